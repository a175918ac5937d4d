"""Shards that lie elsewhere: the same pairs, through a cache that holds what it promises."""

import http.server
import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import fsspec
import pytest

from metaembed_pl.data import remote
from metaembed_pl.data.batches import TrainingBatches
from metaembed_pl.data.plan import Plan
from metaembed_pl.data.remote import RemoteFile, ShardCache
from metaembed_pl.data.shards import ShardedPairs, ShardWriter
from metaembed_pl.errors import Unreachable, UserError
from metaembed_pl.item import Item, Pair

READ_ALL = """
import sys
from metaembed_pl.data.shards import ShardedPairs
print(len([pair.query.text for pair in ShardedPairs(sys.argv[1])]))
"""


def make_pair(i):
    return Pair(str(i), Item(f"query {i}"), Item(f"fruit {i}" + "!" * 5000))


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on 127.0.0.1, counts what was asked for, and can be slow."""

    def __init__(self, folder: Path):
        self.asked: Counter[str] = Counter()
        self.wait_s = 0.0
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that was killed is no fault of the server."""


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.asked[self.path] += 1
        super().do_GET()

    def copyfile(self, source, outputfile):
        if self.server.wait_s and self.path.endswith(".tar"):
            outputfile.write(source.read(5000))
            outputfile.flush()
            time.sleep(self.server.wait_s)
        super().copyfile(source, outputfile)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    with ShardWriter(root / "pets", "pets", pairs_per_shard=2) as writer:
        for i in range(9):
            writer.write(make_pair(i))
    return root


@pytest.fixture
def server(root):
    with Server(root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "WAIT_S", 0.0)
    return tmp_path / "cache"


def kept(cache):
    return [path for path in cache.iterdir() if path.is_file()]


def size_of(cache):
    return sum(path.stat().st_size for path in kept(cache))


def shard_size(root):
    return (root / "pets" / "00000.tar").stat().st_size


def test_a_web_server_gives_the_same_pairs_and_is_asked_once(root, server, cache):
    local = list(ShardedPairs(root / "pets"))
    pairs = ShardedPairs(f"{server.url}/pets/")
    assert set(server.asked) == {"/pets/manifest.json", "/pets/index.jsonl"}
    assert list(pairs) == local
    assert list(ShardedPairs(f"{server.url}/pets")) == local
    shards = {f"/pets/0000{i}.tar" for i in range(5)}
    assert all(server.asked[path] == 1 for path in shards | {"/pets/index.jsonl"})
    assert (pairs.name, pairs.shard_sizes) == ("pets", [2, 2, 2, 2, 1])


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_other_addresses_give_the_same_pairs(root, protocol, tmp_path):
    url = f"{protocol}://{tmp_path}/far/pets"
    filesystem = fsspec.filesystem(protocol)
    filesystem.put(f"{root}/pets", f"{tmp_path}/far/pets", recursive=True)
    assert list(ShardedPairs(url)) == list(ShardedPairs(root / "pets"))


def test_reads_after_pickling(root, server):
    pairs = pickle.loads(pickle.dumps(ShardedPairs(f"{server.url}/pets")))
    assert pairs[8] == make_pair(8)


def test_the_cache_stays_within_its_bytes_and_drops_what_was_used_longest_ago(root, server, cache):
    one = shard_size(root)
    held = ShardCache(cache, 3 * one)
    files = [
        RemoteFile(f"{server.url}/pets/{shard['file']}", shard["bytes"], shard["sha256"])
        for shard in ShardedPairs(root / "pets").manifest["shards"][:4]
    ]
    for number in (0, 1, 2, 0, 3):  # when 3 comes, 1 was used longest ago
        with held.open(files[number]) as file:
            assert len(file.read()) == one
        assert size_of(cache) <= 3 * one
    assert {path.name for path in kept(cache)} == {files[i].sha256 for i in (0, 2, 3)}
    with held.open(files[0]):
        pass
    assert server.asked["/pets/00000.tar"] == 1


def test_a_file_that_makes_room_can_be_read_on(root, server, cache):
    shards = ShardedPairs(root / "pets").manifest["shards"]
    held = ShardCache(cache, shard_size(root))
    first, second = (
        RemoteFile(f"{server.url}/pets/{s['file']}", s["bytes"], s["sha256"]) for s in shards[:2]
    )
    with held.open(first) as reading, held.open(second):
        assert len(reading.read()) == first.num_bytes
    assert [path.name for path in kept(cache)] == [second.sha256]


def test_a_shard_larger_than_the_cache_is_an_error(root, server, monkeypatch):
    monkeypatch.setenv("METAEMBED_CACHE_GB", "1e-6")
    pairs = ShardedPairs(f"{server.url}/pets")
    with pytest.raises(UserError, match=r"more than the cache limit of 1,000: set METAEMBED_CACHE"):
        pairs[0]


