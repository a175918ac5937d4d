"""Muon: momentum with orthogonalized updates, for the matrices of a model trained from scratch.

Like torch's own, with two differences. Matrices of the same shape are orthogonalized together, in a
few large products instead of many small ones. And it uses fp32 if the processor has no bf16
instructions: torch always uses bf16, which takes 90 times as long there.

N: matrices of one shape    A, B: their sides
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration; Jordan et al.
NUM_ITERATIONS = 5
EPS = 1e-7


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the hardware has bf16 matrix products, which are then faster than fp32."""
    if device.type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def orthogonal(
    matrices: Float[Tensor, "N A B"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "N A B"]:
    """Approximately U V^T of each matrix U S V^T: singular values become about 0.7 to 1.2.

    Args:
        matrices: any; zero stays zero.
        dtype: of the products and the result.

    Source: the quintic Newton-Schulz iteration of Jordan et al., "Muon: an optimizer for hidden
    layers in neural networks", 2024.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum; updates have the size of AdamW's.

    Args:
        params: only matrices.
        lr: of AdamW's order.
        weight_decay: decoupled.
        momentum: share of the old direction that remains.

    Source: Jordan et al. 2024; the scale is that of Liu et al., "Muon is scalable for LLM
    training", arXiv 2502.16982, section 2.2.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every matrix that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    of_shape.setdefault(parameter.shape, []).append(parameter)
            for alike in of_shape.values():
                self._move(alike, **{k: group[k] for k in ("lr", "weight_decay", "momentum")})
        return loss

    def _move(
        self, alike: list[nn.Parameter], lr: float, weight_decay: float, momentum: float
    ) -> None:
        ahead = torch.stack([self._ahead(parameter, momentum) for parameter in alike])
        dtype = torch.bfloat16 if computes_in_bf16(ahead.device) else torch.float32
        updates = orthogonal(ahead, dtype).to(ahead.dtype)
        size = 0.2 * max(alike[0].shape) ** 0.5
        for parameter, update in zip(alike, updates, strict=True):
            parameter.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * size)

    def _ahead(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov's momentum: the update if the next gradient equals this one."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        direction = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(direction, momentum)
