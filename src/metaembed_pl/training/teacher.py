"""A trained model beside the one in training, which learns from how it scores each batch.

It reads the tensors that were made for the student, so both must turn items into the same ones.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.data.collate import Inputs, Side, TrainBatch
from metaembed_pl.errors import UserError
from metaembed_pl.model.embedder import MetaEmbedder
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

    def taught(self, batch: TrainBatch) -> Taught:
        """What it makes of a batch."""
        candidates = self._embed(batch.candidates, "candidate")
        negatives = candidates[batch.num_positives :]
        return Taught(
            self.model.groups[-1],
            self._embed(batch.queries, "query"),
            candidates[: batch.num_positives],
            negatives if len(negatives) else None,
        )

    @torch.no_grad()
    def _embed(self, inputs: Inputs, side: Side) -> Float[Tensor, "N R D"]:
        if isinstance(inputs, dict):
            return self.model(self._here(inputs), side)
        parts = [self.model(self._here(chunk.inputs), side) for chunk in inputs]
        found = torch.cat(parts)
        # Chunks hold rows of like length, not those that stand together.
        order = torch.cat([chunk.rows for chunk in inputs]).to(found.device)
        return found[order.argsort()]

    def _here(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: part.to(self.model.device) for name, part in inputs.items()}


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
