"""1D convolutions and group normalisation for short sequences, laid out time first: [T, B, C].

A chunk has few time steps and many channels, so a convolution over it is a matrix product: of what its kernel sees at
every step, side by side, with all taps of the weight, one below the other. These layers are plain; `policy.kernels`
puts what is faster on a machine in their place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Product(nn.Module):
    """A layer whose work is products of rows with matrices that follow from its weights."""

    weight: Tensor
    n_matrices = 1

    def matrix(self, index: int) -> tuple[Tensor, Tensor]:
        """Weight [N, K] and bias [N] of product `index`."""
        raise NotImplementedError

    def product(self, rows: Tensor, index: int = 0) -> Tensor:
        """rows [T, B, K] → [T, B, N] with matrix `index`."""
        flat = rows.flatten(0, 1)  # one addmm, where three axes may cost two operations
        return F.linear(flat, *self.matrix(index)).view(*rows.shape[:2], -1)


class Linear(nn.Linear, Product):
    """`torch.nn.Linear` for [T, B, K]."""

    def matrix(self, index: int) -> tuple[Tensor, Tensor]:
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class Conv1d(Product):
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

    def matrix(self, index: int) -> tuple[Tensor, Tensor]:
        return self.weight.flatten(0, 1).T, self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.product(_windows(x, len(self.weight)))


class GroupNorm(nn.Module):
    """`torch.nn.GroupNorm` for [T, B, C]."""

    def __init__(self, n_groups: int, channels: int, eps: float = 1e-5):
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.group_norm(x.permute(1, 2, 0), self.n_groups, self.weight, self.bias, self.eps)
        return out.permute(2, 0, 1).contiguous()


class Halve(Product):
    """Convolution of kernel 3, stride 2, padding 1: [T, B, C] → [T / 2, B, C], T even. weight [3, C, C]."""

    def __init__(self, channels: int):
        super().__init__()
        conv = Conv1d(channels, channels, 3)
        self.weight, self.bias = conv.weight, conv.bias

    def matrix(self, index: int) -> tuple[Tensor, Tensor]:
        return self.weight.flatten(0, 1).T, self.bias

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x[0::2], x[1::2]
        before = torch.cat([torch.zeros_like(odd[:1]), odd[:-1]])
        return self.product(torch.cat([before, even, odd], dim=-1))


class Double(Product):
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

    def matrix(self, index: int) -> tuple[Tensor, Tensor]:
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
