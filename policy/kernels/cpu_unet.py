"""A denoising step as one call of C (`unet.c`), for chunks on a CPU.

By torch it is hundreds of short operations, and starting one takes longer than its work. Here the U-Net is a list of
some fifty, laid out once: a convolution and all that follows it on the same channels (group norm, activation, FiLM, the
sum with the shortcut) is one of them, so nothing but the weights comes from far in memory. It is the same within
rounding.
"""

from __future__ import annotations

import ctypes
import math
import threading
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from action_diffusion import native
from action_diffusion.policy.kernels.layers import Run, UnetKernel
from action_diffusion.policy.kernels.program import Activations, Convolve, Resize, record
from action_diffusion.policy.model.conv import Double, GroupNorm, Halve, Linear
from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d

PANEL, BLOCK, MOST_ROWS = 32, 512, 2048
"""Channels that lie together, channels of a job at most (as in `unet.c`), rows (T · B) up to which memory is kept."""
MOST_PROGRAMS = 8
"""Sizes of batches whose memory is kept."""
LEAST_HALF = 2**16
"""Smaller weights stay float32 in half precision: a cache holds them."""
CODES = {"relu": 1, "silu": 2, "mish": 3}


@cache
def library() -> native.Library | None:
    """The compiled code, where there is any."""
    return native.load(Path(__file__).parent, "_unet", 2)


