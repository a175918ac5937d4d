"""MetaEmbedModule: wires the embedder, the MMR loss, the metrics and the optimiser to Lightning.

The arithmetic is elsewhere; this file only calls it in order.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from metaembed_pl.budget import PAPER_GROUPS, Budget, budgets_of
from metaembed_pl.data.collate import EvalBatch, TrainBatch
from metaembed_pl.errors import UserError
from metaembed_pl.model.backbone import BackboneConfig, build_backbone, build_processing
from metaembed_pl.model.embedder import MetaEmbedder, Pooling
from metaembed_pl.model.lora import LoraConfig, merge_adapter, set_trainable
from metaembed_pl.model.meta_tokens import Layout
from metaembed_pl.model.model_folder import settings_to_start_from
from metaembed_pl.model.processing import Processing, Prompt
from metaembed_pl.model.weights import fingerprint
from metaembed_pl.training.checkpoints import (
    leave_out_frozen,
    refuse_misfit,
    refuse_other_base,
)
from metaembed_pl.training.gradient_cache import GradientCache, GradientCacheConfig, encode
from metaembed_pl.training.loss import MMRLossOutput
from metaembed_pl.training.metrics import RetrievalMetrics, check_headline, headline
from metaembed_pl.training.objective import LossConfig, Objective, check_widths
from metaembed_pl.training.optimizer import (
    NO_MUON,
    OptimizerConfig,
    apply_settings,
    build_optimizer,
    settings_of_groups,
)
from metaembed_pl.training.strategy import Fsdp2Strategy, ZeroStrategy, backward_by_parts, shared_by
from metaembed_pl.training.teacher import Teacher, refuse_unscored

log = logging.getLogger(__name__)


def dropout_turn(step: int, rank: int, num_ranks: int) -> int:
    """The number of a rank's random draws in a step, different for every step and rank.

    A resumed run therefore has the same dropout masks as one without interruption.

    >>> [[dropout_turn(step, rank, num_ranks=2) for rank in (0, 1)] for step in (0, 1)]
    [[0, 1], [2, 3]]
    """
    return step * num_ranks + rank


def _accept(checkpoint: dict[str, Any]) -> None:
    """Refuses no checkpoint."""


def _surrogate(parameters: list[nn.Parameter], gradients: list[Tensor]) -> Tensor:
    """A number with the given gradients."""
    pairs = zip(parameters, gradients, strict=True)
    return torch.stack([(parameter * gradient).sum() for parameter, gradient in pairs]).sum()


class MetaEmbedModule(pl.LightningModule):
    """A MetaEmbed retriever in training.

    Args:
        backbone: the vision-language model; with `start_from`, only options to run it.
        groups: nested budgets, smallest first, such as `["1x1", "2x4"]`; the paper's by default.
        layout: which meta tokens an input ends with. `both`: those of queries and candidates, as in
            the paper (the default). `own`: only those of its own side, which is shorter.
        projection: width of the meta embeddings; None: the backbone's.
        meta_token_std: standard deviation of new meta tokens; None: `initializer_range`.
        meta_tokens_orthogonal: initialise the meta tokens orthogonally.
        pooling: which states become vectors. `meta_tokens` (the default), or for a single-vector
            model without meta tokens `last` (the last token) or `mean` (of all tokens).
        bidirectional: turn off the causal mask; for pooling `last` and `mean`.
        prompt: text and special tokens around an item.
        loss: the MMR loss and its optional terms.
        optimizer: the optimiser and its schedule.
        start_from: a trained model (folder or hub id) to continue from. It determines backbone,
            preprocessing, groups, layout and projection; its adapter is merged into the weights.
        lora: train a LoRA adapter; None: train the backbone's own weights.
        train_vision: train the vision tower and its projector; with `lora`, adapt the tower's
            linear layers.
        headline: the metric that selects the best checkpoint, such as `ndcg@5`, `recall@1/4x8` or
            `esg/ndcg@5`; None: recall@1.
        gradient_cache: gradient caching, for batches whose activations do not fit into memory;
            None: all rows at once.
    """

    def __init__(
        self,
        backbone: BackboneConfig | None = None,
        groups: list[str] | None = None,
        layout: Layout | None = None,
        projection: int | None = None,
        meta_token_std: float | None = None,
        meta_tokens_orthogonal: bool = False,
        pooling: Pooling | None = None,
        bidirectional: bool | None = None,
        prompt: Prompt | None = None,
        loss: LossConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        start_from: str | None = None,
        lora: LoraConfig | None = None,
        train_vision: bool = True,
        headline: str | None = None,
        gradient_cache: GradientCacheConfig | None = None,
    ):
        super().__init__()
        self.max_chunk_tokens = gradient_cache and gradient_cache.max_tokens
        self.backbone_config = backbone or BackboneConfig()
        self.start_from, self.lora, self.train_vision = start_from, lora, train_vision
        if self.backbone_config.quantization and lora is None:
            raise UserError("quantization: nf4 freezes the weights: it needs `lora` to train")
        head = {
            "layout": layout,
            "projection": projection,
            "meta_token_std": meta_token_std,
            "meta_tokens_orthogonal": meta_tokens_orthogonal or None,
            "pooling": pooling,
            "bidirectional": bidirectional,
        }
        if start_from is not None:
            given = {"groups": groups, **head, "prompt": prompt}
            own = settings_to_start_from(start_from, self.backbone_config, given)
            groups = own["groups"]
            head |= {name: own[name] for name in head.keys() & own.keys()}
        if projection is not None and projection < 1:
            raise UserError(f"model.projection must be at least 1, got {projection}")
        if meta_token_std is not None and not 0 < meta_token_std < float("inf"):
            raise UserError(f"model.meta_token_std must be positive, got {meta_token_std}")
        self._head: Any = {name: value for name, value in head.items() if value is not None}
        self.prompt = prompt or Prompt()
        self.optimizer_config = optimizer or OptimizerConfig()
        self.loss = Objective(PAPER_GROUPS if groups is None else groups, loss)
        self.groups = self.loss.groups
        self.headline = headline
        self.metrics: dict[str, dict[str, RetrievalMetrics]] = {}
        self._sources_seen: set[str] = set()
        self._unread: set[str] = set()
        self._teacher: Teacher | None = None
        self.check_checkpoint: Callable[[dict[str, Any]], None] = _accept

    def __getstate__(self) -> dict[str, Any]:
        """For copies, such as Lightning's average of the weights, which load no checkpoints."""
        return super().__getstate__() | {"check_checkpoint": _accept}

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets to measure: the groups, and the largest one at each width."""
        return budgets_of(self.groups, self.loss.widths)

    @property
    def is_pretrained(self) -> bool:
        """Whether frozen weights can be read again from the base model."""
        return self.backbone_config.scratch is None

    def configure_model(self) -> None:
        """Builds the embedder, once; sharding strategies call this in their own context."""
        if hasattr(self, "embedder"):
            return
        self.embedder = self._new() if self.start_from is None else self._started()
        self.embedder.widths = tuple(self.loss.widths)
        check_widths(self.loss.widths, self.embedder.width)
        strategy = self._trainer and self._trainer.strategy
        self.embedder.shared = shared_by(self._trainer) if self._trainer else None
        if isinstance(strategy, Fsdp2Strategy):
            if list(self.loss.parameters()):
                raise UserError(
                    "model.loss.temperature_bounds and learn_weights do not work with fsdp2: use "
                    "ddp or deepspeed"
                )
            strategy.shard(self.embedder)

    def _new(self) -> MetaEmbedder:
        processing = build_processing(self.backbone_config, self.prompt)
        backbone = build_backbone(self.backbone_config, processing)
        self._base = fingerprint(backbone)
        return self.assemble(backbone, processing)

    def assemble(self, backbone: PreTrainedModel, processing: Processing) -> MetaEmbedder:
        """The embedder around a new backbone, with the recipe's parameters trainable."""
        embedder = MetaEmbedder(backbone, processing, self.groups, **self._head)
        set_trainable(backbone, processing.family, self.lora, self.train_vision)
        return embedder

    def _started(self) -> MetaEmbedder:
        assert self.start_from is not None
        embedder = MetaEmbedder.from_pretrained(self.start_from, options=self.backbone_config)
        self._base = fingerprint(embedder.backbone)  # merging may round otherwise elsewhere
        merge_adapter(embedder.backbone)
        if self.lora is None:
            embedder.backbone.requires_grad_(True)  # an adapter had it frozen
        family = embedder.processing.family
        set_trainable(embedder.backbone, family, self.lora, self.train_vision)
        return embedder.train()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves out frozen weights that can be read from the base model."""
        if self.is_pretrained:
            leave_out_frozen(self, checkpoint, self._base)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the checkpoint of another model, or of another base model."""
        self.check_checkpoint(checkpoint)
        refuse_other_base(checkpoint, self._base)
        if "state_dict" in checkpoint:  # ZeRO has loaded the weights by now
            refuse_misfit(self, checkpoint["state_dict"])
        self.strict_loading = False  # only frozen weights are missing

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule over the steps the trainer will take."""
        if self.optimizer_config.muon_lr and isinstance(self.trainer.strategy, ZeroStrategy):
            raise UserError(NO_MUON)
        optimizer, scheduler = build_optimizer(
            self,
            self.embedder.meta_tokens.parameters(),
            self.optimizer_config,
            int(self.trainer.estimated_stepping_batches),
        )
        self._rates = settings_of_groups(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @property
    def lr(self) -> float:
        """The highest learning rate; Lightning's `LearningRateFinder` reads it and sets it."""
        return self.optimizer_config.lr

    @lr.setter
    def lr(self, value: float) -> None:
        factor = value / self.optimizer_config.lr
        self.optimizer_config = replace(self.optimizer_config, lr=value)
        for group in self._rates:  # the rates of meta tokens and of Muon keep their proportion
            group["initial_lr"] *= factor

    def on_train_start(self) -> None:
        """Uses the recipe's learning rates instead of those of a checkpoint."""
        scheduler = self.trainer.lr_scheduler_configs[0].scheduler
        if isinstance(scheduler, LambdaLR):  # LearningRateFinder has one of its own
            apply_settings(scheduler, self._rates)

    def training_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """The MMR loss of this rank's queries."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        torch.manual_seed(
            seed + dropout_turn(batch.step, self.trainer.global_rank, self.trainer.world_size)
        )
        if self.max_chunk_tokens is not None:
            return self._cached_step(batch, batch_idx)
        queries = encode(self.embedder, batch.queries, "query")
        candidates = encode(self.embedder, batch.candidates, "candidate")
        return self._loss(queries, candidates, batch)

    def _cached_step(self, batch: TrainBatch, batch_idx: int) -> Tensor:
        """The same with gradient caching: all backward passes except the last one run here."""
        assert isinstance(batch.queries, list)
        assert isinstance(batch.candidates, list)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.zero_grad()  # `optimizer_zero_grad` would be too late
        cache = GradientCache(self.embedder)
        queries = cache.encode(batch.queries, "query")
        candidates = cache.encode(batch.candidates, "candidate")
        loss = self._loss(queries, candidates, batch)
        learned = list(self.loss.parameters())
        of_queries, of_candidates, *of_learned = torch.autograd.grad(
            loss, (queries, candidates, *learned)
        )
        surrogates = cache.surrogates({"query": of_queries, "candidate": of_candidates})
        if learned:  # parameters of the loss: a share in each part, as DDP expects all in the last
            surrogates = (
                part + _surrogate(learned, of_learned) / cache.num_passes for part in surrogates
            )
        return backward_by_parts(self.trainer, surrogates)

    def optimizer_zero_grad(
        self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Lightning calls this between `training_step` and its own backward pass."""
        if self.max_chunk_tokens is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def _loss(self, queries: Tensor, candidates: Tensor, batch: TrainBatch) -> Tensor:
        output = self.loss(
            queries,
            **batch.loss_inputs(candidates),
            step=batch.step,
            scores=batch.scores,
            taught=self._teacher and self._teacher.taught(batch),
        )
        self._note(output, batch)
        return output.loss

    def _note(self, output: MMRLossOutput, batch: TrainBatch) -> None:
        if not output.loss.isfinite():
            raise UserError(
                f"the loss is {output.loss.item()} at step {batch.step}, source {batch.source}, "
                f"pairs {', '.join(batch.keys[:5])}, ...; lower model.optimizer.lr, or inspect "
                "these pairs"
            )
        if batch.source not in self._sources_seen:
            self._sources_seen.add(batch.source)
            log.info(
                "%s: a batch of this rank has %d queries to %d candidates (%.1f each); "
                "a query sees %d negatives of the global batch and %.1f hard ones of its own",
                batch.source,
                len(batch.keys),
                batch.num_positives,
                len(batch.keys) / batch.num_positives,
                output.num_in_batch,
                output.num_hard,
            )
            if output.num_masked >= output.num_in_batch + output.num_hard:
                log.warning(
                    "%s: every candidate of the batch of step %d answers every query, so there is "
                    "nothing to learn from it: check `asks` and `answers` with `data show`",
                    batch.source,
                    batch.step,
                )
        size = len(batch.keys)
        self.log("train/loss", output.loss, prog_bar=True, batch_size=size)
        # Lightning sets `log_every_n_steps` from outside its class.
        every = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if not every or (self.global_step + 1) % every:
            return  # Lightning would discard them, after a third of a millisecond each
        self.log("train/false_negatives", output.num_masked, batch_size=size)
        for group, value in zip(self.groups, output.per_group, strict=True):
            self.log(f"train/loss/{group}", value, batch_size=size)
            self.log(f"train/{batch.source}/loss/{group}", value, batch_size=size)
        for group, share in zip(self.groups, output.recall, strict=True):
            self.log(f"train/recall@1/{group}", share, batch_size=size)
        for name, value in output.also.items():
            self.log(f"train/{name}", value, batch_size=size)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuses gradients that are not finite before they reach the weights."""
        if isinstance(self.trainer.strategy, ZeroStrategy):
            return  # the norm is known after DeepSpeed's own step
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if getattr(self.trainer.precision_plugin, "scaler", None) and not norm.isfinite():
            return  # in fp16 the scaler skips such a step, and scales less from then on
        self._note_norm(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def on_train_batch_end(self, outputs: Any, batch: TrainBatch, batch_idx: int) -> None:
        """Under ZeRO, checks the norm of the step's gradients."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ZeroStrategy) and (norm := strategy.gradient_norm) is not None:
            self._note_norm(torch.tensor(norm))

    def _note_norm(self, norm: Tensor) -> None:
        if not norm.isfinite():
            raise UserError(
                f"the gradient norm is {norm.item()} at step {self.global_step}: lower "
                "optimizer.lr or train in bf16 or fp32 instead of fp16"
            )
        self.log("train/grad_norm", norm)

    def on_fit_start(self) -> None:
        """Loads the teacher; refuses a headline that validation would not find."""
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        teacher = self.loss.config.teacher
        if teacher and not teacher.model:
            for pairs, num_negatives in data.shards_and_negatives():
                refuse_unscored(pairs, num_negatives)
        if teacher and teacher.model:
            if shared_by(self.trainer) == "weights":
                raise UserError(
                    "model.loss.teacher.model works where each rank has all weights: use ddp or "
                    "deepspeed_stage_2, or let pairs bring the teacher's scores"
                )
            self._teacher = Teacher(teacher.model, self.embedder)
            self._teacher.model.to(self.device)
        if self.headline and data.eval_sets.get("val"):
            check_headline(
                self.headline, [pool.name for pool in data.eval_sets["val"]], self.budgets
            )

    def on_validation_epoch_start(self) -> None:
        """Empty metrics for each validation set."""
        self._start("val")

    def on_test_epoch_start(self) -> None:
        """Empty metrics for each test set."""
        self._start("test")

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds the meta embeddings of a batch to the metrics."""
        self._update("val", batch)

    def test_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds the meta embeddings of a batch to the metrics."""
        self._update("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Logs metrics such as `val/DATASET/recall@1/16x64`."""
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Logs metrics such as `test/DATASET/recall@1/16x64`."""
        self._finish("test")

    def _start(self, part: str) -> None:
        # Lightning sets `datamodule` from outside its class.
        data = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        self.metrics[part] = {
            pool.name: RetrievalMetrics(
                self.groups,
                pool.relevant,
                len(pool.candidates),
                gains=pool.gains,
                lists=pool.lists,
                itself=pool.itself,
                widths=self.loss.widths,
            ).to(self.device)
            for pool in data.eval_sets[part]
        }

    def _update(self, part: str, batch: EvalBatch) -> None:
        embeddings = self.embedder(batch.inputs, batch.side)
        for row, reason in batch.unread.items():
            where = f"{batch.dataset}, {batch.side} {int(batch.index[row])}"
            if where not in self._unread:
                self._unread.add(where)
                log.warning("%s cannot be read and counts as missed: %s", where, reason)
        metrics = self.metrics[part][batch.dataset]
        metrics.update(batch.side, batch.index, embeddings, batch.unread)

    def _finish(self, part: str) -> None:
        """Logs every metric and the headline, which selects the best checkpoint."""
        if self.trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return  # a few batches of a set cannot be ranked
        values = {name: metric.compute() for name, metric in self.metrics[part].items()}
        for dataset, found in values.items():
            self.log_dict({f"{part}/{dataset}/{name}": value for name, value in found.items()})
        if values:
            best = headline(values, self.headline, self.budgets)
            self.log(f"{part}/headline", best, prog_bar=True)
