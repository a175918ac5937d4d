"""What a user of a paper recipe does, from datasets in the hub's layout to an exported model."""

import pytest

import rehearsal


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_paper_recipe_goes_from_datasets_to_an_exported_model(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "own_tokenizer", lambda _: None)  # it takes ten seconds
    rehearsal.write_datasets(tmp_path / "copy")
    work = tmp_path / "work"
    work.mkdir()
    steps = rehearsal.rehearse("qwen3b", tmp_path / "copy", work)
    assert steps[2:6] == ["check", "fit, killed", "fit, resumed", "test"]
    assert len(steps) == 8


def test_every_paper_recipe_is_rehearsed():
    mixes = ("sources/paper.yaml", "sources/paper_capped.yaml")
    of_the_paper = {
        file.stem
        for file in (rehearsal.ROOT / "recipes").glob("*.yaml")
        if any(f"train: {mix}" in file.read_text() for mix in mixes)
    }
    assert of_the_paper == set(rehearsal.RECIPES)
