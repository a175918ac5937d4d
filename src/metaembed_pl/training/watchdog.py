"""Stop a process that hangs, and report where it is stuck.

If one rank never reaches a collective, the others wait for half an hour, and their error names
neither batch nor step. So a thread on every rank checks when its main thread last made progress. It
also stops a rank whose launcher has exited.

    >>> with Watch() as watch:
    ...     watch.timeout_s = 900
    ...     watch.note("training step 3, source pets, pairs 1, 2")
    ...     watch.where
    'rank 0, training step 3, source pets, pairs 1, 2'
"""

import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

STATUS = 3  # of a process that is ended here
POLL_S = 0.5
GRACE_S = 2.0  # in which other ranks can say where they are, before the end of this one ends them
NUM_FRAMES = 12  # innermost ones, of what is shown of a stack


class Watch:
    """A thread that ends this process without progress, or when its launcher has exited.

    Attributes:
        timeout_s: longest time without progress; 0: any.
        rank: of this process.
    """

    def __init__(self) -> None:
        self.timeout_s = 0.0
        self.rank = "rank 0"
        # Set for what Lightning's launcher or torchrun has started, and not yet for others.
        self._launcher = os.getppid() if "LOCAL_RANK" in os.environ else None
        self._main = threading.get_ident()
        self._noted: tuple[str] | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def note(self, doing: str) -> None:
        """Records progress, and what the main thread does from now on."""
        self._noted = (doing,)  # a new object each time, so that the same words count as well

    def rest(self) -> None:
        """From now on no progress is expected."""
        self._noted = None

    @property
    def rests(self) -> bool:
        """Whether no progress is expected."""
        return self._noted is None

    @property
    def doing(self) -> str:
        """The last note."""
        return self._noted[0] if self._noted else "at rest"

    @property
    def where(self) -> str:
        """The rank and its last note."""
        return f"{self.rank}, {self.doing}"

    def _run(self) -> None:
        seen, still_s, then = None, 0.0, time.monotonic()
        while not self._is_over.wait(POLL_S):
            now = time.monotonic()
            # While the process is suspended, this thread stands still too: that does not count.
            still_s = still_s + min(now - then, 2 * POLL_S) if seen is self._noted else 0.0
            seen, then = self._noted, now
            if self._launcher is not None and os.getppid() != self._launcher:
                self._end("its launcher has exited or was killed")
            if seen is not None and self.timeout_s and still_s > self.timeout_s:
                self._end(f"no progress for {still_s:.0f} s (run.stall_timeout_s)", GRACE_S)

    def _end(self, why: str, grace_s: float = 0.0) -> NoReturn:
        stack = traceback.extract_stack(sys._current_frames()[self._main])
        waits = f"{stack[-1].name} ({Path(stack[-1].filename).name}:{stack[-1].lineno})"
        frames = "".join(traceback.format_list(stack[-NUM_FRAMES:]))
        message = f"metaembed-pl: {self.where}: {why}; it is waiting in {waits}:\n{frames}"
        message += f"metaembed-pl: {self.rank} exits; resume with `--ckpt_path last`\n"
        os.write(2, message.encode())  # in one go, beside those of other ranks
        time.sleep(grace_s)
        # The main thread may never come back from a collective: no clean exit can be waited for.
        os._exit(STATUS)
