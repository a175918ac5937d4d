"""MetaEmbedder: a backbone, its meta tokens and an optional projection; encode, score, save, load.

    >>> model = MetaEmbedder.from_pretrained("runs/emoji/model")          # doctest: +SKIP
    >>> queries = model.encode_query(["flag of Japan"])                   # doctest: +SKIP
    >>> candidates = model.encode_candidate([{"image": "a.png"}])         # doctest: +SKIP
    >>> model.score(queries, candidates, budget="4x8")                    # doctest: +SKIP

model_folder.py describes the files of a model folder.

Shape letters: B items of a batch, N items, R meta embeddings an item (R_q or R_c), D their width.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from metaembed_pl.budget import Budget, check_budget, parse_groups
from metaembed_pl.data.collate import Side
from metaembed_pl.environment import versions
from metaembed_pl.errors import UserError
from metaembed_pl.files import new_folder
from metaembed_pl.item import Item, several
from metaembed_pl.late_interaction import check_vectors, maxsim, narrowed
from metaembed_pl.model import vision
from metaembed_pl.model.backbone import BackboneConfig
from metaembed_pl.model.encoding import Pace, Prepared, one_ahead, prepared
from metaembed_pl.model.meta_tokens import Layout, MetaTokens
from metaembed_pl.model.model_folder import (
    FORMAT,
    SETTINGS,
    backbone_tensors,
    find_model_folder,
    load_folder_backbone,
    read_settings,
    save_backbone,
)
from metaembed_pl.model.packing import packed
from metaembed_pl.model.processing import Processing
from metaembed_pl.model.sharded import unsharded
from metaembed_pl.model.weights import load_into, refuse_unlike
from metaembed_pl.progress import Progress
from metaembed_pl.ranks import rank_and_world

OWN_FILE = "meta_tokens.safetensors"
T = TypeVar("T")
Pooling = Literal["meta_tokens", "last", "mean"]
"""The source of vectors: meta tokens, the last token, or the mean over all tokens."""
Shared = Literal["gradients", "weights"]
"""What ranks exchange in a step: gradients with DDP; with ZeRO-3 and FSDP2 also weights."""


class MetaEmbedder(nn.Module):
    """Turns items into meta embeddings.

    Args:
        backbone: a transformers base model.
        processing: its preprocessing.
        groups: the nested groups the model is trained for; the largest sets R_q and R_c.
        layout: see `MetaTokens`.
        projection: width of the meta embeddings; None: the backbone's hidden width.
        meta_token_std: standard deviation of new meta tokens; None: the backbone's
            `initializer_range`, as in the paper.
        meta_tokens_orthogonal: initialise the meta tokens orthogonally.
        pooling: `last` and `mean` make a single-vector model without meta tokens, like mmE5, GME
            and Qwen3-VL-Embedding (`last`) or MoCa (`mean`).
        bidirectional: turn off the causal mask of the language model, as MoCa does.

    Attributes:
        widths: smaller widths at which its first components were trained, largest first.
        shared: what the ranks of a training run exchange; None in one process. All must run the
            same modules, even without pictures.
        packs: the rows of a call go through the language model as one, without padding.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        processing: Processing,
        groups: Sequence[Budget | str],
        layout: Layout = "both",
        projection: int | None = None,
        meta_token_std: float | None = None,
        meta_tokens_orthogonal: bool = False,
        pooling: Pooling = "meta_tokens",
        bidirectional: bool = False,
    ):
        super().__init__()
        self.groups = parse_groups(groups)
        self.widths: tuple[int, ...] = ()
        _check_pooling(pooling, self.groups, bidirectional)
        self.pooling: Pooling = pooling
        self.bidirectional = bidirectional
        self.merged: dict[str, str] = {}  # identity of merged weights -> of the adapter's
        self.processing = processing
        self.backbone = backbone
        text: Any = backbone.config.get_text_config()
        if bidirectional:
            text.is_causal = False  # what transformers makes attention masks by
        counts = self.groups[-1][:2] if pooling == "meta_tokens" else (0, 0)
        self.meta_tokens = MetaTokens(
            *counts,
            text.hidden_size,
            layout,
            std=meta_token_std or text.initializer_range,
            orthogonal=meta_tokens_orthogonal,
        )
        self.width = projection or text.hidden_size
        self.projection = (
            nn.Linear(text.hidden_size, projection, bias=False) if projection else nn.Identity()
        )
        self.shared: Shared | None = None
        self.packs = (
            processing.family.packs_rows
            and pooling == "meta_tokens"
            and backbone.config._attn_implementation == "flash_attention_2"
        )

    def processor(self) -> Processing:
        """Turns items into the tensors `forward` takes; has no weights, so workers can hold it."""
        slots = {side: self.meta_tokens.num_slots(side) for side in get_args(Side)}
        tower: Any = self.backbone.get_submodule(self.processing.family.vision_module)
        return self.processing.with_slots(slots, tower.dtype)

    def forward(
        self, inputs: dict[str, Tensor], side: Side, is_first: bool = True
    ) -> Float[Tensor, "B R D"]:
        """Meta embeddings of a processed batch: unit vectors, fp32.

        Args:
            inputs: see `Processing.__call__`.
            side: of its items.
            is_first: of several calls with one reduction of gradients: only the first must run the
                same modules as on other ranks.
        """
        family = self.processing.family
        pictures, inputs = family.split(inputs)
        slot_index = inputs.pop("slot_index")
        unused: vision.Seen = {}
        if pictures:
            prepared = family.shown(self.backbone, inputs, self.see(pictures))
        elif self.shared == "weights" or (self.shared and is_first and torch.is_grad_enabled()):
            unused = self._see_for_others()
            prepared = family.in_step(self.backbone, inputs, unused)
        else:
            prepared = nullcontext(inputs)
        table = self.backbone.get_input_embeddings()
        with prepared as ready:
            if self.packs:
                ready, slot_index = packed(ready, slot_index)
            with self.meta_tokens.inserted(table, slot_index, side):
                hidden = self.backbone(**ready, use_cache=False).last_hidden_state
        states = self._read(hidden, slot_index, inputs["attention_mask"], side)
        # bf16 would cost three digits of the score: project and normalise in fp32.
        states = states.to(self.meta_tokens.embedding.weight.dtype)
        with torch.autocast(states.device.type, enabled=False):
            found = nn.functional.normalize(self.projection(states).float(), dim=-1)
        return found + vision.nothing_of(unused)

    def _read(
        self,
        hidden: Float[Tensor, "N L H"],
        slot_index: Int[Tensor, "B K"],
        mask: Int[Tensor, "B S"],
        side: Side,
    ) -> Float[Tensor, "B R H"]:
        """The hidden states that become vectors, without padding and additional rows."""
        if self.pooling == "meta_tokens":
            return self.meta_tokens.read(hidden, slot_index, side)
        hidden = hidden[: len(mask)]
        if self.pooling == "mean":
            weights = (mask / mask.sum(1, keepdim=True))[:, :, None]
            return (hidden.float() * weights).sum(1, keepdim=True)
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last][:, None]

    def _see_for_others(self) -> vision.Seen:
        """Runs the vision tower on the smallest picture, because other ranks run it."""
        if self.shared == "gradients" and self.vision_is_frozen:
            return {}
        smallest = self.processing.smallest_picture.items()
        return self.see({name: part.to(self.device) for name, part in smallest})

    def see(self, pictures: dict[str, Tensor]) -> vision.Seen:
        """The vision tower's outputs; without a graph if it is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.vision_is_frozen):
            return self.processing.family.see(self.backbone, pictures)

    @property
    def vision_is_frozen(self) -> bool:
        """Whether neither the vision tower nor its projector is trained."""
        parts = self.processing.family.vision_parts(self.backbone)
        return not any(weight.requires_grad for part in parts for weight in part.parameters())

    @property
    def device(self) -> torch.device:
        """The device of the meta tokens, and of inputs."""
        # By its name, ZeRO-3 would gather the weight: on this rank, but not on the others.
        return next(self.meta_tokens.parameters()).device

    def encode_query(
        self, items: Iterable[Item | str | dict], batch_size: int = 32, progress: bool = False
    ) -> Float[Tensor, "N R D"]:
        """Meta embeddings of queries.

        Args:
            items: texts, `{"text": ..., "image": ...}` or `Item`s.
            batch_size: pictures prepared at a time, or eight times as many texts; changes speed and
                memory, not the result.
            progress: show a progress bar.

        Returns:
            fp32 unit vectors on the CPU; R = R_q.
        """
        return self._encode(items, "query", batch_size, progress)

    def encode_candidate(
        self, items: Iterable[Item | str | dict], batch_size: int = 32, progress: bool = False
    ) -> Float[Tensor, "N R D"]:
        """Meta embeddings of candidates; as `encode_query`, with R = R_c."""
        return self._encode(items, "candidate", batch_size, progress)

    def _encode(
        self, items: Iterable[Item | str | dict], side: Side, batch_size: int, progress: bool
    ) -> Float[Tensor, "N R D"]:
        parsed = [Item.parse(item) for item in several(items, "items")]
        pace = Pace(batch_size)
        windows = pace.windows(parsed, lambda item: item.image is None)
        process = self.processor()

        def prepare(window: list[Item]) -> Prepared:
            return process.prepared(window, side, pace.chunk_tokens)

        found = torch.empty(len(parsed), self.num_vectors(side), self.width)
        done = 0
        things = "queries" if side == "query" else "candidates"
        with Progress("encoding", len(parsed), things, is_shown=progress) as bar:
            for _, part in self.encoded(windows, prepare, side):
                found[done : done + len(part)] = part
                done += len(part)
                bar.update(done)
        return found

    def num_vectors(self, side: Side) -> int:
        """R: vectors of an item."""
        return self.groups[-1].r_q if side == "query" else self.groups[-1].r_c

    def encoded(
        self,
        windows: Iterable[T],
        prepare: Callable[[T], Prepared],
        side: Side,
        num_workers: int | None = 0,
        num_ranks: int = 1,
    ) -> Iterator[tuple[Prepared, Float[Tensor, "N R D"]]]:
        """Meta embeddings of windows of items, while the next ones are read and prepared.

        Args:
            windows: see `Pace.windows`.
            prepare: calls `Processing.prepared` on a window, here or in a worker.
            side: of all items.
            num_workers: see `encoding.prepared`.
            num_ranks: likewise.

        Yields:
            The result of `prepare`, and fp32 unit vectors on the CPU, in the order of its items.
        """
        ready = prepared(windows, prepare, self.device, num_workers, num_ranks)
        begun = ((window, self._run(window, side)) for window in ready)
        # A GPU computes the next window while the caller handles the last one.
        for window, vectors in one_ahead(begun) if self.device.type == "cuda" else begun:
            self.processing.cut += window.cut
            yield window, vectors.cpu()

    def _run(self, window: Prepared, side: Side) -> Float[Tensor, "N R D"]:
        shape = window.num_items, self.num_vectors(side), self.width
        found = torch.empty(shape, device=self.device)
        was_training = self.training
        self.eval()
        try:
            with torch.inference_mode():
                for chunk in window.chunks:
                    chunk = chunk.to(self.device)
                    found[chunk.rows] = self(chunk.inputs, side)
        finally:
            self.train(was_training)
        return found

    def score(
        self,
        queries: Float[Tensor, "Q Rq D"],
        candidates: Float[Tensor, "C Rc D"],
        budget: Budget | str | None = None,
    ) -> Float[Tensor, "Q C"]:
        """MaxSim scores at a budget; None uses all vectors. Not divided by r_q.

        A budget with a width, such as "4x8x64", uses only the first components.

        Raises:
            UserError: the model was not trained for this budget.
        """
        check_vectors(queries, "queries")
        check_vectors(candidates, "candidates")
        r_q, r_c, width = check_budget(budget or self.groups[-1], self.groups, self.widths)
        return maxsim(narrowed(queries[:, :r_q], width), narrowed(candidates[:, :r_c], width))

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Writes a model folder, atomically; safetensors only.

        If several ranks train the model, each must call this: sharded weights are gathered, and the
        first rank writes.

        Raises:
            UserError: the folder exists without `overwrite`, or the files differ when read back.
        """
        tensors = self._saved_tensors()
        if rank_and_world()[0] == 0:
            with new_folder(Path(folder), overwrite) as temporary:
                self._write(tensors, temporary, Path(folder))

    def write_into(self, folder: Path, home: Path) -> None:
        """Writes a model folder into an existing one, which will be moved to `home`."""
        self._write(self._saved_tensors(), folder, home)

    def _saved_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The saved tensors by part, gathered."""
        return backbone_tensors(self.backbone) | {"own": unsharded(self._own_tensors())}

    def _write(self, tensors: dict[str, dict[str, Tensor]], folder: Path, home: Path) -> None:
        settings = self.settings() | save_backbone(self.backbone, tensors, folder, home)
        (folder / "processing").mkdir(exist_ok=True)
        self.processing.save(folder / "processing")
        own = {name: tensor.contiguous() for name, tensor in tensors["own"].items()}
        save_file(own, folder / OWN_FILE)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")
        refuse_unlike(folder / OWN_FILE, own)

    def narrow(self, width: int) -> None:
        """Keeps the first `width` dimensions of each vector, by a projection.

        Raises:
            UserError: the model was not trained at this width.
        """
        if width not in self.widths:
            known = ", ".join(map(str, self.widths)) or "no other width than its own"
            raise UserError(f"width {width}: this model was trained at {known}")
        own, old = self.meta_tokens.embedding.weight, self.projection
        rows = torch.eye(width, self.width) if isinstance(old, nn.Identity) else old.weight[:width]
        layer = nn.Linear(rows.shape[1], width, bias=False, device=own.device, dtype=own.dtype)
        with torch.no_grad():
            layer.weight.copy_(rows)
        self.projection, self.width = layer.train(self.training), width
        self.widths = tuple(smaller for smaller in self.widths if smaller < width)
        self.merged = {}  # the vectors are not the adapter's any more

    def settings(self) -> dict[str, Any]:
        """The content of `metaembed.json`, except for the place of the backbone."""
        return {
            "format": FORMAT,
            "groups": [str(group) for group in self.groups],
            "layout": self.meta_tokens.layout,
            **({"pooling": self.pooling} if self.pooling != "meta_tokens" else {}),
            **({"bidirectional": True} if self.bidirectional else {}),
            "projection": None if isinstance(self.projection, nn.Identity) else self.width,
            "width": self.width,
            "model_type": self.processing.family.model_type,
            "dtype": str(self.backbone.dtype).removeprefix("torch."),
            "versions": versions(),
            **({"merged": self.merged} if self.merged else {}),
            **({"widths": list(self.widths)} if self.widths else {}),
        }

    def _own_tensors(self) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {}
        if self.pooling == "meta_tokens":
            own["meta_tokens"] = self.meta_tokens.embedding.weight
        if not isinstance(self.projection, nn.Identity):
            own["projection"] = self.projection.weight
        return own

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str = "cpu",
        options: BackboneConfig | None = None,
        revision: str | None = None,
    ) -> "MetaEmbedder":
        """Loads a model folder; every weight must be there and fit.

        Args:
            folder: a model folder, or the hub id of one.
            device: the device to load the model on.
            options: options to run the backbone with; None: those it was saved with.
            revision: branch, tag or commit of a hub id.

        Raises:
            UserError: not a model folder; or weights are missing, unexpected or mis-shaped; or its
                adapter belongs to another base model.
        """
        folder = find_model_folder(folder, revision)
        settings = read_settings(folder)
        try:
            processing = Processing.load(folder / "processing")
            model = cls(
                load_folder_backbone(folder, settings, options, processing),
                processing,
                parse_groups(settings["groups"]),
                settings["layout"],
                settings["projection"],
                pooling=settings.get("pooling", "meta_tokens"),
                bidirectional=settings.get("bidirectional", False),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder}: {SETTINGS} or processing/processing.json is damaged: {error!r}"
            ) from error
        load_into(model._own_tensors(), folder / OWN_FILE)
        model.merged = dict(settings.get("merged") or {})
        model.widths = tuple(settings.get("widths") or ())
        return model.eval().to(device)


def _check_pooling(pooling: Pooling, groups: Sequence[Budget], bidirectional: bool) -> None:
    if pooling not in get_args(Pooling):
        raise UserError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {pooling!r}")
    if pooling != "meta_tokens" and list(groups) != [Budget(1, 1)]:
        raise UserError(
            f"pooling {pooling} gives one vector an item: groups must be [1x1], got "
            f"{', '.join(map(str, groups))}"
        )
    if bidirectional and pooling == "meta_tokens":
        raise UserError(
            "bidirectional is for pooling last or mean: meta tokens are read under the causal "
            "mask, where a query does not see the candidate tokens behind its own"
        )
