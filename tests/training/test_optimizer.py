"""The optimiser: what falls to whom, and two optimisers that behave as one."""

import copy

import pytest
import torch
from torch import nn

from metaembed_pl.errors import UserError
from metaembed_pl.training.muon import Muon
from metaembed_pl.training.optimizer import OptimizerConfig, build_optimizer


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "tokens": nn.Embedding(5, 8),
            "meta": nn.Embedding(3, 8),
            "patches": nn.Conv3d(1, 8, 2),
            "first": nn.Linear(8, 12),
            "norm": nn.LayerNorm(12),
            "second": nn.Linear(12, 8, bias=False),
        }
    )


def built(module: nn.ModuleDict, num_steps: int = 10, **settings):
    config = OptimizerConfig(**settings)
    return build_optimizer(module, module["meta"].parameters(), config, num_steps)


def train(module: nn.ModuleDict, optimizer, scheduler, num_steps: int) -> None:
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        scheduler.step()


def names(module: nn.ModuleDict, group: dict) -> set[str]:
    of = {id(parameter): name for name, parameter in module.named_parameters()}
    return {of[id(parameter)] for parameter in group["params"]}


def test_only_matrices_decay():
    module = model()
    optimizer, _ = built(module, weight_decay=0.1)
    decaying = [names(module, g) for g in optimizer.param_groups if g["weight_decay"]]
    assert decaying == [{"first.weight", "second.weight", "patches.weight"}]


def test_matrices_that_zero_3_has_sharded_decay_as_well():
    module = model()
    before = [names(module, g) for g in built(module, weight_decay=0.1)[0].param_groups]
    for parameter in module.parameters():  # as DeepSpeed leaves the weights that it has sharded
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    after, _ = built(module, weight_decay=0.1)
    assert [names(module, group) for group in after.param_groups] == before
    assert [group["weight_decay"] for group in after.param_groups] == [0.1, 0.0, 0.0]


def test_meta_tokens_have_their_own_rate():
    module = model()
    optimizer, _ = built(module, lr=1e-3, meta_token_lr=5e-3, schedule="constant_with_warmup")
    rates = {frozenset(names(module, g)): g["initial_lr"] for g in optimizer.param_groups}
    assert rates[frozenset({"meta.weight"})] == 5e-3
    assert {rate for group, rate in rates.items() if "meta.weight" not in group} == {1e-3}


def test_every_trainable_parameter_is_in_one_group():
    module = model()
    module["norm"].requires_grad_(False)
    for muon_lr in (None, 1e-2):
        optimizer, _ = built(module, muon_lr=muon_lr)
        found = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(found) == sorted(id(p) for p in module.parameters() if p.requires_grad)


def test_muon_takes_the_matrices_alone():
    module = model()
    optimizer, _ = built(module, muon_lr=1e-2)
    muon, *rest = [names(module, group) for group in optimizer.param_groups]
    assert muon == {"first.weight", "second.weight"}
    assert set().union(*rest) == {name for name, _ in module.named_parameters()} - muon


def test_muon_and_adamw_move_each_parameter_as_they_would_alone():
    together, apart = model(), model()
    train(together, *built(together, lr=1e-3, muon_lr=1e-2, warmup=0.2), num_steps=5)

    settings = {"weight_decay": 0.01}
    matrices = [apart["first"].weight, apart["second"].weight]
    others = [p for p in apart.parameters() if all(p is not m for m in matrices)]
    decaying = [apart["patches"].weight]
    plain = [p for p in others if p is not decaying[0]]
    muon = Muon(matrices, lr=1e-2, **settings)
    adamw = torch.optim.AdamW(
        [{"params": decaying, **settings}, {"params": plain, "weight_decay": 0.0}], lr=1e-3
    )
    highest = [(group, group["lr"]) for part in (muon, adamw) for group in part.param_groups]
    for step in range(5):
        for group, rate in highest:  # linear, up in 2 of 10 steps
            group["lr"] = rate * (step / 2 if step < 2 else (10 - step) / 8)
        generator = torch.Generator().manual_seed(step)
        for parameter in apart.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        muon.step()
        adamw.step()
    for (name, one), other in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("muon_lr", [None, 1e-2])
def test_saved_and_loaded_it_goes_on_where_it_was(muon_lr):
    whole, cut = model(), model()
    train(whole, *built(whole, muon_lr=muon_lr), num_steps=3)
    optimizer, scheduler = built(whole, muon_lr=muon_lr)
    train(whole, optimizer, scheduler, num_steps=3)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    train(whole, optimizer, scheduler, num_steps=4)

    cut.load_state_dict(saved[0])
    optimizer, scheduler = built(cut, muon_lr=muon_lr)
    optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    train(cut, optimizer, scheduler, num_steps=4)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, cut.state_dict()[name]), name


@pytest.mark.parametrize("name", ["lr", "muon_lr", "meta_token_lr"])
def test_refuses_a_rate_that_is_not_positive(name):
    with pytest.raises(UserError, match=f"optimizer.{name} must be positive, got -1"):
        OptimizerConfig(**{name: -1.0})
