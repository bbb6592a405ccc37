"""Convolutions by Winograd's transforms in C (`winograd.c`): of 3 x 3 over images, and of 5 along time.

3 x 3 outputs in an image take 25 products where 81 were, four steps in time 8 where 20 were (Toom 1963, Cook 1966,
Winograd 1980; for networks, Lavin & Gray 2016). m neighbouring outputs of a kernel with r taps take m · r products, one
after the other. They are also what the coefficients of a product of polynomials are, turned around, and such a product
follows from its values at n = m + r − 1 points. So n products are enough:

    values of the inputs    seen   = read @ x             n · (m + r − 1) sums, with small numbers
    values of the kernel    values = kernel @ weight      once for all tiles
    products                seen · values                 n, each a matrix product over the channels
    outputs                 write @ products

The sums are memory traffic, which takes as long as is saved where a whole batch goes through it; the C code takes a few
tiles at a time, and all between stays in a cache. It is compiled when the package is installed, where there is a C
compiler. Without, or on a processor that it is not for, torch computes all products. The difference between both is
rounding, some 5e-6 of the largest output.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from action_diffusion import native

PLACES = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)
"""Where polynomials are taken, and at infinity: small numbers, since differences of large powers lose digits."""
PANEL, PADDING = 32, 16
"""As in `winograd.c`: columns that lie together; floats between rows."""
AT_ONCE, AT_ONCE_BACK = 48, 512
"""Tiles that go through a thread together, at most; and through all threads for the gradient of the weights."""


class Transforms(NamedTuple):
    """For `outputs` neighbours of a kernel with `taps`, n = outputs + taps − 1: float64 matrices."""

    read: np.ndarray
    """[n, n]: values of n neighbouring inputs."""
    kernel: np.ndarray
    """[n, taps]: values of the kernel."""
    write: np.ndarray
    """[outputs, n]: outputs from the products of both."""


def transforms(outputs: int, taps: int) -> Transforms:
    """The matrices of Lavin & Gray's F(outputs, taps): `write @ ((kernel @ g) * (read @ d))` is what g makes of d."""
    n = outputs + taps - 1
    read, kernel = np.linalg.inv(_powers(n, n)).T, _powers(n, taps)
    scale = np.sqrt(np.abs(read).sum(1, keepdims=True) / np.abs(kernel).sum(1, keepdims=True))
    return Transforms(read / scale, kernel * scale, _powers(n, outputs).T)  # both factors of a product equally large


def _powers(n: int, degree: int) -> np.ndarray:
    """[n, degree]: 1, p, p², … of n − 1 places, and the highest power for the place at infinity."""
    finite = np.vander(PLACES[: n - 1], degree, increasing=True)
    return np.vstack([finite, np.eye(degree)[-1:]])


