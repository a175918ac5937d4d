"""Training data: pairs prepared per second, compared with colpali-engine, and memory over time.

    python benchmarks/loading.py [--save]                    # some minutes
    python benchmarks/loading.py --memory 1000000 [--save]   # a million synthetic pairs, minutes

A batch is 8 queries in words, their 8 positives and 8 hard negatives in pictures: read, decoded,
resized and cut into patches as Qwen2.5-VL takes them, with at most 802,816 pixels a picture. Ours
reads shards by the plan. Theirs is colpali-engine's dataset, collator and ColQwen2.5 processor over
a Hugging Face `datasets` folder (pip install datasets; pip install --no-deps colpali-engine). Both
have the same pictures and tokenizer; theirs has transformers' image processor on Pillow, ours the
one in model/image_processors.py, whose patches are equal to the last bit. Each is measured in a
process of its own, on one core and on two (a worker process a core).

The memory is that of reading all pairs of one source by the plan, in this process: texts alone, so
that what grows would be ours.
"""

import argparse
import io
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from _peers import colqwen_processor
from _results import machine, measured_alone, resident_bytes, save
from matplotlib import cbook
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler

from metaembed_pl.data.batches import TrainingBatches
from metaembed_pl.data.plan import Plan, PlannedSource
from metaembed_pl.data.shards import ShardedPairs, ShardWriter
from metaembed_pl.item import Item, Pair
from metaembed_pl.model.backbone import train_tokenizer
from metaembed_pl.model.family import family_of
from metaembed_pl.model.processing import Processing

BATCH, NUM_PAIRS = 8, 96
SHARD = 10_000  # pairs of a shard of texts
MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 802_816
SIZES = {"photo": (640, 480), "page": (1240, 1754)}
CONFIG: dict[str, Any] = {"model_type": "qwen2_5_vl", "vision_config": {"patch_size": 14}}
QUERY = "which of these pictures shows the bay before the storm came"
MIN_S = 8.0
"""Batches are timed for about this long."""


