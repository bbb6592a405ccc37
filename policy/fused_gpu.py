"""A denoising step on a GPU in a fifth of the kernels: products, and one kernel between two of them (`norm_kernel`).

A chunk at a small batch is bound by starting kernels. By torch a convolution of [T, B, C] with its norm, activation and
FiLM is a dozen; here it is two, since everything between two products is written where, and as, the next one reads it:

    windows [B·T, taps, C] ─▶ product with [taps · C, C'] ─▶ between ─▶ windows of the next layer, and of the way up

Values between layers are in the precision of the products. The same within the rounding of that precision.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from action_diffusion.policy.conv import Double, Halve
    from action_diffusion.policy.denoiser import ConditionalUnet1d, ConvBlock, ResidualBlock

SPREAD = 128
"""Channels that a program takes where nothing is normalised."""


@cache
def works() -> bool:
    """Whether a kernel can be compiled and run on this machine's GPU; a warning says what is in the way."""
    try:
        from action_diffusion.policy.norm_kernel import between

        x = torch.ones(2, 4, device="cuda")
        between(x, out := torch.empty(2, 1, 4, device="cuda"), steps=2, group=4)
        return bool((out[:, 0] == x).all())
    except Exception as error:  # a missing package, compiler or driver, each with an exception of its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"denoising steps are not fused on this GPU, which makes them slower: {reason[0]}", stacklevel=2)
        return False


def fits(denoiser: ConditionalUnet1d) -> bool:
    """Whether this can run `denoiser`: on a CUDA device whose kernels can be compiled."""
    return denoiser.time_film.weight.is_cuda and works()


