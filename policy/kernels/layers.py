"""Kernels of single layers: what runs in place of a layer's `forward`, the fastest way that there is on this machine.

    layer.forward = Kernel(layer)         ways of the same result, measured at their first use (`choice`)
                                          torch's own ─ other orders of torch's operations ─ code in C

A layer knows nothing of it, and keeps its weights: they are trained, saved and differentiated as ever. Where weights
are laid out anew, that copy is made once, for inference, and again when they have changed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from action_diffusion import choice, native
from action_diffusion.policy.kernels import winograd
from action_diffusion.policy.kernels.time_first import norm_over_time, shifted_conv
from action_diffusion.policy.model.conv import Conv1d, GroupNorm, Product
from action_diffusion.policy.model.denoisers.denoiser import Film
from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d

Run = Callable[[Tensor], Tensor]
OURS = ("winograd", "one_call")
MOST_SEQUENCES, MOST_FRAMES, MOST_OPERATIONS = 128, 16, 2e9
"""Measured with: the ways differ by as much for more of them. Of large convolutions, as many sequences as take so many
operations with their gradients, 32 at least, so that all can be measured in time."""
LEAST_PACKED = 2**16
"""Smaller matrices are never laid out anew: a cache holds them."""


class Copies:
    """What follows from weights, by name: made at the first call, and anew once they have changed."""

    def __init__(self) -> None:
        self._stamp: Any = None
        self._seen: list[Tensor] = []
        self._made: dict[object, Any] = {}

    def check(self, weights: tuple[Tensor, ...]) -> None:
        """Forget everything if these have changed since the last check."""
        if (now := stamp(weights)) != self._stamp:
            self._made, self._stamp = {}, now
            self._seen = [weight.detach() for weight in weights]  # so that others never lie where these were

    def made(self, name: object, make: Callable[[], Any]) -> Any:
        """What `make` gives. It may be used with gradients and without."""
        if name not in self._made:
            with torch.inference_mode(False), torch.no_grad():
                self._made[name] = make()
        return self._made[name]

    def clear(self) -> None:
        self._made = {}

    def __len__(self) -> int:
        return len(self._made)


def stamp(weights: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Changes when weights are moved, written to by what torch records, or when any optimiser makes a step."""
    try:
        return _Steps.made, tuple([(weight.data_ptr(), weight._version) for weight in weights])
    except RuntimeError:  # made in inference mode, where torch records nothing
        return _Steps.made, tuple([weight.data_ptr() for weight in weights])


class _Steps:
    """Of all optimisers: torch does not record what a fused one writes."""

    made = 0

    @classmethod
    def count(cls, *_: object) -> None:
        cls.made += 1


register_optimizer_step_post_hook(_Steps.count)


class Kernel:
    """Stands for `type(layer).forward`. A copy of the layer gets one of its own, without what this one has made.

    keep: copies of weights that are laid out anew. Without, as in training, each call makes what it needs.
    """

    replaces: ClassVar[str] = "forward"
    layer: Any

    def __init__(self, layer: nn.Module, *, keep: bool = False) -> None:
        self.layer, self.keep, self.copies = layer, keep, Copies()
        self.plain: Callable[..., Tensor] = getattr(type(layer), self.replaces).__get__(layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Kernel:
        return type(self)(copy.deepcopy(self.layer, memo), keep=self.keep)

    def __reduce__(self) -> Any:
        return partial(type(self), keep=self.keep), (self.layer,)

    @property
    def trained(self) -> bool:
        """Whether weights get a gradient. What was made of them is let go then."""
        trained = torch.is_grad_enabled() and self.layer.weight.requires_grad
        if self.layer.training:
            self.copies.clear()
        return trained

    def made(self, name: object, make: Callable[[], Any]) -> Any:
        """What follows from the layer's weights."""
        if self.layer.training or not self.keep:
            return make()
        self.copies.check(tuple(self.layer.parameters(recurse=False)))
        return self.copies.made(name, make)

    def fastest(
        self, operation: str, size: tuple[Any, ...], ways: Mapping[str, Run], sample: Callable[[], Tensor]
    ) -> Run:
        """One of `ways`; measured with what `sample` gives. Where a gradient is asked for, that is measured as well."""
        if len(ways) == 1:
            return next(iter(ways.values()))
        measured = False

        def once(way: Run) -> None:
            nonlocal measured
            measured = True
            _run(way, sample(), tuple(self.layer.parameters(recurse=False)))

        name = choice.fastest(operation, size, {name: partial(once, way) for name, way in ways.items()}, OURS)
        if measured:
            self.let_go()  # what the other ways have made, too
        return ways[name]

    def let_go(self) -> None:
        """Free what was made of weights; it is made again where it is needed."""
        self.copies.clear()


def _run(way: Run, x: Tensor, weights: tuple[Tensor, ...]) -> None:
    """Once, with the gradients that x and the weights ask for."""
    if not torch.is_grad_enabled():
        way(x)
        return
    x = x.detach().requires_grad_(x.requires_grad)
    wanted = [value for value in (x, *weights) if value.requires_grad]
    out = way(x)
    if wanted:
        torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)


