"""What a search costs and finds: on vectors that a model learned, and on made ones.

    python benchmarks/scenes.py --model M --count 1000000 --out scenes     # learned vectors, once
    python benchmarks/search.py --scenes scenes --counts 60000 200000 1000000 [--save]
    python benchmarks/search.py --made 100000x128                           # made ones, diverse

Learned: scenes of nine training pictures, asked with names of one, two and three pictures. Made: 64
vectors an item, 16 a query, of 500 topics; a query's vectors see different vectors of an item, so
pooling it loses most, and recall there says how plans do where queries are diverse.

For each kind of query: the plan that calibration chose, with no hand setting, and some plans that
were fixed by hand. Recall is the share of the ten best of the exact search with all vectors;
*right* the share of queries of whose ten results one shows all that was asked for. `ms` is the
median of one query at a time; `cpu` the processor's time for it, which other jobs on the machine
disturb less; `faster` compares the latter with the exact search's in the same run. The store
calibrates itself by queries for one thing that are asked nowhere else.
"""

import argparse
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loss import RESULTS, machine
from scenes import load
from torch import Tensor
from torch.nn.functional import normalize

from metaembed_pl.budget import PAPER_GROUPS, parse_groups
from metaembed_pl.retrieval import calibration
from metaembed_pl.retrieval.index_build import build
from metaembed_pl.retrieval.store import Store

SCENE_GROUPS = ["1x1", "2x4", "4x8", "8x16"]
TOP, NUM_ASKED, NUM_EXACT = 10, 64, 5
NUM_TOPICS, BLOCK = 500, 2000
SHARES = (0.5, 0.05, 0.005, 0.0005)
"""Of the items that filters leave."""

Queries = dict[str, Tensor]


def of_scenes(folder: Path, scenes: Path, count: int) -> Store:
    """A store of learned vectors, with a number in [0, 1) to filter by."""
    vectors, _ = load(scenes, count)
    groups = parse_groups(SCENE_GROUPS)
    store = Store.create(folder, groups, vectors.shape[2], "scenes")
    draw = np.random.default_rng(0)
    with store.writing():
        for start in range(0, count, BLOCK):
            some = vectors[start : start + BLOCK].float()
            metadata = [{"share": share} for share in draw.random(len(some)).tolist()]
            store.add([str(start + i) for i in range(len(some))], some, metadata)
    return store


def of_topics(folder: Path, count: int, width: int) -> tuple[Store, Queries]:
    """A store of made items, and queries for some of them."""
    draw = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=draw)
    (r_q, r_c), topics = PAPER_GROUPS[-1], normal(NUM_TOPICS, width)
    noise = torch.linspace(0.5, 1.1, r_c)[:, None]
    store = Store.create(folder, PAPER_GROUPS, width, "made")
    with store.writing():
        for start in range(0, count, BLOCK):
            which = torch.randint(NUM_TOPICS, (BLOCK,), generator=draw)
            meant = normalize(topics[which] + 0.8 * normal(BLOCK, width), dim=-1)
            detail = normalize(normal(BLOCK, r_c, width), dim=-1)
            vectors = normalize(meant[:, None] + noise * detail, dim=-1)
            store.add([str(i) for i in range(start, start + BLOCK)], vectors)
    num_queries = NUM_ASKED + calibration.NUM_QUERIES
    asked = store.vectors(torch.linspace(0, count - 1, num_queries).long().tolist())
    order = torch.rand(num_queries, r_c, generator=draw).argsort(dim=1)[:, :r_q, None]
    seen = asked.gather(1, order.expand(-1, -1, width))
    queries = normalize(seen + 0.8 * normalize(normal(*seen.shape), dim=-1), dim=-1)
    return store, {"asked": queries[:NUM_ASKED], "calibration": queries[NUM_ASKED:]}


def scene_queries(scenes: Path) -> tuple[Queries, dict[str, np.ndarray]]:
    """Queries for one, two and three things, and which pictures each asks for."""
    kept = np.load(scenes / "queries.npz")
    queries, asked = {}, {}
    for count, name in ((1, "one thing"), (2, "two things"), (3, "three things")):
        vectors = torch.from_numpy(kept[f"vectors_{count}"]).float()
        queries[name], asked[name] = vectors[:NUM_ASKED], kept[f"asked_{count}"][:NUM_ASKED]
        if count == 1:
            queries["calibration"] = vectors[-calibration.NUM_QUERIES :]
    return queries, asked


