"""Options of a recipe side by side: settings x seeds in about equal time, on all test sets.

    python data_prep/openmoji.py --out data/emoji
    python benchmarks/study.py [--settings today two_spread] [--seeds 0 1 2] [--save]
    python benchmarks/study.py --readme --settings today emoji_single emoji_full

benchmarks/study.yaml names the settings: each is a part of a recipe that is laid over the first
one, or over the `recipe` that it names. A run is `fit` in its own process with one thread, in
runs/study/SETTING-SEED. The same command skips finished runs and resumes interrupted ones. Recall@1
is measured at the groups, with fewer query vectors, with the query's vectors summed into one, and
with candidates of fewer components or bits. Means over seeds with 95 % intervals by Student's t;
minutes are of CPU time, all of `fit`. The last table shows candidates with about a quarter of the
bytes, and the share of the full recall that they keep.

--readme prints the README's tables instead, from all finished runs of its settings; it trains the
missing runs of --settings, and nothing without that flag.
--save writes benchmarks/results/study-MACHINE.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from _results import machine, save

from metaembed_pl.budget import Budget
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.files import write_text
from metaembed_pl.late_interaction import maxsim, mean_cosine, narrowed
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.ranking import ranking_metrics
from metaembed_pl.retrieval.projection import Projection
from metaembed_pl.training.loss_terms import rounded

STUDY = Path(__file__).with_suffix(".yaml")
SUMMED, ALIKE = "summed", "cosine of queries"
FORMS = (
    ("x64", 64, None),
    ("x32", 32, None),
    (" int8", None, 8),
    ("x64 int8", 64, 8),
    (" bits", None, 1),
    (" projected to 32", 32, None),
    (" projected to 64, int8", 64, 8),
)
"""How a store may keep candidates: components, the first or projected ones, and bits of each."""
QUARTER = 0.3
"""Of the bytes of full candidates in bf16: int8 has a scale for each vector beside its bytes."""
README = ("today", "emoji_single", "emoji_full")
IN_WORDS = {
    "emoji_t2i": "name -> picture",
    "emoji_i2t": "picture -> name",
    "emoji_edit": "picture + edit -> picture",
    "emoji_scene": "scene, one thing",
    "emoji_scene_two": "scene, two things",
    "emoji_scene_three": "scene, three things (not trained)",
}
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""95 % quantiles of Student's t for 2, 3, ... 10 seeds."""


Runs = dict[str, list[dict[str, Any]]]
"""By setting, what each seed found."""


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description="Options of a recipe side by side.")
    study = yaml.safe_load(STUDY.read_text())
    known = list(study["settings"])
    parser.add_argument("--settings", nargs="+", choices=known, help="default: all but emoji_full")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--measure", action="store_true", help="measure finished runs again")
    parser.add_argument("--readme", action="store_true", help="print the README's tables")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    options = parser.parse_args()
    usual = [] if options.readme else [name for name in known if name != "emoji_full"]
    settings = options.settings or usual
    refuse_missing_data(study, settings)
    if options.measure:
        for folder in {
            options.out / f"{name}-{seed}" for name in settings for seed in options.seeds
        }:
            (folder / "study.json").unlink(missing_ok=True)
    runs: Runs = {name: [] for name in settings}
    for seed in options.seeds:  # a complete seed first: an early stop leaves a table
        for name in settings:
            runs[name].append(run(study, name, seed, options.out))
    if options.readme:
        print(readme({name: finished(options.out, name) for name in README}))
    else:
        print(f"{overview(runs)}\n\n{tables(runs)}\n\n{shares(runs)}")
    if options.save:
        save("study", {"machine": machine("cpu"), "torch": torch.__version__, "runs": runs})