def fits(denoiser: ConditionalUnet1d) -> bool:
    """Whether this can run `denoiser`: on a CPU that the code is for, with an activation that it knows."""
    blocks = all(_block(width // denoiser.n_groups) <= BLOCK for width in denoiser.channels)
    return denoiser.time_film.weight.is_cpu and denoiser.activation in CODES and blocks and library() is not None


class CpuUnet(UnetKernel):
    """By copies of its weights; those of larger layers in float16 if `half`."""

    def __init__(self, layer: ConditionalUnet1d, *, keep: bool = True, half: bool = False) -> None:
        super().__init__(layer, keep=keep)
        self.half = half
        self._lock = threading.Lock()  # a program has one set of buffers

    def options(self) -> dict[str, Any]:
        return {"half": self.half}

    def __call__(self, x: Tensor, film: Tensor) -> Tensor:
        """As `ConditionalUnet1d.forward`."""
        if not self.takes(x, film):
            return self.plain(x, film)
        net = self.layer
        size = *x.shape[:2], *net.channels, net.kernel_size, net.activation, "half" if self.half else "float32"
        ways: dict[str, Run] = {
            "layers": lambda some: self.plain(some, film),
            "one_call": lambda some: self.run(some, film),
        }
        return self.fastest("unet", size, ways, lambda: x)(x)

    def takes(self, x: Tensor, film: Tensor) -> bool:
        """Whether x [B, H, A] is computed in float32 without a gradient, and fits."""
        if torch.is_grad_enabled() or not native.computes(x) or not film.is_cpu or not self.fits_in(x):
            return False
        plain = x.dtype == film.dtype == self.layer.time_film.weight.dtype == torch.float32
        return plain and x.shape[0] * x.shape[1] <= MOST_ROWS and fits(self.layer)

    def run(self, x: Tensor, film: Tensor) -> Tensor:
        """By the code in C."""
        with self._lock:
            packed: _Weights = self.made("weights", lambda: _Weights(self.half))
            programs: dict[tuple[int, int], _Program] = self.made("programs", dict)
            size = x.shape[1], x.shape[0]
            if size not in programs:
                if len(programs) == MOST_PROGRAMS:
                    del programs[next(iter(programs))]
                with torch.inference_mode(False), torch.no_grad():  # its memory serves any later caller
                    programs[size] = _Program(self.layer, packed, *size)
            return programs[size](x, film)


class _Operation(ctypes.Structure):
    """`Operation` of `unet.c`."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input", "bias", "gamma", "beta", "add", "weight", "out")),
        *((name, ctypes.c_int64) for name in ("in_row", "out_row", "add_row", "in_first", "in_stride")),
        *((name, ctypes.c_int64) for name in ("out_first", "out_stride", "steps", "taps", "n_in", "n_out")),
        *((name, ctypes.c_int64) for name in ("block", "group", "channels", "film", "activation", "half")),
        ("eps", ctypes.c_float),
    )


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
            half = self._half and weight.numel() >= LEAST_HALF and bool(panels.isfinite().all())
            self._known[name] = panels.clamp_(-65504, 65504).half() if half else panels, _padded(bias, 0)
        return self._known[name]

    def norm(self, layer: GroupNorm) -> tuple[Tensor, Tensor]:
        """Its weight and bias, with padding."""
        if layer not in self._known:
            self._known[layer] = _padded(layer.weight, 0), _padded(layer.bias, 0)
        return self._known[layer]


class _Sequence(NamedTuple):
    """[margin + steps + margin, batch, row] of floats from `start` on, of which the first are `channels`, padded."""

    start: int
    row: int
    memory: Tensor


class _Program:
    """The operations for chunks of `steps` steps, `batch` at a time, and all memory that they need."""

    def __init__(self, net: ConditionalUnet1d, weights: _Weights, steps: int, batch: int) -> None:
        self._weights, self._batch = weights, batch
        self._margin = max(1, net.kernel_size // 2)
        self._groups, self._activation = net.n_groups, CODES[net.activation]
        self._operations: list[_Operation] = []
        self._sequences: dict[Activations, _Sequence] = {}
        program = record(net, steps)
        for operation in program.operations:
            if isinstance(operation, Convolve):
                self._convolve(operation)
            else:
                self._resize(operation)
        inside = slice(self._margin, self._margin + steps)
        self._input = self._at(program.entering).memory[inside, :, : net.input_dim]
        self._output = self._at(program.leaving).memory[inside, :, : net.action_dim]
        self._list = (_Operation * len(self._operations))(*self._operations)

    def __call__(self, x: Tensor, film: Tensor) -> Tensor:
        code = library()
        assert code is not None
        film = film.expand(self._batch, -1).contiguous()
        self._input.copy_(x.transpose(0, 1))
        code("run", ctypes.addressof(self._list), len(self._list), self._batch, film, film.shape[1])
        return self._output.transpose(0, 1).clone(memory_format=torch.contiguous_format)

    # -- operations

    def _convolve(self, operation: Convolve) -> None:
        conv, norm, out = operation.conv, operation.norm, operation.out
        width = out.channels
        gamma, beta = self._weights.norm(norm)
        added = None if operation.added is None else self._as_one(operation.added)
        self._add(
            operation.source,
            out,
            self._weights(conv, conv.weight, conv.bias, _parts(operation.source)),
            in_first=self._margin - len(conv.weight) // 2,
            gamma=gamma.data_ptr(),
            beta=beta.data_ptr(),
            eps=norm.eps,
            group=width // self._groups,
            block=_block(width // self._groups),
            channels=width,
            film=-1 if operation.film is None else operation.film,
            activation=self._activation,
            add=added.start if added else None,
            add_row=added.row if added else 0,
        )

    def _as_one(self, value: Activations) -> _Sequence:
        """What is side by side has zeros between, which a sum must not have: laid out anew."""
        if not value.parts:
            return self._at(value)
        whole = Activations(value.steps, value.channels)
        same = torch.eye(value.channels, dtype=torch.float32, device="cpu")
        packed = self._weights(("join", value.channels), same[None], torch.zeros_like(same[0]), _parts(value))
        self._add(value, whole, packed, in_first=self._margin)
        return self._at(whole)

    def _resize(self, operation: Resize) -> None:
        layer, x, out = operation.layer, operation.source, operation.out
        if isinstance(layer, Linear):
            packed = self._weights(layer, layer.weight.T[None], layer.bias, _parts(x))
            self._add(x, out, packed, in_first=self._margin)
        elif isinstance(layer, Halve):
            self._add(x, out, self._weights(layer, layer.weight, layer.bias), in_first=self._margin - 1, in_stride=2)
        else:
            self._double(layer, x, out)

    def _double(self, layer: Double, x: Activations, out: Activations) -> None:
        """Even steps are reached by taps 3 and 1 (of the step before and the step itself), odd ones by taps 2 and 0."""
        for odd, taps in enumerate(([3, 1], [2, 0])):
            packed = self._weights((layer, odd), layer.weight[taps], layer.bias)
            first, start = self._margin - 1 + odd, self._margin + odd
            self._add(x, out, packed, in_first=first, out_first=start, out_stride=2, steps=x.steps)

    def _add(
        self, x: Activations, out: Activations, packed: tuple[Tensor, Tensor], **given: float | int | None
    ) -> None:
        weight, bias = packed
        source, target = self._at(x), self._at(out)
        values = {
            "input": source.start,
            "out": target.start,
            "weight": weight.data_ptr(),
            "half": int(weight.dtype == torch.float16),
            "bias": bias.data_ptr(),
            "in_row": source.row,
            "out_row": target.row,
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

    # -- memory

    def _at(self, value: Activations) -> _Sequence:
        """Where a value is: in memory of its own, or a part of another's."""
        if value not in self._sequences:
            if value.place is None:
                self._sequences[value] = self._zeros(value)
            else:
                whole = self._at(value.place)
                before = value.place.parts[: value.place.parts.index(value)]
                first = sum(_round_up(part.channels) for part in before)
                start = whole.start + first * whole.memory.element_size()
                self._sequences[value] = _Sequence(start, whole.row, whole.memory[:, :, first:])
        return self._sequences[value]

    def _zeros(self, value: Activations) -> _Sequence:
        row = sum(_round_up(part.channels) for part in value.parts or (value,))
        size = value.steps + 2 * self._margin, self._batch, row
        memory = torch.zeros(size, dtype=torch.float32, device="cpu")
        return _Sequence(memory.data_ptr(), row, memory)


def _parts(value: Activations) -> int:
    return len(value.parts) or 1


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
