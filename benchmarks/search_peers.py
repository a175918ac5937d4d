"""Search learned vectors with other libraries and with ours, in one run.

    pip install usearch lancedb fast-plaid maxsim-cpu pylate voyager
    python benchmarks/search_peers.py --scenes scenes --count 60000 [--only usearch] [--save]

All are asked for the ten best of the same scenes (benchmarks/scenes.py) with the same queries for
one and for two things. Recall is against the exact search with all vectors; times are those of
benchmarks/search.py. What is not installed is left out. `--only` with `--save` adds to what was
saved before, so that each can have an environment of its own.

ours        the index, and the plan that calibration chose
usearch     HNSW over all candidate vectors, asked with the sum of the query's; exact re-ranking
lancedb     its multivectors, IVF_PQ with refinement
qdrant edge a named multivector with HNSW, asked with the sum, then with each query vector
fast-plaid  its own index
pylate      its HNSW (Voyager) over all candidate vectors, asked with each query vector; re-ranking
maxsim-cpu  exact scores of all
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import RESULTS, machine
from scenes import load
from search import TOP, of_scenes, recall, timed
from torch import Tensor

from metaembed_pl.late_interaction import maxsim
from metaembed_pl.retrieval import calibration
from metaembed_pl.retrieval.index_build import build
from metaembed_pl.retrieval.store import Store

Search = Callable[[Tensor], list[list[int]]]
HITS = 200
"""Vectors taken from a plain vector index before re-ranking."""


def ours(store: Store, _vectors: Tensor, others: list[Tensor], _folder: Path) -> Any:
    """The chosen plan."""
    index = build(store)
    plan = calibration.calibrate(store, others).best(0.98).plan
    yield plan, index.size_bytes, lambda some: store.search(some, cascade=plan).rows
    every = str(store.groups[-1])
    yield f"exact, {every}", 0, lambda some: store.search(some, every, top=TOP).rows


def usearch(_store: Store, vectors: Tensor, _others: list[Tensor], folder: Path) -> Any:
    """HNSW over all vectors, in int8."""
    from usearch.index import Index  # pyright: ignore

    flat = vectors.float().flatten(0, 1).numpy()
    index = Index(ndim=flat.shape[1], metric="ip", dtype="i8", connectivity=16, expansion_add=64)
    index.add(np.arange(len(flat)), flat, threads=torch.get_num_threads())
    index.save(str(folder / "usearch"))
    size = (folder / "usearch").stat().st_size
    for expansion in (200, 800):
        index.expansion_search = expansion

        def search(some: Tensor) -> list[list[int]]:
            summed = torch.nn.functional.normalize(some.sum(dim=1), dim=-1).numpy()
            found = np.atleast_2d(index.search(summed, HITS).keys)
            return _reranked(some, vectors, found // vectors.shape[1])

        yield f"HNSW16, i8, expansion {expansion}", size, search


def lancedb(_store: Store, vectors: Tensor, _others: list[Tensor], folder: Path) -> Any:
    """Multivectors of LanceDB."""
    import lancedb  # pyright: ignore
    import pyarrow as pa

    num, slots, width = vectors.shape
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.float().flatten().numpy()), width)
    offsets = pa.array(np.arange(0, num * slots + 1, slots, dtype=np.int32))
    table = pa.table({"id": np.arange(num), "vector": pa.ListArray.from_arrays(offsets, values)})
    opened = lancedb.connect(str(folder / "lance")).create_table("scenes", table)
    opened.create_index(metric="cosine", vector_column_name="vector", index_type="IVF_PQ")
    size = sum(f.stat().st_size for f in (folder / "lance").rglob("*") if "_indices" in str(f))
    for nprobes, refine in ((20, 10), (50, 50)):

        def search(some: Tensor, nprobes: int = nprobes, refine: int = refine) -> list[list[int]]:
            return [
                opened.search(query.numpy())
                .nprobes(nprobes)
                .refine_factor(refine)
                .limit(TOP)
                .to_arrow()["id"]
                .to_pylist()
                for query in some
            ]

        yield f"IVF_PQ, nprobes {nprobes}, refine {refine}", size, search


def qdrant_edge(store: Store, _vectors: Tensor, _others: list[Tensor], folder: Path) -> Any:
    """All vectors of an item as one multivector with HNSW, asked with the sum, then with each."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from metaembed_pl.retrieval.qdrant.push import push
    from qdrant_edge_folder import EdgeCollection, open_at  # pyright: ignore

    r_q, r_c, _ = store.groups[-1]
    collection = EdgeCollection(folder / "edge")
    for _ in push(store, collection, counts=(r_c,)):
        pass
    collection.finish()
    collection.close()
    size = sum(file.stat().st_size for file in (folder / "edge").rglob("*") if file.is_file())
    with open_at(folder / "edge") as opened:
        for plan in (f"poolx{r_c}:50,{r_q}x{r_c}:10", f"poolx{r_c}:200,{r_q}x{r_c}:10"):

            def search(some: Tensor, plan: str = plan) -> list[list[int]]:
                return [list(map(int, ids)) for ids in opened.search(some, cascade=plan).ids]

            yield plan, size, search


