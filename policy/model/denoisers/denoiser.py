"""What a denoiser is, for the policy and the sampler: whatever shapes noise into a chunk, step by step.

    prepare(condition [B, C], times [K]) ─▶ Film: what depends on the observation only, and what on the step only
    forward(x [B, H, A], film [B, F])    ─▶ the process' prediction [B, H, A]: noise, clean chunk or velocity

A chunk takes one `prepare` and K calls of `forward`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Film:
    """The modulation of all blocks: of each step [K, F] and of each observation [B, F]."""

    steps: Tensor
    condition: Tensor

    def at(self, index: int, rows: Tensor | None = None) -> Tensor:
        """The modulation [R, F] for step `index`, for all rows or those named."""
        condition = self.condition if rows is None else self.condition[rows]
        return condition + self.steps[index]


class Denoiser(nn.Module):
    """Its constructor takes action_dim (A), condition_dim (C: of an encoded history), and options of its own; also
    `marked` where it is to be trained with policy.objective.max_delay: its input then has one channel more; and
    `two_times` where the objective tells it two. If it takes them, and no option gives them, also `horizon` (H) and
    `n_obs_steps`: how many equal parts the condition is, oldest first (1 where an estimated state follows them)."""

    def check_horizon(self, horizon: int) -> None:
        """Raises `InputError` for a chunk of a length H that it cannot have. Here: takes any."""

    def prepare(self, condition: Tensor, times: Tensor) -> Film:
        """What can be computed once per chunk. condition [B, C], times [K] from 0 (clean) to the process' most;
        [K, 2] for `two_times`: where a step begins, and where it ends."""
        raise NotImplementedError

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x [B, H, A] and film [B, F], the sum of a row of either part of `Film` → [B, H, A]."""
        raise NotImplementedError


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


def embed_times(
    times: Tensor, embed: Callable[[Tensor], Tensor], embed_span: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """times [K], or [K, 2] where `embed_span` says how far a step goes, see `Denoiser.prepare` → [K, D]."""
    if embed_span is None:
        return embed(times)
    begin, end = times.unbind(dim=1)
    return embed(begin) + embed_span(begin - end)


def time_mlp(dim: int) -> nn.Sequential:
    """A time, or how far a step goes, [N] → [N, dim]."""
    return nn.Sequential(SinusoidalEmbedding(dim), nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