class Tile:
    """`axes` of it, `outputs` and `taps` along each, and the matrices that `winograd.c` multiplies by, float32."""

    def __init__(self, axes: int, outputs: int, taps: int) -> None:
        self.axes, self.outputs, self.taps = axes, outputs, taps
        self.points = (outputs + taps - 1) ** axes
        read, kernel, write = transforms(outputs, taps)
        self.read, self.kernel, self.write = _float(read), _float(kernel), _float(write)
        self.mirrored = _float(kernel[:, ::-1])
        self.kernel_back, self.write_back = _float(kernel.T), _float(write.T)

    def count(self, *size: int) -> int:
        """Tiles of a sequence of so many steps, or of an image."""
        tiles = 1
        for n in size:
            tiles *= -(-n // self.outputs)
        return tiles


def _float(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(matrix, np.float32))


IMAGE, TIME = Tile(2, 3, 3), Tile(1, 4, 5)


@cache
def library() -> native.Library | None:
    """The compiled code, where there is any."""
    return native.load(Path(__file__).parent, "_winograd", 2)


def _fits(x: Tensor, weight: Tensor, channels: tuple[int, int, int]) -> bool:
    """Whether the code is for x and weight: float32 on a CPU. channels: of x, of the weight's inputs and outputs."""
    plain = x.dtype == weight.dtype == torch.float32 and weight.is_cpu and native.computes(x)
    fits = channels[0] == channels[1] and not any(n % PANEL for n in channels)
    return plain and fits and library() is not None


def _empty(*size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device="cpu")


# --------------------------------------------------------------------------------------------------- in images


def fits_2d(x: Tensor, weight: Tensor) -> bool:
    """Whether this is for x [N, C_in, H, W] and weight [C_out, C_in, 3, 3]."""
    if x.ndim != 4 or weight.shape[2:] != (3, 3):
        return False
    return _fits(x, weight, (x.shape[1], weight.shape[1], len(weight)))


def pack_2d(weight: Tensor) -> Tensor:
    """The values [25, C_out / 32, C_in, 32] of kernels [C_out, C_in, 3, 3], for `conv2d_packed`."""
    n_out, n_in = weight.shape[:2]
    taps_first = weight.detach().permute(0, 2, 3, 1).reshape(n_out, -1).t().contiguous()  # [9 C_in, C_out]
    return _values(IMAGE, taps_first, n_in, n_out, (n_out, n_in * n_out), IMAGE.kernel)


def conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution with stride 1 and padding 1, float32: x [N, C_in, H, W] → [N, C_out, H, W], channels last.

    weight [C_out, C_in, 3, 3]; numbers of channels are multiples of 32.
    """
    result: Tensor = _Conv2d.apply(x, weight)
    return result


def conv2d_packed(x: Tensor, packed: Tensor) -> Tensor:
    """`conv2d` without a gradient, by what `pack_2d` gives."""
    n, n_in, height, width = x.shape
    out = _empty(n, height, width, packed.shape[1] * PANEL)
    _conv(IMAGE, x.contiguous(memory_format=torch.channels_last), (n, height, width, n_in), packed, None, out)
    return out.permute(0, 3, 1, 2)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return conv2d_packed(x, pack_2d(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, x = (images.contiguous(memory_format=torch.channels_last) for images in (grad, x))
        n_out, n_in = weight.shape[:2]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:  # a convolution with the kernels turned around
            taps_second = weight.permute(0, 2, 3, 1).contiguous()  # [C_out, 3, 3, C_in]
            values = _values(IMAGE, taps_second, n_out, n_in, (9 * n_in, n_in), IMAGE.mirrored)
            grad_x = conv2d_packed(grad, values)
        if ctx.needs_input_grad[1]:
            grad_weight = _empty(n_out, 3, 3, n_in)
            size = len(x), *x.shape[2:]
            _weight_gradient(IMAGE, grad, x, False, size, (n_out, n_in), grad_weight, (9 * n_in, n_in))
            grad_weight = grad_weight.permute(0, 3, 1, 2)
        return grad_x, grad_weight


# -------------------------------------------------------------------------------------------------- along time


def fits_1d(x: Tensor, weight: Tensor) -> bool:
    """Whether this is for x [T, B, C_in] and weight [5, C_in, C_out]."""
    if x.ndim != 3 or len(weight) != 5:
        return False
    return _fits(x, weight, (x.shape[2], weight.shape[1], weight.shape[2]))


def pack_1d(weight: Tensor) -> Tensor:
    """The values [8, C_out / 32, C_in, 32] of a kernel [5, C_in, C_out], for `conv1d_packed`."""
    _, n_in, n_out = weight.shape
    return _values(TIME, weight.detach().contiguous(), n_in, n_out, (n_out, n_in * n_out), TIME.kernel)


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution along time that keeps its length: x [T, B, C_in], weight [5, C_in, C_out] → [T, B, C_out]."""
    result: Tensor = _Conv1d.apply(x, weight, bias)
    return result


def conv1d_packed(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """`conv1d` without a gradient, by what `pack_1d` gives."""
    steps, batch, n_in = x.shape
    out = _empty(steps, batch, packed.shape[1] * PANEL)
    _conv(TIME, x.contiguous(), (batch, 1, steps, n_in), packed, None if bias is None else bias.detach(), out)
    return out


class _Conv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return conv1d_packed(x, pack_1d(weight), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x, grad = x.contiguous(), grad.contiguous()
        taps, n_in, n_out = weight.shape
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            turned = weight.transpose(1, 2).contiguous()  # [5, C_out, C_in]
            values = _values(TIME, turned, n_out, n_in, (n_in, n_in * n_out), TIME.mirrored)
            grad_x = conv1d_packed(grad, values, None)
        if ctx.needs_input_grad[1]:
            grad_weight = _empty(taps, n_in, n_out)
            size = x.shape[1], 1, len(x)
            _weight_gradient(TIME, x, grad, True, size, (n_in, n_out), grad_weight, (n_out, n_in * n_out))
        return grad_x, grad_weight, grad.flatten(0, 1).sum(0) if ctx.needs_input_grad[2] else None


# ------------------------------------------------------------------------------------------------- calls of winograd.c


def _values(tile: Tile, weight: Tensor, n_in: int, n_out: int, distances: tuple[int, int], kernel: Tensor) -> Tensor:
    """Of a kernel at all points; distances in `weight` between inputs and between taps."""
    out = _empty(tile.points, n_out // PANEL, n_in, PANEL)
    _call("kernel_values", tile.axes, weight, n_in, n_out, *distances, kernel, out)
    return out


def _conv(
    tile: Tile, x: Tensor, shape: tuple[int, int, int, int], packed: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    n, height, width, n_in = shape
    n_out, threads = packed.shape[1] * PANEL, torch.get_num_threads()
    tiles = n * (tile.count(height, width) if tile.axes == 2 else tile.count(width))
    at_once = -(-tiles // (threads * -(-tiles // (threads * AT_ONCE))))  # as many for each thread
    scratch = _empty(tile.points * at_once * threads * (n_in + n_out + 2 * PADDING))
    _call("conv", tile.axes, x, *shape, n_out, packed, bias, tile.read, tile.write, out, at_once, scratch)


def _weight_gradient(
    tile: Tile,
    rows: Tensor,
    columns: Tensor,
    rows_are_x: bool,
    size: tuple[int, ...],
    channels: tuple[int, int],
    out: Tensor,
    distances: tuple[int, int],
) -> None:
    values = _empty(tile.points, channels[0], channels[1] + PADDING)
    scratch = _empty(tile.points * AT_ONCE_BACK * (sum(channels) + 2 * PADDING))
    sides, matrices = (rows, columns, int(rows_are_x)), (tile.read, tile.write_back, tile.kernel_back)
    work = values, AT_ONCE_BACK, scratch
    _call("weight_gradient", tile.axes, *sides, *size, *channels, *matrices, out, *distances, *work)


def _call(name: str, *values: Tensor | int | None) -> None:
    code = library()
    assert code is not None, "ask `fits_1d` and `fits_2d` first"
    code(name, *values)
