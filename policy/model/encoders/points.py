"""A cloud of points as one vector: the encoder of DP3 ("3D Diffusion Policy", Ze et al. 2024).

    points [N, P, 3 or 6] ─▶ for each point: linear, layer norm, ReLU, … ─▶ max over points ─▶ linear, layer norm [N, F]

A maximum does not know in which order points come, nor how often one is there. A cloud is in one frame whatever camera
saw it, and so is what is learnt from it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class PointEncoder(nn.Module):
    """channels: values of a point. hidden: sizes of the layers that each point goes through. feature_dim: F."""

    def __init__(self, *, channels: int, hidden: Sequence[int] = (64, 128, 256), feature_dim: int = 64):
        super().__init__()
        sizes = (channels, *hidden)
        layers = [(nn.Linear(n, m), nn.LayerNorm(m), nn.ReLU()) for n, m in zip(sizes, hidden, strict=False)]
        self.layers = nn.Sequential(*(part for layer in layers for part in layer))
        self.out = nn.Sequential(nn.Linear(sizes[-1], feature_dim), nn.LayerNorm(feature_dim))
        self.output_dim = feature_dim

    def forward(self, points: Tensor) -> Tensor:
        """[..., P, C], normalised → [..., F]."""
        result: Tensor = self.out(self.layers(points).amax(dim=-2))
        return result
