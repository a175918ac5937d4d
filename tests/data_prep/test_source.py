"""What all scripts share: nothing twice after a kill, nothing half-written, nothing lost unsaid."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hub
from metaembed_pl.data.parallel import in_order
from metaembed_pl.data.product import Product, check, is_held_out
from metaembed_pl.data.shards import ShardedPairs, verify
from metaembed_pl.data_prep import infoseek, moca_pairs, pdf
from metaembed_pl.data_prep._source import run
from metaembed_pl.item import Item

ROOT = Path(__file__).parents[2]


def draft(number, **more):
    return {
        "id": f"row:{number}",
        "query": f"what is {number}?",
        "positive": {"image": hub.png(number)},
        **more,
    }


def make(folder, drafts, *options, **product):
    """Run a script that makes one product of some drafts."""
    taken = []

    def all_of_them():
        for value in drafts:
            taken.append(value["id"])
            yield value

    def products(options: argparse.Namespace):
        yield Product("things", folder, all_of_them, "a test", **product)

    status = run("test", "A test.", products, lambda parser: None, ["--num-workers=0", *options])
    return status, taken


def ids(folder):
    return [pair.id for pair in ShardedPairs(folder)]


def test_processes_and_no_processes_write_the_same_shards_in_the_same_order(tmp_path):
    drafts = [draft(number % 40) | {"id": f"row:{number}"} for number in range(100)]
    drafts[7]["positive"] = {"image": b"no picture"}
    for workers in ("0", "2"):
        more = ("--num-workers", workers, "--max-dropped", "0.1")
        assert make(tmp_path / workers, drafts, *more)[0] == 0
    tars = [sorted((tmp_path / workers).glob("*.tar")) for workers in ("0", "2")]
    assert [path.read_bytes() for path in tars[0]] == [path.read_bytes() for path in tars[1]]
    assert ids(tmp_path / "2") == [f"row:{number}" for number in range(100) if number != 7]


def test_what_is_finished_is_kept_and_other_settings_do_not_replace_it(tmp_path, capsys):
    out = tmp_path / "out"
    drafts = [draft(number) for number in range(5)]
    assert make(out, drafts) == (0, [value["id"] for value in drafts])
    (out / "README.md").unlink()  # as if a kill came before the card
    assert make(out, drafts) == (0, [])
    assert "kept" in capsys.readouterr().out
    assert (out / "README.md").exists()
    assert make(out, drafts, "--limit", "3")[0] == 2
    assert "is not empty" in capsys.readouterr().err
    assert len(ShardedPairs(out)) == 5
    assert make(out, drafts, "--limit", "3", "--force")[0] == 0
    assert ids(out) == ["row:0", "row:1", "row:2"]


class Killed(BaseException):
    pass


def test_a_run_that_was_cut_off_goes_on_behind_its_last_whole_shard(tmp_path):
    drafts = [{"id": f"row:{n}", "query": "a", "positive": f"b {n}"} for n in range(2500)]
    drafts[3]["positive"] = {"image": b"no picture"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert make(whole, drafts)[0] == 0

    def until_killed():
        yield from drafts[:2400]
        raise Killed

    with pytest.raises(Killed):
        make(cut, until_killed())
    assert not cut.exists()
    partial = tmp_path / ".cut.partial"
    (partial / "00009.tar").write_bytes(b"of a shard that was never finished")
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("0000[01].tar")}
    assert len(kept) == 2
    assert make(cut, drafts)[0] == 0
    assert not partial.exists()
    for name, written in kept.items():
        assert (cut / name).stat().st_mtime_ns == written
    verify(cut)
    assert [path.read_bytes() for path in sorted(cut.glob("*.tar"))] == [
        path.read_bytes() for path in sorted(whole.glob("*.tar"))
    ]
    record = ShardedPairs(cut).manifest["record"]
    assert record["rows"] == 2500
    assert record["dropped"] == {"the image does not decode": 1}


def test_a_run_of_other_settings_takes_nothing_over(tmp_path):
    def until_killed():
        yield from ({"id": f"old:{n}", "query": "a", "positive": "b"} for n in range(1200))
        raise Killed

    with pytest.raises(Killed):
        make(tmp_path / "out", until_killed(), settings={"from": "an old copy"})
    drafts = [draft(number) for number in range(3)]
    assert make(tmp_path / "out", drafts, settings={"from": "a new copy"})[0] == 0
    assert ids(tmp_path / "out") == ["row:0", "row:1", "row:2"]


SLOW = """
import sys, time
from pathlib import Path
from metaembed_pl.data.product import Product
from metaembed_pl.data_prep._source import run

