"""Convolutions of 3 x 3 over images by fewer products, in C (`tiles.c`).

3 x 3 outputs take 25 products where 81 were (`winograd`). The sums around them are memory traffic, which takes as long
as is saved where a whole batch goes through it; the C code takes a few tiles at a time, and all between stays in a
cache. It is compiled when the package is installed, where there is a C compiler. Without, or on a processor that it is
not for, torch computes all products. The difference between both is rounding, some 5e-6 of the largest output.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from action_diffusion.policy.winograd import is_plain, transforms

OUTPUTS, POINTS, PANEL, PADDING = 3, 25, 32, 16
"""As in `tiles.c`: outputs of a tile, along each axis; its products; columns that lie together; floats between rows."""
AT_ONCE, AT_ONCE_BACK = 48, 512
"""Tiles that go through a thread together, at most; and through all threads for the gradient of the weights."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code; None where there is none for this machine. It shares OpenMP's threads with torch."""
    for path in Path(__file__).parent.glob("_tiles*.so"):
        code = ctypes.CDLL(str(path))
        return code if code.has_kernels() else None
    return None


def pays(x: Tensor, weight: Tensor, *, once: bool) -> bool:
    """Whether this is faster for x [N, C_in, H, W] and weight [C_out, C_in, 3, 3] than all products.

    once: the kernel's values are computed for this call, and not at hand. Measured on an AMD EPYC with AVX-512.
    """
    if weight.shape[2:] != (3, 3) or any(n % PANEL for n in weight.shape[:2]) or not is_plain(x) or library() is None:
        return False
    tiles = len(x) * _tiles(x)
    kernels = weight.shape[0] * weight.shape[1]
    return tiles >= max(64, kernels >> 11) if once else tiles >= max(4, kernels >> 14)


def _tiles(x: Tensor) -> int:
    """Of an image."""
    return -(-x.shape[2] // OUTPUTS) * -(-x.shape[3] // OUTPUTS)


def values(weight: Tensor) -> Tensor:
    """Of kernels [C_out, C_in, 3, 3] at all points, for `conv2d_packed`: [25, C_out / 32, C_in, 32]."""
    n_out, n_in = weight.shape[:2]
    taps_first = weight.detach().permute(0, 2, 3, 1).reshape(n_out, -1).t().contiguous()  # [9 C_in, C_out]
    return _kernel_values(taps_first, n_in, n_out, (n_out, n_in * n_out), _matrices().kernel)


def _mirrored_values(weight: Tensor) -> Tensor:
    """The same of the kernels that take a gradient back from outputs to inputs: [25, C_in / 32, C_out, 32]."""
    n_out, n_in = weight.shape[:2]
    taps_second = weight.permute(0, 2, 3, 1).contiguous()  # [C_out, 3, 3, C_in]
    return _kernel_values(taps_second, n_out, n_in, (9 * n_in, n_in), _matrices().mirrored)


def conv2d(x: Tensor, weight: Tensor) -> Tensor:
    """A convolution with stride 1 and padding 1, float32: x [N, C_in, H, W] → [N, C_out, H, W], channels last.

    weight [C_out, C_in, 3, 3]; numbers of channels are multiples of 32.
    """
    return _Conv2d.apply(x, weight)


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return conv2d_packed(x, values(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = conv2d_packed(grad, _mirrored_values(weight)) if ctx.needs_input_grad[0] else None
        return grad_x, _weight_gradient(x, grad) if ctx.needs_input_grad[1] else None


class _Matrices:
    """What `tiles.c` multiplies by: float32, along one axis."""

    def __init__(self) -> None:
        read, kernel, write = transforms(OUTPUTS, 3)
        self.read, self.kernel, self.write = _float(read), _float(kernel), _float(write)
        self.mirrored = _float(kernel[:, ::-1])
        self.kernel_back, self.write_back = _float(kernel.T), _float(write.T)


@cache
def _matrices() -> _Matrices:
    return _Matrices()


def _float(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(matrix, np.float32))


def _kernel_values(weight: Tensor, n_in: int, n_out: int, distances: tuple[int, int], kernel: Tensor) -> Tensor:
    out = torch.empty(POINTS, n_out // PANEL, n_in, PANEL)
    _call("kernel_values", weight, n_in, n_out, *distances, kernel, out)
    return out


def conv2d_packed(x: Tensor, packed: Tensor) -> Tensor:
    """`conv2d` without a gradient, by the kernel's `values`."""
    n, n_in, height, width = x.shape
    n_out, m = packed.shape[1] * PANEL, _matrices()
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty(n, height, width, n_out)
    threads, tiles = torch.get_num_threads(), n * _tiles(x)
    at_once = -(-tiles // (threads * -(-tiles // (threads * AT_ONCE))))  # as many for each thread
    scratch = _scratch(n_in, n_out, at_once, threads)
    _call("conv", x, n, height, width, n_in, n_out, packed, m.read, m.write, out, at_once, scratch)
    return out.permute(0, 3, 1, 2)


def _weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    n, n_in, height, width = x.shape
    n_out, m = grad.shape[1], _matrices()
    x, grad = (images.contiguous(memory_format=torch.channels_last) for images in (x, grad))
    out = torch.empty(n_out, 3, 3, n_in)
    room = torch.empty(POINTS, n_out, n_in + PADDING)
    scratch = _scratch(n_in, n_out, AT_ONCE_BACK, 1)
    matrices = m.read, m.write_back, m.kernel_back
    _call("weight_gradient", x, grad, n, height, width, n_in, n_out, *matrices, out, room, AT_ONCE_BACK, scratch)
    return out.permute(0, 3, 1, 2)


def _scratch(n_in: int, n_out: int, most: int, threads: int) -> Tensor:
    return torch.empty(POINTS * most * threads * (n_in + n_out + 2 * PADDING))


def _call(name: str, *values: Tensor | int) -> None:
    """A function of `tiles.c`: pointers and int64, and as the last the number of threads."""
    given = (ctypes.c_void_p(v.data_ptr()) if isinstance(v, Tensor) else ctypes.c_int64(v) for v in values)
    getattr(library(), name)(*given, ctypes.c_int(torch.get_num_threads()))
