"""The quickstart's notebook runs from top to bottom, here with a tiny model and 12 pictures."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import tiny

NOTEBOOK = Path(__file__).parents[2] / "docs/quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    tiny.embedder().save_pretrained(tmp_path / "runs/emoji/model")
    tiny.shards(tmp_path / "data/emoji/test/emoji_scene", 12)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    names: dict = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    plt.close("all")
    products = names["queries"][:, None] @ names["candidates"].mT  # (12, 12, 4, 8)
    scores = products.amax(dim=-1).sum(dim=-1)
    assert names["recalls"][-1] == pytest.approx(
        (scores.argmax(1) == names["right"]).float().mean().item()
    )
    assert names["exact"].scores[0][0] == pytest.approx(scores[0].max().item(), rel=1e-2)
    assert len(names["store"]) == 12
    assert "the cascade finds 100.0%" in capsys.readouterr().out  # it keeps all 12
