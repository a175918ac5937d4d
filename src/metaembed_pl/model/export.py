"""Model folders that go elsewhere: a copy, merged weights, and how equality is made sure of."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.lora import has_adapter, merge_adapter
from metaembed_pl.model.model_folder import SETTINGS, base_from, find_base, read_settings

# The largest difference of a meta embedding's component that an export may make. A meta embedding
# is a unit vector; 16-bit weights keep three digits, and merging rounds each of them once more.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}


class Difference(NamedTuple):
    """By how much the vectors of an exported model differ from those of the model it came from."""

    largest: float
    allowed: float

    def __str__(self) -> str:
        return f"largest difference of a vector component {self.largest:.1e}"


class Vectors(NamedTuple):
    """Meta embeddings of `sample_items`, on both sides."""

    queries: Tensor
    candidates: Tensor


def sample_items() -> list[Item]:
    """A text, a picture and both: what an export is checked on."""
    ramp = Image.linear_gradient("L").resize((112, 84))
    picture = Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))
    return [Item("a red apple on a table"), Item(image=picture), Item("the flag", image=picture)]


def sample_vectors(model: MetaEmbedder) -> Vectors:
    """The model's meta embeddings of `sample_items`."""
    items = sample_items()
    return Vectors(model.encode_query(items), model.encode_candidate(items))


def compare(before: Vectors, after: Vectors, dtype: torch.dtype, what: str) -> Difference:
    """How far two models' vectors are apart.

    Raises:
        UserError: further than rounding explains, or not finite.
    """
    largest = max(float((b - a).abs().max()) for b, a in zip(before, after, strict=True))
    difference = Difference(largest, TOLERANCE[dtype])
    if not largest <= difference.allowed:  # also where it is not a number
        raise UserError(
            f"{what} would change the model: {difference}, at most {difference.allowed:.0e} is "
            "rounding; nothing was written"
        )
    return difference


def merge(model: MetaEmbedder) -> Difference:
    """Makes the adapter part of the weights, and makes sure that the vectors stay.

    Raises:
        UserError: the model has no adapter, or merging changes its vectors.
    """
    if not has_adapter(model.backbone):
        raise UserError("--merge: this model has no adapter: its weights are whole already")
    before = sample_vectors(model)
    merge_adapter(model.backbone)
    return compare(before, sample_vectors(model), model.backbone.dtype, "merging")


def copy_model(source: Path, target: Path) -> None:
    """Copies a model folder file by file; a base model on disk is told from its new place.

    Args:
        source: a model folder.
        target: an existing empty folder, or a temporary one beside its later place.
    """
    shutil.copytree(source, target, dirs_exist_ok=True)
    settings = read_settings(source)
    known = settings.get("backbone")
    if known is None:
        return
    known["path"] = base_from(find_base(source, known["path"]), target)
    (target / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
    file = target / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": known["path"]}
    file.write_text(json.dumps(config, indent=2) + "\n")
