"""`mine` as a user runs it."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
from PIL import Image

import tiny
from metaembed_pl import progress
from metaembed_pl.cli.main import main
from metaembed_pl.data.shards import ShardedPairs


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("mine")
    tiny.embedder().save_pretrained(root / "model")
    tiny.shards(root / "a", 23, num_negatives=1)
    tiny.shards(root / "b", 11, num_negatives=1, first=100)
    return root


def arguments(root, out, *more):
    given = ["--model", root / "model", "--shards", root / "a", root / "b", "--out", out]
    given += ["--ratio", "1", "--batch-size", "4", *more]
    return ["mine", *map(str, given)]


@pytest.fixture(scope="module")
def mined(root):
    assert (
        main(arguments(root, root / "mined", "--num-negatives", "3", "b=2", "--skip-top", "1")) == 0
    )
    return root / "mined"


def digests(folder):
    return {
        path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.tar"))
    }


def test_new_shards_stand_beside_the_old_with_their_scores(root, mined):
    for name, num in (("a", 3), ("b", 2)):
        old, new = ShardedPairs(root / name), ShardedPairs(mined / name)
        assert [pair.id for pair in new] == [pair.id for pair in old]
        assert new.manifest["settings"]["mined"]["num"] == num
        for before, after in zip(old, new, strict=True):
            scores = [negative.score for negative in after.negatives]
            assert scores == sorted(scores, reverse=True)
            assert max(scores, default=-1) <= after.positive.score
            assert len(scores) <= num
            ids = {negative.id for negative in after.negatives}
            assert before.positive.id not in ids
            assert after.positive.image == before.positive.image
    assert not list(root.glob(".*.stores"))


def test_the_report_has_numbers_and_a_picture(mined):
    found = json.loads((mined / "report" / "mined.json").read_text())
    assert found["a"]["num_pairs"] == 23
    assert sum(found["a"]["num_negatives"].values()) == 23
    assert found["a"]["passed_over"]["known answers"] >= 1
    assert found["b"]["num_candidates"] == 11
    with Image.open(mined / "report" / "mined.png") as sheet:
        assert sheet.height > 12 * 150


MORE = ["--num-negatives", "3", "b=2", "--skip-top", "1"]


def test_a_second_run_writes_the_same_bytes(root, mined, tmp_path):
    assert main(arguments(root, tmp_path / "again", *MORE, "--store", tmp_path / "kept")) == 0
    assert digests(tmp_path / "again") == digests(mined)
    assert (tmp_path / "kept" / "a" / "manifest.json").exists()


def test_two_processes_write_the_same_bytes_too(root, mined, tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*run, "-m", "metaembed_pl", *arguments(root, tmp_path / "two", *MORE)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        told, errors = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    assert told.count("report: ") == 1
    assert digests(tmp_path / "two") == digests(mined)


def test_old_negatives_are_kept_when_asked_and_more_may_be_mined_from(root, tmp_path, capsys):
    (tmp_path / "more.jsonl").write_text("".join(f'"{tiny.text(i)}"\n' for i in range(30, 40)))
    corpus = tmp_path / "more.jsonl"
    given = arguments(root, tmp_path / "out", "--keep", "--num-negatives", "20", "--corpus", corpus)
    assert main(given) == 0
    assert "b: " in capsys.readouterr().out
    pairs = ShardedPairs(tmp_path / "out" / "b")
    assert pairs[0].negatives[0] == ShardedPairs(root / "b")[0].negatives[0]
    assert any(negative.text for pair in pairs for negative in pair.negatives)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-negatives", "many"], r"NAME=N with one of a, b; got 'many'"),
        (["--num-negatives", "4", "c=2"], "got 'c=2'"),
        (["--depth", "0"], "--depth must be at least 1, got 0"),
        (["--margin", "-1"], "margin must be at least 0, got -1.0"),
        (["--budget", "1x1", "--cascade", "1x1:5"], "one of --budget, --cascade and"),
        (["--cascade", "1x1:5", "--depth", "9"], "--depth is set by the last stage of --cascade"),
        (["--target-recall", "2"], "--target-recall must be above 0 and at most 1, got 2.0"),
        (["--budget", "3x3"], "budget 3x3: the model was not trained at 3"),
        (["--shards", "{root}/a", "{root}/a"], "names of the shards must differ, got a, a"),
        (["--corpus", "{root}/nowhere.jsonl"], "cannot read {root}/nowhere.jsonl"),
    ],
)
def test_says_what_is_wrong_in_one_line(root, tmp_path, capsys, more, message):
    more = [argument.format(root=root) for argument in more]
    assert main(arguments(root, tmp_path / "out", *more)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message.format(root=root) in line
    assert not (tmp_path / "out").exists()


def test_mines_through_an_index_at_a_recall_that_is_told(root, mined, tmp_path, capsys):
    pytest.importorskip("faiss")
    given = ["--target-recall", "1", "--depth", "20", "--store", tmp_path / "kept", *MORE]
    assert main(arguments(root, tmp_path / "out", *given)) == 0
    err = capsys.readouterr().err
    assert "which finds 1.000 of the first 20 of the exact ranking, by 23 of its queries" in err
    assert list((tmp_path / "kept" / "a").glob("data-*/index/index.json"))
    for name in ("a", "b"):
        for pair, same in zip(
            ShardedPairs(tmp_path / "out" / name), ShardedPairs(mined / name), strict=True
        ):
            ids = {negative.id for negative in pair.negatives}
            assert len(ids & {negative.id for negative in same.negatives}) >= len(ids) - 1


def test_progress_counts_queries_up_to_the_last(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    assert main(arguments(root, tmp_path / "out", "--num-negatives", "1")) == 0
    err = capsys.readouterr().err
    assert "mining a: 23 of 23 queries, " in err
    assert "mining b: 11 of 11 queries, " in err
    assert "embedding b: 11 of 11 candidates, " in err


def test_refuses_to_write_over_what_is_there(root, mined, capsys):
    assert main(arguments(root, mined)) == 2
    assert "mined/a exists already" in capsys.readouterr().err


def test_a_kept_store_of_other_candidates_is_refused(root, tmp_path, capsys):
    kept = ["--store", str(tmp_path / "kept")]
    assert main(arguments(root, tmp_path / "one", *kept)) == 0
    assert main(arguments(root, tmp_path / "two", *kept)) == 0
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    capsys.readouterr()
    more = ["--candidate-instruction", "Name it:"]
    assert main(arguments(root, tmp_path / "three", *kept, *more)) == 2
    assert "kept/a holds vectors of other candidates" in capsys.readouterr().err


def test_mines_into_the_current_folder(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments(root, ".", "--num-negatives", "1")) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "report"]
