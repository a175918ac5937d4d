"""Where a verb runs its model."""

import os

from metaembed_pl.errors import UserError


def find_device(name: str | None) -> str:
    """The device of that name; None: a GPU where there is one, under torchrun each rank its own.

    Raises:
        UserError: there is no such device.
    """
    import torch

    if name is None:
        local = os.environ.get("LOCAL_RANK", "0")
        return f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not to be had here: {reason}") from error
    return name
