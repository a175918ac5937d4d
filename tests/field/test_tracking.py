"""MLflow slow, gone, full, opened by two at once: training goes on, nothing is lost or doubled."""

import json
import multiprocessing

import pytest

from metaembed_pl.training import tracking
from metaembed_pl.training.tracking import UNSENT_FILE, MLflowRun

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    """Made once: that takes longer than all else here."""
    folder = tmp_path_factory.mktemp("mlflow")
    uri = f"sqlite:///{folder}/mlflow.db"
    mlflow.MlflowClient(uri).search_experiments()
    return uri


def logged(uri, run_id, name="a"):
    history = mlflow.MlflowClient(uri).get_metric_history(run_id, name)
    return [(point.step, point.value) for point in history]


def started(uri, folder, resuming=False):
    return MLflowRun(uri, "experiment", "name", folder, resuming)


def test_a_server_that_cannot_be_reached_is_one_warning_and_nothing_is_lost(
    database, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(tracking, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = started("http://127.0.0.1:9", tmp_path)  # nothing listens there
    for step in range(3):
        run.log_metrics({"a": step / 2}, step)
    run.finalize()
    assert caplog.text.count("cannot be reached") == 1
    kept = [json.loads(line) for line in (tmp_path / UNSENT_FILE).read_text().splitlines()]
    assert [entry["step"] for entry in kept if "metrics" in entry] == [0, 1, 2]
    run._uri = database  # it is back
    with run._changed:
        run._changed.wait_for(lambda: not run._entries, timeout=60)
    assert logged(database, run.run_id) == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert not (tmp_path / UNSENT_FILE).exists()


def test_what_was_not_sent_is_sent_when_the_run_goes_on(database, tmp_path, monkeypatch):
    run = started(database, tmp_path)
    run.log_metrics({"a": 1.0}, 1)
    run.flush()
    refuse = lambda *_, **__: (_ for _ in ()).throw(OSError("database or disk is full"))  # noqa: E731
    monkeypatch.setattr(run._client, "log_batch", refuse)
    monkeypatch.setattr(tracking, "FLUSH_S", 1.0)
    run.log_metrics({"a": 2.0}, 2)
    run.flush(timeout_s=1)
    run.flush(timeout_s=1)
    assert (tmp_path / UNSENT_FILE).exists()
    again = started(database, tmp_path, resuming=True)
    again.log_metrics({"a": 2.0}, 2)  # the step behind the checkpoint is done again
    again.log_metrics({"a": 3.0}, 3)
    again.flush()
    assert logged(database, again.run_id) == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_resumed_run_logs_no_step_twice(database, tmp_path):
    run = started(database, tmp_path)
    for step in range(5):
        run.log_metrics({"a": float(step)}, step)
    run.flush()
    again = started(database, tmp_path, resuming=True)
    for step in range(3, 7):
        again.log_metrics({"a": float(step)}, step)
    again.flush()
    assert [step for step, _ in logged(database, run.run_id)] == list(range(7))


def test_a_server_that_hangs_does_not_hold_up_training(database, tmp_path, monkeypatch):
    import time

    run = started(database, tmp_path)
    run.log_metrics({"a": 0.0}, 0)
    run.flush()
    send, slow = run._client.log_batch, []

    def slowly(*arguments, **named):
        slow.append(len(named.get("metrics", ())))
        time.sleep(0.5)
        return send(*arguments, **named)

    monkeypatch.setattr(run._client, "log_batch", slowly)
    begun = time.monotonic()
    for step in range(1, 200):
        run.log_metrics({"a": float(step)}, step)
    assert time.monotonic() - begun < 0.5
    run.flush()
    assert len(logged(database, run.run_id)) == 200
    assert len(slow) < 10  # many at a time, or it would never keep up


def _first(uri, folder, number):
    run = started(uri, folder / str(number))
    run.log_metrics({"a": float(number)}, 0)
    run.flush(timeout_s=120)
    assert not run._failures
    assert not run._entries


@pytest.mark.slow
def test_two_first_runs_at_once_on_a_new_database_both_work(tmp_path):
    context = multiprocessing.get_context("fork")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    both = [context.Process(target=_first, args=(uri, tmp_path, n)) for n in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(200)
    assert [process.exitcode for process in both] == [0, 0]
    for number in range(2):
        run_id = json.loads((tmp_path / str(number) / "mlflow.json").read_text())["run_id"]
        assert logged(uri, run_id) == [(0, float(number))]