def picture(size: tuple[int, int], i: int) -> bytes:
    """A part of the photograph that comes with matplotlib, as JPEG."""
    photo = Image.open(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")
    x, y = 7 * i % 200, 5 * i % 200
    part = photo.crop((x, y, x + photo.width - 200, y + photo.height - 200))
    buffer = io.BytesIO()
    part.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def prepare(folder: Path) -> None:
    """The same pairs for both forms, at every size."""
    from datasets import Dataset, Features, Value
    from datasets import Image as Picture

    features = Features({"query": Value("string"), "positive": Picture(), "negative": Picture()})
    for name, size in SIZES.items():
        pictures = [picture(size, i) for i in range(NUM_PAIRS + 1)]
        with ShardWriter(folder / "ours" / name, name, pairs_per_shard=32) as writer:
            for i in range(NUM_PAIRS):
                answer, other = Item(image=pictures[i]), Item(image=pictures[i + 1])
                writer.write(Pair(str(i), Item(f"{QUERY} {i}"), answer, (other,)))
        columns = {
            "query": [f"{QUERY} {i}" for i in range(NUM_PAIRS)],
            "positive": [{"bytes": content, "path": None} for content in pictures[:-1]],
            "negative": [{"bytes": content, "path": None} for content in pictures[1:]],
        }
        dataset = Dataset.from_dict(columns, features=features)
        dataset.save_to_disk(folder / "theirs" / name)


def parts() -> tuple[Any, Any]:
    """The tokenizer and the image processor of both forms."""
    family = family_of("qwen2_5_vl")
    return (
        train_tokenizer([QUERY] * 8, 400, family),
        family.image_processor(CONFIG, MIN_PIXELS, MAX_PIXELS),
    )


def ours(folder: Path, num_workers: int) -> Iterable[Any]:
    """Batches by the plan."""
    tokenizer, image_processor = parts()
    processing = Processing(family_of("qwen2_5_vl"), tokenizer, image_processor)
    process = processing.with_slots({"query": 16, "candidate": 64})
    pairs = ShardedPairs(folder)
    plan = Plan([PlannedSource("s", tuple(pairs.shard_sizes))], BATCH)
    batches = TrainingBatches([pairs], [1], plan, process)
    batches.last = 10**6
    return DataLoader(batches, batch_size=None, num_workers=num_workers)


def theirs(folder: Path, num_workers: int) -> Iterable[Any]:
    """Batches of colpali-engine's collator."""
    processor = colqwen_processor(*parts())
    from colpali_engine.collators.visual_retriever_collator import (  # pyright: ignore
        VisualRetrieverCollator,
    )
    from colpali_engine.data.dataset import ColPaliEngineDataset  # pyright: ignore
    from datasets import load_from_disk

    loaded = ColPaliEngineDataset(load_from_disk(folder), None, "query", "positive", "negative")
    # As shuffle=True, but without an end, at which the workers would start anew.
    sampler = RandomSampler(loaded, replacement=True, num_samples=10**6)
    collate = VisualRetrieverCollator(processor)
    return DataLoader(loaded, BATCH, sampler=sampler, collate_fn=collate, num_workers=num_workers)


FORMS: dict[str, Callable[[Path, int], Iterable[Any]]] = {"ours": ours, "theirs": theirs}


def measure(form: str, folder: str, num_cores: int) -> dict[str, float]:
    """Pairs a second, by the clock and by the CPU time of this process and its workers."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:num_cores])
    torch.set_num_threads(1)
    batches = iter(FORMS[form](Path(folder), 0 if num_cores == 1 else num_cores))
    for _ in range(2 * num_cores):  # workers start, caches fill
        next(batches)
    start, cpu_start, count = time.perf_counter(), cpu_s(), 0
    while time.perf_counter() - start < MIN_S:
        next(batches)
        count += BATCH
    return {
        "pairs_per_s": count / (time.perf_counter() - start),
        "pairs_per_cpu_s": count / (cpu_s() - cpu_start),
    }


def cpu_s() -> float:
    """CPU time of this process and its workers: what other jobs on the machine do not change."""
    total = time.process_time()
    for worker in multiprocessing.active_children():
        # The name, in brackets, may hold blanks; user and system time stand 11 fields after it.
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def speeds(folder: Path) -> Iterator[dict[str, Any]]:
    """Both forms at every size on one core and two, each in a fresh process."""
    for name, size in SIZES.items():
        for num_cores in (1, 2):
            row: dict[str, Any] = {"pictures": name, "size": size, "cores": num_cores}
            for form in FORMS:
                one = [form, str(folder / form / name), num_cores]
                row[form] = measured_alone(__file__, one)
            for rate in ("pairs_per_s", "pairs_per_cpu_s"):
                row[f"ratio_{rate}"] = row["ours"][rate] / row["theirs"][rate]
            yield row


def memory(num_pairs: int) -> Iterator[dict[str, float]]:
    """Resident memory while all pairs of a source are read by the plan.

    `anonymous` is what this process has of its own; the rest are pages of files, the mapped index
    and libraries, which the system takes back when it needs room.
    """
    with tempfile.TemporaryDirectory() as root:
        synthetic(Path(root) / "s", num_pairs)
        pairs = ShardedPairs(Path(root) / "s")
        plan = Plan([PlannedSource("s", tuple(pairs.shard_sizes))], 64)
        no_tensors = cast(Any, lambda items, side: {})
        batches = TrainingBatches([pairs], [1], plan, no_tensors)
        start = time.perf_counter()
        every = max(1, num_pairs // 64 // 10)
        for step in range(num_pairs // 64):
            batches.load(step)
            if step % every == 0:
                yield {
                    "pairs": 64 * (step + 1),
                    "resident_mb": resident_bytes("VmRSS") / 1e6,
                    "anonymous_mb": resident_bytes("RssAnon") / 1e6,
                    "time_s": time.perf_counter() - start,
                }


def synthetic(folder: Path, num_pairs: int) -> None:
    """Shards of so many pairs of texts: one shard is written, the others are links to it."""
    with ShardWriter(folder, "s", pairs_per_shard=SHARD) as writer:
        for i in range(SHARD):
            negative = Item(f"the storm before the bay came, {i}")
            writer.write(Pair(str(i), Item(f"{QUERY} {i}"), Item(f"answer {i}"), (negative,)))
    manifest = json.loads((folder / "manifest.json").read_text())
    lines, [shard] = (folder / "index.jsonl").read_text(), manifest["shards"]
    count = num_pairs // SHARD
    names = [f"{number:05d}.tar" for number in range(count)]
    for name in names[1:]:
        os.link(folder / names[0], folder / name)
    with (folder / "index.jsonl").open("w") as index:
        index.writelines(lines.replace(f'["{names[0]}"', f'["{name}"') for name in names)
    manifest |= {"num_pairs": SHARD * count, "shards": [{**shard, "file": n} for n in names]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def main() -> None:
    """Measure, print a table, save it if asked to."""
    parser = argparse.ArgumentParser(description="Training data, ready for a model.")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--memory", type=int, metavar="N", help="the memory of reading N pairs")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    name = machine()
    print(f"{name}, torch {torch.__version__}")
    rows: list[dict[str, Any]] = []
    if options.memory:
        for row in memory(options.memory):
            rows.append(row)
            print("  ".join(f"{key} {value:,.1f}" for key, value in row.items()), flush=True)
    else:
        with tempfile.TemporaryDirectory() as root:
            prepare(Path(root))
            head = f"{'ours':>7} {'theirs':>7} {'ratio':>6}"
            print(f"{'':>24}   {'pairs a second':>22}   {'pairs a CPU-second':>22}")
            print(f"{'pictures':>16} {'cores':>7}   {head}   {head}")
            for row in speeds(Path(root)):
                rows.append(row)
                shape = f"{row['pictures']} {row['size'][0]}x{row['size'][1]}"
                rates = [
                    (row["ours"][rate], row["theirs"][rate], row[f"ratio_{rate}"])
                    for rate in ("pairs_per_s", "pairs_per_cpu_s")
                ]
                cells = [f"{ours:>7.1f} {theirs:>7.1f} {by:>6.2f}" for ours, theirs, by in rates]
                print(f"{shape:>16} {row['cores']:>7}   {'   '.join(cells)}", flush=True)
    if options.save:
        kind = "data-memory" if options.memory else "data"
        save(kind, {"machine": name, "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
