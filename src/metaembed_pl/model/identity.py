"""The identity of a model: vectors of two models cannot be compared."""

import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from metaembed_pl.errors import UserError
from metaembed_pl.model.weights import fingerprint

if TYPE_CHECKING:
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.model.encoder import Encoder, Engine


def identity_of(model: "MetaEmbedder | Encoder | Engine") -> str:
    """A digest of all that a model's vectors depend on: weights, groups, prompt, picture sizes.

    It is the same in fp32 and in bf16, on any device, and for a model that was saved and loaded.
    An adapter and what `merge` makes of it have the same: their vectors differ by rounding alone.

    Raises:
        UserError: the weights have no fingerprint (quantized, fp16, on the meta device).
    """
    if own := getattr(model, "identity", None):  # of a baseline, or of vLLM
        return own
    model = cast("MetaEmbedder", model)
    processing = model.processing
    parts = [model.backbone, *[model.meta_tokens] * (model.pooling == "meta_tokens")]
    weights = [fingerprint(part) for part in parts]
    if isinstance(model.projection, nn.Linear):
        weights.append(fingerprint(model.projection))
    if None in weights:
        raise UserError(
            "a store needs the model's fingerprint, which is not available for these weights "
            "(quantized, fp16 or not loaded): load it with dtype float32 or bfloat16"
        )
    known = {
        "weights": weights,
        "groups": [str(group) for group in model.groups],
        "layout": model.meta_tokens.layout,
        "prompt": asdict(processing.prompt),
        "max_text_tokens": processing.max_text_tokens,
        "picture_size": _size(processing.image_processor.size),
    }
    if model.pooling != "meta_tokens":
        known |= {"pooling": model.pooling, "bidirectional": model.bidirectional}
    found = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]
    return model.merged.get(found, found)


def _size(size: Any) -> dict[str, int]:
    """The sides that are given: a processor that was loaded names the others as None."""
    named = size if isinstance(size, dict) else vars(size)
    return {side: count for side, count in named.items() if count is not None}
