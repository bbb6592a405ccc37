"""Convolutions by fewer products (Toom 1963, Cook 1966, Winograd 1980; for networks, Lavin & Gray 2016).

m neighbouring outputs of a kernel with r taps take m · r products, one after the other. They are also what the
coefficients of a product of polynomials are, turned around, and such a product follows from its values at n = m + r − 1
points. So n products are enough:

    values of the inputs    seen   = read @ x             n · (m + r − 1) sums, with small numbers
    values of the kernel    values = kernel @ weight      once for all windows
    products                seen · values                 n, each a matrix product over the channels
    outputs                 write @ products

Four outputs of a kernel of 5 take 8 products where 20 were, 3 × 3 outputs of a kernel of 3 × 3 take 25 where 81 were.
The sums are memory traffic, so this pays for many rows of many channels on a CPU, where products take the time:
`pays_1d`, `pays_2d`. The difference to the sum of all products is rounding, some 4e-6 of the largest output.
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
OUTPUTS_1D, OUTPUTS_2D = 4, 3
"""Outputs of a tile, along each axis."""


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


def _is_plain(x: Tensor) -> bool:
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
    ways = [_in_tiles(steps, taps)] if steps > OUTPUTS_1D else [_whole(steps, taps), _in_tiles(steps, taps)]
    return min(ways, key=lambda way: way.products)


def _in_tiles(steps: int, taps: int) -> AlongTime:
    read, kernel, write = transforms(OUTPUTS_1D, taps)
    n, tiles = len(read), -(-steps // OUTPUTS_1D)
    reads, writes = np.zeros((n, tiles, steps)), np.zeros((steps, n, tiles))
    for tile in range(tiles):
        first = tile * OUTPUTS_1D
        for column in range(n):
            step = first + column - taps // 2
            if 0 <= step < steps:
                reads[:, tile, step] = read[:, column]
        for row in range(min(OUTPUTS_1D, steps - first)):
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
    if taps not in (3, 5) or min(channels) < 128 or not _is_plain(x):
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


# --------------------------------------------------------------------------------------------------- in images


@cache
def _in_images() -> tuple[Tensor, Tensor, Tensor]:
    """(read [n², n²], kernel [n², 9], write [m², n²]) of a tile of m × m outputs, which reads n × n inputs."""
    read, kernel, write = (_float(np.kron(matrix, matrix)) for matrix in transforms(OUTPUTS_2D, 3))
    return read, kernel, write


def pays_2d(x: Tensor, weight: Tensor) -> bool:
    """Whether this is faster for x [N, C_in, H, W] and weight [C_out, C_in, 3, 3] than all products, with gradients.

    Measured on an AMD EPYC with AVX-512; forward alone it hardly is.
    """
    if weight.shape[2:] != (3, 3) or min(weight.shape[:2]) < 192 or not _is_plain(x):
        return False
    tiles = [-(-size // OUTPUTS_2D) for size in x.shape[2:]]
    saved = _products_of(x.shape[2], 3) * _products_of(x.shape[3], 3) / (tiles[0] * tiles[1] * len(_in_images()[0]))
    return saved >= 1.8 and len(x) * tiles[0] * tiles[1] >= 128


def conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution of 3 × 3 with stride 1 and padding 1, channels last: x [N, C_in, H, W] → [N, C_out, H, W]."""
    return _Conv2d.apply(x, weight)


