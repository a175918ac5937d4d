"""Time and recall of searches, on vectors learned by a model and on synthetic ones.

    python benchmarks/scenes.py --model M --count 1000000 --out scenes     # learned vectors, once
    python benchmarks/search.py --scenes scenes --counts 60000 200000 1000000 [--save]
    python benchmarks/search.py --scenes scenes --halves 10000000 --counts  # four vectors an item
    python benchmarks/search.py --made 1000000x64                           # made ones, diverse

Learned: scenes of nine training pictures, asked with names of one, two and three pictures. Made: 64
vectors an item, 16 a query, of 500 topics; a query's vectors see different vectors of an item, so
pooling it loses most, and recall there says how plans do where queries are diverse.

For each kind of query: the plan that calibration chose, with no hand setting, and some plans that
were fixed by hand. Recall is the share of the ten best of the exact search with all vectors;
*right* the share of queries of whose ten results one shows all that was asked for. A query is
searched for by itself, in three rounds of all queries, and its fastest counts: `ms` is the median
over the queries by the clock, `cpu` by the processor's time, which other jobs disturb less;
`faster` compares the latter with the exact search's in the same run. The store calibrates itself by
queries that are asked nowhere else: names alone, and joined by two and by three.
"""

import argparse
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _results import RESULTS, machine, save
from scenes import load
from torch import Tensor
from torch.nn.functional import normalize

from metaembed_pl.budget import PAPER_GROUPS, parse_groups
from metaembed_pl.retrieval import calibration
from metaembed_pl.retrieval.index_build import build
from metaembed_pl.retrieval.mining import stages_for
from metaembed_pl.retrieval.store import Store

SCENE_GROUPS = ["1x1", "2x4", "4x8", "8x16"]
TOP, DEPTH, NUM_ASKED = 10, 100, 64
HALF = 2
"""Slots that a scene gives to an item made of two."""
ROUNDS, SECONDS = 3, 3
"""Of timing: times that a query is searched for, and what a plan may take in all."""
NUM_TOPICS, BLOCK = 500, 2000
SHARES = (0.5, 0.05, 0.005, 0.0005)
"""Of the items that filters leave."""

SCANNED_AT_MOST = 200_000
"""Items of a store that is also searched with filters, and by plans that score every item."""

Judge = Callable[[str, list[list[int]]], float]
"""The share of a kind of queries whose results are right."""
Asked = tuple[Store, dict[str, Tensor], list[Tensor], Judge | None]
"""A store, queries by kind, others to calibrate with, and the judge, if the contents are known."""


def of_scenes(folder: Path, scenes: Path, count: int) -> Asked:
    """A store of learned vectors, with a number in [0, 1) to filter by, and its queries."""
    vectors, _ = load(scenes, count)
    groups = parse_groups(SCENE_GROUPS)
    store = Store.create(folder, groups, vectors.shape[2], "scenes")
    draw = np.random.default_rng(0)
    with store.writing():
        for start in range(0, count, BLOCK):
            some = vectors[start : start + BLOCK].float()
            metadata = [{"share": share} for share in draw.random(len(some)).tolist()]
            store.add([str(start + i) for i in range(len(some))], some, metadata)
    return store, *scene_queries(scenes)


def of_halves(folder: Path, scenes: Path, count: int) -> Asked:
    """More items than were encoded, of four learned vectors: two slots each of two scenes."""
    groups = parse_groups(["1x1", f"8x{2 * HALF}"])
    vectors, _ = load(scenes)
    num_scenes, slots, width = vectors.shape
    store = Store.create(folder, groups, width, "halves of scenes")
    with store.writing():
        for start in range(0, count, BLOCK):
            items = torch.arange(start, min(start + BLOCK, count))
            round_, first = items // num_scenes, items % num_scenes
            other = (first + 1 + 7919 * (round_ + 1)) % num_scenes
            halves = [
                vectors[
                    scene[:, None], (HALF * (round_ + at))[:, None] % slots + torch.arange(HALF)
                ]
                for at, scene in enumerate((first, other))
            ]
            store.add([str(i) for i in items.tolist()], torch.cat(halves, dim=1).float())
    queries, others, _ = scene_queries(scenes)
    return store, queries, others, None


