"""Pairs of one's own: what is held out stays out, what is bad is said."""

import importlib.util
import json
from pathlib import Path

import pytest

import tiny
from metaembed_pl.data.shards import ShardedPairs

SCRIPT = Path(__file__).parents[2] / "data_prep" / "pairs.py"


def load_script():
    spec = importlib.util.spec_from_file_location("data_prep_pairs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def write_pairs(folder: Path, count: int = 60, bad: int = 0, num_candidates: int = 30) -> Path:
    """`count` pairs over `num_candidates` pictures, each with two hard negatives."""
    (folder / "pictures").mkdir(parents=True)
    for i in range(num_candidates):
        tiny.picture(i).save(folder / "pictures" / f"{i}.png")
    for i in range(bad):
        (folder / "pictures" / f"bad{i}.png").write_bytes(b"no picture")
    lines = []
    for i in range(count):
        own = i % num_candidates
        name = f"bad{i}" if i < bad else own
        others = [(own + 1) % num_candidates, (own + 2) % num_candidates]
        lines.append(
            {
                "query": tiny.text(i),
                "positive": {"image": f"pictures/{name}.png", "id": f"thing {own}"},
                "negatives": [{"image": f"pictures/{j}.png", "id": f"thing {j}"} for j in others],
            }
        )
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def run(file: Path, out: Path, *options: str) -> int:
    return script.main(["--pairs", str(file), "--out", str(out), *options])


def candidates(folder: Path) -> set[str]:
    return {pair.positive.uid for pair in ShardedPairs(folder)}


def negatives(folder: Path) -> set[str]:
    return {item.uid for pair in ShardedPairs(folder) for item in pair.negatives}


def test_held_out_candidates_are_in_no_training_pair_on_any_side(tmp_path):
    file = write_pairs(tmp_path / "mine")
    assert run(file, tmp_path / "out", "--held-out", "0.3") == 0
    train, test = tmp_path / "out" / "train", tmp_path / "out" / "test"
    assert len(ShardedPairs(train)) + len(ShardedPairs(test)) == 60
    assert candidates(train) | candidates(test) == {f"thing {i}" for i in range(30)}
    assert not (candidates(train) | negatives(train)) & candidates(test)
    assert negatives(test) & candidates(train)  # a test may show what training has seen


def test_more_pairs_move_no_candidate_to_the_other_side(tmp_path):
    for count in (40, 60):
        file = write_pairs(tmp_path / f"mine{count}", count)
        assert run(file, tmp_path / f"out{count}", "--held-out", "0.3") == 0
    assert candidates(tmp_path / "out40" / "test") == candidates(tmp_path / "out60" / "test")


def test_nothing_held_out_makes_no_test(tmp_path, capsys):
    assert run(write_pairs(tmp_path / "mine"), tmp_path / "out", "--held-out", "0") == 0
    assert len(ShardedPairs(tmp_path / "out" / "train")) == 60
    assert not (tmp_path / "out" / "test").exists()
    assert "60 pairs" in capsys.readouterr().out


def test_a_bad_picture_is_left_out_named_and_counted(tmp_path, capsys):
    file = write_pairs(tmp_path / "mine", bad=2)
    assert run(file, tmp_path / "out", "--max-dropped", "0.1") == 0
    printed = capsys.readouterr()
    assert "dropped pairs:1: " in printed.err
    assert "dropped: 2" in printed.out
    kept = [len(ShardedPairs(tmp_path / "out" / split)) for split in ("train", "test")]
    assert sum(kept) == 58


@pytest.mark.parametrize(
    ("options", "bad", "message"),
    [
        (("--max-dropped", "0.01"), 3, "3 of 60 pairs cannot be used, more than --max-dropped"),
        (("--held-out", "1.5"), 0, "--held-out is a share, 0 to below 1, not 1.5"),
        (("--held-out", "0.001"), 0, "no pair fell to test with --held-out 0.001"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(tmp_path, capsys, options, bad, message):
    file = write_pairs(tmp_path / "mine", bad=bad)
    assert run(file, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_a_broken_line_is_named(tmp_path, capsys):
    file = write_pairs(tmp_path / "mine")
    file.write_text(file.read_text().replace('"query"', '"qwery"', 1))
    assert run(file, tmp_path / "out") == 2
    assert "pairs.jsonl:1: a pair has unknown key 'qwery'" in capsys.readouterr().err


def test_shards_that_are_there_stay_unless_forced(tmp_path, capsys):
    file = write_pairs(tmp_path / "mine")
    assert run(file, tmp_path / "out") == 0
    assert run(file, tmp_path / "out") == 2
    assert "is not empty" in capsys.readouterr().err
    assert run(file, tmp_path / "out", "--force") == 0
