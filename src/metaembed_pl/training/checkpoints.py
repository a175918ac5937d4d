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

from metaembed_pl.errors import UserError, causes, first_line
from metaembed_pl.files import new_file, refuse_special_file
from metaembed_pl.model import weights

BASE = "base_fingerprint"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically, through a temporary file in the same folder.

    Lightning writes into the machine's temporary folder: if that is on another disk, the last step
    is a copy, and a kill in the middle leaves half a checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes the file; if that fails, an earlier one of its name remains.

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
            # torch hides what the disk said behind an error of its own zip writer.
            reason = next((e for e in causes(error) if isinstance(e, OSError)), error)
            raise UserError(
                f"{path} could not be written: {first_line(reason)}; what had this name "
                "before is as it was: free some space, then resume with --ckpt_path last"
            ) from error

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads the file.

        Raises:
            UserError: it does not exist or is not a checkpoint of this package.
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
            raise UserError(
                f"{path}: not a checkpoint of this package: it is broken or holds Python objects, "
                f"which could run code when loaded ({first_line(e):.200}); give a "
                ".ckpt that `fit` wrote"
            ) from e
        return found


def leave_out_frozen(module: nn.Module, checkpoint: dict[str, Any], base: str | None) -> None:
    """Takes the frozen weights of a base model out of a checkpoint.

    Args:
        module: whose weights the checkpoint holds.
        checkpoint: Lightning's.
        base: fingerprint of the base model; None where it could not be taken.
    """
    state, trained = checkpoint["state_dict"], _trained_names(module)
    if state.keys() - trained:
        checkpoint["state_dict"] = {name: state[name] for name in state if name in trained}
        checkpoint[BASE] = base


def refuse_other_base(checkpoint: dict[str, Any], base: str | None) -> None:
    """Raises a UserError if a checkpoint without frozen weights is from another base model."""
    saved = checkpoint.get(BASE)
    if saved and base and saved != base:
        raise UserError(
            "the checkpoint was trained on other weights than the base model has now (fingerprint "
            f"{saved}, found {base}): give it the base model that the run started from"
        )


def refuse_misfit(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Raises a UserError if a checkpoint's weights do not fit; frozen ones may be missing."""
    own = module.state_dict()
    weights.refuse_misfit(
        "the checkpoint", own, state, optional=own.keys() - _trained_names(module)
    )


def _trained_names(module: nn.Module) -> set[str]:
    """Names of trained weights and persistent buffers, as in a state dict."""
    named = module.named_parameters(remove_duplicate=False)
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    persistent = buffers & module.state_dict().keys()
    return persistent | {name for name, parameter in named if parameter.requires_grad}
