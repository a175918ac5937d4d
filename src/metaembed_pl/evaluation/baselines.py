"""Models of other libraries, evaluated with our sets, ranker and report.

    python -m metaembed_pl evaluate --model sentence-transformers:NAME --benchmark vidore_v2
    python -m metaembed_pl evaluate --model mteb:NAME --benchmark vidore_v2 --vectors 32x1024

`sentence-transformers:` takes its single-vector models and its `MultiVectorEncoder`, including
ColPali and its relatives; `mteb:` takes models registered in mteb, such as MoCa, mmE5, GME and
Qwen3-VL-Embedding. Not yet verified with weights from the hub.

A single-vector model has the budget 1x1. Multi-vector models write one vector per token; here every
item is padded to the counts of --vectors without changing scores: candidates repeat their vectors
(the best match stays the same), queries get zeros (which add nothing).

Shape letters: N items, R vectors of an item after filling, D their width.
"""

import hashlib
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metaembed_pl.budget import Budget
from metaembed_pl.data.collate import Cut, Side
from metaembed_pl.errors import UserError, first_line
from metaembed_pl.item import Item
from metaembed_pl.model.weights import fingerprint

log = logging.getLogger(__name__)

KINDS = ("sentence-transformers", "mteb")
MANY = Budget(64, 1024)
COMPARES = {"cosine": True, "dot": False, "maxsim": False, "MaxSim": False}
"""How a library's models compare vectors -> whether these are normalised first."""


class Baseline:
    """A model of another library as an evaluation needs it; subclasses turn items into vectors.

    Args:
        name: as on the command line.
        compares: one of `COMPARES`.
        vectors: vectors of a query and of a candidate, for multi-vector models; None: one each.
        width: of a vector.
        device: where vectors are compared.
    """

    widths = ()

    def __init__(
        self, name: str, compares: str, vectors: Budget | None, width: int, device: torch.device
    ):
        if compares not in COMPARES:
            raise UserError(
                f"{name} compares vectors by {compares}; expected one of {', '.join(COMPARES)}"
            )
        self.name, self.compares, self.width, self.device = name, compares, width, device
        self.groups = (vectors or Budget(1, 1),)
        self.is_many = vectors is not None
        self.processing = SimpleNamespace(cut=Cut())

    @property
    def identity(self) -> str:
        """A digest that differs from other models'."""
        raise NotImplementedError

    def vectors_of(self, items: Sequence[Item], side: Side) -> Any:
        """One vector or several for each item."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The model's settings, for reports."""
        return {"name": self.name, "compares": self.compares, "groups": [str(self.groups[0])]}

    def encode_query(self, items: Sequence[Item], batch_size: int = 32) -> Float[Tensor, "N R D"]:
        """Vectors of queries, filled with zeros."""
        return self._filled(items, "query", self.groups[0].r_q)

    def encode_candidate(
        self, items: Sequence[Item], batch_size: int = 32
    ) -> Float[Tensor, "N R D"]:
        """Vectors of candidates, filled with copies of an item's first vector."""
        return self._filled(items, "candidate", self.groups[0].r_c)

    def _filled(self, items: Sequence[Item], side: Side, count: int) -> Float[Tensor, "N R D"]:
        found = torch.zeros(len(items), count, self.width)
        try:
            of_items = self.vectors_of(items, side)
        except (ValueError, TypeError, KeyError, NotImplementedError) as error:
            reason = first_line(error)
            raise UserError(f"{self.name} could not encode a {side}: {reason}") from error
        for place, vectors in enumerate(of_items):
            vectors = torch.as_tensor(vectors).float().cpu().reshape(-1, self.width)
            if COMPARES[self.compares]:
                vectors = nn.functional.normalize(vectors, dim=-1)
            if len(vectors) > count:
                raise UserError(
                    f"{self.name} produced {len(vectors)} vectors for a {side}, more than "
                    f"{count}: use a larger --vectors RQxRC, such as --vectors {MANY}"
                )
            found[place, : len(vectors)] = vectors
            if side == "candidate" and len(vectors):  # without vectors, its score is 0
                found[place, len(vectors) :] = vectors[0]
        return found


class SentenceTransformersBaseline(Baseline):
    """A model that sentence-transformers loads: one vector an item, or many.

    Args:
        folder: a folder or hub id.
        device: to run on.
        vectors: vectors of a query and of a candidate, for multi-vector models; None: `MANY`.
    """

    def __init__(self, folder: str, device: str, vectors: Budget | None = None):
        _need("sentence_transformers", "sentence-transformers")
        from sentence_transformers import MultiVectorEncoder, SentenceTransformer

        many = _has_many(folder)
        kind: Any = MultiVectorEncoder if many else SentenceTransformer
        try:
            self.model: Any = kind(folder, device=device)
        except (OSError, ValueError, ImportError) as error:
            reason = first_line(error)
            raise UserError(f"sentence-transformers could not load {folder}: {reason}") from error
        compares = "maxsim" if many else str(self.model.similarity_fn_name or "cosine")
        width = int(self.model.get_embedding_dimension())
        on = torch.device(self.model.device)
        super().__init__(folder, compares, (vectors or MANY) if many else None, width, on)

    @property
    def identity(self) -> str:
        """A digest of the weights and of how many vectors are kept."""
        known = f"{fingerprint(self.model) or self.name} {self.groups[0]} {self.compares}"
        return hashlib.sha256(known.encode()).hexdigest()[:32]

    def vectors_of(self, items: Sequence[Item], side: Side) -> Any:
        """Encoded by `encode_query` or `encode_document`, with the model's own prompts."""
        encode = self.model.encode_query if side == "query" else self.model.encode_document
        inputs = [_sbert_input(item) for item in items]
        options = {} if self.is_many else {"convert_to_tensor": True}
        return encode(inputs, batch_size=len(inputs), show_progress_bar=False, **options)


