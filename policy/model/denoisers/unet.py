"""The denoiser: a 1D U-Net over the time of an action chunk, modulated by observation and denoising step.

    chunk [B, H, A] ─▶ down₀ ─▶ down₁ ─▶ … ─▶ middle ─▶ … ─▶ up₁ ─▶ up₀ ─▶ [B, H, A]
                         └────────┴── skip connections ──────┘
    every residual block is scaled and shifted (FiLM) by  W_t · mish(embed(time)) + W_o · mish(condition) + bias

The condition does not change during a chunk and the times are the same for every chunk, so the two products are
computed once per chunk for all blocks and steps together (`prepare`), and a denoising step only adds them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from action_diffusion.errors import InputError, unknown
from action_diffusion.policy.model.activations import ACTIVATIONS, Activation
from action_diffusion.policy.model.conv import Conv1d, Double, GroupNorm, Halve, Linear
from action_diffusion.policy.model.denoisers.denoiser import Denoiser, Film, embed_times, time_mlp

Value = TypeVar("Value")
"""What goes through the U-Net: a tensor, or what stands for one."""


class ConvBlock(nn.Module):
    """Convolution, group normalisation, activation. [T, B, C_in] → [T, B, C_out]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, n_groups: int, activation: Activation):
        super().__init__()
        self.conv = Conv1d(in_channels, out_channels, kernel_size)
        self.norm = GroupNorm(n_groups, out_channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


class ResidualBlock(nn.Module):
    """Two `ConvBlock`s with FiLM between them (Perez et al. 2018). [T, B, C_in], film [B, 2 C_out] → [T, B, C_out]."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, n_groups: int, activation: Activation):
        super().__init__()
        self.first = ConvBlock(in_channels, out_channels, kernel_size, n_groups, activation)
        self.second = ConvBlock(out_channels, out_channels, kernel_size, n_groups, activation)
        self.shortcut = Linear(in_channels, out_channels) if in_channels != out_channels else nn.Identity()
        self.film_size = 2 * out_channels

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        scale, shift = film.chunk(2, dim=-1)
        hidden = torch.addcmul(shift, self.first(x), scale)
        result: Tensor = self.second(hidden) + self.shortcut(x)
        return result


class ConditionalUnet1d(Denoiser):
    """The U-Net of Diffusion Policy (Chi et al. 2023), after Janner et al. 2022.

    action_dim: A. condition_dim: size of the encoded observation history. marked: the input has one channel more, which
    marks the steps of a chunk that are given clean (`policy.Prefix`). channels: of each level; the time axis is
    halved between levels, so the horizon must be divisible by 2^(levels − 1) (`check_horizon`). activation: SiLU where
    the paper has Mish, which costs several times as much on a CPU.
    """

    def __init__(
        self,
        *,
        action_dim: int,
        condition_dim: int,
        marked: bool = False,
        two_times: bool = False,
        channels: Sequence[int] = (48, 96, 192),
        kernel_size: int = 5,
        n_groups: int = 8,
        time_dim: int = 128,
        activation: str = "silu",
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("denoiser.activation", activation, ACTIVATIONS)
        if kernel_size % 2 == 0:
            raise InputError(f"denoiser.kernel_size={kernel_size} must be odd, so that a chunk keeps its length")
        for width in channels:
            if width % n_groups:
                raise InputError(f"denoiser.channels: {width} is not divisible by n_groups={n_groups}")
        self.channels, self.kernel_size, self.n_groups = tuple(channels), kernel_size, n_groups
        self.action_dim, self.input_dim, self.activation = action_dim, action_dim + marked, activation
        self.time_embedding = time_mlp(time_dim)
        self.span_embedding = time_mlp(time_dim) if two_times else None
        act = ACTIVATIONS[activation]

        def block(n_in: int, n_out: int) -> ResidualBlock:
            return ResidualBlock(n_in, n_out, kernel_size, n_groups, act)

        widths = [self.input_dim, *channels]
        self.down = nn.ModuleList()
        for level, (n_in, n_out) in enumerate(pairwise(widths)):
            last = level == len(channels) - 1
            resize: nn.Module = nn.Identity() if last else Halve(n_out)
            self.down.append(nn.ModuleList([block(n_in, n_out), block(n_out, n_out), resize]))
        self.middle = nn.ModuleList([block(channels[-1], channels[-1]) for _ in range(2)])
        self.up = nn.ModuleList()
        for n_out, n_in in reversed(list(pairwise(channels))):
            grow = Double(n_out)
            self.up.append(nn.ModuleList([block(2 * n_in, n_out), block(n_out, n_out), grow]))
        self.out = nn.Sequential(
            ConvBlock(channels[0], channels[0], kernel_size, n_groups, act), Linear(channels[0], action_dim)
        )
        self.film_sizes = [m.film_size for m in self.modules() if isinstance(m, ResidualBlock)]
        self.time_film = nn.Linear(time_dim, sum(self.film_sizes))
        self.condition_film = nn.Linear(condition_dim, sum(self.film_sizes), bias=False)
        with torch.no_grad():  # one linear layer of both inputs, split in two: the same initial spread
            bound = 1.0 / math.sqrt(time_dim + condition_dim)
            for parameter in (*self.time_film.parameters(), *self.condition_film.parameters()):
                parameter.uniform_(-bound, bound)
            start = 0
            for size in self.film_sizes:  # scales start around 1, so that signals pass unchanged
                self.time_film.bias[start : start + size // 2] += 1.0
                start += size

    def check_horizon(self, horizon: int) -> None:
        """`InputError` when a chunk of this length cannot be halved between all levels."""
        factor = 2 ** (len(self.channels) - 1)
        if horizon % factor:
            raise InputError(
                f"horizon={horizon} must be divisible by {factor}, since a U-Net of {len(self.channels)} levels "
                f"halves it {len(self.channels) - 1} times"
            )

    def prepare(self, condition: Tensor, times: Tensor) -> Film:
        """Everything that depends only on the observation or only on the step. condition [B, C], times [K] or
        [K, 2]."""
        embedded = embed_times(times, self.time_embedding, self.span_embedding)
        return Film(
            steps=self.time_film(F.mish(embedded)),
            condition=self.condition_film(F.mish(condition)),
        )

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x [B, H, A] (A + 1: `marked`), film [B, F] (of `Film.at`, in training the sum of its parts) → [B, H, A]."""
        films = iter(film.split(self.film_sizes, dim=-1))
        out = self.walk(
            x.transpose(0, 1).contiguous(),
            layer=lambda layer, h: layer(h),
            residual=lambda block, h: block(h, next(films)),
            join=lambda h, skipped: torch.cat([h, skipped], dim=-1),
        )
        return out.transpose(0, 1)

    def walk(
        self,
        h: Value,
        *,
        layer: Callable[[Any, Value], Value],
        residual: Callable[[ResidualBlock, Value], Value],
        join: Callable[[Value, Value], Value],
    ) -> Value:
        """All parts in their order, for whoever runs them: these layers, or `kernels.program`, which lists them.

        residual: a block, with its part of the modulation, which are in this order. join: what comes up, beside what
        was skipped to. layer: of another length, and the last two.
        """
        skipped: list[Value] = []
        for level, (first, second, halve) in enumerate(map(_three, self.down)):
            h = residual(second, residual(first, h))
            skipped.append(h)
            h = layer(halve, h) if level < len(self.down) - 1 else h
        for block in self.middle:
            h = residual(cast(ResidualBlock, block), h)
        for first, second, double in map(_three, self.up):
            h = residual(second, residual(first, join(h, skipped.pop())))
            h = layer(double, h)
        block, linear = self.out
        return layer(linear, layer(block, h))


def _three(level: nn.Module) -> tuple[ResidualBlock, ResidualBlock, nn.Module]:
    first, second, resize = cast(nn.ModuleList, level)
    return cast(ResidualBlock, first), cast(ResidualBlock, second), resize