def refuse_missing_data(study: dict[str, Any], settings: list[str]) -> None:
    """Say before any training which data of some settings are not there."""
    wanted: set[str] = set()
    for name in settings:
        setting = study["settings"][name] or {}
        recipe = yaml.safe_load(Path(setting.get("recipe", study["recipe"])).read_text())
        train = setting.get("data", {}).get("train") or recipe["data"]["train"]
        wanted |= {source["path"] for source in train} | set(setting.get("test", study["test"]))
    missing = sorted(path for path in wanted if not Path(path).is_dir())
    if missing:
        raise SystemExit(
            f"data of the study are not there: {', '.join(missing)}; make them with "
            "python data_prep/openmoji.py --out data/emoji"
        )


def run(study: dict[str, Any], name: str, seed: int, out: Path) -> dict[str, Any]:
    """Train and measure a setting with a seed, unless that was done."""
    folder = out / f"{name}-{seed}"
    kept, spent = folder / "study.json", folder / "spent.json"
    if kept.exists():
        return found_in(folder)
    setting = dict(study["settings"][name] or {})
    recipe, tests = setting.pop("recipe", study["recipe"]), setting.pop("test", study["test"])
    more = []
    if teacher := setting.pop("taught_by", None):  # another setting, with the same seed
        run(study, teacher, seed, out)
        more = [f"--model.loss.teacher.model={out / f'{teacher}-{seed}' / 'model'}"]
    folder.mkdir(parents=True, exist_ok=True)
    changes = folder / "setting.yaml"
    write_text(changes, yaml.safe_dump(setting))
    command = [sys.executable, "-m", "metaembed_pl", "fit", "--config", recipe]
    command += ["--config", str(changes), f"--seed_everything={seed}", f"--data.seed={seed}"]
    command += [f"--run.folder={out}", f"--run.name={folder.name}", *more]
    command += ["--data.test", json.dumps([{"path": path} for path in tests])]
    if (folder / "checkpoints" / "last.ckpt").exists():
        command += ["--ckpt_path", "last"]
    print(f"{name}, seed {seed} ...", file=sys.stderr)
    before = _cpu_s()
    try:
        if not (folder / "report" / "metrics.json").exists():  # what `fit` writes last
            subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    finally:
        so_far = json.loads(spent.read_text()) if spent.exists() else 0.0
        write_text(spent, json.dumps(so_far + _cpu_s() - before))
    found = {
        "setting": name,
        "seed": seed,
        "cpu_min": json.loads(spent.read_text()) / 60,
        "sets": measure(folder / "model", tests),
    }
    write_text(kept, json.dumps(found, indent=2) + "\n")
    return found_in(folder)


def found_in(folder: Path) -> dict[str, Any]:
    """What was measured of a run, and the groups and the width of its model."""
    model = json.loads((folder / "model" / "metaembed.json").read_text())
    about = {name: model[name] for name in ("groups", "width")}
    return json.loads((folder / "study.json").read_text()) | about


def finished(out: Path, name: str) -> list[dict[str, Any]]:
    """What was measured of all runs of a setting, by seed."""
    folders = (file.parent for file in out.glob(f"{name}-*/study.json"))
    found = [
        found_in(folder) for folder in folders if folder.name.removeprefix(f"{name}-").isdigit()
    ]
    return sorted(found, key=lambda one: one["seed"])


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
            reduced = partial(narrowed, width=width)
            if width is not None and "projected" in name:
                if width >= model.width:
                    continue
                reduced = Projection.learn([candidates], width)  # as `embed --width` does
            kept = reduced(candidates) if bits is None else rounded(reduced(candidates), bits)
            scores[f"{largest}{name}"] = maxsim(reduced(queries), kept)
        values = {
            name: ranking_metrics(of, pool.relevant, [1])["recall@1"].mean().item()
            for name, of in scores.items()
        }
        values[ALIKE] = mean_cosine(queries).item()
        values["cosine of candidates"] = mean_cosine(candidates).item()
        found[shards.name] = values
    return found