class _Conv2d(torch.autograd.Function):
    """Everything is tile by tile, [R, n², C] for R tiles of all images; a transform is one small matrix for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        read, kernel, write = _in_images()
        ctx.shape, n_out, n_in = x.shape, *weight.shape[:2]
        seen = _transform(read, _overlapping(x))
        values = _transform(kernel, weight.permute(0, 2, 3, 1).reshape(n_out, 9, n_in)).transpose(0, 1).contiguous()
        ctx.save_for_backward(seen, values)
        return _assembled(_transform(write, products(seen.transpose(0, 1), values, dim=1)), x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        read, kernel, write = _in_images()
        seen, values = ctx.saved_tensors
        parts = _transform(write.T, _disjoint(grad))
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_seen = products(parts.transpose(0, 1), values.transpose(1, 2), dim=1)
            grad_x = _summed(_transform(read.T, grad_seen), ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_values = torch.bmm(parts.permute(1, 2, 0), seen.transpose(0, 1))
            grad_weight = _transform(kernel.T, grad_values.transpose(0, 1))
            grad_weight = grad_weight.view(len(grad_weight), 3, 3, -1).permute(0, 3, 1, 2)
        return grad_x, grad_weight


def _transform(matrix: Tensor, parts: Tensor) -> Tensor:
    """matrix [p, q] for every one of parts [R, q, C] → [R, p, C]."""
    return torch.bmm(matrix.expand(len(parts), *matrix.shape), parts)


def _padded(x: Tensor, before: int) -> tuple[Tensor, int, int]:
    """x [N, C, H, W] → [N, H', W', C] with `before` zeros around and whole tiles; tiles along each axis."""
    rows, columns = (-(-size // OUTPUTS_2D) for size in x.shape[2:])
    right, below = (tiles * OUTPUTS_2D - size + before for tiles, size in ((columns, x.shape[3]), (rows, x.shape[2])))
    return F.pad(x.permute(0, 2, 3, 1), (0, 0, before, right, before, below)), rows, columns


def _overlapping(x: Tensor) -> Tensor:
    """The inputs [R, n², C] that each tile of x [N, C, H, W] reads."""
    padded, rows, columns = _padded(x, 1)
    n = OUTPUTS_2D + 2
    tiles = padded.unfold(1, n, OUTPUTS_2D).unfold(2, n, OUTPUTS_2D)  # [N, rows, columns, C, n, n]
    return tiles.permute(0, 1, 2, 4, 5, 3).reshape(len(x) * rows * columns, n * n, -1)


def _summed(tiles: Tensor, shape: torch.Size) -> Tensor:
    """What `_overlapping` took, added up where it came from: [R, n², C] → [N, C, H, W]."""
    m, (count, channels, height, width) = OUTPUTS_2D, shape
    rows, columns = -(-height // m), -(-width // m)
    parts = tiles.view(count, rows, columns, m + 2, m + 2, channels)
    whole = tiles.new_zeros(count, rows + 1, m, columns + 1, m, channels)
    at = whole.transpose(2, 3)  # a tile reaches two rows and two columns into its neighbours
    at[:, :rows, :columns] = parts[..., :m, :m, :]
    at[:, 1:, :columns, :2] += parts[..., m:, :m, :]
    at[:, :rows, 1:, :, :2] += parts[..., :m, m:, :]
    at[:, 1:, 1:, :2, :2] += parts[..., m:, m:, :]
    image = whole.view(count, (rows + 1) * m, (columns + 1) * m, channels)
    return image[:, 1 : height + 1, 1 : width + 1].contiguous().permute(0, 3, 1, 2)


def _disjoint(x: Tensor) -> Tensor:
    """The outputs [R, m², C] of each tile of x [N, C, H, W]."""
    padded, rows, columns = _padded(x, 0)
    m = OUTPUTS_2D
    tiles = padded.unflatten(1, (rows, m)).unflatten(3, (columns, m)).transpose(2, 3)
    return tiles.reshape(len(x) * rows * columns, m * m, -1)


def _assembled(tiles: Tensor, shape: torch.Size) -> Tensor:
    """Tiles [R, m², C] → [N, C, H, W], channels last."""
    m, (count, _, height, width) = OUTPUTS_2D, shape
    rows, columns = -(-height // m), -(-width // m)
    image = tiles.view(count, rows, columns, m, m, -1).transpose(2, 3).reshape(count, rows * m, columns * m, -1)
    return image[:, :height, :width].contiguous().permute(0, 3, 1, 2)
