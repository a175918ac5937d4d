"""`fit`, `validate` and `test`: Lightning's CLI with our defaults.

    python -m metaembed_pl fit --config recipes/emoji.yaml --trainer.max_steps=10
    python -m metaembed_pl fit --config recipes/emoji.yaml --ckpt_path last
    python -m metaembed_pl fit --config recipes/emoji.yaml --print_config

A run is the folder RUNS/NAME: `config.fit.yaml`, `checkpoints/`, `model/`, `report/`.
"""

import argparse
import difflib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf.errors import OmegaConfBaseException
from transformers.utils import logging as transformers_logging

from metaembed_pl.cli.failures import failures_in_one_line
from metaembed_pl.cli.recipe_effects import EXPERIMENT, keys_without_effect
from metaembed_pl.cli.recipe_path import with_recipes_found
from metaembed_pl.cli.train_help import USAGE, RecipeHelp, explain
from metaembed_pl.data.datamodule import RetrievalDataModule
from metaembed_pl.data.recipe_sources import EvalSource, TrainSource
from metaembed_pl.errors import UserError, causes
from metaembed_pl.evaluation.benchmarks import Task
from metaembed_pl.evaluation.outcome import Outcome, TaskOutcome, about_model
from metaembed_pl.evaluation.report import write_report
from metaembed_pl.evaluation.tables import overview
from metaembed_pl.files import only_process, write_text
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.sharded import is_sharded
from metaembed_pl.training.callbacks import (
    DrawnPairs,
    ProgressBar,
    ProgressLines,
    Speed,
    WatchdogCallback,
)
from metaembed_pl.training.checkpoints import AtomicCheckpointIO
from metaembed_pl.training.module import MetaEmbedModule
from metaembed_pl.training.muon import computes_in_bf16
from metaembed_pl.training.out_of_memory import OutOfMemory
from metaembed_pl.training.stopping import Stopped, StopsOnSignal
from metaembed_pl.training.tracking import MLflowRun, mlflow_missing
from metaembed_pl.training.watchdog import Watch

log = logging.getLogger(__name__)

# `omegaconf+` resolves relative interpolations after command-line flags have had their say.
PARSING = {"parser_mode": "omegaconf+", "allow_abbrev": False, "prog": "metaembed-pl"}

NOT_COMPARED = ("ckpt_path", "weights_only", "run.overwrite")
FIXED = (  # settings of the weights and the optimiser state in a checkpoint
    "model.backbone.scratch",
    "model.backbone.tokenizer",
    "model.layout",
    "model.projection",
    "model.lora",
    "model.train_vision",
    "model.meta_token_std",
    "model.pooling",
    "model.bidirectional",
)

QUIET = (  # warnings of libraries that users of this package can do nothing about
    ".*does not have many workers.*",
    ".*`IterableDataset` has `__len__` defined.*",
    ".*LeafSpec.* is deprecated.*",
    ".*Total length of `list` across ranks is zero.*",  # a run without validation sets
    ".*could not find the monitored key.*",  # likewise: it has no best checkpoint
    ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ".*your dataloader is not resumable.*",  # the data module keeps the place in the plan
    ".*`hidden_state` is deprecated.*",  # used by transformers 5.17 itself, for mllama
    ".*sync_dist=True.*",  # our metrics have gathered all ranks' rows already
    ".*WeightAveraging callback with a model that overrides.*",  # sharding: docs/study.md
    ".*torch.distributed.* is deprecated.*",  # their successors came with torch 2.13
)

REFUSED_CALLBACKS: dict[type, str] = {
    StochasticWeightAveraging: "averages over epochs, but runs count steps: use "
    "lightning.pytorch.callbacks.EMAWeightAveraging instead",
    BatchSizeFinder: "changes the batch, and with it the negatives of a query: use "
    "`check --gpu-memory 80GB`, which says what fits",
}