def drafts():
    for number in range(1300):
        yield {"id": f"row:{number}", "query": "a", "positive": f"b {number}"}
    time.sleep(60)

product = Product("things", Path(sys.argv[1]), drafts, "a test")
run("test", "", lambda options: [product], lambda parser: None, ["--num-workers=0"])
"""


def test_a_kill_leaves_whole_shards_and_the_same_command_finishes(tmp_path):
    out, progress = tmp_path / "out", tmp_path / ".out.partial" / "progress.json"
    path = os.pathsep.join([str(ROOT / "src"), *sys.path])
    command = [sys.executable, "-c", SLOW, str(out)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    while not progress.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not out.exists()
    drafts = [{"id": f"row:{n}", "query": "a", "positive": f"b {n}"} for n in range(1500)]
    assert make(out, drafts)[0] == 0
    assert ids(out) == [value["id"] for value in drafts]
    assert json.loads((out / "manifest.json").read_text())["record"]["rows"] == 1500


def test_what_is_bad_is_dropped_named_and_counted_by_its_kind(tmp_path, capsys):
    drafts = [draft(number) for number in range(8)]
    drafts[0]["query"] = {"text": "", "image": None}
    drafts[1]["positive"] = {"image": hub.png(1)[:60]}
    drafts[2]["positive"] = {"image": tmp_path / "nowhere.png"}
    drafts[3]["query"] = "a lone \ud800 surrogate"
    assert make(tmp_path / "out", drafts, "--max-dropped", "0.5")[0] == 0
    printed = capsys.readouterr()
    assert "dropped row:2: picture cannot be read: nowhere.png (No such file" in printed.err
    assert "dropped: 4 (" in printed.out
    counts = ShardedPairs(tmp_path / "out").manifest["record"]["dropped"]
    assert counts == {
        "empty query": 1,
        "the image does not decode": 1,
        "picture cannot be read": 1,
        "an item's text is not valid Unicode": 1,
    }
    assert ids(tmp_path / "out") == [f"row:{number}" for number in range(4, 8)]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Dropped pairs**: 4 (" in card
    assert "picture cannot be read: 1" in card


def test_a_bad_hard_negative_is_left_out_and_its_pair_stays():
    wrong = [b"no picture", {"image": b"no picture"}, {"image": hub.png(5)}, {"text": ""}]
    checked = check(draft(5, negatives=[*wrong[1:], {"text": "a fox"}]))
    assert [item.text for item in checked.pair.negatives] == ["a fox"]
    assert len(checked.left_out) == 3
    assert "hard negative equals the positive" in checked.left_out


def test_held_out_candidates_are_tested_on_and_never_trained_on():
    drafts = [draft(n, negatives=[{"image": hub.png(m)} for m in range(30)]) for n in range(30)]
    owned = {n for n in range(30) if is_held_out(Item(image=hub.png(n)).uid, 0.3)}
    assert 0 < len(owned) < 30
    for split, own in (("train", set(range(30)) - owned), ("test", owned)):
        pairs = [check(value, 0.3, split).pair for value in drafts]
        assert {n for n, pair in enumerate(pairs) if pair} == own
        for pair in filter(None, pairs):
            seen = {item.uid for item in pair.negatives}
            hidden = {Item(image=hub.png(n)).uid for n in owned}
            assert bool(seen & hidden) == (split == "test")


def test_too_much_to_drop_stops_early_and_leaves_nothing(tmp_path, capsys):
    taken = 0

    def drafts():
        nonlocal taken
        for number in range(5000):
            taken += 1
            yield {"id": f"row:{number}", "query": "a", "positive": {"image": b"no picture"}}

    assert make(tmp_path / "out", drafts())[0] == 2
    error = capsys.readouterr().err
    assert "pairs cannot be used, more than --max-dropped 0.01 (the image does not" in error
    assert taken < 1100
    assert not list(tmp_path.iterdir())


def test_a_card_that_is_not_ours_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "README.md").write_text("my project")
    assert make(tmp_path, [draft(0)], held_out=0.0)[0] == 2
    assert "README.md exists already and was not written" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "my project"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", "0"), "--limit must be at least 1, not 0"),
        (("--num-workers", "-1"), "--num-workers must be at least 0, not -1"),
        (("--max-dropped", "7"), "--max-dropped is a share, 0 to 1, not 7"),
    ],
)
def test_flags_that_make_no_sense_are_one_line(tmp_path, capsys, options, message):
    assert make(tmp_path / "out", [draft(0)], *options)[0] == 2
    assert capsys.readouterr().err == f"metaembed-pl prepare test: {message}\n".replace(
        "not 7", "not 7.0"
    )


def test_the_card_tells_counts_licence_source_checksum_and_command(tmp_path):
    out = tmp_path / "out"
    more = {"licence": "CC0-1.0", "note": "Drawn by hand.", "settings": {"from": "here"}}
    assert make(out, [draft(number) for number in range(3)], **more)[0] == 0
    card = (out / "README.md").read_text()
    manifest = json.loads((out / "manifest.json").read_text())
    digest = hashlib.sha256((out / "manifest.json").read_bytes()).hexdigest()
    for words in ("| 3 |", "CC0-1.0", "a test", "Drawn by hand.", digest, "from here"):
        assert words in card
    assert manifest["record"]["command"] == "metaembed-pl prepare test --num-workers=0"
    assert manifest["record"]["command"] in card
    assert make(out, [draft(0)], "--force", "--licence", "MIT", **more)[0] == 0
    assert ShardedPairs(out).manifest["licence"] == "MIT"


def test_jobs_are_taken_a_bounded_amount_ahead():
    taken = 0

    def jobs():
        nonlocal taken
        for number in range(4000):
            taken += 1
            yield -number

    results = in_order(abs, jobs(), 2, chunk=10)
    for number in range(100):
        assert next(results) == number
        assert taken <= number + 80
    results.close()


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    (tmp_path / "numbers_of.py").write_text("import os\ndef own(_): return os.getpid()\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import itertools, os, signal\n"
        "from metaembed_pl.data.parallel import in_order\n"
        "import numbers_of\n"
        "if __name__ == '__main__':\n"
        "    some = in_order(numbers_of.own, range(10**9), 2, chunk=1)\n"
        "    print(*set(itertools.islice(some, 200)), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    workers = [Path("/proc") / number for number in said.stdout.split()]
    assert workers, said.stderr
    for _ in range(100):
        if not any(worker.exists() for worker in workers):
            return
        time.sleep(0.1)
    raise AssertionError(f"still there: {workers}")


@pytest.mark.parametrize(
    ("script", "flag"),
    [(infoseek, "--num-negatives"), (moca_pairs, "--hold-out"), (pdf, "--words")],
)
def test_numbers_below_zero_are_refused(script, flag, tmp_path, capsys):
    assert script.main([flag, "-1", "--from", str(tmp_path), "--out", str(tmp_path / "o")]) == 2
    assert f"{flag} must be at least 0, not -1" in capsys.readouterr().err
