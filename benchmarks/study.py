"""Options of a recipe side by side: settings x seeds in about equal time, on all test sets.

    python data_prep/openmoji.py --out data/emoji
    python benchmarks/study.py [--settings today no_spread] [--seeds 0 1 2]
    python benchmarks/study.py --write

benchmarks/study.yaml names the settings: each is a part of a recipe that is laid over the first
one, or over the `recipe` that it names. A run is `fit` in its own process with one thread, in
runs/study/SETTING-SEED. The same command skips finished runs and resumes interrupted ones. Recall@1
is measured at the groups, with fewer query vectors, with the query's vectors summed into one, and
with candidates of fewer components or bits. Means over seeds with 95 % intervals by Student's t;
minutes are of CPU time, all of `fit`. The last table shows candidates with about a quarter of the
bytes, and the share of the full recall that they keep.

--write puts the tables of all finished runs into README.md and docs/study.md, and the runs into
benchmarks/results/study-MACHINE.json. It trains the missing runs of --settings, and nothing without
that flag.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from _results import machine, save
from _study_tables import COSINE, FORMS, SUMMED, Runs, tables, write_pages
from omegaconf import OmegaConf

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


def main() -> None:
    """Run what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description="Options of a recipe side by side.")
    study = yaml.safe_load(STUDY.read_text())
    known = list(study["settings"])
    parser.add_argument("--settings", nargs="+", choices=known, help="default: all but emoji_full")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--measure", action="store_true", help="measure finished runs again")
    parser.add_argument("--write", action="store_true", help="update the pages and results/")
    options = parser.parse_args()
    usual = [] if options.write else [name for name in known if name != "emoji_full"]
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
    if options.write:
        runs = {name: finished(options.out, name) for name in known}
        write_pages(tables(study, runs), STUDY.parent.parent)
        save("study", {"machine": machine("cpu"), "torch": torch.__version__, "runs": runs})
    print("\n\n".join(tables(study, runs).values()))


def refuse_missing_data(study: dict[str, Any], settings: list[str]) -> None:
    """Say before any training which data of some settings are not there."""
    wanted: set[str] = set()
    for name in settings:
        setting = described(study, name)
        recipe = yaml.safe_load(Path(setting.get("recipe", study["recipe"])).read_text())
        train = setting.get("data", {}).get("train") or recipe["data"]["train"]
        wanted |= {source["path"] for source in train} | set(setting.get("test", study["test"]))
    missing = sorted(path for path in wanted if not Path(path).is_dir())
    if missing:
        raise SystemExit(
            f"data of the study are not there: {', '.join(missing)}; make them with "
            "python data_prep/openmoji.py --out data/emoji"
        )


def described(study: dict[str, Any], name: str) -> dict[str, Any]:
    """The keys that a setting changes, with those of the setting that it is laid over."""
    setting = dict(study["settings"][name])
    setting.pop("about", None)
    if below := setting.pop("over", None):
        merged = OmegaConf.merge(described(study, below), setting)
        setting = cast("dict[str, Any]", OmegaConf.to_container(merged))
    return setting


def run(study: dict[str, Any], name: str, seed: int, out: Path) -> dict[str, Any]:
    """Train and measure a setting with a seed, unless that was done."""
    folder = out / f"{name}-{seed}"
    kept, spent = folder / "study.json", folder / "spent.json"
    if kept.exists():
        return found_in(folder)
    setting = described(study, name)
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
        values[COSINE] = mean_cosine(queries).item()
        values["cosine of candidates"] = mean_cosine(candidates).item()
        found[shards.name] = values
    return found


if __name__ == "__main__":
    main()
