"""A teacher model, whose scores of each batch the model in training distils.

It uses the student's input tensors, so both must have the same preprocessing.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from metaembed_pl.budget import Budget, parse_groups
from metaembed_pl.data.collate import TrainBatch
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.errors import BadSample, UserError, about_key
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.model_folder import find_model_folder, read_settings
from metaembed_pl.model.processing import Processing
from metaembed_pl.training.gradient_cache import encode
from metaembed_pl.training.objective import Taught

NUM_LOOKED_AT = 8
"""Pairs of a source that are checked for scores before training."""


class Teacher:
    """A frozen model; not an `nn.Module`, so that it is not trained, sharded or saved.

    Args:
        folder: a model folder or hub id.
        student: the model in training.
    """

    def __init__(self, folder: str, student: MetaEmbedder):
        refuse_other_inputs(folder, student)
        self.model = MetaEmbedder.from_pretrained(folder).requires_grad_(False)

    @torch.no_grad()
    def taught(self, batch: TrainBatch) -> Taught:
        """Its vectors of a batch."""
        candidates = encode(self.model, batch.candidates, "candidate")
        negatives = candidates[batch.num_positives :]
        return Taught(
            self.model.groups[-1],
            encode(self.model, batch.queries, "query"),
            candidates[: batch.num_positives],
            negatives if len(negatives) else None,
        )


def refuse_other_inputs(folder: str, student: MetaEmbedder, but: Sequence[str] = ()) -> None:
    """Raises a UserError if a teacher's preprocessing differs; only its settings are read.

    Args:
        folder: a model folder or hub id.
        student: the model in training; may be without weights.
        but: parts that are not compared.
    """
    with about_key("model.loss.teacher.model"):
        found = find_model_folder(folder)
    settings = read_settings(found)
    processing = Processing.load(found / "processing")
    largest = parse_groups(settings["groups"])[-1]
    theirs = _what_reads(processing, settings["layout"], largest)
    ours = _what_reads(student.processing, student.meta_tokens.layout, student.groups[-1])
    for name, own in ours.items():
        if own != theirs[name] and name not in but:
            raise UserError(
                f"model.loss.teacher.model {folder} has another {name} than the model in "
                "training: it reads the same tensors, so choose one made by a recipe with the "
                "same tokenizer, pictures, prompt, layout and largest group"
            )


def refuse_unscored(pairs: ShardedPairs, num_negatives: int) -> None:
    """Raises a UserError if some pairs of a source have no teacher's scores or no negatives."""
    found = []
    for i in range(0, len(pairs), math.ceil(len(pairs) / NUM_LOOKED_AT)):
        with suppress(BadSample):  # replaced in training
            found.append(pairs[i])
    if num_negatives == 0 or not all(pair.negatives for pair in found):
        raise UserError(
            f"{pairs.name}: model.loss.teacher learns how far a positive scores above its hard "
            "negatives, and there are none: raise num_negatives, or mine them"
        )
    items = ([pair.positive, *pair.negatives] for pair in found)
    unscored = sum(any(item.score is None for item in of_pair) for of_pair in items)
    if unscored:
        raise UserError(
            f"{pairs.name}: model.loss.teacher learns from the `score` of each pair's positive and "
            f"hard negatives, and {unscored} of {len(found)} pairs looked at have none: let `mine` "
            "write them, or name a model.loss.teacher.model"
        )


def _what_reads(processing: Processing, layout: str, largest: Budget) -> dict[str, Any]:
    """Everything that determines the tensors of an item."""
    return {
        "family": processing.family.model_type,
        "tokenizer": processing.tokenizer.get_vocab(),
        "picture processing": processing.image_processor.to_dict(),
        "prompt": processing.prompt,
        "max_text_tokens": processing.max_text_tokens,
        "layout": layout,
        "largest group": largest,
    }