def of_topics(folder: Path, count: int, width: int) -> Asked:
    """A store of made items, queries for some of them, and others to calibrate with."""
    draw = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=draw)
    (r_q, r_c, _), topics = PAPER_GROUPS[-1], normal(NUM_TOPICS, width)
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
    return store, {"one item": queries[:NUM_ASKED]}, [queries[NUM_ASKED:]], None


def scene_queries(scenes: Path) -> tuple[dict[str, Tensor], list[Tensor], Judge]:
    """Queries for one, two and three things, others to calibrate with, and the judge of results."""
    kept = np.load(scenes / "queries.npz")
    queries, asked, others = {}, {}, []
    for count, name in ((1, "one thing"), (2, "two things"), (3, "three things")):
        vectors = torch.from_numpy(kept[f"vectors_{count}"]).float()
        queries[name], asked[name] = vectors[:NUM_ASKED], kept[f"asked_{count}"][:NUM_ASKED]
        others.append(vectors[-calibration.NUM_QUERIES :])
    tiles = np.load(scenes / "tiles.npy")

    def right(kind: str, found: list[list[int]]) -> float:
        """The share of queries that found a scene with all that they ask for."""
        rows = zip(found, asked[kind].tolist(), strict=True)
        return float(np.mean([any(set(some) <= set(tiles[r]) for r in of) for of, some in rows]))

    return queries, others, right


class PeakMemory(threading.Thread):
    """Most memory of this process meanwhile, without the pages of mapped files, which are lent."""

    def __enter__(self) -> "PeakMemory":
        self.gigabytes, self.ended = 0.0, threading.Event()
        self.start()
        return self

    def run(self) -> None:
        """Look twenty times a second."""
        while not self.ended.wait(0.05):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.gigabytes = max(self.gigabytes, int(line.split()[1]) / 2**20)

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()


def timed(search: Callable[[Tensor], Any], queries: Tensor) -> dict[str, float]:
    """Milliseconds of a query by itself, by the clock and by the processor's time."""
    _, once = _seconds(search, queries[:1])
    some = queries[: max(3, int(SECONDS / ROUNDS / once))].split(1)
    rounds = [[_seconds(search, query) for query in some] for _ in range(ROUNDS)]
    ms, cpu_ms = (1e3 * np.median(np.array(rounds).min(axis=0), axis=0)).tolist()
    return {"ms": ms, "cpu_ms": cpu_ms}


def _seconds(search: Callable[[Tensor], Any], query: Tensor) -> tuple[float, float]:
    clock, cpu = time.perf_counter(), time.process_time()
    search(query)
    return time.perf_counter() - clock, time.process_time() - cpu


def plans(store: Store, measured: calibration.Calibration) -> Iterator[tuple[str, str]]:
    """Names and plans: what calibration chose, and what is fixed by hand."""
    for target in (0.98, 0.95, 0.99):
        yield f"chosen for {target}", measured.best(target).plan
    if len(store) > SCANNED_AT_MOST:
        return
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


def run(
    store: Store,
    queries: dict[str, Tensor],
    others: list[Tensor],
    judge: Judge | None,
    codes: str,
) -> dict[str, Any]:
    """Build, calibrate and search; all rows, printed."""
    head = built(store, codes)
    measured, spent = calibrated(store, others)
    head |= spent
    print("\n" + _listed(head), flush=True)
    with PeakMemory() as memory:
        rows = list(searched(store, queries, measured, judge))
    head["searched_gb"] = memory.gigabytes
    print(f"  memory while searching: {memory.gigabytes:.2f} GB")
    found = {**head, "rows": rows, "filters": filtered(store, queries, measured)}
    return found | {"mining": mined(store, next(iter(queries.values())))}


