"""The form that sentence-transformers' `MultiVectorEncoder` reads.

A model folder of ours is one module to it. It imports the class below, so that this package must
be installed, and asks for `trust_remote_code=True`, as for every class that is not its own.

    from sentence_transformers import MultiVectorEncoder
    model = MultiVectorEncoder("export", trust_remote_code=True)
    model.similarity(model.encode_query(["a cat"]), model.encode_document([{"image": "cat.png"}]))

Its own modules cannot do it: `MultiVectorMask` keeps chosen tokens of documents, but of queries
always all of them.

Shape letters: B items, R meta embeddings an item, D their width.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.processing import Side


def write_sentence_transformers(folder: Path) -> None:
    """Adds to a model folder what `MultiVectorEncoder` looks for."""
    kind = f"{MetaEmbedderModule.__module__}.{MetaEmbedderModule.__qualname__}"
    module = {"idx": 0, "name": "0", "path": "", "type": kind}
    settings = {
        "model_type": "MultiVectorEncoder",
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "maxsim",
    }
    for name, value in (("modules", [module]), ("config_sentence_transformers", settings)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


class MetaEmbedderModule(nn.Module):
    """A MetaEmbedder in the place of sentence-transformers' input module.

    Args:
        embedder: the model.
    """

    forward_kwargs = frozenset({"task"})
    save_in_root = True

    def __init__(self, embedder: MetaEmbedder):
        super().__init__()
        self.embedder = embedder
        self.tokenizer = embedder.processing.tokenizer

    @property
    def modalities(self) -> list[Any]:
        """What an input may be; `message` is its word for batches of several kinds."""
        return ["text", "image", ("image", "text"), ("text", "image"), "message"]

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **_: Any
    ) -> dict[str, Tensor]:
        """Texts, pictures or `{"text": ..., "image": ...}`, as tensors; a string is a text."""
        items = [_parse(given) for given in inputs]
        if prompt:
            items = [
                replace(item, text=prompt + item.text) if item.text else item for item in items
            ]
        return self.embedder.processor()(items, _side(task))

    def forward(self, features: dict[str, Tensor], task: str | None = None) -> dict[str, Tensor]:
        """Meta embeddings (B, R, D) as `token_embeddings`: every one of them counts."""
        found = self.embedder(features, _side(task))
        kept = torch.ones(found.shape[:2], dtype=torch.long, device=found.device)
        return {**features, "token_embeddings": found, "attention_mask": kept}

    def get_embedding_dimension(self) -> int:
        """D."""
        return self.embedder.width

    def save(self, output_path: str, *_args: Any, **_kwargs: Any) -> None:
        """Writes the model folder into an existing folder, as `MultiVectorEncoder.save` asks."""
        self.embedder.write_into(Path(output_path), Path(output_path))

    @classmethod
    def load(
        cls, model_name_or_path: str, *, revision: str | None = None, **_: Any
    ) -> "MetaEmbedderModule":
        """Loads a model folder or a hub repository of one."""
        return cls(MetaEmbedder.from_pretrained(model_name_or_path, revision=revision))


def _side(task: str | None) -> Side:
    return "query" if task == "query" else "candidate"


def _parse(given: Any) -> Item:
    if isinstance(given, dict) and ("role" in given or "content" in given):
        raise UserError('chat messages are no items; give a text, a picture or {"text", "image"}')
    if isinstance(given, str | dict | Item):
        return Item.parse(given)
    return Item(image=given)
