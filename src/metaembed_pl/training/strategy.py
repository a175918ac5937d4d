"""Distributed strategies: DDP, ZeRO and FSDP2 with the same gradient.

Recipes choose by Lightning's names: `ddp`, `deepspeed_stage_2`, `deepspeed_stage_3`, each of the
latter also with `_offload`, and `fsdp2`. The ZeRO ones replace Lightning's: they also
run on the CPU (for tests, and to rehearse a recipe), shard pretrained weights as they are read, and
write checkpoints atomically.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from metaembed_pl.errors import UserError
from metaembed_pl.model.embedder import Shared

RANK_FILE = "zero_pp_rank_*_optim_states.pt"
MODEL_FILE = "zero_pp_rank_0_mp_rank_00_model_states.pt"
TRUSTED = (
    "deepspeed.runtime.fp16.loss_scaler.",
    "deepspeed.runtime.zero.config.",
    "deepspeed.utils.tensor_fragment.",
)
COALESCED_SHARE = 0.1
"""Up to this share of trained weights, gradients are reduced once, at the end of the step."""


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed's ZeRO, on GPUs or on the CPU.

    Args:
        stage: 1 shards the optimiser over the ranks, 2 the gradients as well, 3 the weights too.
        kwargs: see Lightning's `DeepSpeedStrategy`.
    """

    def __init__(self, stage: int = 3, **kwargs: Any):
        if find_spec("deepspeed") is None:
            raise UserError(
                f"deepspeed_stage_{stage} needs deepspeed: pip install metaembed-pl[deepspeed]"
            )
        # Set, or Lightning asks the loader for a batch sampler, which ours does without.
        kwargs.setdefault("logging_batch_size_per_gpu", 1)
        super().__init__(stage=stage, **kwargs)
        assert isinstance(self.config, dict)
        # torch's AdamW also where the optimiser is offloaded: DeepSpeed's own compiles for minutes.
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        self._parts_are_done = False

    @property
    def _on_gpu(self) -> bool:
        return isinstance(self.accelerator, CUDAAccelerator)

    @property
    def root_device(self) -> torch.device:
        """The device of this rank; on the CPU with an index, which DeepSpeed needs."""
        return super().root_device if self._on_gpu else torch.device("cpu", self.local_rank)

    def setup_environment(self) -> None:
        """As Lightning's, which refuses the CPU."""
        if self._on_gpu:
            super().setup_environment()
        else:
            DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """As Lightning's, which needs the index of a GPU."""
        if self._on_gpu:
            super().setup_distributed()
            return
        import deepspeed

        # Or DeepSpeed compiles a kernel for sums in shared memory at first use, for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Or for each layer it searches the next 1e9 weights: with small models on a CPU, the
        # entire step and every chunk of gradient caching.
        assert isinstance(self.config, dict)
        self.config["zero_optimization"].setdefault("stage3_max_reuse_distance", 0)
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """While open, transformers shards pretrained weights while reading them.

        A model from scratch is small and initialised unsharded. DeepSpeed then shards it from rank
        0, like the meta tokens.
        """
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        self._init_config_if_needed()
        module: Any = self.lightning_module
        shards = self.zero_stage_3 and module.is_pretrained
        # transformers finds it as long as this reference exists.
        reference = HfDeepSpeedConfig(self.config) if shards else None
        yield
        del reference

    @property
    def gradient_norm(self) -> float | None:
        """The norm over all ranks at the last step, before clipping; None before the first."""
        engine: Any = self.deepspeed_engine
        norm = engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As Lightning's, unless gradient caching has run the backward passes already."""
        if self._parts_are_done:
            self._parts_are_done = False
            return closure_loss
        # Lightning divides by the number of accumulated batches, and DeepSpeed does so once more.
        engine: Any = self.deepspeed_engine
        closure_loss = closure_loss * engine.gradient_accumulation_steps()
        return super().backward(closure_loss, *args, **kwargs)

    def backward_by_parts(self, parts: Iterator[Tensor]) -> Tensor:
        """Runs a backward pass from each part; their gradients add up.

        Returns:
            The last part, detached.

        Raises:
            UserError: batches are accumulated as well, which stages 1 and 2 do not support.
        """
        engine: Any = self.deepspeed_engine
        is_accumulating = engine.gradient_accumulation_steps() > 1
        if is_accumulating and not self.zero_stage_3:
            raise UserError(
                "gradient_cache with accumulate_grad_batches needs deepspeed_stage_3 or ddp: raise "
                "data.global_batch_size instead, which costs no memory and gives more negatives"
            )
        self._parts_are_done = True
        few = _trained_share(engine.module) <= COALESCED_SHARE and not is_accumulating
        if few or not self.zero_stage_3:
            with engine.coalesce_grad_reduction():
                for part in parts:
                    engine.backward(part)
            return part.detach()
        for number, part in enumerate(parts):
            if number:
                # DeepSpeed mistakes a second backward pass of a step for a repetition.
                engine.optimizer.clear_backward_seen_flag()
            engine.backward(part)
        return part.detach()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Writes a new folder, and lets the link `filepath` point to it once it is complete.

        Frozen weights that can be read from the base model are left out.
        """
        module: Any = self.lightning_module
        self.exclude_frozen_parameters = module.is_pretrained
        link = Path(self.broadcast(str(filepath)))
        slot = Path(self.broadcast(str(_free_slot(link)) if self.is_global_zero else ""))
        super().save_checkpoint(checkpoint, slot, storage_options)
        self.barrier()
        if self.is_global_zero:
            _point(link, slot)
        self.barrier()

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Reads a folder of `save_checkpoint`.

        Raises:
            UserError: it is no such folder, was written by another number of ranks, or contains
                objects that would run code.
        """
        folder = Path(checkpoint_path)
        _refuse_other_world(folder, self.world_size)
        _refuse_objects(folder)
        module: Any = self.lightning_module
        module.strict_loading = not module.is_pretrained
        if self.zero_stage_3 and module.trainer.state.fn != TrainerFn.FITTING:
            return self._load_weights(folder)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def _load_weights(self, folder: Path) -> dict[str, Any]:
        """Reads only weights, which stage 3 of DeepSpeed cannot do without an optimiser."""
        module: Any = self.lightning_module
        state: dict[str, Any] = {"state_dict": {}}
        if self.is_global_zero:  # which sends each weight to the other ranks
            state = consolidated(folder, with_frozen=not module.is_pretrained)
            wanted = {name for name, weight in module.named_parameters() if weight.requires_grad}
            if missing := sorted(wanted - state["state_dict"].keys()):
                raise UserError(f"{folder}: {missing[0]} is not in this checkpoint")
        self._restore_zero_state(state, strict=False)
        state = torch.load(folder / "checkpoint" / MODEL_FILE, "cpu", weights_only=True)
        return {name: value for name, value in state.items() if name != "module"}


