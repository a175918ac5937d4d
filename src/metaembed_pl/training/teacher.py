"""A trained model beside the one in training, which learns from how it scores each batch.

It reads the tensors that were made for the student, so both must turn items into the same ones.
"""

from typing import Any

import torch

from metaembed_pl.data.collate import TrainBatch
from metaembed_pl.errors import UserError
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.training.chunks import encode
from metaembed_pl.training.objective import Taught


class Teacher:
    """A frozen model; no `nn.Module`, so that nothing trains, shards or saves it.

    Args:
        folder: a model folder or hub id.
        student: the model in training.

    Raises:
        UserError: the two do not make the same tensors of an item; says what differs.
    """

    def __init__(self, folder: str, student: MetaEmbedder):
        self.model = MetaEmbedder.from_pretrained(folder).requires_grad_(False)
        ours, theirs = _what_reads(student), _what_reads(self.model)
        for name, own in ours.items():
            if own != theirs[name]:
                raise UserError(
                    f"model.loss.teacher.model {folder} has another {name} than the model in "
                    "training: it reads the same tensors, so choose one made by a recipe with the "
                    "same tokenizer, pictures, prompt, layout and largest group"
                )

    @torch.no_grad()
    def taught(self, batch: TrainBatch) -> Taught:
        """What it makes of a batch."""
        candidates = encode(self.model, batch.candidates, "candidate")
        negatives = candidates[batch.num_positives :]
        return Taught(
            self.model.groups[-1],
            encode(self.model, batch.queries, "query"),
            candidates[: batch.num_positives],
            negatives if len(negatives) else None,
        )


def _what_reads(model: MetaEmbedder) -> dict[str, Any]:
    """All that decides which tensors an item becomes."""
    processing = model.processing
    return {
        "family": processing.family.model_type,
        "tokenizer": processing.tokenizer.get_vocab(),
        "picture processing": processing.image_processor.to_dict(),
        "prompt": processing.prompt,
        "max_text_tokens": processing.max_text_tokens,
        "layout": model.meta_tokens.layout,
        "largest group": model.groups[-1],
    }
