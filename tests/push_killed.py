"""Pushes that are killed after some of their items; `python push_killed.py STORE FOLDER`.

Each is forked from a process that has imported what they need: that takes seconds.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from metaembed_pl.retrieval.qdrant.layout import Layout
from metaembed_pl.retrieval.qdrant.push import push
from metaembed_pl.retrieval.store import Store
from qdrant_edge_folder import EdgeCollection
from store_changes import fork


def push_some(store, folder, told, count):
    """Sends one item at a time and says how many were sent; after `count` it waits to be killed.

    Without that wait, a busy machine may let it send everything before it is killed.
    """
    for done in push(store, EdgeCollection(folder), batch_size=1):
        os.write(told, b"%d\n" % done.sent)
        if done.sent == count:
            signal.pause()


def main(store, folder):
    """Kills five pushes; says how many each had sent."""
    rng, store = random.Random(0), Store.open(store)
    # What is slow the first time is done once, before there are processes.
    Layout.of(store).points(store.ids[:1], store.vectors([0]), store.metadata([0]), [""])
    for killed_after in (0, 1, 5, 9, 13):
        ours, theirs = os.pipe()
        pushing = fork(push_some, store, folder, theirs, killed_after + 2)
        os.close(theirs)
        with open(ours) as pipe:
            while killed_after and int(pipe.readline()) < killed_after:
                pass
            time.sleep(rng.uniform(0, 0.002))
            os.kill(pushing, signal.SIGKILL)
            assert os.waitpid(pushing, 0)[1] == signal.SIGKILL, "it ended before it was killed"
            told = [killed_after, *map(int, pipe.read().split())]
        print(max(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
