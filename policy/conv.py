"""1D convolutions and group normalisation for short sequences, laid out time first: [T, B, C].

A chunk has few time steps and many channels, so a convolution over it is a handful of matrix products. With time
first, the rows that tap j of the kernel reads are one contiguous block, shifted against the rows that it writes:

    kernel 3, T = 4           out[0] out[1] out[2] out[3]
    tap 0 (one step back)            x[0]   x[1]   x[2]      out[1:] += x[:-1] @ W₀
    tap 1                     x[0]   x[1]   x[2]   x[3]      out     += x      @ W₁
    tap 2 (one step ahead)    x[1]   x[2]   x[3]             out[:-1] += x[1:] @ W₂

so nothing is copied, and no product is spent on the zero padding (30 % of the work at T = 4 with a kernel of 5).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from action_diffusion.policy import tiles
from action_diffusion.policy.packing import SMALL, Packable


def _spans(tap: int, kernel: int, steps: int) -> tuple[slice, slice]:
    """(rows read, rows written) by a tap of a kernel centred on the step that it writes."""
    shift = tap - kernel // 2
    return slice(max(0, shift), steps + min(0, shift)), slice(max(0, -shift), steps - max(0, shift))


class _ShiftedConv(torch.autograd.Function):
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


class _GroupNorm(torch.autograd.Function):
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


class Conv1d(Packable):
    """A convolution along time that keeps its length, [T, B, C_in] → [T, B, C_out].

    weight [K, C_in, C_out] (torch's Conv1d weight is its permutation (2, 1, 0)), bias [C_out]; K is odd.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel_size, in_channels, out_channels))
        self.bias = nn.Parameter(torch.empty(out_channels))
        bound = (in_channels * kernel_size) ** -0.5  # as torch.nn.Conv1d
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def matrix(self, index: int) -> tuple[Tensor, Tensor | None]:
        return self.weight.flatten(0, 1).T, self.bias

    def forget(self) -> None:
        super().forget()
        self._values: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] * x.shape[1] <= SMALL or self.runs_packed(x):
            return self.product(_windows(x, len(self.weight)))
        if x.is_cuda:  # one large product; torch's own convolution would lay out all weights anew in every call
            (x,) = _autocast(x)
            return self.product(_windows(x, len(self.weight)))
        if not torch.is_grad_enabled() and self._packed and tiles.pays_1d(x, self.weight, once=False):
            self._values = tiles.pack_1d(self.weight) if self._values is None else self._values
            return tiles.conv1d_packed(x, self._values, self.bias)
        if tiles.pays_1d(x, self.weight, once=True):
            return tiles.conv1d(x, self.weight, self.bias)
        x, weight, bias = _autocast(x, self.weight, self.bias)
        return _ShiftedConv.apply(x, weight, bias)


class GroupNorm(nn.Module):
    """`torch.nn.GroupNorm` for [T, B, C]."""

    def __init__(self, n_groups: int, channels: int, eps: float = 1e-5):
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        few = x.shape[0] * x.shape[1] <= SMALL or (x.shape[1] <= SMALL and not torch.is_grad_enabled())
        if x.is_cuda or few:
            out = torch.group_norm(x.permute(1, 2, 0), self.n_groups, self.weight, self.bias, self.eps)
            return out.permute(2, 0, 1).contiguous()
        with torch.autocast(x.device.type, enabled=False):
            return _GroupNorm.apply(x.float(), self.weight, self.bias, self.n_groups, self.eps)


class Halve(Packable):
    """Convolution of kernel 3, stride 2, padding 1: [T, B, C] → [T / 2, B, C], T even. weight [3, C, C]."""

    def __init__(self, channels: int):
        super().__init__()
        conv = Conv1d(channels, channels, 3)
        self.weight, self.bias = conv.weight, conv.bias

    def matrix(self, index: int) -> tuple[Tensor, Tensor | None]:
        return self.weight.flatten(0, 1).T, self.bias

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x[0::2], x[1::2]
        before = torch.cat([torch.zeros_like(odd[:1]), odd[:-1]])
        return self.product(torch.cat([before, even, odd], dim=-1))


class Double(Packable):
    """Transposed convolution of kernel 4, stride 2, padding 1: [T, B, C] → [2 T, B, C]. weight [4, C, C].

    Even steps are reached by taps 3 and 1 (of the step before and the step itself), odd ones by taps 2 and 0.
    """

    n_matrices = 2

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, channels, channels))
        self.bias = nn.Parameter(torch.empty(channels))
        bound = (channels * 4) ** -0.5  # as torch.nn.ConvTranspose1d
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def matrix(self, index: int) -> tuple[Tensor, Tensor | None]:
        first, second = ((3, 1), (2, 0))[index]
        return torch.cat([self.weight[first], self.weight[second]]).T, self.bias

    def forward(self, x: Tensor) -> Tensor:
        edge = torch.zeros_like(x[:1])
        before, after = torch.cat([edge, x[:-1]]), torch.cat([x[1:], edge])
        even = self.product(torch.cat([before, x], dim=-1), 0)
        odd = self.product(torch.cat([x, after], dim=-1), 1)
        return torch.stack([even, odd], dim=1).flatten(0, 1)


def _windows(x: Tensor, kernel: int) -> Tensor:
    """What a kernel sees at every step, side by side: [T, B, C] → [T, B, K · C], zeros beyond the ends."""
    padded = F.pad(x, (0, 0, 0, 0, kernel // 2, kernel // 2))
    return padded.unfold(0, kernel, 1).movedim(-1, 2).flatten(2)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type that autocast asks for, if it is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(t.to(torch.get_autocast_dtype(kind)) for t in tensors)
