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
    """A digest of everything that a model's vectors depend on: weights, groups, prompt, image size.

    It is the same in fp32 and bf16, on any device, and for an adapter before and after merging. A
    UserError if the weights have no fingerprint (quantized, fp16, on the meta device).
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
    """The sides that are set: a loaded processor has None for the others."""
    named = size if isinstance(size, dict) else vars(size)
    return {side: count for side, count in named.items() if count is not None}
