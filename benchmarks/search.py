"""What a search costs and finds, at each budget and in a cascade, beside what others search with.

    pip install faiss-cpu maxsim-cpu && pip install --no-deps pylate colpali-engine    # the peers
    python benchmarks/search.py [--save]                      # all sizes: 25 GB of disk
    python benchmarks/search.py --shapes 10000x128            # only one

Candidates have 64 unit vectors, queries 16, groups as in the paper, bf16 in a store on disk. An
item is one of 500 topics plus something of its own; its first vectors tell it with less noise than
its last, as nested training makes them. A query sees 16 vectors of an item, with noise. Recall on
made data says little about yours: `search --budget auto` measures that on your own store.

Prints for each plan the milliseconds of one query and of one among 16, the bytes it reads, and its
recall@10 against the exact search with all vectors; then the same for the peers, which hold float32
in memory:

faiss     flat, or HNSW, over first vectors, asked with the sum of the query's; 2000 re-ranked with
          all vectors
pylate, colpali-engine, maxsim-cpu
          their exact scores of all candidates

The peers are left out where all vectors in float32 would take more than 4 GB.

The roof is what this machine reaches in one matrix product of a tile's shape, in float32 and in
bfloat16, which some processors emulate. --save writes benchmarks/results/search-MACHINE.json, and
leaves in it what was measured of other sizes.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _clock import fastest
from _colpali import without_torchvision
from loss import RESULTS, machine
from torch import Tensor
from torch.nn.functional import normalize

from metaembed_pl.budget import PAPER_GROUPS
from metaembed_pl.late_interaction import maxsim
from metaembed_pl.retrieval.scoring import best_columns
from metaembed_pl.retrieval.store import Store

SHAPES = ((10_000, 128), (100_000, 128), (1_000_000, 128), (10_000, 2048))
CASCADE = "16x1:2000,4x8:200,16x64:10"
PLANS = (*(str(group) for group in PAPER_GROUPS), "16x1", CASCADE)
R_Q, R_C = PAPER_GROUPS[-1]
TOP, RERANKED, NUM_QUERIES, BATCH = 10, 2000, 32, 16
NUM_TOPICS, BLOCK = 500, 2000
PEERS_UP_TO = 2**32
"""Bytes of all vectors in float32, which the peers hold in memory."""
AT_A_TIME = 5000
"""Candidates that a peer is given at a time, where it would make all products at once."""
HNSW_LINKS = 32

Search = Callable[[Tensor], Tensor]
"""Queries -> Q x 10 rows."""


def make(folder: Path, count: int, width: int) -> tuple[Store, Tensor]:
    """A store of made items, and queries for some of them."""
    draw = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=draw)
    topics = normal(NUM_TOPICS, width)
    noise = torch.linspace(0.5, 1.1, R_C)[:, None]
    store = Store.create(folder, PAPER_GROUPS, width, "made")
    with store.writing():
        for start in range(0, count, BLOCK):
            which = torch.randint(NUM_TOPICS, (BLOCK,), generator=draw)
            meant = normalize(topics[which] + 0.8 * normal(BLOCK, width), dim=-1)
            detail = normalize(normal(BLOCK, R_C, width), dim=-1)
            vectors = normalize(meant[:, None] + noise * detail, dim=-1)
            store.add([str(i) for i in range(start, start + BLOCK)], vectors)
    asked = store.vectors(torch.linspace(0, count - 1, NUM_QUERIES).long().tolist())
    order = torch.rand(NUM_QUERIES, R_C, generator=draw).argsort(dim=1)[:, :R_Q, None]
    seen = asked.gather(1, order.expand(-1, -1, width))
    return store, normalize(seen + 0.8 * normalize(normal(*seen.shape), dim=-1), dim=-1)


def ours(store: Store) -> Iterator[tuple[str, Search, float]]:
    """Plans: name, search, and bytes read a query."""
    for plan in PLANS:
        how: dict[str, Any] = {"cascade": plan} if ":" in plan else {"budget": plan, "top": TOP}
        probe = torch.ones(1, R_Q, store.width)
        yield (
            plan,
            lambda queries, how=how: torch.tensor(store.search(queries, **how).rows),
            store.search(probe, **how).bytes_read,
        )


def peers(store: Store) -> Iterator[tuple[str, Search]]:
    """Peers that are installed."""
    if 4 * len(store) * R_C * store.width > PEERS_UP_TO:
        return
    vectors = store.vectors()
    for name, peer in (
        ("faiss flat", partial(_faiss, "Flat", vectors)),
        ("faiss HNSW", partial(_faiss, f"HNSW{HNSW_LINKS}", vectors)),
        ("pylate", partial(_pylate, vectors)),
        ("colpali-engine", partial(_colpali, vectors)),
        ("maxsim-cpu", partial(_maxsim_cpu, vectors)),
    ):
        try:
            yield name, peer()
        except ImportError as error:
            print(f"{name} is left out: {error}")


def _faiss(kind: str, vectors: Tensor) -> Search:
    import faiss  # pyright: ignore

    faiss.omp_set_num_threads(torch.get_num_threads())
    first = vectors[:, 0].contiguous()
    index = faiss.index_factory(first.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.add(first.numpy())
    if kind != "Flat":
        index.hnsw.efSearch = RERANKED  # with fewer it cannot find as many

    def search(queries: Tensor) -> Tensor:
        _, found = index.search(queries.sum(dim=1).numpy(), RERANKED)
        rows = torch.from_numpy(found).sort(dim=1).values
        best = []
        for query, of_query in zip(queries, rows, strict=True):
            scores = maxsim(query[None], vectors[of_query])
            best.append(of_query[best_columns(scores, TOP)[1][0]])
        return torch.stack(best)

    return search


def _pylate(vectors: Tensor) -> Search:
    from pylate.scores import colbert_scores  # pyright: ignore

    return lambda queries: _top(
        torch.cat([colbert_scores(queries, some) for some in vectors.split(AT_A_TIME)], dim=1)
    )


def _colpali(vectors: Tensor) -> Search:
    without_torchvision()
    from colpali_engine.utils.processing_utils import (  # pyright: ignore
        BaseVisualRetrieverProcessor,
    )

    score, passages = BaseVisualRetrieverProcessor.score_multi_vector, list(vectors)
    return lambda queries: _top(score(list(queries), passages, device="cpu"))


def _maxsim_cpu(vectors: Tensor) -> Search:
    import maxsim_cpu  # pyright: ignore

    passages = vectors.numpy()
    return lambda queries: _top(
        torch.stack(
            [torch.tensor(maxsim_cpu.maxsim_scores(query.numpy(), passages)) for query in queries]
        )
    )


def _top(scores: Tensor) -> Tensor:
    return best_columns(scores.float(), TOP)[1]


def measure(search: Search, queries: Tensor, exact: Tensor) -> dict[str, float]:
    """Time and recall of a search."""
    found = torch.cat([search(queries[:BATCH]), search(queries[BATCH:])])
    hits = (found.unsqueeze(2) == exact.unsqueeze(1)).any(dim=2)
    return {
        "ms": 1e3 * fastest(lambda: search(queries[:1]), "cpu", 0.5),
        "ms_batched": 1e3 * fastest(lambda: search(queries[:BATCH]), "cpu", 0.5) / BATCH,
        "recall": hits.float().mean().item(),
    }


def roof(width: int) -> dict[str, float]:
    """Operations a second of one matrix product of a tile's shape, by dtype."""
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = torch.ones(4096, width, dtype=dtype), torch.ones(width, 256, dtype=dtype)
        out = torch.empty(4096, 256, dtype=dtype)
        seconds = fastest(partial(torch.mm, left, right, out=out), "cpu", 0.5)
        rates[name] = 2 * 4096 * width * 256 / seconds
    return rates


