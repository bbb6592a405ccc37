"""Policies of one or a few steps, learnt from scratch: the network says how far to go, and not only in which direction.

A flow's time s goes from 1 (noise) to 0 (the clean chunk), x_s = (1 − s) x0 + s eps, and its velocity is x0 − eps. Told
two times, s and r ≤ s, the network says the *mean* velocity u of the way from s to r, so that one step goes all of it,
or says it by F = x_s + s u (prediction "sample", as consistency trajectory models do: the clean chunk, where r is 0):

    x_r = x_s + (s − r) · u(x_s, s, r)

On the diagonal, r = s, that is the velocity itself, which the data teach. Away from it the network teaches itself:

    shortcut, flow_map    a long step is the two short ones that it is made of:
                          u(x_s, s, r) = h · u(x_s, s, m) + (1 − h) · u(x_m, m, r),  h = (s − m) / (s − r)
    mean_flow             what follows from it where one of them is short:
                          u(x_s, s, r) = v − (s − r) · du/ds,  du/ds along the flow

Its own estimates are targets without gradients. The sampler is the flow's, with as many steps as one likes (one!).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.process import Flow, Process
from action_diffusion.policy.objectives.objective import Network, Objective, Pair, Teacher


def told(s: Tensor, r: Tensor) -> Tensor:
    """Two times [R] each, from 0 to 1, as the network is told: [R, 2]."""
    return Flow.TIME_SCALE * torch.stack([s, r], dim=1)


def velocities(network: Network, prediction: str) -> Network:
    """The same network, that says velocities whatever it predicts."""
    if prediction == "velocity":
        return network

    def said(x: Tensor, times: Tensor, rows: Tensor | None = None) -> Tensor:
        s = (times if times.ndim == 1 else times[:, 0]).to(x.dtype).view(-1, 1, 1) / Flow.TIME_SCALE
        return (network(x, times, rows) - x) / s.clamp_min(1e-3)

    return said


def noisy(x0: Tensor, eps: Tensor, s: Tensor) -> Tensor:
    """x_s [R, H, A] at s [R]."""
    s = s.view(-1, 1, 1)
    return (1.0 - s) * x0 + s * eps


def _ends(n: int, generator: torch.Generator | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Any two times s ≥ r, [n] each."""
    ends = torch.rand(2, n, generator=generator, device=device)
    return ends.max(dim=0).values, ends.min(dim=0).values


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """What a network teaches itself of: clean chunks and noise [R, H, A] of the examples `rows` [R].

    network, teacher: say velocities. generator: draws the times.
    """

    network: Network
    teacher: Network | None
    x0: Tensor
    eps: Tensor
    rows: Tensor
    generator: torch.Generator | None

    def at(self, s: Tensor) -> Tensor:
        """x_s [R, H, A] at s [R]."""
        return noisy(self.x0, self.eps, s)

    def velocity(self, x: Tensor, s: Tensor, r: Tensor) -> Tensor:
        """The network's mean velocity [R, H, A] from x at s to r, [R] each."""
        return self.network(x, told(s, r), self.rows)


@dataclass(kw_only=True, eq=False)
class TwoTimes(Objective):
    """distilled: the share of examples, above 0 and at most 1, that the network teaches itself."""

    distilled: float = 0.25

    two_times: ClassVar[bool] = True
    family: ClassVar[str | None] = "flow"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.distilled <= 1.0:
            raise InputError(f"policy.objective.distilled={self.distilled} must be above 0, and at most 1")

    def pairs(
        self,
        network: Network,
        process: Process,
        x0: Tensor,
        generator: torch.Generator | None,
        teacher: Teacher | None = None,
    ) -> Iterator[Pair]:
        n = len(x0)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device, dtype=x0.dtype)
        taught = min(n, max(1, round(self.distilled * n)))
        rows = torch.arange(n, device=x0.device)
        if taught < n:
            of_data = rows[taught:]
            s = torch.rand(len(of_data), generator=generator, device=x0.device, dtype=x0.dtype)
            output = network(noisy(x0[of_data], eps[of_data], s), told(s, s), of_data)
            yield Pair(output, process.target(x0[of_data], eps[of_data], Flow.TIME_SCALE * s), of_data)
        rows = rows[:taught]
        examples = Examples(
            network=velocities(network, process.prediction),
            teacher=None if teacher is None else velocities(teacher.network, process.prediction),
            x0=x0[rows],
            eps=eps[rows],
            rows=rows,
            generator=generator,
        )
        s, pair = self._taught(examples)
        if process.prediction == "sample":  # F − F* is s (u − u*)
            pair = pair._replace(output=s.view(-1, 1, 1) * pair.output, target=s.view(-1, 1, 1) * pair.target)
        yield pair

    def _taught(self, of: Examples) -> tuple[Tensor, Pair]:
        """Where the examples begin, s [R], and their velocities: said, and to be said."""
        raise NotImplementedError


