"""One MLflow run for every training run: parameters, versions, curves, artifacts.

Training never waits for MLflow and never fails because of it: a thread sends the records. Records
that cannot be sent, because a server is slow or down or a disk is full, are kept in the run's
folder and sent later, at the latest when the run resumes.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock
from lightning.fabric.utilities.logger import _flatten_dict
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from metaembed_pl.environment import commit, versions
from metaembed_pl.errors import first_line
from metaembed_pl.files import read_json_object, write_text

log = logging.getLogger(__name__)

RUN_FILE, UNSENT_FILE = "mlflow.json", "mlflow.unsent.jsonl"
AT_A_TIME = 500
"""Metrics in a request; MLflow takes 1000, and 100 parameters."""
LONGEST_PAUSE_S = 60.0
FLUSH_S = 30.0


def mlflow_missing() -> bool:
    """Whether the `mlflow` extra is not installed."""
    return find_spec("mlflow") is None


def mlflow_name(metric: str) -> str:
    """A metric's name in MLflow, which refuses `@`.

    >>> mlflow_name("val/emoji_t2i/recall@1/4x8")
    'val/emoji_t2i/recall_at_1/4x8'
    """
    return re.sub(r"[^\w/. -]+", "", metric.replace("@", "_at_"))


class MLflowRun(Logger):
    """Logs to the MLflow run of a run folder.

    Args:
        uri: MLflow's tracking URI.
        experiment: its experiment.
        name: the run's name.
        folder: the run's folder, with a file that has the id of the MLflow run.
        resuming: continue the MLflow run of that id.
    """

    def __init__(self, uri: str, experiment: str, name: str, folder: Path, resuming: bool):
        super().__init__()
        # By default, MLflow waits minutes for an unreachable server.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        self._uri, self._experiment, self._name = uri, experiment, name
        self._note, self._unsent = folder / RUN_FILE, folder / UNSENT_FILE
        self._client: Any = None
        self._run_id: str | None = None
        self._sent_up_to: dict[str, int] = {}
        self._entries: list[dict[str, Any]] = []
        self._failures = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        if resuming and self._note.exists():
            self._run_id = read_json_object(self._note).get("run_id")
            if self._unsent.exists():
                self._entries = [*map(json.loads, self._unsent.read_text().splitlines())]
        self.is_resumed = self._run_id is not None

    @property
    def name(self) -> str:
        """The run's name."""
        return self._name

    @property
    def version(self) -> str:
        """Not used."""
        return ""

    @property
    def run_id(self) -> str | None:
        """The id of the MLflow run; None while MLflow cannot be reached."""
        self.flush()
        return self._run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs metrics, under names that MLflow accepts."""
        values = [(mlflow_name(name), float(value)) for name, value in metrics.items()]
        for start in range(0, len(values), AT_A_TIME):
            some = dict(values[start : start + AT_A_TIME])
            self._add({"metrics": some, "step": step or 0, "time": int(1000 * time.time())})

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any], *_: Any, **__: Any) -> None:
        """Logs flat parameters, `model/optimizer/lr`; MLflow fixes them."""
        flat = [(key, str(value)[:250]) for key, value in _flatten_dict(dict(params)).items()]
        for start in range(0, len(flat), 100):
            self._add({"params": dict(flat[start : start + 100])})

    @rank_zero_only
    def log_files(self, paths: list[Path]) -> None:
        """Stores files and folders as the run's artifacts."""
        self._add({"artifacts": [str(path.resolve()) for path in paths]})
        self.flush(timeout_s=None)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Logs the final status."""
        if self._thread:
            self._add({"status": "FAILED" if status == "failed" else "FINISHED"})
            self.flush()

    @rank_zero_only
    def flush(self, timeout_s: float | None = FLUSH_S) -> None:
        """Waits until all records are sent, or sending fails."""
        self._start()
        with self._changed:
            before = self._failures
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: not self._entries or self._failures > before, timeout=timeout_s
            )
            if self._entries:
                self._save_unsent()

    def _add(self, entry: dict[str, Any]) -> None:
        self._start()
        with self._changed:
            self._entries.append(entry)
            if self._failures:
                self._save_unsent()
            else:
                self._changed.notify_all()

    def _save_unsent(self) -> None:
        try:
            self._unsent.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._unsent, "".join(json.dumps(entry) + "\n" for entry in self._entries))
        except OSError as error:
            log.warning("%s could not be written: %s", self._unsent, error.strerror)

    def _start(self) -> None:
        """Connects in this thread: that imports modules, which must not happen during a fork."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
            self._attempt([])
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                pause = min(LONGEST_PAUSE_S, 2.0**self._failures) if self._failures else None
                if self._failures or not self._entries:
                    self._changed.wait(pause)
                batch = self._next()
            if batch:
                self._attempt(batch)

    def _next(self) -> list[dict[str, Any]]:
        """The next records: one, or several with metrics, so that slow servers keep up."""
        batch, count = [], 0
        for entry in self._entries:
            count += len(entry.get("metrics", ()))
            if batch and (not entry.keys() & batch[0].keys() & {"metrics"} or count > AT_A_TIME):
                break
            batch.append(entry)
        return batch

    def _attempt(self, batch: list[dict[str, Any]]) -> None:
        try:
            if self._client is None:
                self._connect()
            if batch:
                self._send(batch)
        except Exception as error:  # whatever a server, a network or a disk may do
            if batch and getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE":
                log.warning("MLflow rejects the records: %s", first_line(error)[:200])
                self._drop(len(batch))  # it would be refused again
                return
            if not self._failures:
                log.warning(
                    "MLflow at %s cannot be reached (%s): training goes on, and what is logged is "
                    "kept in %s until it can be sent",
                    self._uri,
                    first_line(error)[:200],
                    self._unsent,
                )
            with self._changed:
                self._failures += 1
                self._changed.notify_all()
            return
        self._drop(len(batch))

    def _drop(self, count: int) -> None:
        with self._changed:
            del self._entries[:count]
            self._failures = 0
            if not self._entries:
                self._unsent.unlink(missing_ok=True)
            self._changed.notify_all()

    def _connect(self) -> None:
        import mlflow
        from mlflow.tracking.context.registry import resolve_tags

        database = self._uri.partition("sqlite:///")[2]
        # Two processes that open a new database at once would both create its tables.
        file = Path(database or ".").absolute()
        if database:
            file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file.with_name(f".{file.name}.lock"), timeout=120)
        with lock if database else nullcontext():
            client = mlflow.MlflowClient(self._uri)
            if self._run_id is None:
                found = client.get_experiment_by_name(self._experiment)
                experiment = (
                    found.experiment_id if found else client.create_experiment(self._experiment)
                )
                tags = {f"version.{package}": number for package, number in versions().items()}
                tags = resolve_tags(tags | {"commit": commit() or "none"})
                run = client.create_run(experiment, tags=tags, run_name=self._name)
                self._run_id = run.info.run_id
                self._note.parent.mkdir(parents=True, exist_ok=True)
                write_text(self._note, json.dumps({"run_id": self._run_id}) + "\n")
            elif self.is_resumed:
                # Steps after the checkpoint are repeated, but have been logged already.
                latest = client.get_run(self._run_id).data._metric_objs
                self._sent_up_to = {metric.key: metric.step for metric in latest}
        self._client = client

    def _send(self, batch: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric, Param

        entry = batch[0]
        if "metrics" in entry:
            known = dict(self._sent_up_to)
            metrics = []
            for some in batch:
                for name, value in some["metrics"].items():
                    if some["step"] > known.get(name, -1):
                        known[name] = some["step"]
                        metrics.append(Metric(name, value, some["time"], some["step"]))
            self._client.log_batch(self._run_id, metrics=metrics)
            self._sent_up_to = known
        elif "params" in entry:
            params = [Param(name, value) for name, value in entry["params"].items()]
            self._client.log_batch(self._run_id, params=params)
        elif "status" in entry:
            self._client.set_terminated(self._run_id, entry["status"])
        for path in map(Path, entry.get("artifacts", ())):
            if path.is_dir():
                self._client.log_artifacts(self._run_id, str(path), path.name)
            elif path.exists():
                self._client.log_artifact(self._run_id, str(path))
