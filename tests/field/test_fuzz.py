"""2,000 spoiled files: each is read, or refused in one line, soon, and nothing else is written.

The seed is fixed: a failure is the same anywhere, and its message names what was spoiled and how.
"""

import json
import random
import resource
import time

import pytest
import torch

import hub
import tiny
import tiny_run
from metaembed_pl.cli.main import one_line
from metaembed_pl.cli.recipe_faults import read_recipe
from metaembed_pl.data.mapping import open_rows
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.errors import UserError
from metaembed_pl.item import read_items
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.identity import identity_of
from metaembed_pl.retrieval.calibration import CALIBRATION_FILE, Calibration, choose, measure
from metaembed_pl.retrieval.store import Store

LONGEST_S, MOST_BYTES = 5.0, 400_000_000
VALUES = [None, True, 0, -1, 10**30, 1.5, "", "x", "../x", "/etc/passwd", "\ud800", [], [[]], {}]
NOISE = [b"\0", b"\xff", b'"', b"{", b"[" * 50, b"9" * 40, b"NaN", b"\n", b"../", b": ", b"&a *a"]


def spoiled_bytes(chance, content):
    """Content with a few bytes changed, cut out, repeated or put in."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(content) + 1)
        end = min(len(content), at + chance.choice([1, 4, 64, 1000]))
        how = chance.randrange(5)
        if how == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            del content[at:end]
        elif how == 2:
            content[at:at] = content[at:end]
        elif how == 3:
            content[at:at] = chance.choice(NOISE)
        else:
            del content[at:]
    return bytes(content)


def spoiled_value(chance, value):
    """JSON with one of its values replaced, or one of its keys."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        if chance.random() < 0.1:
            return {("x" if k == key else k): v for k, v in value.items()}
        return value | {key: spoiled_value(chance, value[key])}
    if isinstance(value, list) and value and chance.random() < 0.9:
        at = chance.randrange(len(value))
        return [*value[:at], spoiled_value(chance, value[at]), *value[at + 1 :]]
    return chance.choice(VALUES)


def spoiled(chance, content):
    """Half of the time as text that is still JSON, line by line, where it was."""
    if chance.random() < 0.5:
        try:
            lines = content.decode().split("\n") if content.count(b"}\n{") else [content.decode()]
            at = chance.randrange(len(lines))
            lines[at] = json.dumps(spoiled_value(chance, json.loads(lines[at])))
            return "\n".join(lines).encode()
        except ValueError:
            pass
    return spoiled_bytes(chance, content)


class Good:
    """Good files of every kind, and what reads them."""

    def __init__(self, root):
        self.root = root
        model = tiny.embedder(("1x1", "2x4"))
        for kind in ("pairs", "recipes", "shards", "stores", "calibrations", "models"):
            (root / kind).mkdir()
        rows = [
            {"id": f"{i}", "query": tiny.text(i), "positive": tiny.text(i + 9)} for i in range(4)
        ]
        lines = [{**row, "positive": {"text": row["positive"], "id": row["id"]}} for row in rows]
        (root / "pairs/p.jsonl").write_text("\n".join(map(json.dumps, lines)))
        csv = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        (root / "pairs/p.csv").write_text("\n".join(csv))
        hub.write_parquet(root / "pairs/p.parquet", rows)
        tiny_run.recipe(root, root / "recipes")
        tiny.shards(root / "shards/s", 4, pairs_per_shard=2)
        for kind in ("stores", "calibrations"):
            store = Store.create(root / kind / "s", model.groups, model.width, identity_of(model))
            texts = [tiny.text(i) for i in range(12)]
            store.add(texts, model.encode_candidate(texts), [{"lang": "en"}] * 12)
        measure(store, model.encode_query).save(store)
        model.save_pretrained(root / "models/m")

    def files(self, kind):
        """Those that are spoiled."""
        if kind == "calibrations":
            return [self.root / "calibrations/s" / CALIBRATION_FILE]
        found = (file for file in (self.root / kind).rglob("*") if file.is_file())
        return sorted(file for file in found if not file.name.startswith("."))

    def read(self, kind, file):
        """Everything that a user's command would read of it."""
        if kind == "pairs":
            list(open_rows(str(file)).drafts())
            if file.suffix == ".jsonl":
                read_items(file)
        elif kind == "recipes":
            read_recipe(file)
        elif kind == "shards":
            pairs = ShardedPairs(self.root / "shards/s")
            for i in range(len(pairs)):
                try:
                    pairs[i].positive.load_image()
                except UserError:
                    continue
        elif kind == "models":
            MetaEmbedder.from_pretrained(self.root / "models/m").encode_query(["red"])
        else:
            store = Store.open(self.root / kind / "s")
            calibration = Calibration.load(store)
            choose(store, calibration, 0.9)
            queries = torch.nn.functional.normalize(torch.ones(1, 2, store.width), dim=-1)
            store.metadata(store.search(queries, "2x4").rows[0])


COUNTS = {
    "pairs": 700,
    "shards": 500,
    "stores": 400,
    "calibrations": 200,
    "recipes": 80,
    "models": 120,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return Good(tmp_path_factory.mktemp("good"))


def test_there_are_two_thousand():
    assert sum(COUNTS.values()) == 2000


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of libraries, about what they read
@pytest.mark.parametrize("kind", COUNTS)
def test_spoiled_files_are_read_or_refused(good, kind):
    chance = random.Random(f"{kind} 0")
    root = str(good.root).encode()
    files, before = good.files(kind), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    there = {path for path in good.root.rglob("*") if "datasets" not in path.parts}
    refused = []
    for number in range(COUNTS[kind]):
        file = chance.choice(files)
        content = file.read_bytes()
        # The same mutants wherever the test runs: its folder has another name each time.
        bad = spoiled(chance, content.replace(root, b"/good")).replace(b"/good", root)
        file.write_bytes(bad)
        started = time.monotonic()
        try:
            good.read(kind, file)
        except UserError as error:
            refused.append(one_line(error))
        except BaseException as error:
            shown = bad if len(bad) < 2000 else bad[:100]
            raise AssertionError(f"{kind} {number}: {file.name} became {shown!r}") from error
        finally:
            file.write_bytes(content)
        assert time.monotonic() - started < LONGEST_S, f"{kind} {number}: {file.name} takes long"
    assert len(refused) > COUNTS[kind] // 10 or kind == "calibrations"
    assert all(refused), "each says why"
    assert {path for path in good.root.rglob("*") if "datasets" not in path.parts} <= there
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 1024 * (after - before) < MOST_BYTES
