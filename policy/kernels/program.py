"""The U-Net as a list of operations between values, recorded once: what `cpu_unet` and `gpu_unet` run.

    record(net, steps)  ─▶  Program: Convolve, Convolve, Product, …      in order
                            values [steps, channels] of each sequence, and which lie side by side as one

It is recorded from the one walk through the network, `ConditionalUnet1d.walk`. What comes up and what was skipped to
are joined by lying side by side in memory: nothing is copied, since whoever makes them writes there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from action_diffusion.policy.model.conv import Conv1d, Double, GroupNorm, Halve, Linear
from action_diffusion.policy.model.denoisers.unet import ConditionalUnet1d, ConvBlock, ResidualBlock


@dataclass(eq=False)
class Activations:
    """steps × channels of every sequence. parts: what it is made of, side by side; place: what it is a part of."""

    steps: int
    channels: int
    parts: tuple[Activations, ...] = ()
    place: Activations | None = None
    taps: int = 0
    """The most steps that one of its own readers sees at once; 0: it is read as a part of another only."""


@dataclass(frozen=True, eq=False)
class Convolve:
    """Convolution, norm, activation; then FiLM, whose scales begin at `film` of the modulation; then the sum."""

    conv: Conv1d
    norm: GroupNorm
    source: Activations
    out: Activations
    film: int | None = None
    added: Activations | None = None


@dataclass(frozen=True, eq=False)
class Resize:
    """Another length, or other channels."""

    layer: Halve | Double | Linear
    source: Activations
    out: Activations


@dataclass(eq=False)
class Program:
    """operations: in order, from `entering` to `leaving`."""

    entering: Activations
    leaving: Activations
    operations: list[Convolve | Resize] = field(default_factory=list)


def record(net: ConditionalUnet1d, steps: int) -> Program:
    """For chunks of so many steps, which the levels of `net` halve."""
    entering = Activations(steps, net.input_dim)
    recorder = _ProgramRecorder(entering)
    recorder.program.leaving = net.walk(entering, layer=recorder.layer, residual=recorder.residual, join=recorder.join)
    return recorder.program


class _ProgramRecorder:
    def __init__(self, entering: Activations) -> None:
        self.program = Program(entering, entering)
        self._film = 0

    def residual(self, block: ResidualBlock, x: Activations) -> Activations:
        start, self._film = self._film, self._film + block.film_size
        shortcut = x if isinstance(block.shortcut, nn.Identity) else self.layer(block.shortcut, x)
        hidden = self._convolve(block.first, x, film=start)
        return self._convolve(block.second, hidden, added=shortcut)

    def layer(self, layer: Any, x: Activations) -> Activations:
        if isinstance(layer, ConvBlock):
            return self._convolve(layer, x)
        taps = {Halve: 3, Double: 3}.get(type(layer), 1)
        steps = {Halve: x.steps // 2, Double: 2 * x.steps}.get(type(layer), x.steps)
        out = Activations(steps, layer.bias.shape[-1])
        self._add(Resize(layer, x, out), taps)
        return out

    def join(self, up: Activations, skipped: Activations) -> Activations:
        both = Activations(up.steps, up.channels + skipped.channels, (up, skipped))
        up.place = skipped.place = both
        return both

    def _convolve(
        self, block: ConvBlock, x: Activations, film: int | None = None, added: Activations | None = None
    ) -> Activations:
        weight = block.conv.weight
        out = Activations(x.steps, weight.shape[-1])
        self._add(Convolve(block.conv, block.norm, x, out, film, added), len(weight))
        return out

    def _add(self, operation: Convolve | Resize, taps: int) -> None:
        operation.source.taps = max(operation.source.taps, taps)
        self.program.operations.append(operation)
