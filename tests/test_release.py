"""What a release consists of fits together."""

import re
from pathlib import Path

import yaml

from metaembed_pl import __version__

ROOT = Path(__file__).parent.parent


def test_version_citation_and_changelog_agree():
    released = re.findall(r"^## \[(\d.*?)\] - (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert released[0] == (__version__, str(citation["date-released"]))
    assert citation["version"] == __version__


def test_files_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:src|tests|data_prep|docs|recipes)/[\w./-]+)`", text)
    named = [name for name in named if "NAME" not in name]
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_workflow_runs_what_continuous_integration_runs():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    job = workflow["jobs"]["check"]
    assert job["steps"][-1]["run"] == "bash .ci/run"
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
