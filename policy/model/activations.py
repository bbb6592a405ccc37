"""The nonlinearities of the denoiser, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Activation = Callable[[Tensor], Tensor]


def mish(x: Tensor) -> Tensor:
    """`torch.nn.functional.mish` (Misra 2019), x · tanh(softplus(x)), faster on a CPU.

    torch takes a logarithm and a hyperbolic tangent. One exponential is enough: tanh(log(1 + e)) = 1 / (1 + 1 / n) with
    e = exp(x) and n = e + e² / 2, also where these are 0 or infinite.
    """
    if not x.is_cpu or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return F.mish(x)
    return _Mish.apply(x) if x.requires_grad and torch.is_grad_enabled() else x * _slope(x)


ACTIVATIONS: dict[str, Activation] = {"silu": F.silu, "mish": mish, "relu": F.relu, "gelu": F.gelu}


def _slope(x: Tensor) -> Tensor:
    """tanh(softplus(x))."""
    e = x.exp()
    return torch.addcmul(e, e, e, value=0.5).reciprocal_().add_(1.0).reciprocal_()


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        slope = _slope(x)
        ctx.save_for_backward(x, slope)
        return x * slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """d/dx x · s(x) = s + x · (1 − s²) · sigmoid(x)."""
        x, slope = ctx.saved_tensors
        rising = torch.sigmoid(x).mul_(x)
        return torch.addcmul(slope, slope, slope.mul(rising), value=-1.0).add_(rising).mul_(grad)
