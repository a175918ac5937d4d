"""Takes one step of every case in a process of a group, and keeps the gradient: test_scale.py."""

from dataclasses import dataclass, replace
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader

import tiny
from metaembed_pl.data.collate import collate
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair
from metaembed_pl.model import processing
from metaembed_pl.model.backbone import BackboneConfig, ScratchTokenizer
from metaembed_pl.model.lora import LoraConfig
from metaembed_pl.model.sharded import unsharded
from metaembed_pl.training.gradient_cache import GradientCacheConfig
from metaembed_pl.training.module import MetaEmbedModule
from metaembed_pl.training.objective import LossConfig

NUM_PAIRS = 8
NUM_BATCHES = 2


@dataclass(frozen=True)
class Case:
    strategy: str = "auto"
    lora: bool = False
    cached: bool = False
    checkpointing: bool = False
    frozen_vision: bool = False
    accumulated: int = 1
    clipped: bool = False
    family: str = "qwen2_5_vl"

    @property
    def num_ranks(self) -> int:
        return 1 if self.strategy == "auto" else 2

    @property
    def reference(self) -> "Case":
        """The same gradient, computed in one go by one process."""
        return replace(self, strategy="auto", cached=False, checkpointing=False)

    def __str__(self) -> str:
        words = [self.strategy, "LoRA" if self.lora else "full"]
        words += ["gradient caching"] * self.cached
        words += ["activation checkpointing"] * self.checkpointing
        words += ["frozen vision tower"] * self.frozen_vision
        words += ["clipped"] * self.clipped
        words += [self.family] * (self.family != Case.family)
        words += [f"{self.accumulated} batches accumulated"] * (self.accumulated > 1)
        return ", ".join(words)


STRATEGIES = ("ddp", "deepspeed_stage_2", "deepspeed_stage_3")
CASES = [
    case
    for strategy in ("auto", *STRATEGIES)
    for case in (
        Case(strategy),
        Case(strategy, checkpointing=True),
        Case(strategy, accumulated=2),
        Case(strategy, cached=True),
        Case(strategy, cached=True, frozen_vision=True),
        Case(strategy, lora=True),
        Case(strategy, lora=True, cached=True, checkpointing=True),
        Case(strategy, lora=True, cached=True, accumulated=2),
        Case(strategy, lora=True, cached=True, clipped=True),
        Case(strategy, lora=True, frozen_vision=True),
        Case(strategy, lora=True, frozen_vision=True, family="mllama"),
    )
    if not (strategy == "deepspeed_stage_2" and case.cached and case.accumulated > 1)
]


CASES += [
    Case("fsdp2"),
    Case("fsdp2", cached=True),
    Case("fsdp2", lora=True),
    Case("fsdp2", lora=True, cached=True),
    Case("fsdp2", lora=True, frozen_vision=True),
    Case("fsdp2", lora=True, cached=True, checkpointing=True, frozen_vision=True),
    Case("fsdp2", lora=True, frozen_vision=True, family="mllama"),
    Case("ddp", lora=True, cached=True, checkpointing=True, frozen_vision=True),
    Case("deepspeed_stage_3", lora=True, cached=True, checkpointing=True, frozen_vision=True),
    Case("deepspeed_stage_3", lora=True, cached=True, frozen_vision=True, family="mllama"),
    # Its cross-attention layers are trained, and texts alone run none of them.
    Case("ddp", family="mllama"),
    Case("deepspeed_stage_3", checkpointing=True, family="mllama"),
    Case("deepspeed_stage_2_offload"),
    Case("deepspeed_stage_2_offload", lora=True, cached=True),
    Case("deepspeed_stage_3_offload"),
    Case("deepspeed_stage_3_offload", lora=True, cached=True),
]
REFUSED = Case("deepspeed_stage_2", cached=True, accumulated=2)


def pairs(batch: int) -> list[Pair]:
    """Half of them with pictures, half (the second rank's) texts alone, of ragged lengths."""
    found = []
    for i in range(NUM_PAIRS * batch, NUM_PAIRS * (batch + 1)):
        has_picture = i % NUM_PAIRS < NUM_PAIRS // 2
        size = (28 + 28 * (i % 3), 56)
        images = [tiny.picture(3 * i + j, size) if has_picture else None for j in range(3)]
        texts = [tiny.text(3 * i + j, 1 + (5 * i + j) % 7) for j in range(3)]
        query, positive, negative = (
            Item(t, image=image) for t, image in zip(texts, images, strict=True)
        )
        found.append(Pair(str(i), query, positive, (negative,)))
    return found