def spoiled(root, folder, spoil):
    """A copy of the shards whose first one is not what the manifest says."""
    for path in (root / "pets").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shard = folder / "00000.tar"
    shard.write_bytes(spoil(shard.read_bytes()))
    return f"file://{folder}"


@pytest.mark.parametrize(
    "spoil",
    [lambda b: b[:600] + b"X" + b[601:], lambda b: b[:-512], lambda b: b + b"more", lambda b: b""],
    ids=["flipped", "cut off", "longer", "empty"],
)
def test_a_shard_that_is_not_what_its_manifest_says_is_an_error_and_not_kept(
    root, tmp_path, cache, spoil
):
    (tmp_path / "far").mkdir()
    pairs = ShardedPairs(spoiled(root, tmp_path / "far", spoil))
    with pytest.raises(Unreachable, match=r"far/00000\.tar could not be read in 3 .* its manifest"):
        pairs[0]
    assert kept(cache) == []
    assert pairs[2] == make_pair(2)


def test_a_broken_connection_is_tried_again(root, server, monkeypatch):
    pairs = ShardedPairs(f"{server.url}/pets")
    copy, failures = remote._copy, [OSError("reset"), RuntimeError("of its own kind")]

    def fails_twice(file, target):
        if failures:
            raise failures.pop()
        copy(file, target)

    monkeypatch.setattr(remote, "_copy", fails_twice)
    assert pairs[0] == make_pair(0)


def test_what_cannot_be_reached_stops_training_instead_of_being_replaced(root, server):
    pairs = ShardedPairs(f"{server.url}/pets")
    plan = Plan([remote_source(pairs)], 4)
    batches = TrainingBatches([pairs], [0], plan, lambda items, side, image: {})
    server.shutdown()
    server.server_close()
    with pytest.raises(Unreachable, match=rf"{server.url}/pets/0000\d\.tar could not be read"):
        batches.load(0)


def remote_source(pairs):
    from metaembed_pl.data.recipe_sources import TrainSource

    return TrainSource(str(pairs.folder)).planned(pairs)


def test_two_processes_at_once_read_each_shard_once(server, cache):
    command = [sys.executable, "-c", READ_ALL, f"{server.url}/pets"]
    server.wait_s = 0.1
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in running] == [b"9\n", b"9\n"]
    assert {path: n for path, n in server.asked.items() if n > 1} == {"/pets/manifest.json": 2}
    assert all(path.suffix != ".part" for path in kept(cache))


def test_a_killed_process_leaves_nothing_that_counts(root, server, cache):
    server.wait_s = 60
    command = [sys.executable, "-c", READ_ALL, f"{server.url}/pets"]
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 60
    while not list(cache.glob("*.part")):
        assert time.monotonic() < deadline, "no download began"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.suffix for path in kept(cache)] == [".part"]
    server.wait_s = 0
    pairs = ShardedPairs(f"{server.url}/pets")
    assert pairs[8] == make_pair(8)  # of another shard: what the killed one left makes room
    assert all(path.suffix != ".part" for path in kept(cache))
    assert pairs[0] == make_pair(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "../../etc/passwd"}, r"sha256 '\.\./\.\./etc/passwd'"),
        ({"sha256": None}, "sha256 None: prepare the data again"),
        ({"file": "a b.tar"}, r"names 'a b\.tar'"),
        ({"file": "../x.tar"}, "is not a valid shard name"),
        ({"bytes": "1"}, "has '1' instead of a number"),
    ],
)
def test_refuses_a_manifest_that_would_lead_elsewhere(root, tmp_path, change, message):
    far = tmp_path / "far"
    far.mkdir()
    url = spoiled(root, far, lambda content: content)
    manifest = json.loads((far / "manifest.json").read_text())
    manifest["shards"][0] |= change
    (far / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        ShardedPairs(url)


def test_refuses_what_is_not_there_and_what_nothing_reads(server):
    with pytest.raises(Unreachable, match=r"/nothing/manifest\.json cannot be read"):
        ShardedPairs(f"{server.url}/nothing")
    with pytest.raises(UserError, match=r"gopher://a/manifest.json: .* metaembed-pl\[remote\]"):
        ShardedPairs("gopher://a")


@pytest.mark.parametrize("given", ["0", "-1", "many", "nan", "inf"])
def test_refuses_a_cache_without_room(given, monkeypatch):
    monkeypatch.setenv("METAEMBED_CACHE_GB", given)
    with pytest.raises(UserError, match=f"METAEMBED_CACHE_GB must be .* got '{given}'"):
        ShardCache.of_environment()