class Timed:
    """Seconds of a query by itself: of the clock (their median), and of the processor."""

    def __init__(self, search: Callable[[Tensor], Any], queries: Tensor):
        search(queries[:1])
        clock, started = [], time.process_time()
        for query in queries.split(1):
            before = time.perf_counter()
            search(query)
            clock.append(time.perf_counter() - before)
        self.ms = 1e3 * float(np.median(clock))
        self.cpu = 1e3 * (time.process_time() - started) / len(queries)


def plans(store: Store, measured: calibration.Calibration) -> Iterator[tuple[str, str]]:
    """Names and plans: what calibration chose, and what is fixed by hand."""
    for target in (0.98, 0.95, 0.99):
        yield f"chosen for {target}", measured.best(target).plan
    yield "chosen without an index", measured.best(0.98, with_index=False).plan
    last = store.groups[-1]
    middle = store.groups[len(store.groups) // 2]
    yield "cascade", f"{last.r_q}x1:2000,{middle}:200,{last}:10"
    yield "pooled", f"poolx{last.r_c}:50,{last}:10"


def recall(found: list[list[int]], exact: list[list[int]]) -> float:
    """Of the ten best."""
    return float(
        np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, exact, strict=True)])
    )


def right(found: list[list[int]], asked: np.ndarray, tiles: np.ndarray) -> float:
    """Queries that found a scene with all that was asked for."""
    shows = [
        any(set(some) <= set(tiles[row]) for row in rows)
        for rows, some in zip(found, asked.tolist(), strict=True)
    ]
    return float(np.mean(shows))


def run(
    store: Store,
    queries: Queries,
    judge: Callable[[str, list[list[int]]], float | None],
    codes: str,
) -> dict[str, Any]:
    """Build, calibrate and search; all rows, printed."""
    last = str(store.groups[-1])
    started, cpu = time.perf_counter(), time.process_time()
    index = build(store, codes)
    built_s, built_cpu_s = time.perf_counter() - started, time.process_time() - cpu
    started = time.perf_counter()
    kinds = calibration.for_several(queries.pop("calibration"), "queries")
    if "asked" in queries:  # made ones ask for one item each
        kinds = calibration.Kinds(kinds.vectors[:1], "queries")
    measured = calibration.calibrate_kinds(store, kinds)
    calibrated_s = time.perf_counter() - started
    opened = time.perf_counter()
    again = Store.open(store.folder)
    again.index()
    opened_ms = 1e3 * (time.perf_counter() - opened)
    size = sum(file.stat().st_size for file in store.folder.rglob("*") if file.is_file())
    head = {
        "items": len(store),
        "vectors": f"{store.groups[-1].r_c} x {store.width}",
        "lists": index.num_lists,
        "codes": codes,
        "index_bytes": index.size_bytes,
        "store_bytes": size - index.size_bytes,
        "built_s": built_s,
        "built_cpu_s": built_cpu_s,
        "calibrated_s": calibrated_s,
        "opened_ms": opened_ms,
        "measured_with": measured.used,
    }
    print("\n" + ", ".join(f"{key} {_short(value)}" for key, value in head.items()), flush=True)
    line = "{:14} {:26} {:34} {:>8} {:>8} {:>7} {:>6} {:>8}"
    print(line.format("queries", "", "plan", "ms", "cpu ms", "recall", "right", "faster"))
    rows = []
    for kind, asked in queries.items():
        exact = store.search(asked, last, top=TOP).rows
        base = Timed(lambda query: store.search(query, last, top=TOP), asked[:NUM_EXACT])
        for name, plan in [("exact", last), *plans(store, measured)]:
            how: dict[str, Any] = {"cascade": plan} if ":" in plan else {"budget": plan, "top": TOP}
            found = exact if plan == last else store.search(asked, **how).rows
            spent = (
                base
                if plan == last
                else Timed(lambda query, how=how: store.search(query, **how), asked)
            )
            row = {
                "queries": kind,
                "what": name,
                "plan": plan,
                "ms": spent.ms,
                "cpu_ms": spent.cpu,
                "recall": recall(found, exact),
                "right": judge(kind, found),
                "faster": base.cpu / spent.cpu,
            }
            rows.append(row)
            told = "" if row["right"] is None else f"{row['right']:.3f}"
            numbers = f"{spent.ms:.2f}", f"{spent.cpu:.2f}", f"{row['recall']:.3f}", told
            print(line.format(kind, name, plan, *numbers, f"{row['faster']:.0f}x"), flush=True)
    return {**head, "rows": rows, "filters": filtered(store, queries, measured)}