class _Composed(TwoTimes):
    """The mean velocity of a step is that of the two steps that it is made of."""

    def _spans(
        self, n: int, generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Times s ≥ m ≥ r, [n] each, and whether the short steps are the shortest that there are, bool [n]."""
        raise NotImplementedError

    def _taught(self, of: Examples) -> tuple[Tensor, Pair]:
        s, m, r, shortest = self._spans(len(of.rows), of.generator, of.x0.device)
        x = of.at(s)
        with torch.no_grad():
            first = of.velocity(x, s, torch.where(shortest, s, m))
            middle = x + (s - m).view(-1, 1, 1) * first
            second = of.velocity(middle, m, torch.where(shortest, m, r))
            h = ((s - m) / (s - r).clamp_min(1e-6)).view(-1, 1, 1)
            target = h * first + (1.0 - h) * second
        return s, Pair(of.velocity(x, s, r), target, of.rows)


@dataclass(kw_only=True, eq=False)
class Shortcut(_Composed):
    """ "One Step Diffusion via Shortcut Models" (Frans et al. 2025): steps of 1, 1/2, 1/4, … are each made of two
    halves, at multiples of their size. finest: the shortest steps are 1 / finest, a power of two; halves of that size
    are the velocity itself (their d = 0).

    Theirs takes the targets from a running mean of the weights; here they are the weights' own.
    """

    finest: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finest < 2 or self.finest & (self.finest - 1):
            raise InputError(f"policy.objective.finest={self.finest} must be a power of two, at least 2")

    @property
    def levels(self) -> int:
        """How many sizes of steps there are."""
        return int(math.log2(self.finest))

    def _spans(
        self, n: int, generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        level = torch.randint(self.levels, (n,), generator=generator, device=device)
        size = 0.5 ** level.float()
        place = (torch.rand(n, generator=generator, device=device) / size).floor() + 1.0
        s = (place * size).clamp_max(1.0)
        return s, s - size / 2, (s - size).clamp_min(0.0), level == self.levels - 1


@dataclass(kw_only=True, eq=False)
class FlowMap(_Composed):
    """Steps between any two times, cut at any time between them: the flow map's semigroup property, X(s→r) = X(m→r) ∘
    X(s→m), as "progressive self-distillation" of "How to build a consistency model" (Boffi et al. 2025) has it."""

    distilled: float = 0.5

    def _spans(
        self, n: int, generator: torch.Generator | None, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s, r = _ends(n, generator, device)
        h = torch.rand(n, generator=generator, device=device)
        return s, s - h * (s - r), r, torch.zeros(n, dtype=torch.bool, device=device)


class MeanFlow(TwoTimes):
    """ "Mean Flows for One-step Generative Modeling" (Geng et al. 2025): du/ds along the flow is
    ∂u/∂s + ∂u/∂x · (eps − x0), and errors are weighted by 1 / (their mean square + 1e-3).

    Theirs differentiates forward; here du/ds is a central difference over 2 · `STEP`, which any denoiser can.
    """

    STEP: ClassVar[float] = 0.005
    """Of the flow's time: small beside a step, and large beside float32's rounding."""

    def _taught(self, of: Examples) -> tuple[Tensor, Pair]:
        s, r = _ends(len(of.rows), of.generator, of.x0.device)
        x, velocity = of.at(s), of.x0 - of.eps
        with torch.no_grad():
            later = of.velocity(x - self.STEP * velocity, s + self.STEP, r)
            sooner = of.velocity(x + self.STEP * velocity, s - self.STEP, r)
            change = (later - sooner) / (2 * self.STEP)
            target = velocity - (s - r).view(-1, 1, 1) * change
        output = of.velocity(x, s, r)
        error = (output.detach() - target).square().mean(dim=(1, 2))
        return s, Pair(output, target, of.rows, 1.0 / (error + 1e-3))