class Fsdp2Strategy(ModelParallelStrategy):
    """torch's FSDP2: weights, gradients and optimiser are sharded over all ranks, by layer."""

    def __init__(self, **kwargs: Any):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        """One mesh of all ranks."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, embedder: nn.Module) -> None:
        """Shards each layer, and the remaining weights, as units that are gathered together."""
        mesh = self.device_mesh["data_parallel"]
        for layer in embedder.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                fully_shard(layer, mesh=mesh)
        fully_shard(embedder, mesh=mesh)


def shared_by(trainer: Trainer) -> Shared | None:
    """What the ranks of a run exchange."""
    if trainer.world_size == 1:
        return None
    strategy = trainer.strategy
    is_zero_3 = isinstance(strategy, ZeroStrategy) and strategy.zero_stage_3
    return "weights" if is_zero_3 or isinstance(strategy, Fsdp2Strategy) else "gradients"


def backward_by_parts(trainer: Trainer, parts: Iterator[Tensor]) -> Tensor:
    """Runs the backward passes of the parts of a loss, each before the next one is computed.

    Returns:
        For `training_step`: the last part, from which Lightning runs the backward pass (then DDP
        reduces all gradients); under ZeRO a detached number.
    """
    if isinstance(trainer.strategy, ZeroStrategy):
        return trainer.strategy.backward_by_parts(parts)
    num_accumulated = trainer.accumulate_grad_batches
    # DDP reduces gradients only after `training_step`: until then they add up.
    last = next(parts)
    for part in parts:
        trainer.precision_plugin.pre_backward(
            last / num_accumulated, trainer.lightning_module
        ).backward()
        last = part
    return last


def consolidated(folder: Path, with_frozen: bool = False) -> dict[str, Any]:
    """The complete weights of a folder that ZeRO wrote, in the form of other checkpoints.

    Args:
        folder: of `save_checkpoint`.
        with_frozen: also frozen weights, which the checkpoint of a model from scratch has.
    """
    _refuse_objects(folder)
    if find_spec("deepspeed") is None:
        raise UserError(f"{folder} was written by DeepSpeed: pip install metaembed-pl[deepspeed]")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        state = get_fp32_state_dict_from_zero_checkpoint(
            str(folder), tag="checkpoint", exclude_frozen_parameters=not with_frozen
        )
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"{folder}: not a complete ZeRO checkpoint: {error}") from error
    assert state is not None
    return {"state_dict": dict(state)}


def _trained_share(module: nn.Module) -> float:
    trained, total = 0, 0
    for parameter in module.parameters():
        count = getattr(parameter, "ds_numel", parameter.numel())
        total += count
        trained += count * parameter.requires_grad
    return trained / total


def _free_slot(link: Path) -> Path:
    """The one of two folders to which `link` does not point, emptied."""
    taken = link.readlink().name if link.is_symlink() else ""
    first, second = (link.with_name(f".{link.name}.{letter}") for letter in "ab")
    slot = second if taken == first.name else first
    shutil.rmtree(slot, ignore_errors=True)
    return slot


def _point(link: Path, folder: Path) -> None:
    new = link.with_name(f".{link.name}.link")
    new.unlink(missing_ok=True)
    new.symlink_to(folder.name)
    old = link.resolve() if link.is_symlink() else None
    os.replace(new, link)
    if old is not None and old != folder.resolve():
        shutil.rmtree(old, ignore_errors=True)


def _refuse_other_world(folder: Path, num_ranks: int) -> None:
    way = (
        "to continue from its weights only, export the model (python -m metaembed_pl export) and "
        "name the folder as model.start_from"
    )
    if not folder.is_dir():
        raise UserError(
            f"{folder} is the checkpoint of another strategy: ZeRO goes on from folders that it "
            f"wrote; {way}"
        )
    saved = len(list(folder.glob(f"checkpoint/*{RANK_FILE}")))
    if saved != num_ranks:
        raise UserError(
            f"{folder} was written by {saved} ranks and this run has {num_ranks}: resume it with "
            f"{saved}; {way}"
        )


def _refuse_objects(folder: Path) -> None:
    """DeepSpeed unpickles its files: they may only contain objects that DeepSpeed writes."""
    for file in sorted(folder.rglob("*.pt")):
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception as error:  # a broken zip, or no zip at all
            raise UserError(f"{file}: not a readable part of a checkpoint: {error}") from error
        foreign = [name for name in names if not name.startswith(TRUSTED)]
        if foreign:
            raise UserError(
                f"{file} would run {foreign[0]} when loaded: not a checkpoint of this package"
            )


for _stage in (1, 2, 3):
    for _offload in (False, True):
        StrategyRegistry.register(
            f"deepspeed_stage_{_stage}" + "_offload" * _offload,
            ZeroStrategy,
            description=f"ZeRO stage {_stage}" + " with offload to the CPU" * _offload,
            override=True,
            stage=_stage,
            offload_optimizer=_offload,
            offload_parameters=_offload and _stage == 3,
        )
StrategyRegistry.register("fsdp2", Fsdp2Strategy, description="torch's FSDP2 over all ranks")
