"""Weights laid out once for inference, so that a denoising step takes little longer than reading them.

A chunk has few rows (T · B, 4 to 16 at batch 1), and a product of few rows with a large matrix is bound by reading the
matrix. A general matrix product runs few rows on one core and rearranges the matrix in every call; these do not:

    precision   on a CPU                                   on a GPU        bytes a weight
    fp32        oneDNN, blocked weights                    as it is        4
    bf16        oneDNN, where the CPU has instructions     tensor cores    2
    fp16        FBGEMM, weights widened in registers       tensor cores    2
    int8        FBGEMM, weights and inputs as integers     –               1

Activations between products stay fp32. What is packed is a copy: a layer keeps its own weights to be trained, to be
saved, and for the gradient with respect to its input, which guidance asks for.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from action_diffusion.errors import InputError, unknown
from action_diffusion.policy import tiles

Product = Callable[[Tensor], Tensor]
"""Rows [M, K] → [M, N], float32."""
SMALL = 64
"""Up to so many rows (T · B) fewer, larger operations win, since starting one costs more than its work."""
LEAST = {"fp32": 2**18, "bf16": 2**16, "fp16": 2**16, "int8": 2**16}
"""On a CPU, layers of fewer weights stay fp32 and as they are: a cache holds them, and other kernels start slower."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ("fp32", "bf16", "fp16", "int8")


class Prepared(nn.Module):
    """Keeps something that follows from its weights, and forgets it when these are trained, moved or replaced.

    A copy begins without it: oneDNN's layouts cannot be copied.
    """

    KEPT: ClassVar[tuple[str, ...]] = ("_packed", "_values", "_fused", "prepared")

    def forget(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self.KEPT}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.forget()

    def train(self, mode: bool = True) -> Prepared:
        if mode:
            self.forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Prepared:
        self.forget()
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args, **kwargs)


