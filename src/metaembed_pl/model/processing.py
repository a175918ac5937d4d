"""Items -> tensors: the one preprocessing for training, encoding, evaluation and serving.

A row is  [prefix ; image ; text ; suffix ; slots]: the slots are the places that the meta tokens
take. The row is put together from token ids, piece by piece, so that a user's text can neither
forge an image placeholder nor push one out when it is too long.

Shape letters: B rows, L tokens of the longest row, K slots a row.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer

from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.family import Family, family_of

Side = Literal["query", "candidate"]


@dataclass(frozen=True)
class Prompt:
    """The words around an item: one user turn, as the paper has it.

    Args:
        prefix: opens the turn; may hold special tokens.
        query: stands before the text of queries only.
        image_only: the text of an item that has none.
        suffix: closes the turn; may hold special tokens.
    """

    prefix: str = "<|im_start|>user\n"
    query: str = "Query: "
    image_only: str = "Describe the image."
    suffix: str = "<|im_end|>\n"


class Processing:
    """Turns items into what a backbone takes.

    Args:
        family: the backbone's family.
        tokenizer: a transformers tokenizer.
        image_processor: a transformers image processor; its pixel limits are the only ones.
        prompt: the words around an item.
        max_text_tokens: longer texts are cut at their end; image placeholders and slots never are.
        padding_side: changes nothing but the place of the padding.
    """

    def __init__(
        self,
        family: Family,
        tokenizer: Any,
        image_processor: Any,
        prompt: Prompt | None = None,
        max_text_tokens: int = 512,
        padding_side: Literal["left", "right"] = "right",
    ):
        if max_text_tokens < 1:
            raise UserError(f"max_text_tokens must be at least 1, got {max_text_tokens}")
        self.family = family
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.prompt = prompt or Prompt()
        self.max_text_tokens = max_text_tokens
        self.padding_side = padding_side

    def __call__(self, items: Sequence[Item], side: Side, num_slots: int) -> dict[str, Tensor]:
        """Tensors of a batch of items.

        Args:
            items: at least one.
            side: queries get the prompt's `query` words.
            num_slots: K, places for meta tokens after each row's last token.

        Returns:
            `input_ids`, `attention_mask` (B, L), `slot_index` (B, K; column of each slot), the
            family's token types (B, L), and where there are images what the image processor gives.

        Raises:
            UserError: an image does not decode.
        """
        if not items:
            raise UserError("expected at least one item, got none")
        images = [item.load_image() for item in items]
        present = [image for image in images if image is not None]
        pixels = self.image_processor(images=present, return_tensors="pt") if present else {}
        image_ids = iter(
            self.family.image_tokens(self.tokenizer, self.image_processor, pixels)
            if present
            else []
        )
        texts = self._text_ids(items, side)
        rows = [
            [*self._prefix, *(next(image_ids) if image is not None else []), *text, *self._suffix]
            for image, text in zip(images, texts, strict=True)
        ]
        return {**self._pad(rows, num_slots), **pixels}

    @cached_property
    def _prefix(self) -> list[int]:
        return self.tokenizer(self.prompt.prefix, add_special_tokens=False)["input_ids"]

    @cached_property
    def _suffix(self) -> list[int]:
        return self.tokenizer(self.prompt.suffix, add_special_tokens=False)["input_ids"]

    def _text_ids(self, items: Sequence[Item], side: Side) -> list[list[int]]:
        before = self.prompt.query if side == "query" else ""
        texts = [before + (item.text or self.prompt.image_only) for item in items]
        # split_special_tokens: "<|image_pad|>" typed by a user is plain text, not a placeholder.
        ids = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        return [row[: self.max_text_tokens] for row in ids]

    def _pad(self, rows: list[list[int]], num_slots: int) -> dict[str, Tensor]:
        slot_id = (
            self.tokenizer.pad_token_id
        )  # any ordinary id: the slots' embeddings are overwritten
        length = max(map(len, rows)) + num_slots
        ids = torch.full((len(rows), length), slot_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        ends = torch.empty(len(rows), dtype=torch.long)
        for i, row in enumerate(rows):
            used = len(row) + num_slots
            start = length - used if self.padding_side == "left" else 0
            ids[i, start : start + len(row)] = torch.tensor(row, dtype=torch.long)
            mask[i, start : start + used] = 1
            ends[i] = start + len(row)
        batch = {
            "input_ids": ids,
            "attention_mask": mask,
            "slot_index": ends[:, None] + torch.arange(num_slots),
        }
        if self.family.token_types:
            batch[self.family.token_types] = (ids == self._image_id).long()
        return batch

    @cached_property
    def _image_id(self) -> int:
        names = {config_name: token for token, config_name in self.family.special_tokens}
        return self.tokenizer.convert_tokens_to_ids(names["image_token_id"])

    def save(self, folder: Path) -> None:
        """Writes tokenizer, image processor and `processing.json` into an existing folder."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        settings = {
            "model_type": self.family.model_type,
            "prompt": asdict(self.prompt),
            "max_text_tokens": self.max_text_tokens,
        }
        (folder / "processing.json").write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Processing":
        """The processing that `save` wrote."""
        settings = json.loads((folder / "processing.json").read_text())
        tokenizer, image_processor = load_processors(str(folder))
        return cls(
            family_of(settings["model_type"]),
            tokenizer,
            image_processor,
            Prompt(**settings["prompt"]),
            settings["max_text_tokens"],
        )


def load_processors(path: str, revision: str | None = None) -> tuple[Any, Any]:
    """Tokenizer and image processor of a model folder or hub id.

    Loaded one by one: the whole processor of the Qwen family asks for torchvision only because of
    its video part, which a retriever of texts and images has no use for.

    Raises:
        UserError: the files are missing.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        image_processor = AutoImageProcessor.from_pretrained(path, revision=revision, backend="pil")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no tokenizer and image processor could be loaded from there: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return tokenizer, image_processor
