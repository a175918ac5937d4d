"""The ten minutes with a GPU, rehearsed on a CPU: every part runs and leaves its rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, list[dict]]:
    """The rows of each part, by its name."""
    out = tmp_path_factory.mktemp("gpu_day")
    done = subprocess.run(
        ["bash", "benchmarks/gpu_day.sh", str(out), "--steps", "1", "--min_s", "0"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PATIENCE": "4"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return {
        file.stem: [json.loads(line) for line in file.read_text().splitlines()]
        for file in out.glob("*.jsonl")
    }


@pytest.mark.slow
def test_every_part_ends_well(rows):
    assert [row["part"] for row in rows["parts"]] == ["roof", "train", "loss", "zero", "search"]
    assert {row["status"] for row in rows["parts"]} == {0}


@pytest.mark.slow
def test_the_step_is_measured_beside_its_peers(rows):
    ours, *peers = rows["train"]
    assert ours["what"] == "metaembed_pl"
    assert ours["tokens_per_s"] * ours["step_s"] > 24 * 16
    assert 0 < ours["share_of_roof"] < 1.5
    assert ours["check_bytes"] > 2**20
    for row in peers:
        assert row.get("step_s", 0) > 0 or "No module named" in row["failed"], row


@pytest.mark.slow
def test_zero_resumes_and_leaves_a_model(rows):
    pytest.importorskip("deepspeed")
    (row,) = rows["zero"]
    assert row["has_model"], row


@pytest.mark.slow
def test_loss_and_search_are_timed(rows):
    assert all(row["ours"]["time_s"] > 0 for row in rows["loss"])
    assert [row["budget"] for row in rows["search"]] == ["1x1", "2x4", "4x8", "8x16", "16x64"]


def test_the_limits_leave_room_within_ten_minutes():
    script = (ROOT / "benchmarks" / "gpu_day.sh").read_text()
    limits = [int(line.split()[1]) for line in script.splitlines() if line.startswith("run ")]
    assert len(limits) == 5
    assert sum(limits) <= 570