def run(count: int, width: int, folder: Path) -> dict[str, Any]:
    """All rows of a table, printed."""
    store, queries = make(folder / "store", count, width)
    exact = torch.tensor(store.search(queries, top=TOP).rows)
    print(f"\n{count:,} items of width {width}: {_size(folder) / 1e9:.1f} GB", flush=True)
    line = "{:28} {:>9} {:>9} {:>10} {:>7} {:>8}"
    print(line.format("", "ms", "batched", "MB read", "recall", "faster"))
    rows: list[dict[str, Any]] = []
    plans = [*ours(store), *((name, search, None) for name, search in peers(store))]
    for name, search, read in plans:
        rows.append({"plan": name, "bytes_read": read, **measure(search, queries, exact)})
    all_vectors = next(row for row in rows if row["plan"] == str(PAPER_GROUPS[-1]))
    for row in rows:
        row["faster"] = all_vectors["ms"] / row["ms"]
        read = f"{row['bytes_read'] / 1e6:.1f}" if row["bytes_read"] else ""
        numbers = [f"{row['ms']:.2f}", f"{row['ms_batched']:.2f}", read]
        print(line.format(row["plan"], *numbers, f"{row['recall']:.3f}", f"{row['faster']:.1f}x"))
    found, most = count * R_C * 2 * width * R_Q / all_vectors["ms_batched"] * 1e3, roof(width)
    shares = (f"{found / rate:.0%} of {rate / 1e9:.0f} in {name}" for name, rate in most.items())
    print(f"exact, of {BATCH}: {found / 1e9:.0f} GFLOP/s, {', '.join(shares)}")
    return {"items": count, "width": width, "rows": rows, "flops": found, "roof_flops": most}


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _shape(text: str) -> tuple[int, int]:
    count, width = map(int, text.split("x"))
    if count % BLOCK:
        raise argparse.ArgumentTypeError(f"items come by {BLOCK}, got {count}")
    return count, width


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure all shapes, print tables, save them if asked to."""
    parser = argparse.ArgumentParser(description="Searches by budget, and the peers.")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="another folder for --save")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where stores are made; removed afterwards")
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, metavar="ITEMSxWIDTH")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.num_threads)
    name = machine("cpu")
    print(f"{name}, {options.num_threads} threads, torch {torch.__version__}", flush=True)
    result: dict[str, Any] = {"machine": name, "num_threads": options.num_threads}
    result |= {"torch": torch.__version__, "shapes": []}
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    for count, width in options.shapes:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            result["shapes"].append(run(count, width, Path(folder)))
        if options.save:
            _save(options.out / f"search-{slug}.json", result)
    return result


def _save(file: Path, result: dict[str, Any]) -> None:
    """Write a file, with the other shapes of one that was measured alike."""
    file.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(file.read_text()) if file.exists() else {}
    alike = all(known.get(key) == result[key] for key in result if key != "shapes")
    shapes = {
        (shape["width"], shape["items"]): shape
        for shape in [*(known["shapes"] if alike else []), *result["shapes"]]
    }
    result = {**result, "shapes": [shapes[key] for key in sorted(shapes)]}
    file.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