def on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether x [.] is to be computed with now, in this CPU's memory, by weights of its type there."""
    return x.is_cpu and weight.is_cpu and x.dtype == weight.dtype and not native.traced()


def _kind(x: Tensor, weight: Tensor) -> str:
    """Of a measurement: the type that is computed in, and which gradients there are."""
    cast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if cast else x.dtype
    grad = torch.is_grad_enabled()
    parts = [str(dtype).removeprefix("torch."), "x" * (grad and x.requires_grad), "w" * (grad and weight.requires_grad)]
    return "-".join(part for part in parts if part)


class ProductKernel(Kernel):
    """`Product.product`: oneDNN's blocked weights for few rows, which a general product would lay out in every call."""

    replaces = "product"

    def __call__(self, rows: Tensor, index: int = 0) -> Tensor:
        weight = self.layer.weight
        few = rows.numel() // rows.shape[-1] <= MOST_SEQUENCES
        if self.trained or not (self.keep and few and weight.numel() >= LEAST_PACKED) or not on_cpu(rows, weight):
            return self.plain(rows, index)
        if rows.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or not torch.backends.mkldnn.is_available():
            return self.plain(rows, index)
        ways = {"torch": partial(self.plain, index=index), "onednn": partial(self._packed, index=index)}
        size = rows.numel() // rows.shape[-1], rows.shape[-1], len(self.layer.bias), _kind(rows, weight)
        return self.fastest("product", size, ways, lambda: rows)(rows)

    def _packed(self, rows: Tensor, index: int) -> Tensor:
        layer, flat = self.layer, rows.flatten(0, 1)
        packed = self.made(index, lambda: _reorder(layer.matrix(index)[0]))
        if torch.is_grad_enabled() and rows.requires_grad:
            out = _PackedProduct.apply(flat, packed, *layer.matrix(index))
        else:
            out = _multiply(flat, packed, layer.bias)
        result: Tensor = out.view(*rows.shape[:2], -1)
        return result


def _reorder(matrix: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), MOST_SEQUENCES)
    return result


