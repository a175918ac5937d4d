"""Background measurement of the plans of a served store, on request."""

import threading
from collections.abc import Callable
from contextlib import suppress

from metaembed_pl.budget import Budget, budgets_of
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.calibration import Calibration, costs, plan_name, usable_index
from metaembed_pl.retrieval.cascade import Stage
from metaembed_pl.retrieval.store import Store
from metaembed_pl.serving.schema import Measurement, SearchPlan


class _StoppedError(Exception):
    """The service stops."""


class Measuring:
    """Loads the calibration of a store, or measures it in a thread.

    Args:
        calibrate: measures a store, which takes seconds. It calls its second argument regularly,
            and an exception from that ends it.
    """

    def __init__(self, calibrate: Callable[[Store, Callable[[], None]], Calibration]):
        self._calibrate = calibrate
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._known: Calibration | None = None
        self._running: threading.Thread | None = None
        self._failure: tuple[int, str] | None = None

    def calibration(self, store: Store) -> Calibration | None:
        """The valid calibration of a store, by this service or the command line."""
        known = self._known
        if known is None or not known.fits(store):
            self._known = known = Calibration.load(store)
        return known

    def start(self, store: Store) -> None:
        """Start measuring, unless it is done or running."""
        with self._lock:
            if self.state(store).state in ("running", "done"):
                return
            self._failure = None
            self._running = threading.Thread(target=self._run, args=[store], name="calibration")
            self._running.start()

    def wait(self) -> None:
        """Wait until the measurement has ended."""
        if self._running is not None:
            self._running.join()

    def stop(self) -> None:
        """Stop the measurement, which takes a second or two."""
        self._stopped.set()
        self.wait()

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise _StoppedError

    def state(self, store: Store) -> Measurement:
        """The state of the measurement."""
        if self._running is not None and self._running.is_alive():
            return Measurement(state="running")
        known = self.calibration(store)
        if known is not None:
            return Measurement(state="done", used=known.used)
        if self._failure is not None and self._failure[0] == store.generation:
            return Measurement(state="failed", error=self._failure[1])
        return Measurement(state="none")

    def _run(self, store: Store) -> None:
        try:
            found = self._calibrate(store, self._go_on)
        except _StoppedError:
            return
        except UserError as error:
            self._failure = store.generation, str(error)
            return
        # For `search --budget auto` and the next start; on a read-only disk, each start measures.
        with suppress(OSError):
            found.save(store)
        self._known = found


def choices(store: Store, calibration: Calibration | None) -> list[SearchPlan]:
    """Plans to choose from, cheapest first; those that ask the index only if there is one."""
    if calibration is not None:
        has_index = usable_index(store) is not None
        rows = [row for row in calibration.measured if has_index or "@" not in row.plan]
        known = [(*row[3:5], row.plan, row.recall, row.milliseconds) for row in rows]
    else:
        # All query vectors with the first of each item: as cheap as 1x1, and finds more.
        summed = Budget(store.groups[-1].r_q, store.groups[0].r_c)
        budgets = dict.fromkeys([*budgets_of(store.groups, store.widths), summed])
        plans = [[Stage(budget, 1)] for budget in budgets]
        known = sorted((*costs(plan, store), plan_name(plan), None, None) for plan in plans)
    exact = costs([Stage(store.groups[-1], 1)], store)[0]
    return [
        SearchPlan(
            plan=plan,
            cost=products / exact if exact else 1.0,  # an empty store
            bytes_read=int(bytes_read),
            recall=recall,
            milliseconds=milliseconds,
        )
        for products, bytes_read, plan, recall, milliseconds in known
    ]
