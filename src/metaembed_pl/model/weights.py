"""Pretrained weights, read from a folder or the hub and accounted for one by one."""

import hashlib
import logging
import re
from collections.abc import Mapping, Set
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from metaembed_pl.errors import UserError
from metaembed_pl.files import read_json_object
from metaembed_pl.model.hub_faults import why_not
from metaembed_pl.model.sharded import complete_tensor

log = logging.getLogger(__name__)

# The head that the checkpoint of a generative model brings and the base model has no place for.
UNUSED_HEAD = re.compile(r"(^|\.)lm_head\.")
NUM_SAMPLED = 64  # values of each tensor that a fingerprint reads


def load_backbone(path: str, dtype: str = "float32", **kwargs: Any) -> PreTrainedModel:
    """A pretrained base model; every weight must be loaded.

    Weights of a model that has this one as a part, such as an embedder around it, are read too:
    their names then have a prefix.

    Args:
        path: a folder, `ORG/NAME` on the hub, or `ORG/NAME/FOLDER` in it.
        dtype: of the weights.
        kwargs: further arguments of `from_pretrained`.

    Raises:
        UserError: a weight is missing, unexpected (except for a language-model head) or mis-shaped:
            transformers would continue with random values there.
    """
    revision = kwargs.get("revision")
    source, kwargs["subfolder"] = split_hub_folder(path)
    model, report = _from_pretrained_with_prefixes(source, dtype, kwargs)
    faults = {
        "missing": sorted(report["missing_keys"]),
        "unexpected": sorted(_unexpected(report)),
        "mis-shaped": sorted(str(key) for key in report["mismatched_keys"]),
    }
    refuse_faults(path, faults)
    # Kept so that an adapter can say what it belongs to.
    model.config.name_or_path = str(Path(path).resolve()) if Path(path).exists() else path
    model.base_revision = commit_of(path, revision)
    return model


def _from_pretrained_with_prefixes(
    path: str, dtype: str, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A model and its report, also if the names in the files have a prefix."""
    best, report = _from_pretrained(path, dtype, kwargs)
    for prefix in _foreign_prefixes(report):
        other = kwargs | {"key_mapping": {rf"^{re.escape(prefix)}": ""}}
        model, found = _from_pretrained(path, dtype, other)
        if len(found["missing_keys"]) < len(report["missing_keys"]):
            best, report = model, found
            best._weight_conversions = None  # or saving would give them that prefix again
            log.info("%s: its weights are named %s...: read without that", path, prefix)
        if not found["missing_keys"]:
            break
    return best, report


def _from_pretrained(path: str, dtype: str, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    folder = Path(path, kwargs.get("subfolder") or "")
    if folder.is_dir():  # what transformers says of damaged files does not name them
        read_json_object(folder / "config.json")
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, "pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise UserError(f"{file}: not a complete safetensors file: {error}") from error
    try:
        return AutoModel.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report has them, and all of them are refused
            **kwargs,
        )
    except Exception as error:  # transformers raises nearly anything on a damaged file
        raise UserError(
            f"{path}: no model could be loaded from there: {why_not(path, error)}"
        ) from error


def _unexpected(report: dict[str, Any]) -> list[str]:
    return [key for key in report["unexpected_keys"] if not UNUSED_HEAD.search(key)]


def _foreign_prefixes(report: dict[str, Any]) -> list[str]:
    """Common prefixes of the unexpected names, such as `base.` and `base.model.`."""
    names = [key.split(".")[:-1] for key in _unexpected(report)]
    if len(names) < 2 or not report["missing_keys"]:
        return []
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    return list(accumulate(f"{column[0]}." for column in columns))[:3]


def split_hub_folder(path: str) -> tuple[str, str]:
    """The repository and the folder in it of `ORG/NAME/FOLDER`; of anything else, itself and "".

    >>> split_hub_folder("org/name/backbone"), split_hub_folder("org/name")
    (('org/name', 'backbone'), ('org/name', ''))
    """
    parts = path.split("/")
    if len(parts) == 3 and all(parts) and not path.startswith(".") and not Path(path).exists():
        return "/".join(parts[:2]), parts[2]
    return path, ""


def commit_of(path: str, revision: str | None) -> str | None:
    """The commit that a hub model in the cache is at; of a folder, None."""
    if Path(path).exists():
        return None
    source, folder = split_hub_folder(path)
    file = "/".join(filter(None, (folder, "config.json")))
    cached = try_to_load_from_cache(source, file, revision=revision)
    if not isinstance(cached, str):
        return revision
    parts = Path(cached).parts
    return parts[parts.index("snapshots") + 1]


def refuse_faults(path: str | Path, faults: dict[str, list[str]]) -> None:
    """Raises a UserError that counts and names the weights that do not fit."""
    messages = [
        f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for kind, keys in faults.items()
        if keys
    ]
    if messages:
        raise UserError(
            f"{path}: its weights do not fit this model: {'; '.join(messages)}; "
            "is it another architecture, or saved incompletely?"
        )


def refuse_misfit(
    path: str | Path,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    optional: Set[str] = frozenset(),
) -> None:
    """Raises a UserError about tensors that are missing, unexpected or mis-shaped."""
    both = expected.keys() & found.keys()
    faults = {
        "missing": sorted(expected.keys() - found.keys() - optional),
        "unexpected": sorted(found.keys() - expected.keys()),
        "mis-shaped": sorted(name for name in both if expected[name].shape != found[name].shape),
    }
    refuse_faults(path, faults)


def load_into(tensors: dict[str, Tensor], file: Path) -> None:
    """Fills tensors from a safetensors file, which must contain exactly these."""
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a readable safetensors file: {error}") from error
    refuse_misfit(file, tensors, found)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(found[name])


def refuse_unlike(file: Path, tensors: dict[str, Tensor]) -> None:
    """Raises a UserError if a file that was just written does not contain exactly these tensors.

    Or if one of them is empty: other libraries have saved empty adapters from sharded weights.
    """
    found = load_file(file)
    same = found.keys() == tensors.keys() and all(
        tensor.numel() and torch.equal(found[name], tensor.cpu())
        for name, tensor in tensors.items()
    )
    if not same:
        raise UserError(f"{file}: differs from what was written; is the disk full?")


def fingerprint(backbone: nn.Module) -> str | None:
    """A short digest of the weights, the same in fp32 and in bf16.

    It reads a few values of each tensor; if they are sharded over ranks, every rank must call it.
    None if there are no values (meta device) or they are coarser than bf16 (quantized, fp16).
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.named_parameters()):
        if tensor.is_meta or tensor.dtype not in (torch.float32, torch.bfloat16):
            return None
        with complete_tensor(tensor) as values:
            places = torch.arange(NUM_SAMPLED) * (values.numel() - 1) // (NUM_SAMPLED - 1)
            some = values.flatten()[places.to(values.device)].to(torch.bfloat16)
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(some.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
