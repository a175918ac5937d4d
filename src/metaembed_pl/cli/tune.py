"""`python -m metaembed_pl tune`: search over settings of a recipe with Optuna.

    python -m metaembed_pl tune --config recipes/emoji.yaml --space space.yaml --trials 20

A trial runs `fit` in its own process and is scored by the recipe's headline metric on its
validation sets. A trial that is worse than half of the others at the same step is stopped. The
study is one SQLite file next to the runs: the same command resumes it, also within a trial.

space.yaml lists the keys to search and their values:

    model.optimizer.lr: {low: 3.0e-4, high: 3.0e-3, log: true}
    model.loss.query_spread: [null, {weight: 3.0}, {weight: 10.0}]
    data.global_batch_size: {low: 64, high: 256, step: 64}
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from metaembed_pl.errors import UserError
from metaembed_pl.files import as_on_disk, only_process

POLL_S = 0.5
LOG = "tune.log"
HEADLINES = "headlines.jsonl"
RANGE_KEYS = {"low", "high", "log", "step"}


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
        help="folder of study.db and runs (default: runs/tune)",
    )
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    add("--no-pruning", action="store_true", help="run every trial to the end")


def run(args: argparse.Namespace) -> None:
    """Run trials up to the number of --trials; print the best."""
    space = read_space(args.space)
    optuna = _optuna()
    args.out.mkdir(parents=True, exist_ok=True)
    with only_process(args.out, f"tunes in {args.out}"):
        study = _study(optuna, args)
        num_done = _num_finished(study)
        while num_done < args.trials:
            _try(optuna, study, study.ask(), space, args)
            num_done += 1
    _print_best(optuna, study)


def read_space(file: Path) -> dict[str, Any]:
    """The keys to search, each with a list of choices or a range."""
    try:
        space = yaml.safe_load(as_on_disk(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read the space {file}: {' '.join(str(error).split())}") from error
    if not isinstance(space, dict) or not space:
        raise UserError(f"{file} must map keys of a recipe to their values, such as {_EXAMPLE}")
    for key, values in space.items():
        is_choice = isinstance(values, list) and len(values) > 1
        if not is_choice and not _is_range(values):
            raise UserError(
                f"{file}: {key} must be a list of at least two choices or a range such as "
                f"{{low: 1, high: 4}}, got {values!r}"
            )
    return space


_EXAMPLE = "model.optimizer.lr: {low: 3.0e-4, high: 3.0e-3, log: true}"


def _is_range(values: Any) -> bool:
    if not isinstance(values, dict) or not {"low", "high"} <= set(values) <= RANGE_KEYS:
        return False
    numbers = [values[name] for name in ("low", "high")]
    if any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in numbers):
        return False
    return values["low"] < values["high"] and (values["low"] > 0 or not values.get("log"))


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("tune needs Optuna: pip install metaembed-pl[tune]") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _study(optuna: Any, args: argparse.Namespace) -> Any:
    """The study; trials that were killed are queued to be resumed."""
    storage = f"sqlite:///{args.out / 'study.db'}"
    pruner = optuna.pruners.NopPruner() if args.no_pruning else optuna.pruners.MedianPruner()
    known = optuna.study.get_all_study_names(storage)
    study = optuna.create_study(
        storage=storage,
        study_name="tune",
        direction="maximize",
        load_if_exists=True,
        pruner=pruner,
    )
    num_before = len(study.trials) if known else 0
    # Begun again with the same seed, it would try the same again.
    study.sampler = optuna.samplers.TPESampler(seed=args.seed + num_before)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        run = trial.user_attrs.get("run", f"trial-{trial.number}")
        study.enqueue_trial(trial.params, user_attrs={"run": run})
    return study


def _num_finished(study: Any) -> int:
    return sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in study.trials)


def _try(
    optuna: Any, study: Any, trial: Any, space: dict[str, Any], args: argparse.Namespace
) -> None:
    """One trial, from its settings to its value."""
    settings = {key: _suggested(trial, key, values) for key, values in space.items()}
    name = trial.user_attrs.get("run", f"trial-{trial.number}")
    trial.set_user_attr("run", name)
    folder = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
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
                    print(f"{name}: {_shown(settings)}: stopped at step {step}, {headline:.4f}")
                    return
        finally:
            process.terminate()  # it keeps a checkpoint
            status = process.wait()
    if status or value is None:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        said = (folder / LOG).read_text(errors="replace").strip().splitlines() or ["nothing"]
        reason = f"ended with status {status}" if status else "has no validation sets"
        raise UserError(f"{name}, {_shown(settings)}: fit {reason}; its last line: {said[-1]}")
    study.tell(trial, value)
    print(f"{name}: {_shown(settings)}: {value:.4f}")


def _suggested(trial: Any, key: str, values: Any) -> Any:
    if isinstance(values, list):
        # As text: Optuna keeps choices in its file, and not every choice is a number or a name.
        return json.loads(trial.suggest_categorical(key, [json.dumps(value) for value in values]))
    is_whole = all(isinstance(values[name], int) for name in ("low", "high"))
    return (trial.suggest_int if is_whole else trial.suggest_float)(key, **values)


def _command(args: argparse.Namespace, folder: Path, settings: dict[str, Any]) -> list[str]:
    reports = {
        "class_path": "metaembed_pl.training.callbacks.WritesHeadline",
        "init_args": {"file": str(folder / HEADLINES)},
    }
    command = [sys.executable, "-m", "metaembed_pl", "fit"]
    command += [flag for config in args.config for flag in ("--config", config)]
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


def _print_best(optuna: Any, study: Any) -> None:
    done = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    if not done:
        print("no trial came to its end")
        return
    best = study.best_trial
    flags = " ".join(f"--{key}={value}" for key, value in best.params.items())
    print(f"best of {_num_finished(study)}: {best.value:.4f}, {flags}")


def _shown(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {json.dumps(value)}"
        for key, value in settings.items()
    )
