"""A denoising step of few rows as one call of C (`unet.c`), for a chunk at a small batch on a CPU.

By torch it is hundreds of short operations, and starting one takes longer than its work. Here the U-Net is a list of
some fifty, laid out once: a convolution and all that follows it on the same channels (group norm, activation, FiLM, the
sum with the shortcut) is one of them, so nothing but the weights comes from far in memory. It is the same within
rounding.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from action_diffusion import native
from action_diffusion.policy import packing
from action_diffusion.policy.conv import Double, GroupNorm, Halve

if TYPE_CHECKING:
    from action_diffusion.policy.denoiser import ConditionalUnet1d, ConvBlock, ResidualBlock

PANEL, BLOCK, MOST_ROWS = 32, 512, 256
"""Channels that lie together, channels of a job at most (as in `unet.c`), and rows (T · B) up to which this is for."""
MOST_PROGRAMS = 8
"""Sizes of batches whose memory is kept."""
CODES = {"relu": 1, "silu": 2, "mish": 3}


@cache
def library() -> native.Library | None:
    """The compiled code, where there is any."""
    return native.load(Path(__file__).parent, "_unet", 2)


def fits(denoiser: ConditionalUnet1d) -> bool:
    """Whether this can run `denoiser`: on a CPU that the code is for, with an activation that it knows."""
    blocks = all(_block(width // denoiser.n_groups) <= BLOCK for width in denoiser.channels)
    return denoiser.time_film.weight.is_cpu and denoiser.activation in CODES and blocks and library() is not None


class Fused:
    """Runs a U-Net by copies of its weights, made at the first call; those of larger layers in float16 if `half`."""

    def __init__(self, denoiser: ConditionalUnet1d, *, half: bool = False) -> None:
        self._denoiser = denoiser
        self._weights = _Weights(half)
        self._layers = denoiser._layers()  # which forget what is packed when their weights change
        self._programs: dict[tuple[int, int], _Program] = {}
        self._lock = threading.Lock()  # a program has one set of buffers

    def takes(self, x: Tensor, film: Tensor) -> bool:
        """Whether x [B, H, A] is few rows, computed in float32 without a gradient, by weights that have not changed."""
        net, plain = self._denoiser, x.dtype == film.dtype == torch.float32
        if torch.is_grad_enabled() or not plain or not native.computes(x) or not film.is_cpu:
            return False
        fits = x.ndim == 3 and x.shape[2] == net.input_dim and x.shape[1] % 2 ** (len(net.channels) - 1) == 0
        return fits and 0 < x.shape[0] * x.shape[1] <= MOST_ROWS and all(layer._packed for layer in self._layers)

    def __call__(self, x: Tensor, film: Tensor) -> Tensor:
        """As `ConditionalUnet1d.forward`."""
        with self._lock:
            size = x.shape[1], x.shape[0]
            if size not in self._programs:
                if len(self._programs) == MOST_PROGRAMS:
                    del self._programs[next(iter(self._programs))]
                with torch.inference_mode(False), torch.no_grad():  # its memory serves any later caller
                    self._programs[size] = _Program(self._denoiser, self._weights, *size)
            return self._programs[size](x, film)


class _Operation(ctypes.Structure):
    """`Operation` of `unet.c`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "bias", "gamma", "beta", "add", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("in_row", "out_row", "add_row", "in_first", "in_stride")),
        *((name, ctypes.c_int64) for name in ("out_first", "out_stride", "steps", "taps", "n_in", "n_out")),
        *((name, ctypes.c_int64) for name in ("block", "group", "channels", "film", "activation", "half")),
        ("eps", ctypes.c_float),
    )


class _Sequence(NamedTuple):
    """[margin + steps + margin, batch, row] of floats from `start` on, of which the first are `channels`, padded."""

    start: int
    row: int
    steps: int
    channels: int


