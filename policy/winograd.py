"""Convolutions by fewer products (Toom 1963, Cook 1966, Winograd 1980; for networks, Lavin & Gray 2016).

m neighbouring outputs of a kernel with r taps take m · r products, one after the other. They are also what the
coefficients of a product of polynomials are, turned around, and such a product follows from its values at n = m + r − 1
points. So n products are enough:

    values of the inputs    seen   = read @ x             n · (m + r − 1) sums, with small numbers
    values of the kernel    values = kernel @ weight      once for all windows
    products                seen · values                 n, each a matrix product over the channels
    outputs                 write @ products

Four outputs of a kernel of 5 take 8 products where 20 were, 3 × 3 outputs of a kernel of 3 × 3 take 25 where 81 were.
The sums are memory traffic, so along time this pays for many rows of many channels on a CPU, where products take the
time (`pays_1d`). Over images, `tiles` does them in a cache. The difference to the sum of all products is rounding, some
4e-6 of the largest output.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)
"""Where polynomials are taken, and at infinity: small numbers, since differences of large powers lose digits."""
OUTPUTS = 4
"""Of a tile, along time."""


class Transforms(NamedTuple):
    """For `outputs` neighbours of a kernel with `taps`, n = outputs + taps − 1: float64 matrices."""

    read: np.ndarray
    """[n, n]: values of n neighbouring inputs."""
    kernel: np.ndarray
    """[n, taps]: values of the kernel."""
    write: np.ndarray
    """[outputs, n]: outputs from the products of both."""


@cache
def transforms(outputs: int, taps: int) -> Transforms:
    """The matrices of Lavin & Gray's F(outputs, taps): `write @ ((kernel @ g) * (read @ d))` is what g makes of d."""
    n = outputs + taps - 1
    read, kernel = np.linalg.inv(_powers(n, n)).T, _powers(n, taps)
    scale = np.sqrt(np.abs(read).sum(1, keepdims=True) / np.abs(kernel).sum(1, keepdims=True))
    return Transforms(read / scale, kernel * scale, _powers(n, outputs).T)  # both factors of a product equally large


def _powers(n: int, degree: int) -> np.ndarray:
    """[n, degree]: 1, p, p², … of n − 1 points, and the highest power for the point at infinity."""
    finite = np.vander(POINTS[: n - 1], degree, increasing=True)
    return np.vstack([finite, np.eye(degree)[-1:]])


def products(rows: Tensor, matrices: Sequence[Tensor] | Tensor, dim: int = 0) -> Tensor:
    """rows [n, R, K] times n matrices [N, K], transposed → [n, R, N], or with dim=1 [R, n, N].

    By oneDNN where there is one: torch's other library, MKL, is slower on CPUs of another maker than its own.
    """
    product = torch.ops.mkldnn._linear_pointwise if torch.backends.mkldnn.is_available() else _linear
    return torch.stack([product(r, m, None, "none", [], "") for r, m in zip(rows, matrices, strict=True)], dim)


def _linear(rows: Tensor, matrix: Tensor, *_: Any) -> Tensor:
    return F.linear(rows, matrix)


def is_plain(x: Tensor) -> bool:
    """Whether x is what these functions are for: float32 on a CPU, computed as it stands."""
    compiled = torch.compiler.is_compiling()
    return x.is_cpu and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and not compiled


# -------------------------------------------------------------------------------------------------- along time


class AlongTime(NamedTuple):
    """How T steps of a kernel with K taps, zeros around them, are computed by n products of R = tiles · B rows each."""

    read: Tensor
    """[n · tiles, T], from the steps to the values of all tiles."""
    kernel: Tensor
    """[n, K]"""
    write: Tensor
    """[T, n · tiles]"""

    @property
    def products(self) -> int:
        """For each row of the batch."""
        return len(self.read)


@cache
def along_time(steps: int, taps: int) -> AlongTime:
    """In tiles of four outputs, or a short sequence as a whole: whichever takes fewer products."""
    ways = [_in_tiles(steps, taps)] if steps > OUTPUTS else [_whole(steps, taps), _in_tiles(steps, taps)]
    return min(ways, key=lambda way: way.products)