def filtered(
    store: Store, queries: Queries, measured: calibration.Calibration
) -> list[dict[str, Any]]:
    """The chosen plan under filters."""
    if "share" not in store.metadata([0])[0]:
        return []
    rows, last = [], str(store.groups[-1])
    plan = measured.best(0.98).plan
    how: dict[str, Any] = {"cascade": plan} if ":" in plan else {"budget": plan, "top": TOP}
    for share in SHARES:
        where = f"share<{share}"
        started = time.process_time()
        store.search(next(iter(queries.values()))[:1], **how, where=where)
        first_ms = 1e3 * (time.process_time() - started)
        for kind, asked in queries.items():
            exact = store.search(asked, last, top=TOP, where=where).rows
            hits = store.search(asked, **how, where=where)
            spent = Timed(
                lambda query, where=where: store.search(query, **how, where=where), asked[:32]
            )
            base = Timed(
                lambda query, where=where: store.search(query, last, top=TOP, where=where),
                asked[:3],
            )
            row = {
                "share": share,
                "queries": kind,
                "plan": ",".join(map(str, hits.stages)),
                "recall": recall(hits.rows, exact),
                "ms": spent.ms,
                "cpu_ms": spent.cpu,
                "exact_cpu_ms": base.cpu,
                "first_ms": first_ms,
            }
            rows.append(row)
            print(
                "  " + ", ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True
            )
    return rows


def growth(shapes: list[dict[str, Any]]) -> str:
    """How the time of a chosen plan grows with the items: the exponent of a fit."""
    told = []
    for kind in dict.fromkeys(row["queries"] for shape in shapes for row in shape["rows"]):
        points = [
            (math.log(shape["items"]), math.log(row["cpu_ms"]))
            for shape in shapes
            for row in shape["rows"]
            if row["queries"] == kind and row["what"] == "chosen for 0.98"
        ]
        slope = np.polyfit(*zip(*points, strict=True), 1)[0]
        told.append(f"{kind}: items^{slope:.2f}")
    return ", ".join(told)


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}"


def _shape(text: str) -> tuple[int, int]:
    count, width = map(int, text.split("x"))
    if count % BLOCK:
        raise argparse.ArgumentTypeError(f"items come by {BLOCK}, got {count}")
    return count, width


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure all shapes, print tables, save them if asked to."""
    parser = argparse.ArgumentParser(description="What searches cost and find.")
    parser.add_argument("--scenes", type=Path, help="folder that benchmarks/scenes.py filled")
    parser.add_argument("--counts", type=int, nargs="+", default=[60_000], help="scenes of it")
    parser.add_argument("--made", type=_shape, nargs="+", default=[], metavar="ITEMSxWIDTH")
    parser.add_argument("--codes", default="sq8", help="of the index: sq8 or rabitq")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="another folder for --save")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where stores are made; removed afterwards")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.num_threads)
    import faiss

    faiss.omp_set_num_threads(options.num_threads)
    name = machine("cpu")
    print(f"{name}, {options.num_threads} threads, torch {torch.__version__}", flush=True)
    result: dict[str, Any] = {"machine": name, "num_threads": options.num_threads}
    result |= {"torch": torch.__version__, "learned": [], "made": []}
    file = options.out / f"search-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    for count in options.counts if options.scenes else []:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            store = of_scenes(Path(folder) / "store", options.scenes, count)
            queries, asked = scene_queries(options.scenes)
            tiles = np.load(options.scenes / "tiles.npy")
            judge = lambda kind, found: right(found, asked[kind], tiles)  # noqa: E731, B023
            result["learned"].append(run(store, queries, judge, options.codes))
    if len(result["learned"]) > 1:
        result["growth"] = growth(result["learned"])
        print(f"\ntime of the chosen plan grows with {result['growth']}")
    for count, width in options.made:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            store, queries = of_topics(Path(folder) / "store", count, width)
            result["made"].append(run(store, queries, lambda _kind, _found: None, options.codes))
    if options.save:
        options.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
