"""One MLflow run for every training run: parameters, versions, curves, artifacts."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import MLFlowLogger

from metaembed_pl.environment import commit, versions
from metaembed_pl.files import write_text

RUN_FILE = "mlflow.json"


def mlflow_missing() -> bool:
    """Whether the `mlflow` extra is not installed."""
    return find_spec("mlflow") is None


def mlflow_name(metric: str) -> str:
    """A metric's name in MLflow, which refuses `@`.

    >>> mlflow_name("val/emoji_t2i/recall@1/4x8")
    'val/emoji_t2i/recall_at_1/4x8'
    """
    return metric.replace("@", "_at_")


class MLflowRun(MLFlowLogger):
    """Logs to the MLflow run that belongs to a run folder; a resumed run goes on in the same one.

    Args:
        uri: MLflow's tracking uri.
        experiment: its experiment.
        name: the run's name.
        folder: the run's folder, where the id of the MLflow run is kept.
        resuming: go on in the MLflow run noted there.
    """

    def __init__(self, uri: str, experiment: str, name: str, folder: Path, resuming: bool):
        self._note = folder / RUN_FILE
        self._known = resuming and self._note.exists()
        self._noted = self._known
        super().__init__(
            experiment_name=experiment,
            run_name=name,
            tracking_uri=uri,
            tags={f"version.{package}": number for package, number in versions().items()}
            | {"commit": commit() or "none"},
            run_id=json.loads(self._note.read_text())["run_id"] if self._known else None,
        )

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs under MLflow's spelling of the names."""
        self._remember()
        super().log_metrics({mlflow_name(name): value for name, value in metrics.items()}, step)

    def _remember(self) -> None:
        # A note may be there that an overwritten run of this name has left.
        if not self._noted and self.run_id:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._note, json.dumps({"run_id": self.run_id}) + "\n")
            self._noted = True

    @rank_zero_only
    def log_recipe(self, recipe: Mapping[str, Any]) -> None:
        """Logs a recipe as flat parameters, `model/optimizer/lr`; once, since MLflow fixes them."""
        if not self._known:
            self.log_hyperparams(dict(recipe))

    @rank_zero_only
    def keep(self, paths: list[Path]) -> None:
        """Stores files and folders as the run's artifacts."""
        for path in paths:
            if path.is_dir():
                self.experiment.log_artifacts(self.run_id, str(path), path.name)
            elif path.exists():
                self.experiment.log_artifact(self.run_id, str(path))
