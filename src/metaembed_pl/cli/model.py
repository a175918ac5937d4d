"""The model of a verb: where it runs, and whether it is the one of a store."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from metaembed_pl.errors import UserError

if TYPE_CHECKING:
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.retrieval.searchable import Searchable


def load_model(
    folder: str | Path, device: str | None, store: "Searchable | None" = None
) -> "MetaEmbedder":
    """A model, on the device that `find_device` finds; that of a store, where one is given.

    Raises:
        UserError: there is no such model or device, or the store is another model's.
    """
    from transformers.utils import logging

    from metaembed_pl.model.embedder import MetaEmbedder

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    model = MetaEmbedder.from_pretrained(folder, find_device(device))
    if store is not None:
        from metaembed_pl.retrieval.embedding import check_model

        check_model(store, model)
    return model


def tell_cut(model: "MetaEmbedder") -> None:
    """Say how much of what the model has read was cut; every rank must ask."""
    from metaembed_pl.data.collate import Cut
    from metaembed_pl.retrieval.embedding import gathered

    total = Cut()
    for cut in gathered(model.processing.cut):
        total += cut
    if total.num_cut:
        print(total, file=sys.stderr)


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
        raise UserError(f"device {name} is not available: {reason}") from error
    return name
