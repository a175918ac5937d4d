"""`embed --engine vllm`: vLLM's offline engine instead of our own forward pass.

It loads a folder of `export --format vllm`. The store has the same vectors and the same identity as
with the exported model, so this model can search it.

Shape letters: N items of a window, R meta embeddings of a side, D their width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from metaembed_pl.budget import parse_groups
from metaembed_pl.data.collate import Cut, Side
from metaembed_pl.errors import UserError
from metaembed_pl.files import read_json_object
from metaembed_pl.item import Item
from metaembed_pl.model.encoding import Prepared, prepared
from metaembed_pl.model.export_transformers import FORM
from metaembed_pl.model.export_vllm import VllmPrompts

T = TypeVar("T")


@dataclass(frozen=True)
class PromptProcessor:
    """Prepares a window of items for vLLM, in this process or in a worker."""

    prompts: VllmPrompts

    def prepared(
        self, items: Sequence[Item], side: Side, chunk_tokens: int, about: Any = None
    ) -> Prepared:
        """The prepared window; vLLM forms batches itself."""
        own, self.prompts.cut = self.prompts.cut, Cut()
        try:
            prompts: Any = self.prompts(items, side)
            return Prepared(prompts, len(items), self.prompts.cut, about)
        finally:
            self.prompts.cut = own


class VllmModel:
    """A model that embeds items with vLLM.

    Args:
        folder: of `export --format vllm`.
        settings: of `vllm.LLM`, such as `tensor_parallel_size`.

    Raises:
        UserError: vLLM is missing, the folder has another format, or vLLM refuses a setting.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]):
        form = Path(folder) / FORM
        config = Path(folder) / "config.json"
        is_ours = form.is_file() and "metaembed" in read_json_object(config)
        known = read_json_object(form) if is_ours else {}
        if not known.get("identity"):
            raise UserError(
                f"--engine vllm takes a folder that this version's `export --format vllm` made; "
                f"{folder} is none"
            )
        try:
            from vllm import LLM
        except ImportError as error:
            raise UserError(
                f"--engine vllm needs vLLM in this environment: pip install vllm ({error})"
            ) from error
        self.identity: str = known["identity"]
        self.groups = parse_groups(known["groups"])
        self.width: int = known["width"]
        self.widths = tuple(known["widths"])
        self.processing = VllmPrompts(folder)
        try:
            self._engine: Any = LLM(str(folder), runner="pooling", **settings)
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"vLLM cannot start with {settings}: {reason:.400}") from error

    def processor(self) -> PromptProcessor:
        """The processor that prepares windows."""
        return PromptProcessor(self.processing)

    def encoded(
        self,
        windows: Iterable[T],
        prepare: Callable[[T], Prepared],
        side: Side,
        num_workers: int | None = 0,
        num_ranks: int = 1,
    ) -> Iterator[tuple[Prepared, Tensor]]:
        """As `MetaEmbedder.encoded`: prepared windows, and fp32 unit vectors (N, R, D)."""
        shape = self.groups[-1][side == "candidate"], self.width
        for window in prepared(windows, prepare, torch.device("cpu"), num_workers, num_ranks):
            self.processing.cut += window.cut
            vectors = torch.empty(0, *shape)
            if window.num_items:
                found = self._encode(window.chunks)
                vectors = torch.stack([one.outputs.data.float().cpu() for one in found])
            yield window, vectors

    def _encode(self, prompts: list[Any]) -> list[Any]:
        try:
            return self._engine.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"vLLM refuses an item: {reason:.400}") from error
