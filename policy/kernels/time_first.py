"""Convolution and group norm along time by torch's operations in another order, for many rows on a CPU.

With time first, the rows that tap j of a kernel reads are one contiguous block, shifted against those that it writes:

    kernel 3, T = 4           out[0] out[1] out[2] out[3]
    tap 0 (one step back)            x[0]   x[1]   x[2]      out[1:] += x[:-1] @ W₀
    tap 1                     x[0]   x[1]   x[2]   x[3]      out     += x      @ W₁
    tap 2 (one step ahead)    x[1]   x[2]   x[3]             out[:-1] += x[1:] @ W₂

so nothing is copied, and no product is spent on the zero padding (30 % of the work at T = 4 with a kernel of 5).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def shifted_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [T, B, C_in], weight [K, C_in, C_out], bias [C_out] → [T, B, C_out], in the type that autocast asks for."""
    result: Tensor = ShiftedConv.apply(*_autocast(x, weight, bias))
    return result


def norm_over_time(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """x [T, B, C], weight, bias [C] → [T, B, C], float32, normalised over time and the channels of a group."""
    with torch.autocast(x.device.type, enabled=False):
        result: Tensor = NormOverTime.apply(x.float(), weight, bias, groups, eps)
        return result


def _spans(tap: int, kernel: int, steps: int) -> tuple[slice, slice]:
    """(rows read, rows written) by a tap of a kernel centred on the step that it writes."""
    shift = tap - kernel // 2
    return slice(max(0, shift), steps + min(0, shift)), slice(max(0, -shift), steps - max(0, shift))


class ShiftedConv(torch.autograd.Function):
    """x [T, B, C_in], weight [K, C_in, C_out], bias [C_out] → [T, B, C_out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        steps, kernel = len(x), len(weight)
        middle = kernel // 2
        out = torch.addmm(bias, x.flatten(0, 1), weight[middle]).view(steps, x.shape[1], -1)
        for tap in range(kernel):
            read, written = _spans(tap, kernel, steps)
            if tap != middle and read.start < read.stop:
                out[written].flatten(0, 1).addmm_(x[read].flatten(0, 1), weight[tap])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        steps, kernel = len(x), len(weight)
        middle = kernel // 2
        grad_x = (grad.flatten(0, 1) @ weight[middle].T).view_as(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for tap in range(kernel):
            read, written = _spans(tap, kernel, steps)
            if read.start >= read.stop:
                continue
            part = grad[written].flatten(0, 1)
            if grad_x is not None and tap != middle:
                grad_x[read].flatten(0, 1).addmm_(part, weight[tap].T)
            if grad_weight is not None:
                torch.mm(x[read].flatten(0, 1).T, part, out=grad_weight[tap])
        grad_bias = grad.flatten(0, 1).sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


class NormOverTime(torch.autograd.Function):
    """x [T, B, C], weight, bias [C] → [T, B, C], normalised over time and the channels of a group.

    Written with sums over time first, which keep the channels contiguous. With s = Σ x and q = Σ x² over the n
    values of a group: mean = s / n, var = q / n − mean², y = x · a + c, where a = weight / std, c = bias − mean · a.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        shape = (x.shape[1], groups, -1)
        n = x.shape[0] * x.shape[2] // groups
        # Shifted by the first step, so that a large common offset does not eat the digits of q − s².
        shift = x[0].reshape(shape).mean(-1, keepdim=True)
        centred = x - shift.expand(shape[0], groups, x.shape[2] // groups).reshape(1, x.shape[1], -1)
        s = centred.sum(0).view(shape).sum(-1, keepdim=True) / n
        q = (centred * centred).sum(0).view(shape).sum(-1, keepdim=True) / n
        rstd = torch.rsqrt((q - s * s).clamp_min(0.0) + eps)
        scale = (rstd * weight.view(groups, -1)).view(x.shape[1], -1)
        offset = bias - (s * rstd * weight.view(groups, -1)).view(x.shape[1], -1)
        ctx.save_for_backward(centred, weight, s, rstd)
        ctx.groups = groups
        return torch.addcmul(offset, centred, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels = x.shape[1:]
        shape = (batch, ctx.groups, -1)
        n = x.shape[0] * channels // ctx.groups
        gamma = weight.view(ctx.groups, -1)
        by_x = (grad * x).sum(0).view(shape)
        by_1 = grad.sum(0).view(shape)
        grad_weight = ((by_x - mean * by_1) * rstd).sum(0).flatten()
        grad_bias = by_1.sum(0).flatten()
        sum_x, sum_1 = (by_x * gamma).sum(-1, keepdim=True), (by_1 * gamma).sum(-1, keepdim=True)
        along = (sum_1 * mean - sum_x) * rstd**3 / n
        constant = -along * mean - sum_1 * rstd / n
        per_channel = (batch, ctx.groups, channels // ctx.groups)
        grad_x = torch.addcmul(
            constant.expand(per_channel).reshape(batch, channels),
            x,
            along.expand(per_channel).reshape(batch, channels),
        ).addcmul_(grad, (rstd * gamma).view(batch, channels))
        return grad_x, grad_weight, grad_bias, None, None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type that autocast asks for, if it is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)
