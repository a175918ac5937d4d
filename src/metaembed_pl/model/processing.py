"""Items -> tensors: the one preprocessing for training, encoding, evaluation and serving.

A row is  [prefix ; image ; text ; suffix ; slots]: the slots are the positions of the meta tokens.
The user's text is tokenized separately, so that it can neither forge an image placeholder nor push
one out when it is too long.

Shape letters: B rows, L tokens of the longest row, K slots a row.
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from metaembed_pl.data.collate import Chunk, Cut, Side
from metaembed_pl.errors import UserError
from metaembed_pl.files import read_json_object
from metaembed_pl.item import Item
from metaembed_pl.model.encoding import Prepared
from metaembed_pl.model.family import Family, Template, family_of
from metaembed_pl.model.hub_faults import why_not
from metaembed_pl.model.image_processors import load_image_processor
from metaembed_pl.picture import picture_size

PASS_TOKENS = 128
"""The cost of a forward pass in addition to its tokens, in tokens."""
BYTES_A_TOKEN = 4
"""Of a text, on average."""
PICTURE_TOKENS = 1024
"""The cost of a picture in tokens, for families that see all pictures at one size."""


@dataclass(frozen=True)
class Prompt:
    """The words around an item: one user turn, as the paper has it; None: the family's own.

    Args:
        prefix: opens the turn, before the image; may contain special tokens.
        before_text: between image and text; may contain special tokens.
        query: placed before the text of queries only.
        image_only: the text of an item that has only an image.
        suffix: closes the turn; may contain special tokens.

    >>> family_of("mllama").template.suffix, Prompt(query="").over(family_of("mllama").template)
    ('<|eot_id|>', Template(..., suffix='<|eot_id|>', before_text='', query='', ...))
    """

    prefix: str | None = None
    query: str | None = None
    image_only: str | None = None
    suffix: str | None = None
    before_text: str | None = None

    def over(self, template: Template) -> Template:
        """The template with the words that are given here."""
        given = {name: words for name, words in asdict(self).items() if words is not None}
        return replace(template, **given)


class Processing:
    """Turns items into the inputs of a backbone.

    Args:
        family: the backbone's family.
        tokenizer: a transformers tokenizer.
        image_processor: a transformers image processor; its pixel limits are the only ones.
        prompt: the words around an item.
        max_text_tokens: longer texts are cut at their end; image placeholders and slots never are.
        padding_side: the place of the padding.

    Attributes:
        cut: how many texts were cut so far.
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
        template = self._own_template()
        self.prompt = (prompt or Prompt()).over(template)
        self._refuse_unknown_marks(template)
        self.max_text_tokens = max_text_tokens
        self.cut = Cut()
        self.padding_side = padding_side
        self._num_slots: dict[Side, int] = dict.fromkeys(get_args(Side), 0)
        self._pixel_dtype = torch.float32

    def with_slots(
        self, num_slots: dict[Side, int], pixel_dtype: torch.dtype = torch.float32
    ) -> "Processing":
        """A copy for a model with meta tokens.

        Args:
            num_slots: K of each side, places for meta tokens after each row's last token.
            pixel_dtype: what the vision tower casts pixels to: as bf16 they take half of the memory
                in which workers hand them over.
        """
        made = copy.copy(self)
        made._num_slots, made._pixel_dtype = num_slots, pixel_dtype
        return made

    def __call__(self, items: Sequence[Item], side: Side) -> dict[str, Tensor]:
        """Tensors of a batch of items, as `MetaEmbedder.forward` takes them.

        Args:
            items: at least one.
            side: queries get the prompt's `query` words.

        Returns:
            `input_ids`, `attention_mask` (B, L), `slot_index` (K columns of each row), and further
            inputs of the family's model.

        Raises:
            UserError: an image does not decode, or the family does not support its shape.
        """
        images = _load_images(items)
        with_image = [i for i, image in enumerate(images) if image is not None]
        seen = self._see([images[i] for i in with_image], self.family.image_options)
        shown = dict(zip(with_image, self._image_text(seen), strict=True))
        rows = self._rows([shown.get(i, "") for i in range(len(images))], items, side)
        return self._assembled(rows, seen, with_image, self._num_slots[side])

    def in_chunks(
        self, items: Sequence[Item], side: Side, max_tokens: int | None = None
    ) -> list[Chunk]:
        """Tensors of a batch in chunks of similar length, longest first, with little padding.

        Args:
            items: at least one.
            side: as for a batch.
            max_tokens: see `chunked`.
        """
        num_slots = self._num_slots[side]
        seen = [
            self._see([] if image is None else [image], self.family.image_options)
            for image in _load_images(items)
        ]
        shown = [next(iter(self._image_text(each)), "") for each in seen]
        rows = self._rows(shown, items, side)
        chunks = []
        for chosen in chunked([len(row) + num_slots for row in rows], max_tokens):
            some, parts = [rows[i] for i in chosen], [seen[i] for i in chosen]
            with_image = [i for i, part in enumerate(parts) if part]
            joined = _joined([parts[i] for i in with_image])
            inputs = self._assembled(some, joined, with_image, num_slots)
            chunks.append(Chunk(torch.tensor(chosen), inputs))
        return chunks

    def prepared(
        self, items: Sequence[Item], side: Side, chunk_tokens: int, about: Any = None
    ) -> Prepared:
        """The same as a window for `MetaEmbedder.encoded`; also of no items."""
        own, self.cut = self.cut, Cut()
        try:
            chunks = self.in_chunks(items, side, chunk_tokens) if items else []
            return Prepared(chunks, len(items), self.cut, about)
        finally:
            self.cut = own

    def rough_length(self, item: Item, side: Side) -> int:
        """About how many tokens an item's row has; nothing is decoded."""
        num_bytes = len(self._text(item, side).encode())
        text = min(self.max_text_tokens, num_bytes // BYTES_A_TOKEN)
        return text + self._picture_length(item) + self._num_slots[side]

    def _picture_length(self, item: Item) -> int:
        if item.image is None:
            return 0
        if not self.family.packs_images:
            return PICTURE_TOKENS
        if isinstance(item.image, Image.Image):
            width, height = item.image.size
        else:
            try:
                _, width, height = picture_size(item.image_content())
            except UserError:  # whoever decodes it says what is wrong
                return 0
        limits, side = self.image_processor.size, self.image_processor.patch_size
        area = max(limits["shortest_edge"], min(limits["longest_edge"], width * height))
        return area // (side * self.image_processor.merge_size) ** 2

    @cached_property
    def smallest_picture(self) -> dict[str, Tensor]:
        """The vision tower's inputs for a grey picture of the smallest size."""
        options = {**self.family.image_options, **self.family.smallest_options}
        # Tensors that are made in inference mode cannot be used in training later.
        with torch.inference_mode(False):
            seen = self._see([Image.new("RGB", (1, 1), "gray")], options)
        return {name: seen[name] for name in self.family.picture_inputs}

    def smallest_row(self, side: Side) -> dict[str, Tensor]:
        """Tensors of the shortest row, without content."""
        return self._assembled([[self._slot_id]], {}, [], self._num_slots[side])

    def _rows(self, shown: list[str], items: Sequence[Item], side: Side) -> list[list[int]]:
        """Token ids without slots: [prefix ; image ; text ; suffix]."""
        heads = [self.prompt.prefix + image + self.prompt.before_text for image in shown]
        parts = zip(self._ids(heads), self.text_ids(items, side), strict=True)
        return [[*head, *text, *self._suffix] for head, text in parts]

    def _assembled(
        self,
        rows: list[list[int]],
        seen: Mapping[str, Any],
        with_image: list[int],
        num_slots: int,
    ) -> dict[str, Tensor]:
        batch = self._pad(rows, num_slots)
        row_index = torch.tensor(with_image, dtype=torch.long)
        return batch | self.family.model_inputs(batch, seen, row_index, self._image_id)

    def _own_template(self) -> Template:
        """The family's template whose special tokens this model's tokenizer knows."""
        templates = (self.family.template, *self.family.other_templates)
        known = (t for t in templates if all(map(self._knows, _marks(t.prefix + t.suffix))))
        return next(known, self.family.template)

    def _knows(self, mark: str) -> bool:
        nothing = None, getattr(self.tokenizer, "unk_token_id", None)
        return self.tokenizer.convert_tokens_to_ids(mark) not in nothing

    def _refuse_unknown_marks(self, own: Template) -> None:
        """Refuses special tokens that this model's tokenizer would read as letters."""
        parts = {own.prefix, own.before_text, own.suffix}
        used = parts & {self.prompt.prefix, self.prompt.before_text, self.prompt.suffix}
        if not self._knows(self.family.image_token):
            raise UserError(
                f"the tokenizer does not know {self.family.image_token}: are its files missing, or "
                f"is it not that of a {self.family.model_type} model?"
            )
        for mark in _marks(" ".join(sorted(used))):
            if not self._knows(mark):
                raise UserError(
                    f"the prompt of {self.family.model_type} has {mark}, which this model's "
                    "tokenizer does not know: set prompt.prefix and prompt.suffix to its own"
                )

    def _see(self, images: list[Any], options: Mapping[str, Any]) -> Mapping[str, Any]:
        if not images:
            return {}
        # One list an item: some families take a flat list for the images of a single row.
        nested = [[image] for image in images]
        try:
            seen = self.image_processor(images=nested, return_tensors="pt", **options)
        except ValueError as error:
            sizes = ", ".join(f"{image.width} x {image.height}" for image in images)
            raise UserError(f"images of {sizes}: preprocessing failed: {error}") from error
        return seen | {"pixel_values": seen["pixel_values"].to(self._pixel_dtype)}

    def _image_text(self, seen: Mapping[str, Any]) -> list[str]:
        return self.family.image_text(self.image_processor, seen) if seen else []

    def _ids(self, texts: list[str], **settings: Any) -> list[list[int]]:
        different = list(dict.fromkeys(texts))  # pictures of one size have the same text
        ids = self.tokenizer(different, add_special_tokens=False, **settings)["input_ids"]
        of_text = dict(zip(different, ids, strict=True))
        return [of_text[text] for text in texts]

    @cached_property
    def _suffix(self) -> list[int]:
        return self._ids([self.prompt.suffix])[0]

    def text_ids(self, items: Sequence[Item], side: Side) -> list[list[int]]:
        """The tokens of each item's text, truncated; truncated texts are counted in `cut`."""
        # split_special_tokens: "<|image_pad|>" typed by a user is plain text, not a placeholder.
        ids = self._ids([self._text(item, side) for item in items], split_special_tokens=True)
        self.cut.note([len(row) for row in ids], self.max_text_tokens)
        return [row[: self.max_text_tokens] for row in ids]

    def _text(self, item: Item, side: Side) -> str:
        before = self.prompt.query if side == "query" else ""
        return before + (item.words or self.prompt.image_only)

    def _pad(self, rows: list[list[int]], num_slots: int) -> dict[str, Tensor]:
        length = max(map(len, rows)) + num_slots
        ids, mask, ends = [], [], []
        for row in rows:
            used = len(row) + num_slots
            before = length - used if self.padding_side == "left" else 0
            after = length - used - before
            free = [self._slot_id] * length
            ids.append([*free[:before], *row, *free[: num_slots + after]])
            mask.append([0] * before + [1] * used + [0] * after)
            ends.append([before + len(row)])
        return {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(mask),
            "slot_index": torch.tensor(ends) + torch.arange(num_slots),
        }

    @cached_property
    def _slot_id(self) -> int:
        """Any ordinary id: embeddings of slots are overwritten, those of padding masked."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    @cached_property
    def _image_id(self) -> int:
        return self.tokenizer.convert_tokens_to_ids(self.family.image_token)

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
        settings = read_json_object(folder / "processing.json")
        tokenizer, image_processor = load_processors(str(folder))
        return cls(
            family_of(settings["model_type"]),
            tokenizer,
            image_processor,
            Prompt(**settings["prompt"]),
            settings["max_text_tokens"],
        )


def chunked(lengths: Sequence[int], max_tokens: int | None = None) -> list[list[int]]:
    """Splits rows into chunks of similar length, longest first, at the lowest cost of encoding.

    Args:
        lengths: of the rows, slots included.
        max_tokens: per chunk, padding included; a longer row is a chunk by itself.

    >>> chunked([3, 9, 4, 4], max_tokens=12)
    [[1], [2, 3, 0]]
    >>> chunked([300, 290, 90, 80, 70])
    [[0, 1], [2, 3, 4]]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    longest = np.asarray(lengths)[order]
    costs = np.zeros(len(order) + 1)  # of the first rows, by their number
    starts = np.zeros(len(order) + 1, dtype=np.int64)  # of the last chunk of these rows
    for end in range(1, len(order) + 1):
        tokens = longest[:end] * np.arange(end, 0, -1)
        found = costs[:end] + tokens + PASS_TOKENS
        if max_tokens is not None:
            found[:-1][tokens[:-1] > max_tokens] = np.inf
        starts[end] = found.argmin()
        costs[end] = found[starts[end]]
    chunks: list[list[int]] = []
    end = len(order)
    while end:
        chunks.append(order[starts[end] : end].tolist())
        end = starts[end]
    return chunks[::-1]


def _load_images(items: Sequence[Item]) -> list[Image.Image | None]:
    if not items:
        raise UserError("expected at least one item, got none")
    return [item.load_image() for item in items]


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Concatenates the image processor's outputs of several images, padded to the widest.

    Image processors do the same if images have different numbers of tiles.
    """
    found = {}
    for name in parts[0] if parts else ():
        tensors = [part[name] for part in parts]
        if isinstance(tensors[0], Tensor):
            shape = [max(sizes) for sizes in zip(*(t.shape[1:] for t in tensors), strict=True)]
            found[name] = torch.cat([_widened(tensor, shape) for tensor in tensors])
    return found


def _widened(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    missing = [size - have for size, have in zip(shape, tensor.shape[1:], strict=True)]
    return torch.nn.functional.pad(tensor, [n for size in reversed(missing) for n in (0, size)])


def load_processors(path: str, revision: str | None = None) -> tuple[Any, Any]:
    """Tokenizer and image processor of a model folder or hub id.

    They are loaded separately, because the video part of the Qwen processors needs torchvision.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        tokenizer("a")  # settings of a wrong kind show only now
        image_processor = load_image_processor(path, revision)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain ones
        raise UserError(
            f"{path}: no tokenizer and image processor could be loaded from there: "
            f"{why_not(path, error)}"
        ) from error
    return tokenizer, image_processor


def _marks(words: str) -> list[str]:
    """The special tokens of a template.

    >>> _marks("<|im_start|>User: a < b")
    ['<|im_start|>']
    """
    return re.findall(r"<[^<>\s]+>", words)
