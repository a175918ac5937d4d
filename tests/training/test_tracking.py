import json

import pytest

from metaembed_pl.training.tracking import RUN_FILE, MLflowRun


def test_an_overwritten_run_notes_its_own_mlflow_run(tmp_path):
    pytest.importorskip("mlflow")
    (tmp_path / RUN_FILE).write_text(json.dumps({"run_id": "of-the-overwritten-run"}))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    new = MLflowRun(uri, "experiment", "name", tmp_path, resuming=False)
    new.log_metrics({"val/pool/recall@1/1x1": 0.5}, step=1)
    assert json.loads((tmp_path / RUN_FILE).read_text())["run_id"] == new.run_id
    resumed = MLflowRun(uri, "experiment", "name", tmp_path, resuming=True)
    assert resumed.run_id == new.run_id
