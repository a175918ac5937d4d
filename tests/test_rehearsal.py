"""What a user of a paper recipe does, from datasets in the hub's layout to an exported model."""

import rehearsal


def test_every_paper_recipe_is_rehearsed():
    mixes = ("sources/paper.yaml", "sources/paper_capped.yaml")
    of_the_paper = {
        file.stem
        for file in (rehearsal.ROOT / "recipes").glob("*.yaml")
        if any(f"train: {mix}" in file.read_text() for mix in mixes)
    }
    assert of_the_paper == set(rehearsal.RECIPES)