class FusedGpu:
    """Runs a U-Net with products in `dtype`, by copies of its weights; in float32 mostly by themselves."""

    def __init__(self, denoiser: ConditionalUnet1d, dtype: torch.dtype) -> None:
        self._denoiser, self._dtype = denoiser, dtype
        self._layers = denoiser._layers()  # which forget what is packed when their weights change
        self._known: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def takes(self, x: Tensor, film: Tensor) -> bool:
        """Whether x [B, H, A] is computed without a gradient, by weights that have not changed."""
        net, plain = self._denoiser, x.dtype == film.dtype == torch.float32
        if torch.is_grad_enabled() or not plain or torch.is_autocast_enabled(x.device.type) or x.ndim != 3:
            return False
        fits = x.shape[2] == net.input_dim and x.shape[1] % 2 ** (len(net.channels) - 1) == 0 and x.shape[0] > 0
        return fits and self._tiles_fit(x.shape[1]) and all(layer._packed for layer in self._layers)

    def _tiles_fit(self, steps: int) -> bool:
        """Whether a program can hold the steps of a chunk and the channels that it takes, at every level."""
        from action_diffusion.policy.norm_kernel import MOST, tile

        net = self._denoiser
        sizes = [tile(steps >> level, width // net.n_groups) for level, width in enumerate(net.channels)]
        return all(rows * columns <= MOST for rows, columns in [*sizes, tile(steps, SPREAD)])

    def __call__(self, x: Tensor, film: Tensor) -> Tensor:
        """As `ConditionalUnet1d.forward`."""
        with torch.cuda.device_of(x):  # Triton starts kernels on the current device, wherever tensors are
            return _Step(self._denoiser, self._matrix, film.expand(len(x), -1), x.shape[1], self._dtype).run(x)

    def _matrix(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """What rows are multiplied by, [K, N], and the bias [N]: float32, where a kernel adds it."""
        if layer not in self._known:
            with torch.inference_mode(False), torch.no_grad():  # they serve any later caller
                self._known[layer] = _laid_out(layer, self._dtype)
        return self._known[layer]


def _laid_out(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight, bias = layer.weight.detach(), layer.bias.detach()
    if weight.ndim == 2:
        return weight.T.to(dtype), bias.to(dtype)
    if len(weight) == 4:  # `Double`: rows see steps i − 1, i, i + 1, and give steps 2 i and 2 i + 1 side by side
        both = weight.new_zeros(3, 2, *weight.shape[1:])
        both[0, 0], both[1, 0], both[1, 1], both[2, 1] = weight[3], weight[1], weight[2], weight[0]
        return both.transpose(1, 2).flatten(2).flatten(0, 1).to(dtype), bias
    return weight.flatten(0, 1).to(dtype), bias


class _Step:
    """One pass through the network. A map of `steps` steps is [B · steps, taps, C]: windows, the middle tap itself."""

    def __init__(self, net: ConditionalUnet1d, matrix: Any, film: Tensor, steps: int, dtype: torch.dtype) -> None:
        from action_diffusion.policy.norm_kernel import between

        self._net, self._matrix, self._steps, self._dtype, self._between = net, matrix, steps, dtype, between
        self._films: Iterator[Tensor] = iter(film.split(net.film_sizes, dim=1))
        self._batch, self._device = len(film), film.device

    def run(self, x: Tensor) -> Tensor:
        net, kernel = self._net, self._net.kernel_size
        h = self._map(net.input_dim, kernel)
        self._spread(x.reshape(-1, net.input_dim), h)
        both: list[Tensor] = []  # of each level: what comes up beside what was skipped
        for level, (width, modules) in enumerate(zip(net.channels, net.down, strict=True)):
            first, second, resize = cast("tuple[ResidualBlock, ResidualBlock, Halve]", modules)
            last = level == len(net.channels) - 1
            both.append(self._map(2 * width, kernel) if level else self._map(width, kernel))
            h, before = self._map(width, kernel if last else 3), h
            self._residual(second, self._residual(first, before), h, both[-1][..., width:] if level else None)
            if not last:
                self._steps //= 2
                rows = _rows(h[0::2], 3) @ self._matrix(resize)[0]
                self._spread(rows, h := self._map(width, kernel), self._matrix(resize)[1])
        middle = cast("list[ResidualBlock]", net.middle)
        self._residual(middle[1], self._residual(middle[0], h), both[-1][..., : net.channels[-1]])
        for modules in net.up:
            first, second, grow = cast("tuple[ResidualBlock, ResidualBlock, Double]", modules)
            width = second.second.conv.weight.shape[-1]
            h = self._residual(second, self._residual(first, both.pop()), self._map(width, 3))
            self._steps *= 2
            rows = (_rows(h, 3) @ self._matrix(grow)[0]).view(-1, width)
            self._spread(rows, both[-1][..., :width], self._matrix(grow)[1])
        block, linear = cast("tuple[ConvBlock, nn.Linear]", net.out)
        h = self._block(block, both.pop(), self._map(net.channels[0], 1))
        return self._linear(linear, h).float().view(self._batch, -1, net.action_dim)

    def _residual(
        self, block: ResidualBlock, x: Tensor, out: Tensor | None = None, other: Tensor | None = None
    ) -> Tensor:
        added = self._linear(block.shortcut, x) if isinstance(block.shortcut, nn.Linear) else _rows(x, 1)
        width = block.second.conv.weight.shape[-1]
        hidden = self._block(block.first, x, self._map(width, self._net.kernel_size), film=next(self._films))
        out = self._map(width, self._net.kernel_size) if out is None else out
        return self._block(block.second, hidden, out, other, add=added)

    def _block(
        self, block: ConvBlock, x: Tensor, out: Tensor, other: Tensor | None = None, **given: Tensor | None
    ) -> Tensor:
        matrix, bias = self._matrix(block.conv)
        norm, y = block.norm, _rows(x, len(block.conv.weight)) @ matrix
        self._between(
            y,
            out,
            other,
            steps=self._steps,
            group=y.shape[1] // norm.n_groups,
            bias=bias,
            norm=(norm.weight, norm.bias, norm.eps),
            activation=self._net.activation,
            **given,
        )
        return out

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        matrix, bias = self._matrix(layer)
        return torch.addmm(bias, _rows(x, 1), matrix)

    def _spread(self, rows: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
        self._between(rows, out, steps=self._steps, group=min(SPREAD, rows.shape[1]), bias=bias)

    def _map(self, channels: int, taps: int) -> Tensor:
        return torch.empty(self._batch * self._steps, taps, channels, dtype=self._dtype, device=self._device)


def _rows(x: Tensor, taps: int) -> Tensor:
    """What a kernel of so many taps sees, [B · T, taps · C], of a map [B · T, taps or more, C]: not a copy."""
    first = (x.shape[1] - taps) // 2
    return x[:, first : first + taps].flatten(1)