class _Weights:
    """What layers multiply by, laid out once for all programs."""

    def __init__(self, half: bool) -> None:
        self._half = half
        self._known: dict[object, tuple[Tensor, Tensor]] = {}

    def __call__(self, name: object, weight: Tensor, bias: Tensor, parts: int = 1) -> tuple[Tensor, Tensor]:
        """weight [taps, n_in, n_out] in panels [n_out / 32, taps, n_in, 32], and bias [n_out], both with padding.

        parts: its inputs are so many sequences side by side, each padded. name: of the layer.
        """
        if name not in self._known:
            inputs = torch.cat([_padded(part, 1) for part in weight.detach().chunk(parts, dim=1)], dim=1)
            panels = _padded(inputs, 2).unflatten(2, (-1, PANEL)).permute(2, 0, 1, 3).contiguous()
            half = self._half and weight.numel() >= packing.LEAST["fp16"] and bool(panels.isfinite().all())
            self._known[name] = panels.clamp_(-65504, 65504).half() if half else panels, _padded(bias, 0)
        return self._known[name]

    def norm(self, layer: GroupNorm) -> tuple[Tensor, Tensor]:
        """Its weight and bias, with padding."""
        if layer not in self._known:
            self._known[layer] = _padded(layer.weight, 0), _padded(layer.bias, 0)
        return self._known[layer]


