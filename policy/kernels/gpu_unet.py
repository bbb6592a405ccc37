"""A denoising step on a GPU in a fifth of the kernels: products, and one kernel between two of them (`norm_kernel`).

A chunk at a small batch is bound by starting kernels. By torch a convolution of [T, B, C] with its norm, activation and
FiLM is a dozen; here it is two, since everything between two products is written where, and as, the next one reads it:

    windows [B·T, taps, C] ─▶ product with [taps · C, C'] ─▶ between ─▶ windows of the next layer, and of the way up

Values between layers are in the precision of the products. The same within the rounding of that precision.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from action_diffusion.policy.kernels.layers import UnetKernel
from action_diffusion.policy.kernels.program import Activations, Convolve, Program, Resize, record
from action_diffusion.policy.model.conv import Double, Halve

if TYPE_CHECKING:
    from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d

SPREAD = 128
"""Channels that a program takes where nothing is normalised."""


@cache
def works() -> bool:
    """Whether a kernel can be compiled and run on this machine's GPU; a warning says what is in the way."""
    try:
        from action_diffusion.policy.kernels.norm_kernel import between

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


class GpuUnet(UnetKernel):
    """With products in `dtype`, by copies of its weights; in float32 mostly by themselves."""

    def __init__(self, layer: ConditionalUnet1d, *, keep: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(layer, keep=keep)
        self._dtype = dtype

    def options(self) -> dict[str, Any]:
        return {"dtype": self._dtype}

    def takes(self, x: Tensor, film: Tensor) -> bool:
        """Whether x [B, H, A] is computed without a gradient, and fits."""
        plain = x.dtype == film.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)
        return not torch.is_grad_enabled() and plain and self.fits_in(x) and self._tiles_fit(x.shape[1])

    def _tiles_fit(self, steps: int) -> bool:
        """Whether a program can hold the steps of a chunk and the channels that it takes, at every level."""
        from action_diffusion.policy.kernels.norm_kernel import MOST, tile

        net = self.layer
        sizes = [tile(steps >> level, width // net.n_groups) for level, width in enumerate(net.channels)]
        return all(rows * columns <= MOST for rows, columns in [*sizes, tile(steps, SPREAD)])

    def __call__(self, x: Tensor, film: Tensor) -> Tensor:
        """As `ConditionalUnet1d.forward`."""
        if not self.takes(x, film):
            return self.plain(x, film)
        return self.run(x, film)

    def run(self, x: Tensor, film: Tensor) -> Tensor:
        """By few kernels."""
        program = self.made(("program", x.shape[1]), lambda: record(self.layer, x.shape[1]))
        step = _Step(self.layer, self._matrix, film.expand(len(x), -1), self._dtype)
        if not x.is_cuda:  # in Triton's interpreter
            return step.run(program, x)
        with torch.cuda.device_of(x):  # Triton starts kernels on the current device, wherever tensors are
            return step.run(program, x)

    def _matrix(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """What rows are multiplied by, [K, N], and the bias [N]: float32, where a kernel adds it."""
        result: tuple[Tensor, Tensor] = self.made(layer, lambda: _laid_out(layer, self._dtype))
        return result


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

    def __init__(self, net: ConditionalUnet1d, matrix: Any, film: Tensor, dtype: torch.dtype) -> None:
        from action_diffusion.policy.kernels.norm_kernel import between

        self._net, self._matrix, self._film, self._dtype, self._between = net, matrix, film, dtype, between
        self._batch = len(film)
        self._maps: dict[Activations, Tensor] = {}
        self._rows_of: dict[Activations, Tensor] = {}

    def run(self, program: Program, x: Tensor) -> Tensor:
        self._spread(x.reshape(-1, x.shape[2]), program.entering)
        for operation in program.operations:
            if isinstance(operation, Convolve):
                self._convolve(operation)
            elif operation.out is program.leaving:
                matrix, bias = self._matrix(operation.layer)
                out = torch.addmm(bias, self._seen(operation.source, 1), matrix)
                return out.float().view(self._batch, -1, out.shape[1])
            else:
                self._resize(operation)
        raise AssertionError("a U-Net ends with a linear layer")

    def _convolve(self, operation: Convolve) -> None:
        matrix, bias = self._matrix(operation.conv)
        film, norm, width = None, operation.norm, operation.out.channels
        if operation.film is not None:
            film = self._film[:, operation.film : operation.film + 2 * width]
        self._between(
            self._seen(operation.source, len(operation.conv.weight)) @ matrix,
            *self._places(operation.out),
            steps=operation.out.steps,
            group=width // norm.n_groups,
            bias=bias,
            norm=(norm.weight, norm.bias, norm.eps),
            activation=self._net.activation,
            film=film,
            add=None if operation.added is None else self._seen(operation.added, 1),
        )

    def _resize(self, operation: Resize) -> None:
        layer, x, out = operation.layer, operation.source, operation.out
        matrix, bias = self._matrix(layer)
        if isinstance(layer, Halve):
            self._spread(_rows(self._map(x)[0::2], 3) @ matrix, out, bias)
        elif isinstance(layer, Double):
            self._spread((self._seen(x, 3) @ matrix).view(-1, out.channels), out, bias)
        else:  # a shortcut, which is only added
            self._rows_of[out] = torch.addmm(bias, self._seen(x, 1), matrix)

    def _spread(self, rows: Tensor, out: Activations, bias: Tensor | None = None) -> None:
        self._between(rows, *self._places(out), steps=out.steps, group=min(SPREAD, rows.shape[1]), bias=bias)

    # -- maps

    def _seen(self, value: Activations, taps: int) -> Tensor:
        return self._rows_of[value] if value in self._rows_of else _rows(self._map(value), taps)

    def _places(self, value: Activations) -> list[Tensor]:
        """Where a value is written: for its own readers, for those of what it is a part of, or for both."""
        places = [] if value.place is not None and value.taps == 0 else [self._map(value)]
        if value.place is not None:
            parts = value.place.parts
            first = sum(part.channels for part in parts[: parts.index(value)])
            places.append(self._map(value.place)[..., first : first + value.channels])
        return places

    def _map(self, value: Activations) -> Tensor:
        if value not in self._maps:
            size = self._batch * value.steps, value.taps, value.channels
            self._maps[value] = torch.empty(size, dtype=self._dtype, device=self._film.device)
        return self._maps[value]


def _rows(x: Tensor, taps: int) -> Tensor:
    """What a kernel of so many taps sees, [B · T, taps · C], of a map [B · T, taps or more, C]: not a copy."""
    first = (x.shape[1] - taps) // 2
    return x[:, first : first + taps].flatten(1)
