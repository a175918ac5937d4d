import json
from pathlib import Path

import pytest

from metaembed_pl.cli.main import main
from metaembed_pl.data.shards import ShardedPairs

SCRIPTS = Path(__file__).parents[2] / "data_prep"


def test_without_a_name_all_scripts_are_listed_in_a_line_each(capsys):
    assert main(["prepare"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = {file.stem for file in SCRIPTS.glob("*.py") if not file.name.startswith("_")}
    assert {line.split()[0] for line in lines} == expected
    assert len(lines) == len(expected) > 8
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


def test_a_script_runs_by_its_name_and_can_be_imported(tmp_path, capsys):
    from metaembed_pl.data_prep import pairs as script

    assert callable(script.products)
    pairs = [{"query": f"q {i}", "positive": f"p {i}"} for i in range(40)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)))
    command = ["prepare", "pairs", "--pairs", str(file), "--out", str(tmp_path / "out")]
    assert main([*command, "--num-workers", "2"]) == 0
    out = tmp_path / "out"
    assert sum(len(ShardedPairs(out / split)) for split in ("train", "test")) == 40
    record = ShardedPairs(out / "train").manifest["record"]
    assert record["command"].startswith("metaembed-pl prepare pairs --pairs ")
    with pytest.raises(SystemExit) as ended:
        main([*command, "--held-out", "7"])
    assert ended.value.code == 2
    assert "metaembed-pl prepare pairs: --held-out is a share" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(file.stem for file in SCRIPTS.glob("[!_]*.py")))
def test_help_of_a_script_is_the_scripts_own(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["prepare", name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: metaembed-pl prepare {name} ")
    assert f"python data_prep/{name}.py " in out


def test_a_script_that_is_not_there_is_told_with_those_that_are(capsys):
    assert main(["prepare", "pears"]) == 2
    err = capsys.readouterr().err
    assert "there is no script 'pears': choose one of colpali_train, folder" in err
