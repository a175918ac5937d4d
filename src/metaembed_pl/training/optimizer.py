"""The optimiser and its schedule."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import get_scheduler

from metaembed_pl.errors import UserError


@dataclass
class OptimizerConfig:
    """AdamW, warmed up, then brought down.

    Args:
        lr: the highest learning rate.
        meta_token_lr: that of the meta tokens; None: the same.
        weight_decay: of matrices; never of norms, biases, embeddings and meta tokens.
        betas: AdamW's.
        schedule: how the learning rate falls after the warm-up.
        warmup: share of all steps in which it rises.
    """

    lr: float = 1e-4
    meta_token_lr: float | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise UserError(
                f"optimizer.warmup is a share of all steps, 0 to below 1, got {self.warmup}"
            )
        if self.lr <= 0:
            raise UserError(f"optimizer.lr must be positive, got {self.lr}")


def build_optimizer(
    module: nn.Module, meta_tokens: Iterable[nn.Parameter], config: OptimizerConfig, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimiser of all trainable parameters, and its schedule over `num_steps` steps."""
    own = {id(parameter) for parameter in meta_tokens}
    embeddings = {
        id(parameter)
        for part in module.modules()
        if isinstance(part, nn.Embedding)
        for parameter in part.parameters(recurse=False)
    }
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    plain = {id(p) for p in trainable if p.ndim < 2} | embeddings | own
    groups = [
        {
            "params": [p for p in trainable if id(p) not in plain],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in trainable if id(p) in plain - own], "weight_decay": 0.0},
        {
            "params": [p for p in trainable if id(p) in own],
            "weight_decay": 0.0,
            "lr": config.meta_token_lr or config.lr,
        },
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr, betas=config.betas
    )
    warmup = round(config.warmup * num_steps)
    return optimizer, get_scheduler(config.schedule, optimizer, warmup, num_steps)
