"""Count, on a CPU, the work and memory of a model of real shape on a GPU, without its weights.

Floating-point tensors are fake: they have a shape and a dtype but no content. Integers (token ids,
masks, picture sizes) are real, so the model takes the same branches as in training. Layers,
autograd, autocast and gradient checkpointing are the real ones.

Where a GPU does something else than a CPU, the GPU's way is counted: attention in torch's fused
kernels, which keep no scores; dropout that keeps a mark of one byte; layer norms in fp32.
"""

import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from metaembed_pl.model.embedder import MetaEmbedder

_FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def fake(tensor: Tensor) -> FakeTensor:
    """A tensor of the same shape and type without content."""
    return FakeTensor(_FAKE, tensor.detach().to("meta"), torch.device("cpu"))


def without_weights(model: nn.Module) -> None:
    """Replace the weights of a model, which may be on the meta device, with fake ones."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            made = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
            setattr(module, name, made)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, fake(buffer))


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """While open, attention, dropout and layer norms are those of a GPU."""
    forms = {"scaled_dot_product_attention": _attention, "dropout": _dropout}
    forms["layer_norm"] = _layer_norm
    # Modules that imported a function by its name have it as an attribute of their own.
    ours = [m for name, m in list(sys.modules.items()) if name.startswith("metaembed_pl.")]
    with ExitStack() as stack:
        for name, form in forms.items():
            plain = getattr(functional, name)
            for module in (functional, *ours):
                if getattr(module, name, None) is plain:
                    stack.enter_context(mock.patch.object(module, name, form))
        yield


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (t.to(torch.get_autocast_dtype("cpu")) for t in (query, key, value))
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        # The kernel reads each key for all its query heads: nothing is copied, all is computed.
        key, value = (_Repeated.apply(t, times) for t in (key, value))
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )[0]
    bias = _bias(attn_mask, query).expand(*query.shape[:3], -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, dropout_p, is_causal, scale=scale
    )[0]


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """The mask as the kernel reads it: of the query's type, its rows a multiple of 16 long.

    It is copied for each call, unless it has this form already.
    """
    length = mask.shape[-1]
    if mask.dtype == query.dtype and length % 16 == 0:
        return mask
    made = query.new_empty(*mask.shape[:-1], -(-length // 16) * 16)
    return made[..., :length]


class _Repeated(torch.autograd.Function):
    """Keys repeated for all query heads."""

    @staticmethod
    def forward(ctx: Any, keys: Tensor, times: int) -> Tensor:
        ctx.times = times
        b, h, length, width = keys.shape
        return keys[:, :, None].expand(b, h, times, length, width).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient.unflatten(1, (-1, ctx.times)).sum(2), None


_PLAIN_LAYER_NORM = functional.layer_norm


def _layer_norm(input: Any, shape: Any, weight: Any = None, bias: Any = None, *args: Any) -> Any:
    if torch.is_autocast_enabled("cpu"):
        input, weight, bias = (t if t is None else t.float() for t in (input, weight, bias))
    return _PLAIN_LAYER_NORM(input, shape, weight, bias, *args)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p else input


class Ledger(TorchDispatchMode):
    """Operations, and the bytes of all storages alive, by the part of the model that made them.

    Operations are counted as in torch's `FlopCounterMode`, which cannot be used itself: its hooks
    keep tensors alive that backward passes no longer need.

    Args:
        held: tensors that exist before, which are not counted.
    """

    def __init__(self, held: list[Tensor]):
        super().__init__()
        self._alive: dict[int, Any] = {t.untyped_storage()._cdata: None for t in held}
        self._held = held
        self.flops = self.attention = 0
        self.part = "rest"
        self.by_part: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    @property
    def num_bytes(self) -> int:
        """Bytes of all live storages."""
        return sum(self.by_part.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and record its results."""
        if func in _CPU_ATTENTION:
            raise RuntimeError(f"{func} is not what a GPU runs: see as_on_gpu")
        made = _chosen(func, args)
        if made is None:
            made = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            found = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=made)
            self.flops += found
            self.attention += found if func in _ATTENTION else 0
        self.add(tree_leaves(made))
        return made

    def add(self, values: list[Any]) -> None:
        """Record tensors that are new."""
        for value in values:
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        if self.num_bytes > sum(self.peak.values()):
            self.peak = self.by_part.copy()

    def _add(self, storage: Any) -> None:
        key, num_bytes, part = storage._cdata, storage.nbytes(), self.part
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self.by_part[part] -= num_bytes

        self._alive[key] = weakref.ref(storage, gone)
        self.by_part[part] += num_bytes


_ATTENTION = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention{way}").default
    for kernel in ("flash", "efficient")
    for way in ("", "_backward")
}
_CPU_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_attention_math.default,
)


def _chosen(func: Any, args: Any) -> Tensor | None:
    """A fake tensor indexed by a real mask: as many elements as the mask selects."""
    if func is not torch.ops.aten.index.Tensor or not isinstance(args[0], FakeTensor):
        return None
    mask = args[1][0]
    if mask is None or mask.dtype != torch.bool or isinstance(mask, FakeTensor):
        return None
    return args[0].new_empty(int(mask.sum()), *args[0].shape[mask.dim() :])


@dataclass
class Counted:
    """The cost of a forward and a backward pass.

    Args:
        forward: operations.
        backward: operations, including recomputation.
        attention: operations of attention, in both passes.
        vision: operations of the vision tower's forward pass.
        seen: those of them in attention.
        kept: bytes that live between the two passes, by the part that made them.
        peak: bytes at the peak, without weights and their gradients, likewise.
    """

    forward: float = 0
    backward: float = 0
    attention: float = 0
    vision: float = 0
    seen: float = 0
    kept: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)

    @property
    def flops(self) -> float:
        """Operations of both passes."""
        return self.forward + self.backward


def count(model: MetaEmbedder, calls: list[tuple[Any, Any]], autocast: bool) -> Counted:
    """Run a forward and a backward pass of a model without weights.

    Args:
        model: see `without_weights`.
        calls: inputs and side of each forward call; all go backwards together.
        autocast: to bf16.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = fake(parameter)
    calls = [
        ({k: fake(v) if v.is_floating_point() else v for k, v in inputs.items()}, side)
        for inputs, side in calls
    ]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    ledger = Ledger([*model.parameters(), *model.buffers(), *gradients])
    found = Counted()
    with ledger, as_on_gpu():
        ledger.add([value for inputs, _ in calls for value in inputs.values()])
        with (
            _noting_parts(model, ledger, found),
            torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(),
        ):
            total: Any = sum(model(inputs, side).sum() for inputs, side in calls)
        found.forward = ledger.flops
        found.kept = dict(ledger.by_part)
        ledger.part = "backward"
        total.backward()
    found.backward = ledger.flops - found.forward
    found.attention = ledger.attention
    found.peak = dict(ledger.peak)
    return found


@contextmanager
def _noting_parts(model: Any, ledger: Ledger, found: Counted) -> Iterator[None]:
    """While open, the ledger knows whether the vision tower or the language model runs."""
    family = model.processing.family
    hooks = []
    for name, part in (
        (family.vision_module, "vision"),
        (family.projector_module, "vision"),
        (family.text_module, "text"),
    ):
        if name is None:
            continue

        def enter(*_: Any, part: str = part) -> None:
            ledger.part = part
            if part == "vision":
                found.vision -= ledger.flops
                found.seen -= ledger.attention

        def leave(*_: Any, part: str = part) -> None:
            ledger.part = "rest"
            if part == "vision":
                found.vision += ledger.flops
                found.seen += ledger.attention

        module = model.backbone.get_submodule(name)
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
