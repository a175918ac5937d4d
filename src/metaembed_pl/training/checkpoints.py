"""Training checkpoints: their contents, and atomic writing.

A checkpoint contains trained weights, buffers, the optimiser and the position in the plan. Frozen
weights are not saved (15 GB for a 7B model): they are loaded again from the base model, whose
fingerprint is verified. Frozen weights with random initial values are saved.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from metaembed_pl.errors import UserError
from metaembed_pl.files import new_file, refuse_special_file
from metaembed_pl.model.weights import refuse_faults

BASE = "base_fingerprint"


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, and then gives it its name.

    Lightning's own form writes into the machine's temporary folder: where that is another disk than
    the run's, the last step is a copy, and a kill in the middle leaves half a checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes the file; if it cannot, what had its name before is as it was.

        Raises:
            UserError: the disk is full, or the file cannot be written for another reason.
        """
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with new_file(path) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            reason = _disk_error(error) or error
            raise UserError(
                f"{path} could not be written: {str(reason).splitlines()[0]}; what had this name "
                "before is as it was: free some space, then resume with --ckpt_path last"
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads the file.

        Raises:
            UserError: it is not there, or no checkpoint of this package.
        """
        try:
            if not Path(path).exists():
                raise UserError("no such file")
            refuse_special_file(Path(path))
            found = super().load_checkpoint(path, *args, **kwargs)
            missing = {"state_dict", "global_step", "loops"} - set(found)
            if missing:
                raise UserError(f"it has no {min(missing)!r}")
        except (UserError, OSError, RuntimeError, EOFError, pickle.UnpicklingError, TypeError) as e:
            said = (str(e).strip() or type(e).__name__).splitlines()[0]
            raise UserError(
                f"{path}: not a checkpoint of this package: it is broken or holds Python objects, "
                f"which could run code when loaded ({said:.200}); give a .ckpt that `fit` wrote"
            ) from e
        return found


def _disk_error(error: BaseException | None) -> OSError | None:
    """What the disk said: torch hides it behind an error of its own zip writer."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def leave_out_frozen(module: nn.Module, checkpoint: dict[str, Any], base: str | None) -> None:
    """Takes the frozen weights of a base model out of a checkpoint.

    Args:
        module: whose weights the checkpoint holds.
        checkpoint: Lightning's.
        base: fingerprint of the base model; None where it could not be taken.
    """
    state, kept = checkpoint["state_dict"], _kept(module)
    if state.keys() - kept:
        checkpoint["state_dict"] = {name: state[name] for name in state if name in kept}
        checkpoint[BASE] = base


def refuse_other_base(checkpoint: dict[str, Any], base: str | None) -> None:
    """Makes sure that the weights a checkpoint leaves out are those it was trained on.

    Raises:
        UserError: the fingerprint of the base model at hand is another one.
    """
    saved = checkpoint.get(BASE)
    if saved and base and saved != base:
        raise UserError(
            "the checkpoint was trained on other weights than the base model has now (fingerprint "
            f"{saved}, found {base}): give it the base model that the run started from"
        )


def refuse_misfit(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Makes sure that a checkpoint's weights are those of the module, but for frozen ones.

    Raises:
        UserError: a weight is missing, unexpected or mis-shaped.
    """
    own = module.state_dict()
    both = state.keys() & own.keys()
    refuse_faults(
        "the checkpoint",
        {
            "missing": sorted(_kept(module) - state.keys()),
            "unexpected": sorted(state.keys() - own.keys()),
            "mis-shaped": sorted(name for name in both if state[name].shape != own[name].shape),
        },
    )


def _kept(module: nn.Module) -> set[str]:
    """Names of what training changes, as a state dict has them."""
    named = module.named_parameters(remove_duplicate=False)
    trained = {name for name, parameter in named if parameter.requires_grad}
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    persistent = buffers & module.state_dict().keys()
    return trained | persistent
