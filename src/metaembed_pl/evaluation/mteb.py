"""A MetaEmbed model in mteb, at any budget, through mteb's interface for late interaction.

    import mteb
    from metaembed_pl.evaluation.mteb import MtebEncoder

    model = MtebEncoder("runs/emoji/model", budget="4x8")
    mteb.evaluate(model, mteb.get_benchmark("ViDoRe(v2)").tasks)

mteb encodes, scores with the model's `similarity` (MaxSim here) and ranks. Needs the extra `mteb`.
Its numbers equal ours if there are no ties: mteb ranks the tied candidate with the greater id
first, and we rank the wrong one first.

N: items of a task    R: vectors spent on an item    D: width
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from torch import Tensor

from metaembed_pl.budget import Budget, check_budget
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.late_interaction import maxsim, narrowed
from metaembed_pl.model.embedder import MetaEmbedder


class MtebEncoder(AbsEncoder):
    """What mteb evaluates.

    Args:
        model_name: a model folder, its id on the hub, or a model.
        revision: of a hub id.
        device: None: a GPU if available.
        budget: to search with; None: all vectors.
        name: `organisation/model`, in results; None: the folder's name.
    """

    def __init__(
        self,
        model_name: str | MetaEmbedder,
        revision: str | None = None,
        device: str | None = None,
        budget: Budget | str | None = None,
        name: str | None = None,
        **_: Any,
    ):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model = (
            model_name.to(device)
            if isinstance(model_name, MetaEmbedder)
            else MetaEmbedder.from_pretrained(model_name, device, revision=revision)
        )
        self.budget = check_budget(
            budget or self.model.groups[-1], self.model.groups, self.model.widths
        )
        known = str(model_name).strip("/") if isinstance(model_name, str) else "model"
        name = name or "/".join(("local", *known.split("/"))[-2:])
        self.mteb_model_meta = meta_of(self.model, self.budget, name, revision)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int | None = None,
        **_: Any,
    ) -> Float[Tensor, "N R D"]:
        """Meta embeddings of a task's queries or documents, as many as the budget has.

        Args:
            inputs: mteb's loader: batches of texts, images, or both.
            task_metadata: of the task.
            hf_split: likewise.
            hf_subset: likewise.
            prompt_type: query or document.
            batch_size: not used; mteb's loader has one.

        Raises:
            UserError: the task does not have queries and documents.
        """
        if prompt_type is None:
            raise UserError(
                f"{task_metadata.name}: MetaEmbed embeds queries and candidates differently, and "
                f"tasks of type {task_metadata.type} do not say which is which: choose retrieval "
                "or reranking"
            )
        if prompt_type == PromptType.query:
            encode, count = self.model.encode_query, self.budget.r_q
        else:
            encode, count = self.model.encode_candidate, self.budget.r_c
        parts = [encode(items, len(items))[:, :count] for items in map(_items, inputs)]
        return torch.cat([narrowed(part, self.budget.width).contiguous() for part in parts])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Float[Tensor, "Q C"]:
        """MaxSim of every query with every candidate."""
        device = self.model.device
        queries, candidates = torch.as_tensor(embeddings1), torch.as_tensor(embeddings2)
        return maxsim(queries.to(device), candidates.to(device)).cpu()


def meta_of(model: MetaEmbedder, budget: Budget, name: str, revision: str | None) -> ModelMeta:
    """The metadata that mteb stores with results."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    embedding: Any = model.backbone.get_input_embeddings()
    return ModelMeta(
        loader=MtebEncoder,
        loader_kwargs={"budget": str(budget)},
        name=name,
        revision=revision,
        release_date=None,
        languages=None,
        n_parameters=num_parameters,
        n_embedding_parameters=embedding.weight.numel(),
        memory_usage_mb=num_bytes / 2**20,
        max_tokens=model.processing.max_text_tokens,
        embed_dim=budget.width or model.width,
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers", "safetensors"],
        similarity_fn_name=ScoringFunction.MAX_SIM,
        use_instructions=bool(model.processing.prompt.query),
        training_datasets=None,
        modalities=["image", "text"],
        model_type=["late-interaction"],
        experiment_kwargs={"budget": str(budget)},
    )


def _items(batch: dict[str, Any]) -> list[Item]:
    """A batch of mteb as items; an empty text with an image is dropped."""
    columns = [batch.get(name) for name in ("text", "image")]
    count = max(len(column) for column in columns if column is not None)
    texts, images = (column if column is not None else [None] * count for column in columns)
    return list(_parsed(texts, images))


def _parsed(texts: Any, images: Any) -> Iterator[Item]:
    for text, image in zip(texts, images, strict=True):
        yield Item((text or "").strip() or None, image)
