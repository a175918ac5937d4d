"""Processes that change a store, read it and are killed; `python store_changes.py WHAT FOLDER`.

Each is forked from one that has imported what they need: that takes seconds.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from metaembed_pl.retrieval import index_build
from metaembed_pl.retrieval.store import Store


def change(folder, told=None, until=10**9):
    """Adds, replaces, deletes and compacts; says the generation after each change."""
    store = Store.open(folder)
    while store.generation < until:
        seed = store.generation
        torch.manual_seed(seed)
        embeddings = torch.nn.functional.normalize(torch.randn(3, 8, 16), dim=-1)
        checks = [{"check": check} for check in embeddings[:, 0, 0].tolist()]
        store.add([f"{seed % 7}-{i}" for i in range(3)], embeddings, checks)
        if seed % 3 == 0:
            store.delete(store.ids[:2])
        if seed % 4 == 0:
            store.compact()
        if told is not None:
            os.write(told, b"%d\n" % store.generation)


def check(store):
    """Every item has its own vectors: their first component was said in its metadata."""
    checks = torch.tensor([value["check"] for value in store.metadata()])
    assert torch.allclose(store.vectors()[:, 0, 0], checks, atol=0.01), "mixed up"
    assert len(set(store.ids)) == len(store)


def read(folder):
    """Opens and searches until the store has changed often."""
    seen = set()
    while len(seen) < 25:
        store = Store.open(folder)
        check(store)
        hits = store.search(torch.randn(2, 4, 16), "4x1", top=3)
        assert all(set(ids) <= set(store.ids) for ids in hits.ids), "found what is not there"
        seen.add(store.generation)


def change_index(folder, told=None, until=10**9):
    """Adds, replaces, deletes and compacts a store with an index, which is extended and rebuilt."""
    index_build.LEFT_OUT_AT_MOST = 2
    store = Store.open(folder)
    while store.generation < until:
        seed = store.generation
        generator = torch.Generator().manual_seed(seed)
        embeddings = torch.nn.functional.normalize(
            torch.randn(3, 8, 16, generator=generator), dim=-1
        )
        store.add([f"{seed % 7}-{i}" for i in range(3)], embeddings)
        if seed % 3 == 0:
            store.delete(store.ids[:1])
        if seed % 5 == 0:
            store.compact()
        if store.index() is None or seed % 4 == 0:
            index_build.build(store)
        else:
            index_build.extend(store)


def check_index(store):
    """What the index finds is there, and what was added last is found."""
    if store.index() is None:
        return
    queries = store.vectors([0, len(store) - 1])[:, :4]
    hits = store.search(queries, cascade="each@.8:8,4x8:3")
    for query, (ids, scores) in enumerate(zip(hits.ids, hits.scores, strict=True)):
        assert set(ids) <= set(store.ids), "found what is not there"
        assert ids[0] == store.ids[[0, -1][query]], "did not find what is there"
        assert abs(scores[0] - 4) < 0.1


def index_killed_at_every_step(folder):
    """Kills who writes an index before its first, second, third, ... step on the disk."""
    numbers = set()
    for step in range(70):
        writer = fork(die_at, change_index, folder, step)
        assert os.waitpid(writer, 0)[1] == signal.SIGKILL, f"was not killed at step {step}"
        store = Store.open(folder)
        check_index(store)
        index = store.index()
        numbers.add((store.description.data, index and index.manifest.number))
    assert len(numbers) > 10, f"the writer was killed before it did anything: {numbers}"


def read_index(folder):
    """Opens and searches until the index has changed often."""
    seen = set()
    while len(seen) < 12:
        store = Store.open(folder)
        check_index(store)
        index = store.index()
        seen.add((store.description.data, index and index.manifest.number))


def index_read_beside_a_writer(folder):
    """Two processes read while one writes."""
    writer = fork(change_index, folder)
    readers = [fork(read_index, folder) for _ in range(2)]
    statuses = [os.waitpid(reader, 0)[1] for reader in readers]
    assert os.waitpid(writer, os.WNOHANG) == (0, 0), "the writer ended"
    os.kill(writer, signal.SIGKILL)
    assert statuses == [0, 0]


def fork(function, *arguments):
    """A process of its own that runs a function; its id."""
    child = os.fork()
    if child:
        return child
    try:
        function(*arguments)
        os._exit(0)
    except BaseException as error:
        print(type(error).__name__, error, flush=True)
        os._exit(1)


def kill_at_random(folder):
    """Kills a writer at random moments; nothing it told may be lost."""
    rng, told = random.Random(0), 0
    for _ in range(40):
        ours, theirs = os.pipe()
        writer = fork(change, folder, theirs)
        os.close(theirs)
        time.sleep(rng.uniform(0, 0.1))
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        with open(ours) as pipe:
            told = max([told, *map(int, pipe.read().split())])
        store = Store.open(folder)
        assert store.generation >= told, "what was told is lost"
        check(store)
    assert told > 20, f"the writer was killed before it did anything: {told}"


def kill_at_every_step(folder):
    """Kills a writer before its first, second, third, ... step on the disk."""
    generations = set()
    for step in range(60):
        writer = fork(die_at, change, folder, step)
        assert os.waitpid(writer, 0)[1] == signal.SIGKILL, f"was not killed at step {step}"
        store = Store.open(folder)
        check(store)
        generations.add(store.generation)
    assert len(generations) > 20, "the writer was killed before it did anything"


def die_at(function, folder, step):
    """Changes a store and kills itself before a step."""
    left = step

    def or_die(function):
        def stepping(*arguments, **keywords):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*arguments, **keywords)

        return stepping

    for name in ("fsync", "replace", "mkdir", "rmdir", "unlink"):
        setattr(os, name, or_die(getattr(os, name)))
    function(folder)


def read_beside_a_writer(folder):
    """Two processes read while one writes."""
    writer = fork(change, folder)
    readers = [fork(read, folder) for _ in range(2)]
    statuses = [os.waitpid(reader, 0)[1] for reader in readers]
    assert os.waitpid(writer, os.WNOHANG) == (0, 0), "the writer ended"
    os.kill(writer, signal.SIGKILL)
    assert statuses == [0, 0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    # What a killed process wrote is safe with the system; waiting for the disk only takes time.
    os.fsync = lambda file: None
    # What is slow the first time is done once, before there are processes.
    begin = change_index if sys.argv[1].startswith("index") else change
    begin(Path(sys.argv[2]), until=5)
    globals()[sys.argv[1]](Path(sys.argv[2]))
    print("fine")