@dataclass
class RunConfig:
    """The folder of a run, its checkpoints and its tracking.

    Args:
        name: the run's folder below `folder`, and its name in MLflow.
        folder: the folder of all runs.
        checkpoint_every_n_steps: how often `checkpoints/last.ckpt` is written.
        stall_timeout_s: seconds without progress after which a rank reports where it is stuck and
            exits; 0: never. Choose more than the longest batch, validation or checkpoint takes, and
            less than the half hour after which torch.distributed gives up.
        overwrite: replace an existing run of this name.
        mlflow_uri: MLflow's tracking URI; None turns MLflow off.
        experiment: the MLflow experiment.
    """

    name: str
    folder: str = "runs"
    checkpoint_every_n_steps: int = 200
    stall_timeout_s: float = 900
    overwrite: bool = False
    mlflow_uri: str | None = "sqlite:///mlflow.db"
    experiment: str = EXPERIMENT

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(?!\.+$)[^/\\\x00-\x1f]{1,200}", self.name) or not self.name.strip():
            raise UserError(f"run.name is the name of one folder, got {self.name!r:.80}")
        if self.checkpoint_every_n_steps < 1:
            every = self.checkpoint_every_n_steps
            raise UserError(f"run.checkpoint_every_n_steps must be at least 1, got {every}")
        if not 0 <= self.stall_timeout_s < float("inf"):
            raise UserError(f"run.stall_timeout_s is in seconds, got {self.stall_timeout_s}")

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.folder) / self.name

    @property
    def last_checkpoint(self) -> Path:
        """The checkpoint of `--ckpt_path last`."""
        return self.path / "checkpoints" / "last.ckpt"


class ParsingError(UserError):
    """The parser refuses a recipe or a flag."""