def questions(batch: int) -> list[list[Pair]]:
    """The pairs by candidate: the first and the last of a batch are asked one and two things more.

    So ranks differ in their numbers of queries and hard negatives.
    """
    found = [[pair] for pair in pairs(batch)]
    for place, count in ((0, 1), (-1, 2)):
        (pair,) = found[place]
        for n in range(count):
            query = Item(tiny.text(1000 + 10 * batch + 3 * place + n, 2 + n))
            found[place].append(Pair(f"{pair.id}/{n}", query, pair.positive))
    return found


class OneStep(MetaEmbedModule):
    """The module with plain gradient descent, which turns a gradient into the same difference."""

    def configure_model(self) -> None:
        fresh = not hasattr(self, "embedder")
        torch.manual_seed(0)
        super().configure_model()
        if fresh:
            generator = torch.Generator().manual_seed(1)
            for name, parameter in self.named_parameters():
                # As they start, with zeros, what is behind them would get no gradient.
                is_gate = "gate" in name.rpartition(".")[2]
                if "lora_B" in name or is_gate:
                    value = torch.empty(parameter.shape)
                    value.normal_(std=0.5 if is_gate else 0.01, generator=generator)
                    if isinstance(parameter, DTensor):
                        shared = parameter.device_mesh, parameter.placements
                        value = distribute_tensor(value, *shared)
                    parameter.data.copy_(value)

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=1.0)

    def on_train_start(self) -> None:
        """There is no schedule whose rates a checkpoint could have changed."""


class Batches(pl.LightningDataModule):
    """Two global batches, shared out over the ranks by halves."""

    def train_dataloader(self):
        module = self.trainer.lightning_module
        rank, share = self.trainer.global_rank, NUM_PAIRS // self.trainer.world_size
        processing.PASS_TOKENS = 4  # these rows are short: they would all be one chunk
        return DataLoader(
            [
                collate(
                    questions(b)[rank * share :][:share],
                    module.embedder.processor(),
                    source="pairs",
                    step=b,
                    # In the plain form, which all are compared with, all rows are padded alike.
                    in_chunks=self.trainer.world_size > 1,
                    max_chunk_tokens=module.max_chunk_tokens,
                )
                for b in range(NUM_BATCHES)
            ],
            batch_size=None,
        )


def step(case: Case, num_ranks: int, shards: Path) -> tuple[dict[str, torch.Tensor], float]:
    """What one step of plain descent adds to each trained weight, and the loss."""
    backbone = BackboneConfig(
        scratch=tiny.CONFIGS[case.family],
        tokenizer=ScratchTokenizer(300, [str(shards)]),
        max_pixels=tiny.PIXEL_LIMITS.get(case.family, (None, None))[1],
        gradient_checkpointing=case.checkpointing,
    )
    module = OneStep(
        backbone,
        groups=["1x1", "2x4"],
        lora=LoraConfig(r=4, dropout=0.0) if case.lora else None,
        train_vision=not case.frozen_vision,
        loss=LossConfig(both_directions=True),
        # Chunks of a few rows: ranks differ in how many they make.
        gradient_cache=GradientCacheConfig(max_tokens=250) if case.cached else None,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=case.strategy,
        max_steps=1,
        accumulate_grad_batches=case.accumulated,
        gradient_clip_val=0.05 if case.clipped else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    before: dict[str, torch.Tensor] = {}

    class Start(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            before.update(trained(pl_module))

    trainer.callbacks.append(Start())
    trainer.fit(module, datamodule=Batches())
    after = trained(module)
    loss = float(trainer.callback_metrics["train/loss"])
    return {name: after[name] - before[name] for name in after}, loss


def trained(module) -> dict[str, torch.Tensor]:
    named = module.embedder.named_parameters()
    found = unsharded({name: p for name, p in named if p.requires_grad})
    return {name: tensor.float().clone() for name, tensor in found.items()}


def steps(rank: int, cases: list[Case], num_ranks: int, shards: Path, out: Path) -> None:
    """Keeps what `step` gives for each case."""
    torch.set_num_threads(1)
    found = {}
    for case in cases:
        try:
            found[str(case)] = step(case, num_ranks, shards)
        except UserError as error:
            found[str(case)] = {"refused": torch.zeros(0)}, str(error)
        print(case, found[str(case)][1], flush=True)
    torch.save(found, out / f"{num_ranks}.{rank}.pt")