def built(store: Store, codes: str) -> dict[str, Any]:
    """Make the index: what it takes."""
    started, cpu = time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        index = build(store, codes)
    built_s, built_cpu_s = time.perf_counter() - started, time.process_time() - cpu
    opened = time.perf_counter()
    Store.open(store.folder).index()
    opened_ms = 1e3 * (time.perf_counter() - opened)
    size = sum(file.stat().st_size for file in store.folder.rglob("*") if file.is_file())
    return {
        "items": len(store),
        "vectors": f"{store.groups[-1].r_c} x {store.width}",
        "lists": index.num_lists,
        "codes": codes,
        "index_bytes": index.size_bytes,
        "store_bytes": size - index.size_bytes,
        "built_s": built_s,
        "built_cpu_s": built_cpu_s,
        "built_gb": memory.gigabytes,
        "opened_ms": opened_ms,
    }


def calibrated(
    store: Store, others: list[Tensor]
) -> tuple[calibration.Calibration, dict[str, Any]]:
    """Measure plans on the store: that, and what it takes."""
    started, cpu = time.perf_counter(), time.process_time()
    measured = calibration.calibrate(store, others)
    took = time.perf_counter() - started, time.process_time() - cpu
    spent = {"calibrated_s": took[0], "calibrated_cpu_s": took[1], "measured_with": measured.used}
    return measured, spent


def searched(
    store: Store,
    queries: dict[str, Tensor],
    measured: calibration.Calibration,
    judge: Judge | None,
) -> Iterator[dict[str, Any]]:
    """What plans cost and find for each kind of query, printed."""
    last = str(store.groups[-1])
    line = "{:14} {:26} {:34} {:>8} {:>8} {:>7} {:>6} {:>8}"
    print(line.format("queries", "", "plan", "ms", "cpu ms", "recall", "right", "faster"))
    for kind, asked in queries.items():
        exact = store.search(asked, last, top=TOP).rows
        base = timed(lambda query: store.search(query, last, top=TOP), asked)
        known = {last: (exact, base)}
        for name, plan in [("exact", last), *plans(store, measured)]:
            if plan not in known:
                how = _how(plan)
                spent = timed(lambda query, how=how: store.search(query, **how), asked)
                known[plan] = store.search(asked, **how).rows, spent
            found, spent = known[plan]
            row = {
                "queries": kind,
                "what": name,
                "plan": plan,
                **spent,
                "recall": recall(found, exact),
                "right": judge(kind, found) if judge else None,
                "faster": base["cpu_ms"] / spent["cpu_ms"],
            }
            times = f"{row['ms']:.2f}", f"{row['cpu_ms']:.2f}"
            numbers = *times, f"{row['recall']:.3f}", f"{row['right']:.3f}" if judge else ""
            print(line.format(kind, name, plan, *numbers, f"{row['faster']:.0f}x"), flush=True)
            yield row


def _how(plan: str) -> dict[str, Any]:
    return {"cascade": plan} if ":" in plan else {"budget": plan, "top": TOP}


def filtered(
    store: Store, queries: dict[str, Tensor], measured: calibration.Calibration
) -> list[dict[str, Any]]:
    """The chosen plan under filters."""
    if "share" not in store.metadata([0])[0] or len(store) > SCANNED_AT_MOST:
        return []
    rows, last = [], str(store.groups[-1])
    how = _how(measured.best(0.98).plan)
    for share in SHARES:
        where = f"share<{share}"
        started = time.process_time()
        store.search(next(iter(queries.values()))[:1], **how, where=where)
        first_ms = 1e3 * (time.process_time() - started)
        for kind, asked in queries.items():
            exactly: dict[str, Any] = {"budget": last, "top": TOP, "where": where}
            exact = store.search(asked, **exactly).rows
            hits = store.search(asked, **how, where=where)
            spent = timed(lambda query, where=where: store.search(query, **how, where=where), asked)
            base = timed(lambda query, exactly=exactly: store.search(query, **exactly), asked)
            row = {
                "share": share,
                "queries": kind,
                "plan": ",".join(map(str, hits.stages)),
                "recall": recall(hits.rows, exact),
                **spent,
                "exact_cpu_ms": base["cpu_ms"],
                "first_ms": first_ms,
            }
            rows.append(row)
            print("  " + _listed(row), flush=True)
    return rows