def overview(runs: Runs) -> str:
    """Settings by test sets, at each model's largest group."""
    sets = list(next(iter(runs.values()))[0]["sets"])
    head = ["setting", "seeds", "CPU min", *sets, ALIKE]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, of_seeds in runs.items():
        cells = [str(len(of_seeds)), with_interval([one["cpu_min"] for one in of_seeds], ".1f")]
        cells += [_cell(of_seeds, dataset, of_seeds[0]["groups"][-1]) for dataset in sets]
        lines.append(f"| {name} | {' | '.join(cells)} | {_cell(of_seeds, sets[-1], ALIKE)} |")
    return "\n".join(lines)


def tables(runs: Runs) -> str:
    """A table for each test set: settings by budgets."""
    parts = []
    for dataset, values in next(iter(runs.values()))[0]["sets"].items():
        lines = [f"| setting | {' | '.join(values)} |", "|---" * (len(values) + 1) + "|"]
        for name, of_seeds in runs.items():
            cells = (_cell(of_seeds, dataset, column) for column in values)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        parts.append(f"{dataset}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def shares(runs: Runs) -> str:
    """Candidates of about a quarter of the bytes: recall, as a share of that of full ones."""
    sets = list(next(iter(runs.values()))[0]["sets"])
    lines = ["| setting | candidates | bytes | of bf16 | " + " | ".join(sets) + " |"]
    lines.append("|---|---|---:|---:|" + "---:|" * len(sets))
    for name, of_seeds in runs.items():
        largest, width = of_seeds[0]["groups"][-1], of_seeds[0]["width"]
        for form, first, bits in FORMS:
            components = first or width
            vector_bytes = 2 * components if bits is None else components * bits // 8
            vector_bytes += 4 * (bits == 8)
            if vector_bytes > QUARTER * 2 * width:
                continue
            size = int(largest.partition("x")[2]) * vector_bytes
            cells = [_cell(of_seeds, dataset, f"{largest}{form}", by=largest) for dataset in sets]
            share = f"{size:,} | {vector_bytes / (2 * width):.2f}"
            if any(cells):
                lines.append(f"| {name} | {largest}{form} | {share} | " + " | ".join(cells) + " |")
    return "a quarter of the bytes: share of the recall kept\n\n" + "\n".join(lines)


def readme(runs: Runs) -> str:
    """The README's tables: the quickstart's model beside a single vector, and the larger one."""
    today, single, full = (runs[name] for name in README)
    if not today:
        raise SystemExit("no run of `today` is finished: call it with --settings today")
    parts = [_readme_table(today, single)]
    parts += [_readme_table(full, [])] if full else []
    return "\n\n".join(parts)


def _readme_table(of_seeds: list[dict[str, Any]], single: list[dict[str, Any]]) -> str:
    """Test sets by group, and a column for a model of one vector where it was trained."""
    groups, width = of_seeds[0]["groups"], of_seeds[0]["width"]
    head = ["recall@1, held out", *groups] + ["one vector"] * bool(single)
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for dataset in of_seeds[0]["sets"]:
        cells = [_cell(of_seeds, dataset, group) for group in groups]
        cells += [_cell(single, dataset, "1x1")] if single else []
        lines.append(f"| {IN_WORDS.get(dataset, dataset)} | {' | '.join(cells)} |")
    sizes = [f"{2 * width * int(group.partition('x')[2]):,}" for group in groups]
    sizes += [f"{2 * single[0]['width']:,}"] if single else []
    lines.append(f"| bytes a candidate, bf16 | {' | '.join(sizes)} |")
    note = f"Mean and 95 % interval over {len(of_seeds)} seeds" if of_seeds[1:] else "One seed"
    if single and len(single) != len(of_seeds):
        note += f" (one vector: {len(single)})"
    return "\n".join(lines) + f"\n\n{note}."


def _cell(of_seeds: list[dict[str, Any]], dataset: str, column: str, by: str | None = None) -> str:
    """A value over seeds, or its share of another one; empty where it was not measured."""
    found = []
    for one in of_seeds:
        values = one["sets"].get(dataset, {})
        if column in values and (by is None or values[by] > 0):
            found.append(values[column] / (1 if by is None else values[by]))
    return with_interval(found) if found else ""


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
