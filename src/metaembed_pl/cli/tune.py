"""`python -m metaembed_pl tune`: search over settings of a recipe with Optuna.

    python -m metaembed_pl tune --config recipes/emoji.yaml --space space.yaml --trials 20

A trial runs `fit` in its own process and is scored by the recipe's headline metric on its
validation sets. A trial that is worse than half of the others at the same step is stopped, from a
third of its steps on. The
study is one SQLite file next to the runs: the same command resumes it, also within a trial.

space.yaml lists the keys to search and their values:

    model.optimizer.lr: {low: 3.0e-4, high: 3.0e-3, log: true}
    model.loss.query_spread: [null, {weight: 3.0}, {weight: 10.0}]
    data.global_batch_size: {low: 64, high: 256, step: 64}

At the end, best.yaml has the best settings: lay it over the recipe with a second --config.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from metaembed_pl.cli.model import check_at_least, refuse_ignored
from metaembed_pl.cli.recipe_path import find_recipe
from metaembed_pl.cli.tune_space import Space, is_whole, read_space, refuse_faulty
from metaembed_pl.errors import UserError, first_line
from metaembed_pl.files import only_process, write_text

POLL_S = 0.5
LOG = "tune.log"
HEADLINES = "headlines.jsonl"
BEST = "best.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    add = parser.add_argument
    add(
        "--config",
        required=True,
        action="append",
        metavar="RECIPE",
        help="recipe to tune; repeatable: later ones override",
    )
    add(
        "--space",
        type=Path,
        required=True,
        metavar="FILE",
        help="YAML of keys and values to search",
    )
    add(
        "--trials",
        type=int,
        default=20,
        metavar="N",
        help="number of trials, earlier ones included (default: 20)",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/tune"),
        metavar="FOLDER",
        help="folder of study.db, best.yaml and the runs of trials (default: runs/tune)",
    )
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    add(
        "--prune-from",
        type=int,
        metavar="STEP",
        help="stop no trial before this step (default: a third of its steps)",
    )
    add("--no-pruning", action="store_true", help="run every trial to the end")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key in all trials; the flags of `fit` work, too; repeatable",
    )


def run(args: argparse.Namespace) -> None:
    """Run trials up to the number of --trials; print and keep the best settings."""
    check_at_least(args, 1, "trials", "prune_from")
    if args.no_pruning:
        refuse_ignored(args, "has no effect with --no-pruning", "prune_from")
    space = read_space(args.space)
    optuna = _optuna()
    num_steps = refuse_faulty(args.space, space, args.config, args.set)
    prune_from = args.prune_from or num_steps // 3
    args.out.mkdir(parents=True, exist_ok=True)
    with only_process(args.out, f"tunes in {args.out}"):
        study = _study(optuna, args, prune_from)
        distributions = _distributions(optuna, study, space, args)
        try:
            while _num_finished(study) < args.trials:
                _try(optuna, study, study.ask(distributions), space, args)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, and SIGTERM
            print("the same command continues the study, and the trial", file=sys.stderr)
            raise
        _print_best(optuna, study, space, args)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("tune needs Optuna: pip install metaembed-pl[tune]") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(optuna: Any, args: argparse.Namespace, prune_from: int) -> Any:
    """The study; trials that were killed are queued to be resumed."""
    storage = f"sqlite:///{args.out / 'study.db'}"
    pruner = optuna.pruners.MedianPruner(n_warmup_steps=prune_from)
    if args.no_pruning:
        pruner = optuna.pruners.NopPruner()
    from sqlalchemy.exc import SQLAlchemyError  # as Optuna does

    try:
        known = optuna.study.get_all_study_names(storage)
        study = optuna.create_study(
            storage=storage,
            study_name="tune",
            direction="maximize",
            load_if_exists=True,
            pruner=pruner,
        )
    except (optuna.exceptions.OptunaError, SQLAlchemyError, RuntimeError) as error:
        raise UserError(
            f"{args.out / 'study.db'} cannot be read as a study ({first_line(error)}): restore it, "
            "or give another --out"
        ) from error
    num_before = len(study.trials) if known else 0
    # Begun again with the same seed, it would try the same again.
    study.sampler = optuna.samplers.TPESampler(seed=args.seed + num_before)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={"run": _name(trial)})
    return study


def _distributions(
    optuna: Any, study: Any, space: Space, args: argparse.Namespace
) -> dict[str, Any]:
    """The space for Optuna; a UserError if its choices are not those of earlier trials."""
    found = {key: _distribution(optuna.distributions, values) for key, values in space.items()}
    for trial in study.trials:
        for key, earlier in trial.distributions.items():
            if key not in found:
                continue
            try:
                optuna.distributions.check_distribution_compatibility(earlier, found[key])
            except ValueError as error:
                raise UserError(
                    f"{args.space}: {key} has other choices than in the trials of {args.out}: "
                    "restore them, or give another --out"
                ) from error
    return found


def _distribution(distributions: Any, values: Any) -> Any:
    if isinstance(values, list):
        # As text: Optuna keeps choices in its file, and not every choice is a number or a name.
        return distributions.CategoricalDistribution([json.dumps(value) for value in values])
    kind = "IntDistribution" if is_whole(values) else "FloatDistribution"
    return getattr(distributions, kind)(**values)


def _settings(trial: Any, space: Space) -> dict[str, Any]:
    """The values of a trial by key."""
    return {
        key: json.loads(trial.params[key]) if isinstance(values, list) else trial.params[key]
        for key, values in space.items()
        if key in trial.params
    }


def _num_finished(study: Any) -> int:
    return sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)


def _try(optuna: Any, study: Any, trial: Any, space: Space, args: argparse.Namespace) -> None:
    """One trial, from its settings to its value."""
    settings, name = _settings(trial, space), trial.user_attrs.get("run") or _new_name(study)
    trial.set_user_attr("run", name)
    folder = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}: {_shown(settings)}: started, log in {folder / LOG}", flush=True)
    value = None
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            _command(args, folder, settings), stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        try:
            for step, headline in _headlines(process, folder / HEADLINES):
                value = headline
                trial.report(headline, step)
                if process.poll() is None and trial.should_prune():
                    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                    print(f"{name}: stopped at step {step}, {headline:.4f}", flush=True)
                    return
        finally:
            process.terminate()  # it keeps a checkpoint
            status = process.wait()
    if status or value is None:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        said = (folder / LOG).read_text(errors="replace").strip().splitlines() or ["nothing"]
        reason = f"ended with status {status}" if status else "never validated"
        raise UserError(f"{name}, {_shown(settings)}: fit {reason}; its last line: {said[-1]}")
    study.tell(trial, value)
    print(f"{name}: {value:.4f}", flush=True)


def _command(args: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> list[str]:
    reports = {
        "class_path": "metaembed_pl.training.callbacks.WritesHeadline",
        "init_args": {"file": str(folder / HEADLINES)},
    }
    command = [sys.executable, "-m", "metaembed_pl", "fit"]
    command += [flag for config in args.config for flag in ("--config", config)]
    command += [f"--{given}" for given in args.set]
    command += [f"--{key}={json.dumps(value)}" for key, value in settings.items()]
    command += [f"--trainer.callbacks+={json.dumps(reports)}"]
    command += [f"--run.folder={folder.parent}", f"--run.name={folder.name}"]
    if (folder / "checkpoints" / "last.ckpt").exists():
        command += ["--ckpt_path=last"]
    return command


def _headlines(process: subprocess.Popen, file: Path) -> Iterator[tuple[int, float]]:
    """Step and headline of each validation, while the process runs."""
    num_read, is_over = 0, False
    while not is_over:
        is_over = process.poll() is not None
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        for line in lines[num_read:]:
            if line.endswith("\n"):
                num_read += 1
                said = json.loads(line)
                yield said["step"], said["headline"]
        if not is_over:
            time.sleep(POLL_S)


def _print_best(optuna: Any, study: Any, space: Space, args: argparse.Namespace) -> None:
    """Print the best settings, keep them as a recipe, and say how to train with them."""
    if not study.get_trials(states=[optuna.trial.TrialState.COMPLETE]):
        print("no trial came to its end")
        return
    best, file = study.best_trial, args.out / BEST
    settings = _settings(best, space)
    write_text(file, yaml.safe_dump(_nested(settings), sort_keys=False))
    print(f"best of {_num_finished(study)}: {_name(best)}, {best.value:.4f}: {_shown(settings)}")
    model = args.out / _name(best) / "model"
    if model.exists():
        print(f"its model: {model}")
    configs = [*map(find_recipe, args.config), str(file)]
    flags = [word for config in configs for word in ("--config", config)]
    flags += [f"--{given}" for given in args.set] + ["--run.name=tuned"]
    print(f"train with its settings: python -m metaembed_pl fit {shlex.join(flags)}")


def _name(trial: Any) -> str:
    """The name of a trial's run."""
    return trial.user_attrs.get("run", f"trial-{trial.number}")


def _new_name(study: Any) -> str:
    """A name for the trial that was asked for last; one that was resumed has two numbers."""
    earlier = [int(_name(trial).removeprefix("trial-")) for trial in study.trials[:-1]]
    return f"trial-{1 + max(earlier, default=-1)}"


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted keys, as a recipe has them.

    >>> _nested({"model.optimizer.lr": 0.1, "model.loss": {"temperature": 1.0}})
    {'model': {'optimizer': {'lr': 0.1}, 'loss': {'temperature': 1.0}}}
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return found


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {json.dumps(value)}"
        for key, value in settings.items()
    )
