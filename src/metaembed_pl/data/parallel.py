"""Parallel work on all cores: in order, with a bounded queue."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    num_workers: int,
    chunk: int = 32,
) -> Iterator[Result]:
    """Map a function over jobs in worker processes; results are in the order of the jobs.

    Jobs are read lazily, two chunks per worker ahead, so memory does not grow with their number.

    Args:
        function: at the top level of a module, since other processes import it by name.
        jobs: its arguments.
        num_workers: processes; below 2, everything runs in this one.
        chunk: jobs sent to a process at a time.
    """
    jobs = iter(jobs)
    first = list(islice(jobs, chunk))
    if num_workers < 2 or len(first) < chunk:  # a few jobs end before a process has started
        yield from map(function, chain(first, jobs))
        return
    chunks = chain([first], iter(lambda: list(islice(jobs, chunk)), []))
    waiting: deque[Future[list[Result]]] = deque()
    # spawn: a fork beside the progress bar's thread can hang.
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=_end_with_parent)
    try:
        for some in chunks:
            waiting.append(pool.submit(_apply, function, some))
            if len(waiting) > 2 * num_workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def count_cores() -> int:
    """The number of cores that this process may use, at most 8."""
    cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    return min(8, len(cores))


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed; it would else wait for work for ever."""

    def wait() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _apply(function: Callable[[Job], Result], jobs: list[Job]) -> list[Result]:
    return [function(job) for job in jobs]
