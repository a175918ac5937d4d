"""Options of a recipe side by side: settings x seeds in about equal time, on all test sets.

    python data_prep/openmoji.py --out data/emoji
    python benchmarks/study.py [--settings today two_spread] [--seeds 0 1 2] [--save]

benchmarks/study.yaml names the settings: each is a part of a recipe that is laid over the first
one. A run is `fit` in a process of its own, one thread, into runs/study/SETTING-SEED. What is
finished is kept, and a run that was interrupted goes on: call it again. Recall@1 is measured at the
groups, with fewer query vectors, with the query's vectors summed into one, and with candidates of
fewer components or bits. Means over seeds with 95 % intervals by Student's t; minutes are of CPU
time, all of `fit`.

--save writes benchmarks/results/study-MACHINE.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from loss import RESULTS, machine

from metaembed_pl.budget import Budget
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.files import write_text
from metaembed_pl.late_interaction import maxsim, narrowed
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.ranking import ranking_metrics
from metaembed_pl.training.loss_terms import mean_cosine, rounded

STUDY = Path(__file__).with_suffix(".yaml")
SUMMED = "summed"
FORMS = (
    ("x64", 64, None),
    ("x32", 32, None),
    (" int8", None, 8),
    ("x64 int8", 64, 8),
    (" bits", None, 1),
)
"""How a store may keep candidates: first components, bits of each."""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""95 % quantiles of Student's t for 2, 3, ... 10 seeds."""


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description="Options of a recipe side by side.")
    study = yaml.safe_load(STUDY.read_text())
    known = list(study["settings"])
    parser.add_argument("--settings", nargs="+", default=known, choices=known)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in options.settings}
    for seed in options.seeds:  # a whole seed first: an early stop leaves a table
        for name in options.settings:
            setting = study["settings"][name]
            runs[name].append(run(study, name, setting or {}, seed, options.out))
    print(tables(runs))
    if options.save:
        found = {"machine": machine("cpu"), "torch": torch.__version__, "runs": runs}
        file = RESULTS / f"study-{machine('cpu').replace(' ', '_').replace('/', '_')}.json"
        write_text(file, json.dumps(found, indent=2) + "\n")


def run(
    study: dict[str, Any], name: str, setting: dict[str, Any], seed: int, out: Path
) -> dict[str, Any]:
    """Train and measure a setting with a seed, unless that was done."""
    folder = out / f"{name}-{seed}"
    kept, spent = folder / "study.json", folder / "spent.json"
    if kept.exists():
        return json.loads(kept.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    changes = folder / "setting.yaml"
    write_text(changes, yaml.safe_dump(setting))
    command = [sys.executable, "-m", "metaembed_pl", "fit", "--config", study["recipe"]]
    command += ["--config", str(changes), f"--seed_everything={seed}", f"--data.seed={seed}"]
    command += [f"--run.folder={out}", f"--run.name={folder.name}"]
    command += ["--data.test", json.dumps([{"path": path} for path in study["test"]])]
    if (folder / "checkpoints" / "last.ckpt").exists():
        command += ["--ckpt_path", "last"]
    print(f"{name}, seed {seed} ...", file=sys.stderr)
    before = _cpu_s()
    try:
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    finally:
        so_far = json.loads(spent.read_text()) if spent.exists() else 0.0
        write_text(spent, json.dumps(so_far + _cpu_s() - before))
    found = {
        "setting": name,
        "seed": seed,
        "cpu_min": json.loads(spent.read_text()) / 60,
        "sets": measure(folder / "model", study["test"]),
    }
    write_text(kept, json.dumps(found, indent=2) + "\n")
    return found


def _cpu_s() -> float:
    """CPU time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(folder: Path, tests: list[str]) -> dict[str, dict[str, float]]:
    """Recall@1 of each test set by budget, and how alike the vectors of an item are."""
    model = MetaEmbedder.from_pretrained(folder)
    found = {}
    for path in tests:
        shards = ShardedPairs(path)
        pool = RetrievalSet.from_pairs(shards.name, shards)
        queries = model.encode_query(pool.queries, batch_size=256)
        candidates = model.encode_candidate(pool.candidates, batch_size=256)
        largest = model.groups[-1]
        budgets = {str(group): group for group in model.groups}
        fewer = [group.r_q for group in model.groups if group.r_q < largest.r_q]
        budgets |= {f"{r_q}x{largest.r_c}": Budget(r_q, largest.r_c) for r_q in fewer}
        scores = {
            name: maxsim(queries[:, :r_q], candidates[:, :r_c])
            for name, (r_q, r_c, _) in budgets.items()
        }
        scores[SUMMED] = maxsim(queries.sum(dim=1, keepdim=True), candidates)
        for name, width, bits in FORMS:
            kept = narrowed(candidates, width)
            kept = kept if bits is None else rounded(kept, bits)
            scores[f"{largest}{name}"] = maxsim(narrowed(queries, width), kept)
        values = {
            name: ranking_metrics(of, pool.relevant, [1])["recall@1"].mean().item()
            for name, of in scores.items()
        }
        values["cosine of queries"] = mean_cosine(queries).item()
        values["cosine of candidates"] = mean_cosine(candidates).item()
        found[shards.name] = values
    return found


def tables(runs: dict[str, list[dict[str, Any]]]) -> str:
    """A table for each test set: settings by budgets."""
    first = next(iter(runs.values()))[0]
    parts = []
    for dataset, values in first["sets"].items():
        lines = ["| setting | CPU min | " + " | ".join(values) + " |"]
        lines.append("|---|" + "---:|" * (len(values) + 1))
        for name, of_seeds in runs.items():
            cells = [with_interval([one["cpu_min"] for one in of_seeds], ".1f")]
            for column in values:
                found = [one["sets"][dataset].get(column) for one in of_seeds]
                known = [value for value in found if value is not None]
                cells.append(with_interval(known) if known else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        parts.append(f"{dataset}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def with_interval(values: list[float], form: str = ".3f") -> str:
    """The mean, and half the width of its 95 % interval.

    >>> with_interval([0.5]), with_interval([0.5, 0.6, 0.7])
    ('0.500', '0.600 ± 0.248')
    """
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:{form}}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:{form}} ± {STUDENT[len(values) - 2] * error:{form}}"


if __name__ == "__main__":
    main()
