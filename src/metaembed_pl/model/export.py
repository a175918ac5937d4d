"""Export of model folders: a copy or merged weights, with a check that vectors stay equal."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity

from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.late_interaction import maxsim
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.identity import identity_of
from metaembed_pl.model.lora import has_adapter, merge_adapter
from metaembed_pl.model.model_folder import SETTINGS, base_from, find_base, read_settings

# The smallest cosine between a vector before and after: 16-bit weights keep two or three digits,
# and merging rounds each of them once more.
LEAST_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.995, torch.float16: 0.999}


class Difference(NamedTuple):
    """The difference between vectors before and after an export.

    Args:
        cosine: the smallest one between a vector before and after.
        allowed: the smallest one that rounding explains.
        swaps: pairs of candidates that changed places and were too far apart for rounding.
    """

    cosine: float
    allowed: float
    swaps: int

    def __str__(self) -> str:
        order = f"{self.swaps} pairs of candidates swapped" if self.swaps else "the ranking is kept"
        return f"smallest cosine of a vector {self.cosine:.6f}, {order}"


class Vectors(NamedTuple):
    """Meta embeddings of `sample_items`, on both sides."""

    queries: Tensor
    candidates: Tensor


def sample_items() -> list[Item]:
    """Texts, pictures and both: what an export is checked on, as queries and as candidates."""
    ramp = Image.linear_gradient("L").resize((112, 84))
    picture = Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))
    other = Image.merge("RGB", (ramp.rotate(180), ramp, ramp)).resize((84, 84))
    return [
        Item("a red apple on a table"),
        Item("How is the yearly dividend of a company decided?"),
        Item(image=picture),
        Item(image=other),
        Item("the flag", image=picture),
    ]


def sample_vectors(model: MetaEmbedder) -> Vectors:
    """The model's meta embeddings of `sample_items`."""
    items = sample_items()
    return Vectors(model.encode_query(items), model.encode_candidate(items))


def compare(before: Vectors, after: Vectors, dtype: torch.dtype, what: str) -> Difference:
    """The difference between two models' vectors; a UserError if rounding does not explain it."""
    pairs = zip(before, after, strict=True)
    cosines = [cosine_similarity(b, a, dim=-1).flatten() for b, a in pairs]
    cosine = float(torch.cat(cosines).min())  # also where one is not a number
    allowed = LEAST_COSINE[dtype]
    difference = Difference(cosine, allowed, _swaps(before, after, allowed))
    if not cosine >= allowed or difference.swaps:
        raise UserError(
            f"{what} would change the model: {difference}; at least {allowed} is rounding. Nothing "
            "was written, and the run keeps its adapter: export it without --merge in another form"
        )
    return difference


def _swaps(before: Vectors, after: Vectors, allowed: float) -> int:
    """Pairs of candidates that change places for a query although their scores were apart.

    The mean over a query's vectors changes far less than each vector, because rounding is random.
    """
    was, now = (maxsim(v.queries, v.candidates) / v.queries.shape[1] for v in (before, after))
    gap = was[:, :, None] - was[:, None, :]
    turned = now[:, :, None] <= now[:, None, :]
    return int(((gap > 2 * (1 - allowed)) & turned).sum())


def merge(model: MetaEmbedder) -> Difference:
    """Merges the adapter into the weights, and checks that vectors stay equal."""
    if not has_adapter(model.backbone):
        raise UserError("--merge: this model has no adapter: its weights are complete already")
    before = sample_vectors(model)
    merge_in_memory(model)
    return compare(before, sample_vectors(model), model.backbone.dtype, "merging")


def merge_in_memory(model: MetaEmbedder) -> None:
    """Merges the adapter into the weights, if there is one."""
    if not has_adapter(model.backbone):
        return
    identity = known_identity(model)
    merge_adapter(model.backbone)
    if identity is not None:
        model.merged = {identity_of(model): identity}


def known_identity(model: MetaEmbedder) -> str | None:
    """The model's identity; None where its weights have no fingerprint."""
    try:
        return identity_of(model)
    except UserError:
        return None


def copy_model(source: Path, target: Path) -> None:
    """Copies a model folder file by file; a local base model's path is adapted.

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