def fast_plaid(_store: Store, vectors: Tensor, _others: list[Tensor], folder: Path) -> Any:
    """PLAID."""
    from fast_plaid.search import FastPlaid  # pyright: ignore

    index = FastPlaid(index=str(folder / "plaid"), device="cpu")
    index.create(documents_embeddings=[one.float() for one in vectors])
    size = sum(f.stat().st_size for f in (folder / "plaid").rglob("*") if f.is_file())

    def search(some: Tensor) -> list[list[int]]:
        return [[row for row, _ in one] for one in index.search(some, top_k=TOP)]

    yield "defaults", size, search


def pylate(_store: Store, vectors: Tensor, _others: list[Tensor], folder: Path) -> Any:
    """HNSW of PyLate."""
    from pylate import indexes, retrieve  # pyright: ignore

    width = vectors.shape[2]
    index = indexes.Voyager(str(folder / "pylate"), override=True, embedding_size=width)
    rows = [str(row) for row in range(len(vectors))]
    index.add_documents(rows, list(vectors.float().numpy()))
    size = sum(file.stat().st_size for file in (folder / "pylate").rglob("*") if file.is_file())
    retriever = retrieve.ColBERT(index=index)
    for hits in (100, 400):

        def search(some: Tensor, hits: int = hits) -> list[list[int]]:
            asked = list(some.numpy())
            found = retriever.retrieve(asked, k=TOP, k_token=hits, device="cpu")
            return [[int(hit["id"]) for hit in of_query] for of_query in found]

        yield f"Voyager, k_token {hits}", size, search


def maxsim_cpu(_store: Store, vectors: Tensor, _others: list[Tensor], _folder: Path) -> Any:
    """Exact scores of all candidates."""
    import maxsim_cpu as library  # pyright: ignore

    passages = vectors.float().numpy()

    def search(some: Tensor) -> list[list[int]]:
        scores = [torch.tensor(library.maxsim_scores(one.numpy(), passages)) for one in some]
        return torch.stack(scores).topk(TOP).indices.tolist()

    yield "exact", passages.nbytes, search


ALL = ours, usearch, lancedb, qdrant_edge, fast_plaid, pylate, maxsim_cpu
PEERS = {one.__name__: one for one in ALL}


def _reranked(queries: Tensor, vectors: Tensor, found: np.ndarray) -> list[list[int]]:
    rows = []
    for query, items in zip(queries, found, strict=True):
        some = torch.from_numpy(np.unique(items).astype(np.int64))
        scores = maxsim(query[None], vectors[some].float())[0]
        rows.append(some[scores.topk(min(TOP, len(some))).indices].tolist())
    return rows


def measured(
    name: str, queries: dict[str, Tensor], store: Store, *given: Any
) -> Iterator[dict[str, Any]]:
    """Rows of a peer."""
    started, cpu = time.perf_counter(), time.process_time()
    for what, size, search in PEERS[name](store, *given):
        built = time.perf_counter() - started, time.process_time() - cpu
        row = {"name": name, "what": what, "built_s": built[0], "built_cpu_s": built[1]}
        row |= {"bytes": size, "version": _version(name)}
        for kind in ("one thing", "two things"):
            exact = store.search(queries[kind], str(store.groups[-1]), top=TOP).rows
            spent = timed(search, queries[kind][:20])
            row[kind] = {"recall": recall(search(queries[kind]), exact), **spent}
        yield row


def _version(name: str) -> str:
    package = {"ours": "metaembed_pl", "qdrant_edge": "qdrant-edge-py"}.get(name, name)
    return metadata.version(package)


def save(rows: list[dict[str, Any]], folder: Path, count: int) -> None:
    """Put the rows of a peer in place of those of an earlier run."""
    file = folder / "search-peers.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    others = kept.get("rows", []) if kept.get("items") == count else []
    others = [row for row in others if row["name"] != rows[0]["name"]]
    folder.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine(), "num_threads": torch.get_num_threads(), "items": count}
    file.write_text(json.dumps({**about, "rows": others + rows}, indent=1) + "\n")


def main() -> None:
    """Measure what is installed."""
    parser = argparse.ArgumentParser(description="Other libraries beside ours.")
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60_000)
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where stores are made; removed afterwards")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="another folder for --save")
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    vectors, _ = load(options.scenes, options.count)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        place = Path(folder) / "store"
        store, queries, others, _ = of_scenes(place, options.scenes, options.count)
        for name in options.only:
            try:
                rows = list(measured(name, queries, store, vectors, others, Path(folder)))
                print(*rows, sep="\n", flush=True)
                if options.save:
                    save(rows, options.out, options.count)
            except ImportError as error:
                print(f"{name} is left out: {error}", flush=True)


if __name__ == "__main__":
    main()