class MtebBaseline(Baseline):
    """A model that mteb has registered, through mteb's own interface.

    Args:
        model: its name, or a model that mteb has loaded.
        device: to run on.
        vectors: vectors of a query and of a candidate, for multi-vector models; None: `MANY`.
    """

    def __init__(self, model: Any, device: str, vectors: Budget | None = None):
        _need("mteb", "metaembed-pl[mteb]")
        self.model = _of_mteb(model, device) if isinstance(model, str) else model
        about = self.model.mteb_model_meta
        if not hasattr(self.model, "encode"):
            raise UserError(f"{about.name} has no `encode`: it searches by itself, without vectors")
        compares = getattr(about.similarity_fn_name, "value", about.similarity_fn_name) or "cosine"
        many = compares == "MaxSim"
        self._revision, width = str(about.revision), about.embed_dim
        if not isinstance(width, int):  # unknown, or all that it can be cut to
            width = torch.as_tensor(self._encode([Item("a")], "query")[0]).shape[-1]
        vectors = (vectors or MANY) if many else None
        super().__init__(str(about.name), compares, vectors, width, torch.device(device))

    @property
    def identity(self) -> str:
        """A digest of its name, its revision and of how many vectors are kept."""
        known = f"mteb {self.name} {self._revision} {self.groups[0]}"
        return hashlib.sha256(known.encode()).hexdigest()[:32]

    def vectors_of(self, items: Sequence[Item], side: Side) -> Any:
        """Texts, pictures and both are encoded apart: mteb takes batches of one modality."""
        modalities = [(item.words is not None, item.image is not None) for item in items]
        found: list[Any] = [None] * len(items)
        for modality in dict.fromkeys(modalities):
            places = [place for place, of_item in enumerate(modalities) if of_item == modality]
            vectors = self._encode([items[place] for place in places], side)
            for place, vector in zip(places, vectors, strict=True):
                found[place] = vector
        return found

    def _encode(self, items: Sequence[Item], side: Side) -> Sequence[Any]:
        from datasets import Dataset
        from mteb import TaskMetadata
        from mteb.types import PromptType
        from torch.utils.data import DataLoader

        columns: dict[str, list[Any]] = {"id": [str(place) for place in range(len(items))]}
        if items[0].words is not None:
            columns["text"] = [item.words for item in items]
        if items[0].image is not None:
            columns["image"] = [item.load_image() for item in items]
        rows: Any = Dataset.from_dict(columns)
        loader = DataLoader(rows, batch_size=len(items), collate_fn=_columns)
        found = self.model.encode(
            loader,
            task_metadata=TaskMetadata(**TASK),
            hf_split="test",
            hf_subset="default",
            prompt_type=PromptType.query if side == "query" else PromptType.document,
        )
        return list(found)


# What mteb wants to know of a task; its models look at the type, for their instructions.
TASK: dict[str, Any] = {
    "name": "MetaEmbedEvaluation",
    "dataset": {"path": "local/evaluation", "revision": "1"},
    "description": "Any retrieval set.",
    "reference": None,
    "type": "Any2AnyRetrieval",
    "category": "it2it",
    "modalities": ["text", "image"],
    "eval_splits": ["test"],
    "eval_langs": ["eng-Latn"],
    "main_score": "ndcg_at_5",
    "date": None,
    "domains": None,
    "task_subtypes": None,
    "license": None,
    "annotations_creators": None,
    "dialect": None,
    "sample_creation": None,
    "bibtex_citation": "",
}


def is_baseline(name: str) -> bool:
    """Whether a name is `KIND:NAME` of another library."""
    kind, _, rest = name.partition(":")
    return kind in KINDS and bool(rest)


def load_baseline(name: str, device: str, vectors: Budget | None = None) -> Baseline:
    """The baseline of `KIND:NAME`.

    Raises:
        UserError: its library is missing, or cannot load it; or it is a model of one vector, and
            more are given.
    """
    log.warning("%s: not yet verified with weights from the hub", name)
    kind, _, rest = name.partition(":")
    made = SentenceTransformersBaseline if kind == KINDS[0] else MtebBaseline
    found = made(rest, device, vectors)
    if vectors and not found.is_many:
        raise UserError(f"--vectors is for models of many vectors, and {name} has one an item")
    return found


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _need(package: str, install: str) -> None:
    if find_spec(package) is None:
        raise UserError(f"this model needs {package}: pip install {install}")


def _has_many(folder: str) -> bool:
    """Whether a model gives many vectors, by the library's own config or transformers'."""
    from sentence_transformers.util import load_file_path

    from metaembed_pl.files import read_json_object

    own, config = (
        read_json_object(Path(file)) if (file := load_file_path(folder, name)) else {}
        for name in ("config_sentence_transformers.json", "config.json")
    )
    names = config.get("architectures") or []
    is_late = any(name.endswith("ForRetrieval") or name == "HF_ColBERT" for name in names)
    return own.get("model_type") in ("MultiVectorEncoder", "ColBERT") or (not own and is_late)


def _sbert_input(item: Item) -> Any:
    image = item.load_image()
    if image is None:
        return item.words
    return {"text": item.words, "image": image} if item.words else image


def _of_mteb(name: str, device: str) -> Any:
    import mteb

    try:
        return mteb.get_model(name, device=device)
    except Exception as error:  # whatever loaders of many authors raise
        raise UserError(f"mteb could not load {name}: {first_line(error)}") from error
