"""Faults of the loss's options that only the model or the data show."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from metaembed_pl.cli.check_data import Data
from metaembed_pl.errors import UserError
from metaembed_pl.model.weightless import WeightlessModel
from metaembed_pl.training.module import MetaEmbedModule
from metaembed_pl.training.objective import check_widths
from metaembed_pl.training.teacher import refuse_other_inputs, refuse_unscored


def loss_faults(
    module: MetaEmbedModule, made: WeightlessModel | None, data: Data | None
) -> Iterator[str]:
    """What `fit` would refuse, one line each.

    Args:
        module: of the recipe.
        made: the model; None: it cannot be built.
        data: of the recipe; None: they cannot be read.
    """
    teacher, checks = module.loss.config.teacher, []
    if made is not None:
        checks.append(partial(check_widths, module.loss.widths, made.model.width))
    folder = teacher and teacher.model
    if teacher and not folder:
        checks += [partial(refuse_unscored, *source) for source in (data.sources if data else [])]
    elif folder and not Path(folder).exists():  # a hub id would be downloaded
        yield (f"model.loss.teacher.model: {folder} does not exist: train or download it first")
    elif folder and made is not None:
        unknown = () if made.counts_tokens else ("tokenizer",)
        checks.append(partial(refuse_other_inputs, folder, made.model, unknown))
    for check in checks:
        try:
            check()
        except UserError as error:
            yield str(error)