class RecipeParser(LightningArgumentParser):
    """Reports an error of a recipe in one line, with the nearest valid key."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As Lightning's; circular interpolations are errors of the user."""
        with _interpolated():
            return super().parse_args(*args, **kwargs)

    def parse_object(self, *args: Any, **kwargs: Any) -> Any:
        """Likewise."""
        with _interpolated():
            return super().parse_object(*args, **kwargs)

    def _apply_actions(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        # Parsing changes values in place, and YAML aliases refer to the same object.
        return super()._apply_actions(_unshared(cfg), *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises a ParsingError instead of printing the usage, which has some two hundred keys."""
        text = " ".join(str(ex or message).split())
        refused = [str(cause) for cause in causes(ex) if isinstance(cause, UserError)]
        where, union, _ = text.partition(": Does not validate")
        if refused and union:  # of the class itself, not all else that was tried
            text = f"{where}: {refused[-1]}"
        raise ParsingError(text + self._suggestion(text))

    def _suggestion(self, text: str) -> str:
        quoted = re.search(r"(?:[Kk]ey|arguments?:|[Oo]ption) ['\"-]*([\w.@]+)", text)
        if not quoted:
            return ""
        given = quoted[1]
        verbs = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(parser for choices in verbs for parser in choices.values())]
        known = {action.dest for parser in parsers for action in parser._actions}
        known |= {field.name for part in (TrainSource, EvalSource) for field in fields(part)}
        near = difflib.get_close_matches(given, known, n=1, cutoff=0.5)
        return f"; did you mean {near[0]!r}?" if near and near[0] not in text else ""


class SaveRecipe(SaveConfigCallback):
    """Writes the resolved recipe to `config.VERB.yaml` in the run's folder."""

    def __init__(self, parser: Any, config: Any, *, folder: Path, verb: str):
        super().__init__(parser, config, save_to_log_dir=False)
        self.file = folder / f"config.{verb}.yaml"

        self.recipe = yaml.safe_load(parser.dump(config, skip_none=False))
        self.changed: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Lightning writes here; in a fit this is too early, because it may still be refused."""
        if stage != "fit":
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes the recipe of a fit."""
        super().setup(trainer, pl_module, "fit")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict) -> None:
        """Stores the recipe, for `compare`."""
        checkpoint["recipe"] = self.recipe

    def compare(self, checkpoint: dict[str, Any]) -> None:
        """Logs the settings that differ from a checkpoint's; a UserError if one cannot change."""
        old, new, step = checkpoint.get("recipe"), _flat(self.recipe), checkpoint["global_step"]
        before = new if old is None else _flat(old)
        keys = sorted(k for k in before.keys() | new.keys() if before.get(k) != new.get(k))
        for key in keys:
            if key.startswith(NOT_COMPARED):
                continue
            was, becomes = before.get(key), new.get(key)
            muon_or_not = key.endswith("muon_lr") and None in (was, becomes)
            if key.startswith(FIXED) or muon_or_not:
                raise UserError(
                    f"{key} cannot change when a run resumes: it was {was}, and is {becomes} now; "
                    "restore the old value, or start a run with another name"
                )
            self.changed[f"from_step_{step + 1}/{key.replace('.', '/')}"] = becomes
            message = "%s was %.200s; from step %d on it is %.200s"
            log.warning(message, key, was, step + 1, becomes)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Called on rank 0 when the verb starts."""
        if isinstance(trainer.logger, MLflowRun):
            is_resumed = trainer.logger.is_resumed  # MLflow fixes what was logged
            trainer.logger.log_hyperparams(self.changed if is_resumed else self.recipe)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, self.parser.dump(self.config, skip_none=False))


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [*map(_unshared, value)] if isinstance(value, list) else value


@contextmanager
def _interpolated() -> Iterator[None]:
    try:
        yield
    except (OmegaConfBaseException, RecursionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"interpolation of a recipe key failed: {said}") from error


@contextmanager
def _refusing() -> Iterator[None]:
    """What our classes refuse is an error of the recipe."""
    try:
        yield
    except Exception as error:
        refused = [str(cause) for cause in causes(error) if isinstance(cause, UserError)]
        # jsonargparse has an error of its own for a class that it constructs.
        if refused and (isinstance(error, UserError) or "Does not validate" in str(error)):
            raise ParsingError(refused[-1]) from error
        raise


def _flat(recipe: dict[str, Any], before: str = "") -> dict[str, Any]:
    """A recipe by dotted keys.

    >>> _flat({"model": {"lr": 1, "groups": ["1x1"]}})
    {'model.lr': 1, 'model.groups': ['1x1']}
    """
    found = {}
    for key, value in recipe.items():
        nested = isinstance(value, dict) and value
        found |= _flat(value, f"{before}{key}.") if nested else {f"{before}{key}": value}
    return found


class RecipeCLI(LightningCLI):
    """Lightning's CLI with the run's folder, checkpoints, progress, tracking and report.

    Args:
        argv: the command line.
        watch: ends this process without progress.
        stops: stops the run on a signal.
        stack: ends with the process.
    """

    def __init__(self, argv: list[str], watch: Watch, stops: StopsOnSignal, stack: ExitStack):
        self._watch, self._stops, self._stack = watch, stops, stack
        super().__init__(
            MetaEmbedModule,
            RetrievalDataModule,
            save_config_callback=SaveRecipe,
            seed_everything_default=0,
            parser_class=RecipeParser,
            parser_kwargs={
                verb: PARSING | {"usage": USAGE.format(verb)} for verb in self.subcommands()
            }
            | PARSING
            | {"formatter_class": RecipeHelp},
            # Our own loaders share the plan over the ranks.
            trainer_defaults={"use_distributed_sampler": False, "num_sanity_val_steps": 0},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=argv,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's without `predict`, for which there is `embed`."""
        verbs = LightningCLI.subcommands()
        return {verb: verbs[verb] for verb in ("fit", "validate", "test")}

    def _prepare_subcommand_parser(self, *args: Any, **kwargs: Any) -> LightningArgumentParser:
        """With our help, and without Lightning's table of results, which cuts off names."""
        parser = super()._prepare_subcommand_parser(*args, **kwargs)
        explain(parser, args[1])
        if any(action.dest == "verbose" for action in parser._actions):
            parser.set_defaults(verbose=False)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the given arguments; Lightning's method warns that `sys.argv` has some, too."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Reads no settings from a checkpoint."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the keys of `run`."""
        parser.add_class_arguments(RunConfig, "run")

    def before_instantiate_classes(self) -> None:
        """Sets the run's folder, and refuses to mix two runs in it."""
        with _refusing():
            self.run = RunConfig(**self._get(self.config, "run").as_dict())
            unused = keys_without_effect(self.config.fit) if self.subcommand == "fit" else []
        for line in unused:
            raise UserError(line)
        # A checkpoint must not create Python objects, which could run code.
        self.config[str(self.subcommand)]["weights_only"] = True
        self.save_config_kwargs = {"folder": self.run.path, "verb": self.subcommand}
        resuming = self._get(self.config, "ckpt_path")
        last = self.run.last_checkpoint
        if self.subcommand == "fit" and last.exists() and not (resuming or self.run.overwrite):
            raise UserError(
                f"{self.run.path} contains a run already: continue it with --ckpt_path last, start "
                "anew with --run.overwrite=true, or give another --run.name"
            )
        file = last if resuming == "last" else Path(resuming) if resuming else None
        if file is not None and not file.exists() and resuming not in ("best", "hpc", "registry"):
            raise UserError(
                f"there is no {file} to continue from; leave out --ckpt_path to start a new run"
            )

    def instantiate_classes(self) -> None:
        """As Lightning's; what our classes refuse is an error of the recipe."""
        with _refusing():
            super().instantiate_classes()

    def before_fit(self) -> None:
        """Locks the run's folder, and has its checkpoint checked."""
        self.model.check_checkpoint = self._check_checkpoint
        self._stops.last = self.run.last_checkpoint
        if rank_zero_only.rank == 0:
            self._stack.enter_context(only_process(self.run.path, f"trains into {self.run.path}"))

    def _check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        step, last = checkpoint["global_step"], self.trainer.max_steps
        if 0 <= last <= step:
            said = f"the run is already at step {step}; trainer.max_steps is {last}"
            if step > last or self._is_complete():
                if isinstance(self.trainer.logger, MLflowRun):
                    self.trainer.logger.flush()  # records that could not be sent before
                raise UserError(f"{said}: nothing to train; raise it to continue")
            log.info("%s: what comes after training is made", said)
        keep = [c for c in self.trainer.callbacks if isinstance(c, SaveRecipe)]  # pyright: ignore
        for callback in keep:
            callback.compare(checkpoint)

    def _is_complete(self) -> bool:
        """Whether the results of training are newer than its last checkpoint."""
        results = ["model/metaembed.json"]
        results += ["report/metrics.json"] * bool(self.datamodule.eval_sources["test"])
        files, last = [self.run.path / name for name in results], self.run.last_checkpoint
        at = last.stat().st_mtime if last.exists() else float("inf")
        return all(file.exists() and file.stat().st_mtime >= at for file in files)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The recipe's trainer, with our callbacks and logger unless the recipe has its own."""
        config = self._get(self.config_init, "trainer")
        kwargs["default_root_dir"] = str(self.run.path)
        kwargs["precision"] = _precision(config)
        given = config.get("callbacks") or []
        for callback in given:
            for kind, why in REFUSED_CALLBACKS.items():
                if isinstance(callback, kind):
                    raise UserError(f"{kind.__name__} {why}")
        kwargs["callbacks"] = [*given, *self._callbacks(config)]
        if isinstance(config.get("val_check_interval"), int):
            kwargs["check_val_every_n_epoch"] = None  # count steps of the run, not of an epoch
        kwargs["logger"] = self._loggers(config.get("logger"))
        if not sys.stderr.isatty():
            kwargs["enable_progress_bar"] = False
        kwargs["enable_model_summary"] = False
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _callbacks(self, config: Any) -> list[Callback]:
        watches = [WatchdogCallback(self._watch, self.run.stall_timeout_s), self._stops]
        if self.subcommand != "fit":
            return watches
        speed = Speed()
        every = config.get("log_every_n_steps") or 50
        shown = ProgressBar(speed) if sys.stderr.isatty() else ProgressLines(speed, every)
        strategy = config.get("strategy")
        watches.append(OutOfMemory(strategy if isinstance(strategy, str) else "ddp"))
        if config.get("fast_dev_run"):
            return [*watches, shown]
        common = {
            "dirpath": self.run.last_checkpoint.parent,
            "auto_insert_metric_name": False,
            "enable_version_counter": False,
        }
        best = ModelCheckpoint(filename="best", monitor="val/headline", mode="max", **common)
        last = ModelCheckpoint(
            filename="last", every_n_train_steps=self.run.checkpoint_every_n_steps, **common
        )
        callbacks = [*watches, speed, shown, best, last, DrawnPairs()]
        if config.get("logger") is not False:
            callbacks.append(LearningRateMonitor("step"))
        return callbacks

    def _loggers(self, given: Any) -> Any:
        """Our logger, then those of the recipe; none if it is false there."""
        if given is False or self.subcommand != "fit":
            return given or False
        others = [] if given in (None, True) else given if isinstance(given, list) else [given]
        run = self.run
        if run.mlflow_uri is not None and not mlflow_missing():
            resuming = bool(self._get(self.config, "ckpt_path"))
            own = MLflowRun(run.mlflow_uri, run.experiment, run.name, run.path, resuming)
            return [own, *others]
        if run.mlflow_uri is None and others:
            return others
        if run.mlflow_uri is not None:
            log.info(
                "MLflow is not installed (pip install metaembed-pl[mlflow]): metrics go to CSV"
            )
        return [CSVLogger(run.path, name="csv", version=""), *others]

    def after_fit(self) -> None:
        """Exports the model, tests it and reports."""
        # Lightning sets `fast_dev_run` from outside its class.
        dry = self.trainer.fast_dev_run  # pyright: ignore[reportAttributeAccessIssue]
        if dry or self.trainer.interrupted:
            return
        self.trainer.save_checkpoint(self.run.last_checkpoint, weights_only=False)
        self.model.embedder.save_pretrained(self.run.path / "model", overwrite=True)
        log.info("model folder: %s", self.run.path / "model")
        if self.datamodule.eval_sources["test"]:
            self.trainer.test(
                self.model, datamodule=self.datamodule, verbose=False, weights_only=True
            )
            self.after_test()
        logger = self.trainer.logger
        if isinstance(logger, MLflowRun) and self.trainer.is_global_zero:
            logger.log_files(
                [self.run.path / name for name in ("config.fit.yaml", "model", "report")]
            )

    def after_test(self) -> None:
        """Writes the report of the test sets."""
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        folder, pools = self.run.path / "report", self.datamodule.eval_sets["test"]
        tasks = [
            TaskOutcome.of(
                Task(pool.name, "", "recall@1"),
                pool,
                metrics.ranked,
                diversity=metrics.cosines,
                bad_queries=_unread(pool.queries, metrics.unread["query"]),
                bad_candidates=_unread(pool.candidates, metrics.unread["candidate"]),
            )
            for pool in pools
            for metrics in [self.model.metrics["test"][pool.name]]
        ]
        budgets = [str(budget) for budget in self.model.budgets]
        about = about_model(self.model.embedder)
        outcome = Outcome("test", f"{self.run.name}: test sets", budgets, about, tasks)
        write_report(outcome, pools, folder, model=self._embedder_to_map())
        outcome.save(folder)
        # Last, so that the report is complete once this file exists.
        metrics = json.dumps(outcome.task_metrics("test"), indent=2, sort_keys=True)
        write_text(folder / "metrics.json", metrics + "\n")
        log.info("report: %s", folder)
        print(overview(outcome))

    def after_validate(self) -> None:
        """Prints the metrics of the validation sets."""
        if self.trainer.is_global_zero:
            for name, value in sorted(self.trainer.callback_metrics.items()):
                print(f"{name}  {value:.4f}")

    def _embedder_to_map(self) -> MetaEmbedder | None:
        """The embedder for attention maps; None if weights are sharded."""
        embedder = self.model.embedder
        if any(map(is_sharded, embedder.parameters())):
            return None
        # Lightning has moved it to the CPU.
        return embedder.to(self.trainer.strategy.root_device).eval()


def _unread(items: Sequence[Item], indices: Sequence[int]) -> list[str]:
    """Items that could not be read, for the report; the log has the reasons."""
    return [f"{items[index].uid}: see the log" for index in indices]


def _precision(config: Any) -> Any:
    """The recipe's precision; fp32 instead of mixed bf16 if this CPU has no bf16 instructions."""
    precision = config.get("precision")
    on_cpu = config.get("accelerator") == "cpu" or not torch.cuda.is_available()
    if precision == "bf16-mixed" and on_cpu and not computes_in_bf16(torch.device("cpu")):
        log.info("this CPU has no bf16 instructions: training in fp32 instead of bf16-mixed")
        return "32-true"
    return precision


def run(argv: list[str]) -> None:
    """Runs a training verb."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    first = not getattr(rank_zero_only, "rank", 0)  # the others would repeat the messages
    level = logging.INFO if first else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    for chatty in ("httpx", "httpx2", "alembic", "mlflow", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()
    for harmless in QUIET:
        warnings.filterwarnings("ignore", message=harmless)
    with StopsOnSignal() as stops, ExitStack() as stack:
        try:
            with Watch() as watch, failures_in_one_line(watch):
                RecipeCLI(with_recipes_found(argv), watch, stops, stack)
        except Stopped as stopped:
            if not getattr(rank_zero_only, "rank", 0):  # known by now, if there are several
                print(f"metaembed-pl: stopped by {stopped.name}; {stops.saved()}", file=sys.stderr)
            raise
