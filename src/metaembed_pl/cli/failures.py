"""One-line messages for failures outside the recipe: memory, disks, other ranks."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.distributed import DistError

from metaembed_pl.errors import UserError, first_line
from metaembed_pl.training.out_of_memory import is_out_of_memory
from metaembed_pl.training.watchdog import Watch

# How gloo, in a plain RuntimeError, says that the process at the other end is gone.
PEER_IS_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|Socket closed")

# Of a step, the error itself brings advice with numbers.
NOT_IN_A_STEP = (
    "in validation, lower data.eval_batch_size; if the model itself is too large, change "
    "trainer.precision to bf16-true, share it among GPUs (trainer.strategy: deepspeed_stage_3) or "
    "give a smaller model.backbone.path; `check --gpu-memory` estimates each part"
)


@contextmanager
def failures_in_one_line(watch: Watch) -> Iterator[None]:
    """Turns errors that the user can do something about into `UserError`s.

    Such as out of memory, a lost rank or a missing package; `watch` knows what was being done.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = _message(error, watch)
        if message is None:
            raise
        raise UserError(message) from error


def _message(error: Exception, watch: Watch) -> str | None:
    first = first_line(error)
    if isinstance(error, MisconfigurationException):  # of Lightning: no GPU here, say
        return " ".join(str(error).split())
    if missing := _missing_package(error):
        return f"{missing}: install it, or remove it from the recipe"
    if is_out_of_memory(error):
        if notes := getattr(error, "__notes__", None):
            return f"out of memory: {' '.join([first, *notes])}"
        doing = "" if watch.rests else f", {watch.doing}"
        return f"out of memory{doing}: {first}; {NOT_IN_A_STEP}"
    if isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and PEER_IS_GONE.search(str(error))
    ):
        first = first.partition(". This is typically")[0]  # gloo goes on to wish good luck
        return (
            f"{watch.where}: the connection to other ranks failed ({first}): if one has ended or "
            "was killed, its last output says why; resume with --ckpt_path last"
        )
    return None


def _missing_package(error: BaseException | None) -> str | None:
    """The message about a package that is not installed, in an error or its causes."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError):
            return str(error).partition(" HINT")[0].rstrip(".")
        error = error.__cause__
    return None