def _in_tiles(steps: int, taps: int) -> AlongTime:
    read, kernel, write = transforms(OUTPUTS, taps)
    n, tiles = len(read), -(-steps // OUTPUTS)
    reads, writes = np.zeros((n, tiles, steps)), np.zeros((steps, n, tiles))
    for tile in range(tiles):
        first = tile * OUTPUTS
        for column in range(n):
            step = first + column - taps // 2
            if 0 <= step < steps:
                reads[:, tile, step] = read[:, column]
        for row in range(min(OUTPUTS, steps - first)):
            writes[first + row, :, tile] = write[row]
    return AlongTime(_float(reads.reshape(n * tiles, steps)), _float(kernel), _float(writes.reshape(steps, n * tiles)))


def _whole(steps: int, taps: int) -> AlongTime:
    """The steps and the kernel change places: a kernel of T taps passes over 2 T − 1 inputs, K of them not zero.

    out[t] = Σ_s x[s] · weight[s − t + K // 2], turned around in t: d[t' + s] · x[s] with t' = T − 1 − t.
    """
    read, kernel, write = transforms(steps, steps)
    first = steps - 1 - taps // 2
    there = [tap for tap in range(taps) if 0 <= first + tap < len(read)]  # others meet nothing but zeros
    values = np.zeros((len(read), taps))
    values[:, there] = read[:, [first + tap for tap in there]]
    return AlongTime(_float(kernel), _float(values), _float(write[::-1].copy()))


def _float(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(matrix.astype(np.float32))


def pays_1d(x: Tensor, weight: Tensor, *, kept: bool) -> bool:
    """Whether this is faster for x [T, B, C_in] and weight [K, C_in, C_out] than all products.

    kept: the values of the kernel are at hand, laid out (`pack_1d`); otherwise it takes more rows to make up for
    computing them. Measured on an AMD EPYC with AVX-512.
    """
    (steps, batch, _), (taps, *channels) = x.shape, weight.shape
    if taps not in (3, 5) or min(channels) < 128 or not is_plain(x):
        return False
    way = along_time(steps, taps)
    if _products_of(steps, taps) < 1.5 * way.products:
        return False
    rows = batch * way.products // len(way.kernel)
    if kept:
        return rows >= 32 and steps <= 8
    return rows >= 192 and rows * channels[0] * channels[1] >= 2**23


def _products_of(size: int, taps: int) -> int:
    """Products of a kernel with `size` inputs, without those with the zeros around them."""
    return sum(max(0, size - abs(tap - taps // 2)) for tap in range(taps))


def pack_1d(weight: Tensor, steps: int) -> list[Tensor]:
    """The values [C_out, C_in] of a kernel [K, C_in, C_out] at each point, laid out for `products`."""
    kernel = along_time(steps, len(weight)).kernel
    values = (kernel @ weight.detach().flatten(1)).view(-1, *weight.shape[1:])
    if not torch.backends.mkldnn.is_available():
        return [value.T.contiguous() for value in values]
    return [torch.ops.mkldnn._reorder_linear_weight(value.T.contiguous(), None) for value in values]


def conv1d_packed(x: Tensor, packed: list[Tensor], taps: int, bias: Tensor) -> Tensor:
    """`conv1d` with the kernel's values from `pack_1d` for as many steps, without a gradient."""
    read, _, write = along_time(len(x), taps)
    seen = (read @ x.flatten(1)).view(len(packed), -1, x.shape[2])
    return _written(products(seen, packed), write, bias, x.shape[1])


def conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution along time that keeps its length: x [T, B, C_in], weight [K, C_in, C_out] → [T, B, C_out]."""
    return _Conv1d.apply(x, weight, bias)


class _Conv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        read, kernel, write = along_time(len(x), len(weight))
        values = (kernel @ weight.flatten(1)).view(len(kernel), *weight.shape[1:])
        seen = (read @ x.flatten(1)).view(len(kernel), -1, x.shape[2])
        ctx.save_for_backward(seen, values)
        ctx.shape, ctx.taps = x.shape, len(weight)
        return _written(products(seen, values.transpose(1, 2)), write, bias, x.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seen, values = ctx.saved_tensors
        read, kernel, write = along_time(ctx.shape[0], ctx.taps)
        parts = (write.T @ grad.flatten(1)).view(len(kernel), -1, grad.shape[2])
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (read.T @ products(parts, values).view(len(read), -1)).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_values = torch.bmm(seen.transpose(1, 2), parts)
            grad_weight = (kernel.T @ grad_values.flatten(1)).view(ctx.taps, *values.shape[1:])
        return grad_x, grad_weight, grad.flatten(0, 1).sum(0) if ctx.needs_input_grad[2] else None


def _written(parts: Tensor, write: Tensor, bias: Tensor, batch: int) -> Tensor:
    """Products [n, tiles · B, C] → outputs [T, B, C]."""
    return (write @ parts.view(write.shape[1], -1)).view(len(write), batch, -1).add_(bias)
