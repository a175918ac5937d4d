"""Tables in place of shards: made once, told, found again, the same as `prepare pairs` makes."""

import json
import logging
import re

import pytest
import yaml

import hub
from metaembed_pl.cli.main import main
from metaembed_pl.data.datamodule import RetrievalDataModule
from metaembed_pl.data.recipe_sources import EvalSource, TrainSource
from metaembed_pl.data.recipe_tables import RecipeTable
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.data_prep import pairs as script
from metaembed_pl.errors import UserError

COLUMNS = {"query": "question", "positive_image": "page", "positive_id": "name"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAEMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def table(tmp_path):
    rows = [{"question": f"what {i}", "page": hub.png(i), "name": f"p{i}"} for i in range(30)]
    hub.write_parquet(tmp_path / "mine.parquet", rows, ("page",))
    return tmp_path / "mine.parquet"


def opened(**given):
    data = RetrievalDataModule([TrainSource(**given)], [EvalSource(**given)], global_batch_size=4)
    data.prepare_data()
    data.setup("fit")
    return data


def test_a_table_is_the_shards_that_prepare_makes_of_it(table, tmp_path):
    data = opened(path=str(table), columns=COLUMNS, held_out=0.3)
    told = ",".join(f"{key}={column}" for key, column in COLUMNS.items())
    command = ["--from", str(table), "--columns", told, "--held-out", "0.3", "--num-workers", "0"]
    assert script.main([*command, "--out", str(tmp_path / "out")]) == 0
    (trained,), (evaluated,) = data._shards, data.eval_sets["val"]
    assert list(trained) == list(ShardedPairs(tmp_path / "out" / "train"))
    tested = {pair.positive.id for pair in ShardedPairs(tmp_path / "out" / "test")}
    assert {item.id for item in evaluated.candidates} == tested
    assert trained.name == evaluated.name == "mine"
    assert tested
    assert not tested & {pair.positive.id for pair in trained}


def test_it_is_made_once_and_again_when_the_table_or_the_mapping_changes(table, caplog):
    caplog.set_level(logging.INFO)
    first = opened(path=str(table), columns=COLUMNS)
    assert f"{table}: made into shards once, in {first.tables()[0].folder}" in caplog.text
    assert f"{table}: 30 pairs in " in caplog.text
    assert len(first.eval_sets["val"][0].candidates) == len(first._shards[0]) == 30
    caplog.clear()
    assert opened(path=str(table), columns=COLUMNS).tables() == first.tables()
    assert "made into shards" not in caplog.text
    other = opened(path=str(table), columns={"query": "question", "positive": "name"})
    assert other._shards[0][0].positive.text == "p0"
    hub.write_parquet(
        table,
        [{"question": f"new {i}", "page": hub.png(1), "name": "n"} for i in range(8)],
        ("page",),
    )
    assert len(opened(path=str(table), columns=COLUMNS)._shards[0]) == 8


def test_what_a_killed_process_left_is_finished(table):
    table = RecipeTable(str(table), COLUMNS)
    (table.folder / ".train.partial").mkdir(parents=True)
    table.make()
    assert len(ShardedPairs(table.shards("train"))) == 30


def test_pairs_of_ones_own_need_no_mapping(tmp_path):
    (tmp_path / "page.png").write_bytes(hub.png(3))
    pairs = [{"query": f"q {i}", "positive": {"image": "page.png"}} for i in range(8)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    data = opened(path=str(tmp_path / "mine.jsonl"))
    assert [pair.query.text for pair in data._shards[0]] == [f"q {i}" for i in range(8)]


@pytest.mark.parametrize(("files", "read"), [("*", "*train*"), ("*val*", "*val*")])
def test_other_files_of_a_preset_may_be_chosen(files, read):
    assert TrainSource("preset:coco", files=files).table.files == read


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": "preset:coca"}, "preset:coca: presets with a place on the hub are colpali_train"),
        ({"path": "preset:megapairs"}, "presets with a place on the hub are"),
        ({"path": "data/pets", "held_out": 0.1}, "`files` and `held_out` are for tables: give"),
        ({"path": "x.csv", "held_out": 1.0}, "held_out is a share, 0 to below 1, not 1.0"),
        ({"path": "x/y.csv"}, "x/y.csv is neither a file, a folder"),
        ({"path": "nowhere", "columns": COLUMNS}, "nowhere is neither a file, a folder"),
        ({"path": "an/id", "columns": COLUMNS}, "cannot read an/id: the hub cannot be reached"),
    ],
)
def test_what_is_no_table_is_one_line(given, message):
    with pytest.raises(UserError, match=message) as refused:
        opened(**given)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("to_train", "to_test"), [(0.1, 0.2), (0.2, 0.1), (0.0, 0.1), (0.1, 0.0)])
def test_nothing_is_trained_on_and_evaluated_under_two_shares(to_train, to_test):
    train = TrainSource("x.csv", columns=COLUMNS, held_out=to_train)
    others = [EvalSource("x.csv", columns=COLUMNS, held_out=to_train), EvalSource("y.csv")]
    RetrievalDataModule([train], others)
    test = EvalSource("x.csv", columns=COLUMNS, held_out=to_test)
    told = f"x.csv has held_out {to_train:g} to train and {to_test:g} to evaluate on"
    with pytest.raises(UserError, match=re.escape(told)):
        RetrievalDataModule([train], others, [test])


def test_too_many_bad_pairs_name_the_command_with_the_flags(tmp_path):
    rows = [{"query": "q", "positive_image": picture} for picture in (hub.png(1), b"none")]
    hub.write_parquet(tmp_path / "x.parquet", rows)
    with pytest.raises(UserError, match=r"1 of 2 pairs cannot .*`metaembed-pl prepare pairs --fr"):
        opened(path=str(tmp_path / "x.parquet"))


def test_one_list_may_serve_training_and_validation(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text("data: {train: &mine [{path: x.csv, held_out: 0.2}], val: *mine}\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(file), "--run.name", "r", "--print_config"])
    told = yaml.safe_load(capsys.readouterr().out)["data"]
    (train,), (val,) = told["train"], told["val"]
    assert train["path"] == val["path"] == "x.csv"
    assert "weight" in train
    assert "max_queries" in val
