"""How a network is told a time: sines and cosines, and a small network on top."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of a time [N] → [N, dim] (Vaswani et al. 2017; Ho et al. 2020)."""

    frequencies: Tensor

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        exponent = torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / (half - 1))
        self.register_buffer("frequencies", exponent.exp(), persistent=False)

    def forward(self, times: Tensor) -> Tensor:
        angles = times[:, None].float() * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def time_mlp(dim: int) -> nn.Sequential:
    """A time, or how far a step goes, [N] → [N, dim]."""
    return nn.Sequential(SinusoidalEmbedding(dim), nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
