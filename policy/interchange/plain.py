"""Our networks in torch's own layers and layout, as an exporter and the runtimes behind it know them best."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from action_diffusion.policy.model.conv import Conv1d, Double, Halve
from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d, ConvBlock, ResidualBlock

Layer = TypeVar("Layer", bound=nn.Module)
ACTIVATIONS = {"silu": nn.SiLU, "mish": nn.Mish, "relu": nn.ReLU, "gelu": nn.GELU}
"""By the names of our functions; an exporter does not know those of our own making."""


class PlainUnet(nn.Module):
    """Computes what `ConditionalUnet1d` does, by convolutions over [B, C, T]. The weights are copies."""

    def __init__(self, net: ConditionalUnet1d) -> None:
        super().__init__()
        self.film_sizes = net.film_sizes
        self.down = nn.ModuleList(_level(level) for level in net.down)
        self.middle = nn.ModuleList(_Residual(cast(ResidualBlock, block)) for block in net.middle)
        self.up = nn.ModuleList(_level(level) for level in net.up)
        block, linear = cast("tuple[ConvBlock, nn.Linear]", net.out)
        self.out = nn.Sequential(_block(block), _pointwise(linear))

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x [B, H, A], film [B, F] → [B, H, A]."""
        films = iter(film.unsqueeze(-1).split(self.film_sizes, dim=1))
        h, skips = x.mT, []
        for first, second, resize in cast(Any, self.down):
            skips.append(second(first(h, next(films)), next(films)))
            h = resize(skips[-1])
        for block in self.middle:
            h = block(h, next(films))
        for first, second, resize in cast(Any, self.up):
            h = torch.cat([h, skips.pop()], dim=1)
            h = resize(second(first(h, next(films)), next(films)))
        output: Tensor = self.out(h)
        return output.mT


class _Residual(nn.Module):
    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.first, self.second = _block(block.first), _block(block.second)
        shortcut = block.shortcut
        self.shortcut = _pointwise(shortcut) if isinstance(shortcut, nn.Linear) else nn.Identity()

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        scale, shift = film.chunk(2, dim=1)
        output: Tensor = self.second(self.first(x) * scale + shift) + self.shortcut(x)
        return output


def _level(level: nn.Module) -> nn.ModuleList:
    first, second, resize = cast("tuple[ResidualBlock, ResidualBlock, nn.Module]", level)
    return nn.ModuleList([_Residual(first), _Residual(second), _resize(resize)])


def _block(block: ConvBlock) -> nn.Sequential:
    norm = block.norm
    made = nn.GroupNorm(norm.n_groups, len(norm.weight), norm.eps)
    made.load_state_dict(norm.state_dict())
    return nn.Sequential(_conv(block.conv), made, ACTIVATIONS[block.activation.__name__]())


def _conv(layer: Conv1d) -> nn.Conv1d:
    taps, n_in, n_out = layer.weight.shape
    return _filled(nn.Conv1d(n_in, n_out, taps, padding=taps // 2), layer.weight.permute(2, 1, 0), layer.bias)


def _resize(layer: nn.Module) -> nn.Module:
    if isinstance(layer, Halve):
        taps, n_in, n_out = layer.weight.shape
        return _filled(nn.Conv1d(n_in, n_out, taps, 2, 1), layer.weight.permute(2, 1, 0), layer.bias)
    if isinstance(layer, Double):
        taps, n_in, n_out = layer.weight.shape
        return _filled(nn.ConvTranspose1d(n_in, n_out, taps, 2, 1), layer.weight.permute(1, 2, 0), layer.bias)
    return nn.Identity()


def _pointwise(layer: nn.Linear) -> nn.Conv1d:
    made = nn.Conv1d(layer.in_features, layer.out_features, 1)
    return _filled(made, layer.weight.unsqueeze(-1), layer.bias)


def _filled(made: Layer, weight: Tensor, bias: Tensor) -> Layer:
    with torch.no_grad():
        cast(Tensor, made.weight).copy_(weight)
        cast(Tensor, made.bias).copy_(bias)
    return made