def _multiply(rows: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return result


class _PackedProduct(torch.autograd.Function):
    """A product with a packed matrix, differentiated with respect to its rows by the matrix [N, K] itself."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, packed: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(matrix)
        return _multiply(rows, packed, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (matrix,) = ctx.saved_tensors
        return grad @ matrix, None, None, None


class ConvAlongTime(Kernel):
    """`Conv1d`: as one product, as shifted products, or by Winograd's transforms."""

    layer: Conv1d

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.layer.weight
        if x.ndim != 3 or x.shape[2] != weight.shape[1] or not on_cpu(x, weight):
            return self.plain(x)
        ways: dict[str, Run] = {"windows": self.plain, "shifted": self._shifted}
        if self._differentiated(x):  # the likelier one first: of many rows, windows are five copies
            ways = {"shifted": self._shifted, "windows": self.plain}
        if winograd.fits_1d(x, weight):
            ways["winograd"] = self._train_winograd if self._differentiated(x) else self._winograd
        some = min(x.shape[1], MOST_SEQUENCES, max(32, int(MOST_OPERATIONS / (6 * len(x) * weight.numel()))))
        size = (len(x), some, *weight.shape[1:], len(weight), _kind(x, weight))
        return self.fastest("conv1d", size, ways, lambda: x[:, :some].contiguous())(x)

    def _differentiated(self, x: Tensor) -> bool:
        return self.trained or (torch.is_grad_enabled() and x.requires_grad)

    def _shifted(self, x: Tensor) -> Tensor:
        return shifted_conv(x, self.layer.weight, self.layer.bias)

    def _train_winograd(self, x: Tensor) -> Tensor:
        return winograd.conv1d(x, self.layer.weight, self.layer.bias)

    def _winograd(self, x: Tensor) -> Tensor:
        values = self.made("winograd", lambda: winograd.pack_1d(self.layer.weight))
        return winograd.conv1d_packed(x, values, self.layer.bias)


class NormAlongTime(Kernel):
    """`GroupNorm`: torch's, or over time first."""

    layer: GroupNorm

    def __call__(self, x: Tensor) -> Tensor:
        layer = self.layer
        if x.ndim != 3 or not x.is_cpu or native.traced():
            return self.plain(x)
        ways: dict[str, Run] = {"torch": self.plain, "time_first": self._time_first}
        size = (len(x), min(x.shape[1], MOST_SEQUENCES), x.shape[2], layer.n_groups, _kind(x, layer.weight))
        return self.fastest("group_norm", size, ways, lambda: x[:, :MOST_SEQUENCES].contiguous())(x)

    def _time_first(self, x: Tensor) -> Tensor:
        layer = self.layer
        return norm_over_time(x, layer.weight, layer.bias, layer.n_groups, layer.eps)


class ConvInImages(Kernel):
    """`torch.nn.Conv2d`: torch's, by weights that oneDNN has laid out, or for 3 x 3 by Winograd's transforms."""

    layer: nn.Conv2d

    def __call__(self, x: Tensor) -> Tensor:
        layer, weight = self.layer, self.layer.weight
        if x.ndim != 4 or layer.groups != 1 or not on_cpu(x, weight):
            return self.plain(x)
        differentiated = self.trained or (torch.is_grad_enabled() and x.requires_grad)
        ways: dict[str, Run] = {"torch": self.plain}
        if self._packs(x) and not differentiated:
            ways["onednn"] = self._packed
        if _is_3x3(layer) and winograd.fits_2d(x, weight):
            ways["winograd"] = self._train_winograd if differentiated else self._winograd
        layout = "last" if x.is_contiguous(memory_format=torch.channels_last) else "first"
        size = (min(len(x), MOST_FRAMES), *x.shape[2:], *weight.shape, layout, _kind(x, weight))
        return self.fastest("conv2d", size, ways, lambda: x[:MOST_FRAMES])(x)

    def _packs(self, x: Tensor) -> bool:
        here = torch.backends.mkldnn.is_available() and x.dtype == torch.float32
        few = len(x) <= MOST_FRAMES and self.layer.weight.numel() >= LEAST_PACKED
        return self.keep and here and few and not torch.is_autocast_enabled("cpu")

    def _packed(self, x: Tensor) -> Tensor:
        layer = self.layer
        shape = [*map(list, (layer.padding, layer.stride, layer.dilation)), layer.groups]
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        packed = self.made("onednn", lambda: reorder(layer.weight.detach(), *shape, list(x.shape)))
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(x, packed, layer.bias, *shape, "none", [], "")
        return result

    def _train_winograd(self, x: Tensor) -> Tensor:
        return winograd.conv2d(x, self.layer.weight)

    def _winograd(self, x: Tensor) -> Tensor:
        return winograd.conv2d_packed(x, self.made("winograd", lambda: winograd.pack_2d(self.layer.weight)))


class UnetKernel(Kernel):
    """`ConditionalUnet1d.forward` by copies of its weights, which stand until a chunk begins with others."""

    layer: ConditionalUnet1d
    _weights: tuple[Tensor, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> UnetKernel:
        return type(self)(copy.deepcopy(self.layer, memo), keep=self.keep, **self.options())

    def __reduce__(self) -> Any:
        return partial(type(self), keep=self.keep, **self.options()), (self.layer,)

    def options(self) -> dict[str, Any]:
        """What it was made with, beside the layer."""
        return {}

    def begin(self) -> None:
        """Forget copies of weights that have changed: looked at once a chunk, since there are a hundred."""
        if not self._weights or self._weights[0] is not self.layer.time_film.weight:  # not yet found, or replaced
            self._weights = (self.layer.time_film.weight, *self.layer.parameters())
        self.copies.check(self._weights)

    def made(self, name: object, make: Callable[[], Any]) -> Any:
        return self.copies.made(name, make)

    def let_go(self) -> None:
        super().let_go()
        for module in self.layer.modules():
            for kernel in (module.__dict__.get("forward"), module.__dict__.get("product")):
                if isinstance(kernel, Kernel):
                    kernel.copies.clear()

    def fits_in(self, x: Tensor) -> bool:
        """Whether x [B, H, A] has a shape that the network takes, which is not being trained."""
        net = self.layer
        right = x.ndim == 3 and x.shape[2] == net.input_dim and x.shape[1] % 2 ** (len(net.channels) - 1) == 0
        return right and x.shape[0] * x.shape[1] > 0 and not net.training


class Beginning(Kernel):
    """`ConditionalUnet1d.prepare`, which every chunk begins with."""

    replaces = "prepare"

    def __call__(self, condition: Tensor, times: Tensor) -> Film:
        kernel = self.layer.__dict__.get("forward")
        if isinstance(kernel, UnetKernel):
            kernel.begin()
        return cast(Film, self.plain(condition, times))


def _is_3x3(layer: nn.Conv2d) -> bool:
    ones = layer.stride == layer.padding == layer.dilation == (1, 1)
    return ones and layer.kernel_size == (3, 3) and layer.bias is None and layer.padding_mode == "zeros"


KERNELS: dict[type[nn.Module], type[Kernel]] = {
    Conv1d: ConvAlongTime,
    GroupNorm: NormAlongTime,
    nn.Conv2d: ConvInImages,
}
"""By the exact type of a layer."""


def put(kernel: Kernel) -> None:
    """In the place of what it replaces."""
    kernel.layer.__dict__[kernel.replaces] = kernel


def install(module: nn.Module, *, keep: bool) -> None:
    """Put kernels in place of all layers in `module` that have one."""
    for layer in module.modules():
        if isinstance(layer, Product):
            put(ProductKernel(layer, keep=keep))
        if type(layer) in KERNELS:
            put(KERNELS[type(layer)](layer, keep=keep))


def remove(module: nn.Module) -> None:
    """Let all layers in `module` run themselves again."""
    for layer in module.modules():
        for name in ("forward", "product", "prepare", "chunk"):
            layer.__dict__.pop(name, None)
