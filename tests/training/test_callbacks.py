"""What happens between batches: lines of progress, and steps that are skipped."""

import logging
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import tiny
from metaembed_pl.data.collate import collate
from metaembed_pl.errors import UserError
from metaembed_pl.training.callbacks import ProgressLines, Speed
from metaembed_pl.training.module import MetaEmbedModule


class TrainerAfter(pl.Trainer):
    """A trainer that has trained on so many batches, of which two make a step."""

    is_global_zero = True
    estimated_stepping_batches = 4

    def __init__(self, num_batches: int):
        self.num_batches = num_batches

    @property
    def global_step(self) -> int:
        return self.num_batches // 2

    @property
    def callback_metrics(self) -> dict:
        return {"train/loss": torch.tensor(float(self.num_batches))}


def test_a_step_of_several_batches_has_one_line(caplog):
    caplog.set_level(logging.INFO)
    lines = ProgressLines(Speed(), every_n_steps=2)
    batch = collate([tiny.pairs(1)], tiny.processing(), source="pets", step=0)
    for num_batches in range(1, 9):
        lines.on_train_batch_end(TrainerAfter(num_batches), None, None, batch)
    said = [message.split(", ")[:2] for message in caplog.messages if message.startswith("step")]
    assert said == [["step 2 of 4", "loss 2.500"], ["step 4 of 4", "loss 6.500"]]


def test_an_overflow_that_the_scaler_of_fp16_skips_is_no_error():
    module = MetaEmbedModule(groups=["1x1"])
    module.weight = nn.Parameter(torch.ones(2))
    module.weight.grad = torch.full((2,), torch.inf)
    plugin = SimpleNamespace(scaler=torch.amp.GradScaler("cpu"))
    module._trainer = SimpleNamespace(strategy=None, precision_plugin=plugin)
    optimizer = torch.optim.SGD([module.weight], 1.0)
    module.on_before_optimizer_step(optimizer)
    plugin.scaler = None
    module._trainer.global_step = 0
    with pytest.raises(UserError, match="the gradient norm is inf"):
        module.on_before_optimizer_step(optimizer)
