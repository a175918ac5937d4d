"""The export format for sentence-transformers' `MultiVectorEncoder`.

It loads our model folder as one module with a custom class, which requires
`trust_remote_code=True`. For the Qwen-VL families the folder includes that class
(sentence_transformers_module.py) and does not need this package. For other families it is the class
below, and this package must be installed.

    from sentence_transformers import MultiVectorEncoder
    model = MultiVectorEncoder("export", trust_remote_code=True)
    model.similarity(model.encode_query(["a cat"]), model.encode_document([{"image": "cat.png"}]))

Its own modules do not suffice: `MultiVectorMask` can select tokens of documents but not of queries.

Shape letters: B items, R meta embeddings an item, D their width.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaembed_pl.data.collate import Side
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.backbone import BackboneConfig
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.model_folder import read_settings

OWN_CODE = "sentence_transformers_module.py"
OWN_CODE_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TAKEN = {"method": "forward", "method_output_name": "token_embeddings"}
BERT_CONFIG = {"modality_config": {"text": TAKEN, "image": TAKEN}}
"""Declares texts and pictures as inputs, for programs such as mteb."""


def write_sentence_transformers(folder: Path) -> None:
    """Adds to a model folder what `MultiVectorEncoder` looks for.

    Args:
        folder: with complete weights.
    """
    kind = f"{MetaEmbedderModule.__module__}.{MetaEmbedderModule.__qualname__}"
    about = read_settings(folder)
    if about["model_type"] in OWN_CODE_FAMILIES and "pooling" not in about:
        shutil.copy(Path(__file__).with_name(OWN_CODE), folder / OWN_CODE)
        kind = f"{Path(OWN_CODE).stem}.MetaEmbed"
    settings = {
        "model_type": "MultiVectorEncoder",
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "maxsim",
    }
    for name, value in (
        ("modules", [{"idx": 0, "name": "0", "path": "", "type": kind}]),
        ("config_sentence_transformers", settings),
        ("sentence_bert_config", BERT_CONFIG),
    ):
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
        """The kinds of inputs; `message` stands for batches of several kinds."""
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
        mask = torch.ones(found.shape[:2], dtype=torch.long, device=found.device)
        return {**features, "token_embeddings": found, "attention_mask": mask}

    def get_embedding_dimension(self) -> int:
        """D."""
        return self.embedder.width

    def save(self, output_path: str, *_args: Any, **_kwargs: Any) -> None:
        """Writes the model folder into an existing folder, as `MultiVectorEncoder.save` asks."""
        folder = Path(output_path)
        self.embedder.write_into(folder, folder)
        (folder / "sentence_bert_config.json").write_text(json.dumps(BERT_CONFIG, indent=2) + "\n")

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        *,
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        **_: Any,
    ) -> "MetaEmbedderModule":
        """Loads a model folder, or a hub repository of one."""
        if backend != "torch":
            raise UserError(f"this model runs with backend='torch', not {backend!r}")
        options = _options(model_kwargs or {})
        folder = model_name_or_path
        if not Path(folder).exists():
            from huggingface_hub import snapshot_download

            folder = snapshot_download(
                folder,
                revision=revision,
                token=token,
                cache_dir=cache_folder,
                local_files_only=local_files_only,
            )
        return cls(MetaEmbedder.from_pretrained(folder, options=options))


def _options(given: dict[str, Any]) -> BackboneConfig | None:
    """The options of sentence-transformers' `model_kwargs`."""
    names = {"dtype": "dtype", "torch_dtype": "dtype", "attn_implementation": "attention"}
    if unknown := given.keys() - names:
        raise UserError(
            f"model_kwargs: expected {', '.join(names)}, got {', '.join(sorted(unknown))}"
        )
    found: dict[str, Any] = {
        names[key]: str(value).removeprefix("torch.") for key, value in given.items()
    }
    return BackboneConfig(**found) if found else None


def _side(task: str | None) -> Side:
    return "query" if task == "query" else "candidate"


def _parse(given: Any) -> Item:
    if isinstance(given, dict) and ("role" in given or "content" in given):
        raise UserError('chat messages are no items; give a text, a picture or {"text", "image"}')
    if isinstance(given, str | dict | Item):
        return Item.parse(given)
    return Item(image=given)