class _Program:
    """The operations for chunks of `steps` steps, `batch` at a time, and all memory that they need."""

    def __init__(self, denoiser: ConditionalUnet1d, weights: _Weights, steps: int, batch: int) -> None:
        self._weights, self._batch = weights, batch
        self._margin = max(1, denoiser.kernel_size // 2)
        self._groups, self._activation = denoiser.n_groups, CODES[denoiser.activation]
        self._operations: list[_Operation] = []
        self._memory: list[Tensor] = []
        self._films = _starts(denoiser.film_sizes)
        entering, entered = self._sequence(steps, denoiser.input_dim)
        leaving, left = self._sequence(steps, denoiser.action_dim)
        self._lay_out(denoiser, entering, leaving)
        inside = slice(self._margin, self._margin + steps)
        self._input, self._output = entered[inside, :, : denoiser.input_dim], left[inside, :, : denoiser.action_dim]
        self._list = (_Operation * len(self._operations))(*self._operations)

    def __call__(self, x: Tensor, film: Tensor) -> Tensor:
        code = library()
        assert code is not None
        film = film.expand(self._batch, -1).contiguous()
        self._input.copy_(x.transpose(0, 1))
        code("run", ctypes.addressof(self._list), len(self._list), self._batch, film, film.shape[1])
        return self._output.transpose(0, 1).clone(memory_format=torch.contiguous_format)

    # -- the network, as `ConditionalUnet1d.run` goes through it

    def _lay_out(self, net: ConditionalUnet1d, x: _Sequence, leaving: _Sequence) -> None:
        joined: list[tuple[_Sequence, _Sequence]] = []  # of each level: what comes up beside what was skipped
        for level, (width, modules) in enumerate(zip(net.channels, net.down, strict=True)):
            first, second, resize = cast("tuple[ResidualBlock, ResidualBlock, Halve]", modules)
            joined.append(self._side_by_side(x.steps, width))
            x = self._residual(second, self._residual(first, x), joined[-1][1])
            if level < len(net.channels) - 1:
                x = self._halve(resize, x)
        middle = cast("list[ResidualBlock]", net.middle)
        x = self._residual(middle[1], self._residual(middle[0], x), joined[-1][0])
        for modules in net.up:
            first, second, grow = cast("tuple[ResidualBlock, ResidualBlock, Double]", modules)
            up, skipped = joined.pop()
            both = _Sequence(up.start, up.row, up.steps, up.channels + skipped.channels)
            x = self._residual(second, self._residual(first, both, parts=2))
            x = self._double(grow, x, joined[-1][0])
        block, linear = cast("tuple[ConvBlock, nn.Linear]", net.out)
        self._linear(linear, self._convolve(block, x), leaving)

    def _residual(self, block: ResidualBlock, x: _Sequence, out: _Sequence | None = None, parts: int = 1) -> _Sequence:
        added = x
        if isinstance(block.shortcut, nn.Linear):
            added = self._linear(block.shortcut, x, parts=parts)
        elif parts > 1:  # what is side by side has zeros between
            width = block.second.conv.weight.shape[1]
            same = torch.eye(width, dtype=torch.float32, device="cpu")
            packed = self._weights((block, "shortcut"), same[None], torch.zeros_like(same[0]), parts)
            added = self._sequence(x.steps, width)[0]
            self._add(x, added, packed, in_first=self._margin)
        hidden = self._convolve(block.first, x, film=next(self._films), parts=parts)
        return self._convolve(block.second, hidden, out, add=added)

    def _convolve(
        self,
        block: ConvBlock,
        x: _Sequence,
        out: _Sequence | None = None,
        *,
        film: int = -1,
        add: _Sequence | None = None,
        parts: int = 1,
    ) -> _Sequence:
        conv, norm = block.conv, block.norm
        width = conv.weight.shape[-1]
        out = out or self._sequence(x.steps, width)[0]
        gamma, beta = self._weights.norm(norm)
        self._add(
            x,
            out,
            self._weights(conv, conv.weight, conv.bias, parts),
            in_first=self._margin - len(conv.weight) // 2,
            gamma=gamma.data_ptr(),
            beta=beta.data_ptr(),
            eps=norm.eps,
            group=width // self._groups,
            block=_block(width // self._groups),
            channels=width,
            film=film,
            activation=self._activation,
            add=add.start if add else None,
            add_row=add.row if add else 0,
        )
        return out

    def _linear(self, layer: nn.Linear, x: _Sequence, out: _Sequence | None = None, parts: int = 1) -> _Sequence:
        out = out or self._sequence(x.steps, layer.out_features)[0]
        self._add(x, out, self._weights(layer, layer.weight.T[None], layer.bias, parts), in_first=self._margin)
        return out

    def _halve(self, layer: Halve, x: _Sequence) -> _Sequence:
        out = self._sequence(x.steps // 2, layer.weight.shape[-1])[0]
        packed = self._weights(layer, layer.weight, layer.bias)
        self._add(x, out, packed, in_first=self._margin - 1, in_stride=2)
        return out

    def _double(self, layer: Double, x: _Sequence, out: _Sequence) -> _Sequence:
        """Even steps are reached by taps 3 and 1 (of the step before and the step itself), odd ones by taps 2 and 0."""
        for odd, taps in enumerate(([3, 1], [2, 0])):
            packed = self._weights((layer, odd), layer.weight[taps], layer.bias)
            first, start = self._margin - 1 + odd, self._margin + odd
            self._add(x, out, packed, in_first=first, out_first=start, out_stride=2, steps=x.steps)
        return out

    # -- operations and memory

    def _add(self, x: _Sequence, out: _Sequence, packed: tuple[Tensor, Tensor], **given: float | int | None) -> None:
        weight, bias = packed
        values = {
            "input": x.start,
            "out": out.start,
            "weight": weight.data_ptr(),
            "half": int(weight.dtype == torch.float16),
            "bias": bias.data_ptr(),
            "in_row": x.row,
            "out_row": out.row,
            "in_stride": 1,
            "out_first": self._margin,
            "out_stride": 1,
            "steps": out.steps,
            "taps": weight.shape[1],
            "n_in": weight.shape[2],
            "n_out": len(bias),
            "block": PANEL,
            "film": -1,
        }
        self._operations.append(_Operation(**(values | given)))

    def _sequence(self, steps: int, channels: int) -> tuple[_Sequence, Tensor]:
        """Zeros; the memory beside where it is."""
        padded = _round_up(channels)
        size = steps + 2 * self._margin, self._batch, padded
        memory = torch.zeros(size, dtype=torch.float32, device="cpu")
        self._memory.append(memory)
        return _Sequence(memory.data_ptr(), padded, steps, padded), memory

    def _side_by_side(self, steps: int, channels: int) -> tuple[_Sequence, _Sequence]:
        padded = _round_up(channels)
        both, memory = self._sequence(steps, 2 * padded)
        second = both.start + padded * memory.element_size()
        return _Sequence(both.start, both.row, steps, padded), _Sequence(second, both.row, steps, padded)


def _starts(sizes: Sequence[int]) -> Iterator[int]:
    start = 0
    for size in sizes:
        yield start
        start += size


def _round_up(channels: int) -> int:
    return -(-channels // PANEL) * PANEL


def _block(group: int) -> int:
    """Channels that one thread takes: whole panels of whole groups."""
    return math.lcm(PANEL, group)


def _padded(values: Tensor, dim: int) -> Tensor:
    """With zeros up to a multiple of `PANEL` along `dim`."""
    missing = _round_up(values.shape[dim]) - values.shape[dim]
    before = [0, 0] * (values.ndim - 1 - dim)
    return F.pad(values.detach(), [*before, 0, missing]).contiguous()
