"""`data show` as a user sees it."""

import json

import pytest
from PIL import Image

import tiny
from metaembed_pl.cli.main import main


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny.shards(root / "train", 12, num_negatives=2)
    tiny.shards(root / "test", 5, num_negatives=0, first=10)
    return root


def test_shows_every_folder_below_and_what_they_share(root, capsys):
    assert main(["data", "show", str(root)]) == 0
    out = capsys.readouterr().out
    test, train, leak = out.split("\n\n")
    assert train.startswith(f"{root / 'train'}: train\n  pairs       12 in 2 shards, 0 unusable")
    assert "negatives   2: 12 (number of them: pairs)" in train
    assert "negatives   0: 5 (number of them: pairs)" in test
    assert "width       min 56, 5% 56, median 56, 95% 56, max 56 (36 PNG)" in train
    assert "2 texts, 2 pictures, 2 pairs" in leak
    assert "pairs of pairs such as pair-10, pair-11" in leak


def test_as_json(root, capsys):
    assert main(["data", "show", str(root / "train"), str(root / "test"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [source["num_pairs"] for source in found["sources"]] == [12, 5]
    assert found["shared"][0]["num_pairs"] == 2


def test_draws_a_contact_sheet(root, tmp_path, capsys):
    sheet = tmp_path / "pairs.png"
    assert main(["data", "show", str(root / "train"), "--sheet", str(sheet), "--num", "3"]) == 0
    with Image.open(sheet) as drawn:
        assert drawn.height > 3 * 150  # a row is more than an inch at 150 dots
        pixels = drawn.convert("RGB").resize((60, 60)).getcolors(3600)
    assert len(pixels) > 500  # pictures of noise, not an empty page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{root}/nowhere"], "no folder of shards at {root}/nowhere"),
        (["{root}", "--num", "0", "--sheet", "x.png"], "--num must be at least 1, got 0"),
        (["{root}", "--num", "3"], "--num needs --sheet FILE.png"),
    ],
)
def test_says_what_is_wrong_in_one_line(root, capsys, arguments, message):
    assert main(["data", "show", *(a.format(root=root) for a in arguments)]) == 2
    assert capsys.readouterr().err.startswith(f"metaembed-pl: {message.format(root=root)}")
