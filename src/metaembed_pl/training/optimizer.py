"""The optimiser and its schedule."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import import_module
from inspect import signature
from typing import Any, Literal

import torch
from torch import nn
from transformers import get_scheduler

from metaembed_pl.errors import UserError
from metaembed_pl.model.sharded import complete_shape
from metaembed_pl.training.muon import Muon

NO_MUON = (
    "model.optimizer.muon_lr does not work with DeepSpeed, which gives an optimizer flat parts of "
    "the matrices: leave it out, or use ddp"
)


@dataclass
class OptimizerConfig:
    """AdamW or another optimiser, warmed up, then brought down.

    Args:
        kind: the class, such as `torch.optim.Adafactor` or `bitsandbytes.optim.PagedAdamW8bit`.
        options: other arguments of the class, such as `{"eps": 1e-6}`.
        lr: the highest learning rate.
        meta_token_lr: learning rate of the meta tokens; None: `lr`.
        muon_lr: train the backbone's matrices with Muon at this rate and the rest with AdamW, for a
            model from scratch, which then needs about half the steps (docs/log.md). Updates are
            scaled like AdamW's, so use similar rates. None: AdamW for everything.
        weight_decay: weight decay of matrices; norms, biases, embeddings and meta tokens have none.
        betas: AdamW's betas; ignored by a class that has none.
        schedule: how the learning rate falls after the warm-up.
        warmup: share of all steps in which the learning rate rises.
    """

    lr: float = 1e-4
    meta_token_lr: float | None = None
    muon_lr: float | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup: float = 0.05
    kind: str = "torch.optim.AdamW"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise UserError(
                f"optimizer.warmup is a share of all steps, 0 to below 1, got {self.warmup}"
            )
        for name in ("lr", "muon_lr", "meta_token_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"optimizer.{name} must be positive, got {value}")
        if not 0 <= self.weight_decay < float("inf"):
            raise UserError(f"optimizer.weight_decay must be at least 0, got {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas are shares, 0 to below 1, got {self.betas}")
        optimizer_class(self)


def optimizer_class(config: OptimizerConfig) -> type[torch.optim.Optimizer]:
    """The class that a recipe names; a UserError if it is none or does not take the options."""
    module, _, name = config.kind.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise UserError(
            f"optimizer.kind: expected a class such as torch.optim.AdamW, got {config.kind!r}: "
            f"{error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise UserError(f"optimizer.kind: {config.kind} is no torch.optim.Optimizer")
    takes = signature(found).parameters
    if unknown := config.options.keys() - takes.keys():
        raise UserError(
            f"optimizer.options: {config.kind} does not take {', '.join(sorted(unknown))}; it "
            f"takes {', '.join(takes.keys() - {'params', 'lr', 'weight_decay', 'betas'})}"
        )
    return found


class MuonAndAdamW(torch.optim.Optimizer):
    """Two optimisers that step, are scheduled and are saved as one: Muon takes only matrices."""

    def __init__(self, muon: torch.optim.Optimizer, adamw: torch.optim.Optimizer):
        self.parts = (muon, adamw)
        super().__init__(
            [{"params": g["params"]} for part in self.parts for g in part.param_groups], {}
        )
        self._share()

    def _share(self) -> None:
        """Shares the parts' groups, into which a schedule writes its rate."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Both states."""
        return {"muon": self.parts[0].state_dict(), "adamw": self.parts[1].state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads both states."""
        for part, name in zip(self.parts, ("muon", "adamw"), strict=True):
            part.load_state_dict(state_dict[name])
        self._share()


def settings_of_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each parameter group: rates, decay, betas."""
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def apply_settings(scheduler: Any, settings: list[dict[str, Any]]) -> None:
    """Replaces a checkpoint's settings by these, at its step."""
    scheduler.base_lrs = [of_group["initial_lr"] for of_group in settings]
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    for group, own, factor in zip(scheduler.optimizer.param_groups, settings, factors, strict=True):
        group |= own | {"lr": own["initial_lr"] * factor}
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


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
    num_dims = {id(p): len(complete_shape(p)) for p in trainable}
    plain = {id(p) for p in trainable if num_dims[id(p)] < 2} | embeddings | own
    matrices = [p for p in trainable if num_dims[id(p)] == 2 and id(p) not in plain]
    by_muon = {id(p) for p in matrices} if config.muon_lr else set()
    groups = [
        {
            "params": [p for p in trainable if id(p) not in plain | by_muon],
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in trainable if id(p) in plain - own], "weight_decay": 0.0},
        {
            "params": [p for p in trainable if id(p) in own],
            "weight_decay": 0.0,
            "lr": config.meta_token_lr or config.lr,
        },
    ]
    kind: Any = optimizer_class(config)
    options = {"betas": config.betas} if "betas" in signature(kind).parameters else {}
    options |= config.options
    optimizer = kind([group for group in groups if group["params"]], lr=config.lr, **options)
    if config.muon_lr:
        muon = Muon(matrices, lr=config.muon_lr, weight_decay=config.weight_decay)
        optimizer = MuonAndAdamW(muon, optimizer)
    warmup = round(config.warmup * num_steps)
    return optimizer, get_scheduler(config.schedule, optimizer, warmup, num_steps)