def mined(store: Store, queries: Tensor) -> dict[str, Any]:
    """Candidates of hard negatives: how they are ranked, what that finds, minutes for 100,000."""
    started = time.process_time()
    stages, _ = stages_for(store, queries[: NUM_ASKED // 2], DEPTH, 0.95)
    chosen_s = time.process_time() - started
    others = queries[NUM_ASKED // 2 :]
    exact = store.search(others, str(store.groups[-1]), top=DEPTH).rows
    started = time.process_time()
    found = store.search(others, cascade=stages).rows
    seconds = (time.process_time() - started) / len(others)
    row = {
        "plan": ",".join(map(str, stages)),
        "chosen_cpu_s": chosen_s,
        "recall": recall(found, exact),
        "minutes": 100_000 * seconds / 60,
    }
    print("  mining: " + _listed(row))
    return row


def growth(shapes: list[dict[str, Any]]) -> str:
    """How the time of a chosen plan grows with the items: the exponent of a fit."""
    found = []
    for kind in dict.fromkeys(row["queries"] for shape in shapes for row in shape["rows"]):
        points = [
            (math.log(shape["items"]), math.log(row["cpu_ms"]))
            for shape in shapes
            for row in shape["rows"]
            if row["queries"] == kind and row["what"] == "chosen for 0.98"
        ]
        sizes, times = np.array(points).T
        slope = np.polyfit(sizes, times, 1)[0]
        found.append(f"{kind}: items^{slope:.2f}")
    return ", ".join(found)


def _listed(row: dict[str, Any]) -> str:
    shown = {k: f"{value:.4g}" if isinstance(value, float) else value for k, value in row.items()}
    return ", ".join(f"{key} {value}" for key, value in shown.items())


def _shape(text: str) -> tuple[int, int]:
    count, width = map(int, text.split("x"))
    if count % BLOCK:
        raise argparse.ArgumentTypeError(f"items come by {BLOCK}, got {count}")
    return count, width


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure all shapes, print tables, save them if asked to."""
    parser = argparse.ArgumentParser(description="What searches cost and find.")
    parser.add_argument("--scenes", type=Path, help="folder that benchmarks/scenes.py filled")
    parser.add_argument("--counts", type=int, nargs="*", default=[60_000], help="scenes of it")
    parser.add_argument("--halves", type=int, nargs="+", default=[], help="items of two scenes")
    parser.add_argument("--made", type=_shape, nargs="+", default=[], metavar="ITEMSxWIDTH")
    parser.add_argument("--codes", default="sq8", help="of the index: sq8 or rabitq")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--out", type=Path, default=RESULTS, help="another folder for --save")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--name", default="search", help="beginning of the result's file name")
    parser.add_argument("--folder", type=Path, help="where stores are made; removed afterwards")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.num_threads)
    import faiss

    faiss.omp_set_num_threads(options.num_threads)
    name = machine("cpu")
    print(f"{name}, {options.num_threads} threads, torch {torch.__version__}", flush=True)
    result: dict[str, Any] = {"machine": name, "num_threads": options.num_threads}
    result |= {"torch": torch.__version__, "faiss": faiss.__version__}
    result |= {"load": os.getloadavg()[0], "learned": [], "halves": [], "made": []}
    jobs = [("learned", of_scenes, (options.scenes, n)) for n in options.counts if options.scenes]
    jobs += [("halves", of_halves, (options.scenes, n)) for n in options.halves]
    jobs += [("made", of_topics, shape) for shape in options.made]
    for group, make, given in jobs:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            result[group].append(run(*make(Path(folder) / "store", *given), options.codes))
        if group == "learned" and len(result[group]) > 1:
            result["growth"] = growth(result[group])
            print(f"\ntime of the chosen plan grows with {result['growth']}")
        if options.save:  # after each shape: the largest take long
            save(options.name, result, options.out)
    return result


if __name__ == "__main__":
    main()