class Packable(Prepared):
    """A layer whose work is products of rows with matrices that follow from its weights."""

    n_matrices = 1
    weight: Tensor
    _packed: list[Product]
    _most_rows: int | None

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def matrix(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Weight [N, K] and bias [N] of product `index`."""
        raise NotImplementedError

    def pack(self, precision: str) -> None:
        """Use copies of the matrices in `precision` (one of `PRECISIONS`), wherever weights get no gradient."""
        self.forget()
        if self.weight.is_cpu and self.weight.numel() < LEAST[precision]:
            precision = "fp32"
        with torch.no_grad():
            self._packed = [_pack(*self.matrix(index), precision) for index in range(self.n_matrices)]
        self._most_rows = SMALL if precision == "fp32" else None

    def forget(self) -> None:
        self._packed, self._most_rows = [], None

    def runs_packed(self, x: Tensor) -> bool:
        """Whether `product` takes what is packed for x [T, B, C]."""
        few = self._most_rows is None or x.shape[0] * x.shape[1] <= self._most_rows
        return bool(self._packed) and few and not (torch.is_grad_enabled() and self.weight.requires_grad)

    def product(self, rows: Tensor, index: int = 0) -> Tensor:
        """rows [T, B, K] → [T, B, N] with matrix `index`."""
        flat = rows.flatten(0, 1)  # one addmm, where three axes may cost two operations
        if not self.runs_packed(rows):
            out = F.linear(flat, *self.matrix(index))
        elif torch.is_grad_enabled() and flat.requires_grad:
            out = _PackedProduct.apply(flat, self._packed[index], self.matrix(index)[0])
        else:
            out = self._packed[index](flat)
        return out.view(*rows.shape[:2], -1)


class _PackedProduct(torch.autograd.Function):
    """A packed product, differentiated with respect to its rows by the weight [N, K] that it was packed from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, packed: Product, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return packed(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grad @ weight, None, None


class Linear(nn.Linear, Packable):
    """`torch.nn.Linear` whose product can be packed."""

    def matrix(self, index: int) -> tuple[Tensor, Tensor | None]:
        return self.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class Conv2d(nn.Conv2d, Prepared):
    """`torch.nn.Conv2d` that on a CPU takes fewer products (`tiles`), or keeps its weights as oneDNN lays them out.

    The latter for a few frames: otherwise every call lays them out again, which for the last stages of a ResNet takes
    longer than the products.
    """

    MOST_FRAMES = 8
    _wanted = False
    _packed: Tensor | None = None
    _values: Tensor | None = None

    @property
    def _tiled(self) -> bool:
        """Whether this is the convolution that `tiles` does."""
        ones = self.stride == self.padding == self.dilation == (1, 1)
        return ones and self.groups == 1 and self.bias is None and self.padding_mode == "zeros"

    def pack(self) -> None:
        """Lay the weights out at the next call, which says for frames of which size."""
        self.forget()
        self._wanted = self.weight.is_cpu and self.groups == 1

    def forget(self) -> None:
        self._wanted, self._packed, self._values = False, None, None

    def forward(self, x: Tensor) -> Tensor:
        gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if self._tiled and tiles.pays_2d(x, self.weight, once=gradient or not self._wanted):
            return tiles.conv2d(x, self.weight) if gradient else tiles.conv2d_packed(x, self._kernel_values())
        if gradient or not self._runs_packed(x):
            return super().forward(x)
        shape = list(self.padding), list(self.stride), list(self.dilation), self.groups
        if self._packed is None:
            pack = torch.ops.mkldnn._reorder_convolution_weight
            self._packed = pack(self.weight.detach(), *shape, list(x.shape))
        return torch.ops.mkldnn._convolution_pointwise(x, self._packed, self.bias, *shape, "none", [], "")

    def _runs_packed(self, x: Tensor) -> bool:
        large = self._wanted and self.weight.numel() >= LEAST["fp32"]
        here = torch.backends.mkldnn.is_available() and not torch.compiler.is_compiling()
        return large and here and len(x) <= self.MOST_FRAMES

    def _kernel_values(self) -> Tensor:
        if not self._wanted:
            return tiles.pack_2d(self.weight)
        self._values = tiles.pack_2d(self.weight) if self._values is None else self._values
        return self._values


def check_precision(precision: str, device: torch.device) -> None:
    """`InputError` for a precision that is unknown, or that this device has no kernels for."""
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    on_cpu = device.type == "cpu"
    if precision == "int8" and not on_cpu:
        raise InputError(f"precision=int8 is for CPUs, the policy is on {device}: choose fp32, bf16 or fp16")
    if precision == "bf16" and on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise InputError("precision=bf16 needs a CPU with bfloat16 instructions, or a GPU: choose fp32, fp16 or int8")
    if precision in ("fp16", "int8") and on_cpu and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise InputError(f"precision={precision} on a CPU needs torch with FBGEMM, for x86: choose fp32")


def _pack(weight: Tensor, bias: Tensor | None, precision: str) -> Product:
    """The product with a matrix [N, K] and a bias [N]."""
    if weight.is_cpu and precision in KERNELS:
        return KERNELS[precision](weight, bias)
    if precision == "fp32":
        return lambda rows: F.linear(rows, weight, bias)
    dtype = DTYPES[precision]
    low, low_bias = weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype)
    return lambda rows: F.linear(rows.to(dtype), low, low_bias).float()


def _onednn(weight: Tensor, bias: Tensor | None) -> Product:
    if weight.numel() < LEAST["fp32"] or not torch.backends.mkldnn.is_available():
        return lambda rows: F.linear(rows, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), SMALL)
    return _Opaque(lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], ""), len(weight))


def _fp16(weight: Tensor, bias: Tensor | None) -> Product:
    packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)
    return _Opaque(lambda rows: torch.ops.quantized.linear_dynamic_fp16(rows, packed), len(weight))


def _int8(weight: Tensor, bias: Tensor | None) -> Product:
    """A scale for each row of the matrix, and in every call one for all inputs, which get 7 bits.

    The eighth would overflow: CPUs without VNNI add two products of bytes in 16 bits.
    """
    scale = (weight.abs().amax(1) / 127).clamp_min(1e-12).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that quantised tensors will move to another package
        zero = torch.zeros_like(scale).long()
        integers = torch.quantize_per_channel(weight.contiguous(), scale, zero, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(integers, bias)
    return _Opaque(lambda rows: torch.ops.quantized.linear_dynamic(rows, packed, True), len(weight))


KERNELS = {"fp32": _onednn, "fp16": _fp16, "int8": _int8}
"""On a CPU; bf16 has none of its own."""


class _Opaque:
    """A product that torch.compile cannot look into: it sees an operation that names it by number."""

    living: ClassVar[weakref.WeakValueDictionary[int, _Opaque]] = weakref.WeakValueDictionary()
    numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, run: Product, width: int):
        self.run, self.width, self.number = run, width, next(self.numbers)
        self.living[self.number] = self

    def __call__(self, rows: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.ops.action_diffusion.product(rows, self.number, self.width)
        return self.run(rows)


_library = torch.library.Library("action_diffusion", "DEF")
_library.define("product(Tensor rows, int number, int width) -> Tensor")
_library.impl("product", lambda rows, number, width: _Opaque.living[number].run(rows), "CPU")
_library.impl("product", lambda rows, number, width: rows.new_empty(len(rows), width), "Meta")
