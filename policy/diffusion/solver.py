"""What a sampling scheduler does in each of its steps, as numbers that are the same for every chunk.

Driven by `x0_hat` (see `process`), every step of these schedulers is linear. Its numbers are read off the diffusers
scheduler once (`_moves`); sampling then only multiplies and adds, on any device, without asking it again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from action_diffusion.errors import InputError

NOISE = 0.95
"""The least noise (`Step.b`) that sampling may begin at, since it begins with nothing else."""
EXACT = 1e-3
"""How far from the next step's signal and noise a step may end."""
NEGLIGIBLE = 1e-8
"""Noise of a smaller standard deviation is none: schedulers keep it above zero for the sake of a logarithm."""


@dataclass(frozen=True)
class Step:
    """One denoising step, known before the sampling loop starts. `time` is what the network is told."""

    index: int
    time: float
    a: float
    b: float

    @property
    def sigma(self) -> float:
        """Noise over signal; infinite where nothing of the signal is left."""
        return self.b / self.a if self.a > 0 else float("inf")

    @property
    def tau(self) -> float:
        """1 / (1 + sigma): 0 at pure noise, and where nothing is known yet; 1 at the clean sample."""
        return self.a / (self.a + self.b) if self.a > 0 else 0.0


CLEAN = Step(0, 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Move:
    """What a scheduler does in one step: x_next = keep · x + Σ_j blend[j] · x0_hat of j steps ago + spread · z.

    z is standard normal. draws: whether the scheduler draws it (some draw where spread is 0, too).
    """

    keep: float
    blend: tuple[float, ...]
    spread: float
    draws: bool


class Solver:
    """A scheduler set to a number of steps, as the linear map that each of its steps is.

    `steps` lists what the network and hooks are told; `mean` goes from `x` at step i to `x` at step i + 1 up to the
    noise, whose standard deviation is `moves[i].spread`. start: what the initial noise is multiplied by. keeps_noise:
    the noise of x stays what the network's own estimate says it is where that is clipped. Nothing here changes, so one
    solver serves all chunks.
    """

    def __init__(self, *, steps: list[Step], moves: list[Move], start: float = 1.0, keeps_noise: bool = False):
        self.steps, self.moves, self.start, self.keeps_noise = steps, moves, start, keeps_noise
        self.memory = max(len(move.blend) for move in self.moves)  # estimates that `mean` looks at

    @classmethod
    def of(
        cls, scheduler: Any, steps: list[Step], last: Sequence[Step], *, keeps_noise: bool = False, **step_options: Any
    ) -> Solver:
        """A diffusers scheduler's. last: the levels that the last step may end at.

        Raises `InputError` where levels do not meet.
        """
        _check_begin(steps)
        moves = _moves(scheduler, steps, step_options)
        _check_levels(steps, moves, last)
        return cls(steps=steps, moves=moves, keeps_noise=keeps_noise)

    gaussian = True
    """Whether x_next ~ N(`mean`, spread²), as a recorded chain says."""

    def noisy(self, mean: Tensor, x: Tensor, z: Tensor, step: Step) -> Tensor:
        """x_next [B, H, A] of a step whose `spread` is above 0. z: standard normal."""
        return torch.add(mean, z, alpha=self.moves[step.index].spread)

    def mean(self, estimates: Sequence[Tensor], x: Tensor, step: Step) -> Tensor:
        """The mean [B, H, A] of p(x_next | x). estimates: x0_hat [B, H, A] of this step, the step before, and so on.

        For DDPM the posterior of Ho et al. 2020, eq. 7; for DDIM Song et al. 2021, eq. 12.
        """
        move = self.moves[step.index]
        mean = move.keep * x
        for weight, x0_hat in zip(move.blend, estimates, strict=False):
            mean = torch.add(mean, x0_hat, alpha=weight)
        return mean

    def kept_noise(self, clipped: Tensor, raw: Tensor, step: Step) -> Tensor:
        """What is added to `mean` for the noise that an estimate x0 [B, H, A] implies before it is clipped.

        DDIM goes on with a' · x0_hat + b' · eps. `mean` has eps = (x − a · x0_hat) / b; of x0_raw it is larger by
        a · (x0_hat − x0_raw) / b, and b' / b is `keep`.
        """
        return (self.moves[step.index].keep * step.a) * (clipped - raw)


class UnmetLevels(InputError):
    """Why noise levels do not meet."""


def _check_begin(steps: Sequence[Step]) -> None:
    if steps[0].b < NOISE:
        raise UnmetLevels(f"its first step is told that {steps[0].b:.2f} of its input is noise, where all of it is")


def _check_levels(steps: Sequence[Step], moves: Sequence[Move], last: Sequence[Step]) -> None:
    """With a perfect network, each step must end at the signal and the noise that the next one begins with."""
    for step, move in zip(steps, moves, strict=True):
        a, b = move.keep * step.a + sum(move.blend), math.hypot(move.keep * step.b, move.spread)
        expected = last if step is steps[-1] else (steps[step.index + 1],)
        if not any(abs(a - level.a) <= EXACT and abs(b - level.b) <= EXACT for level in expected):
            raise UnmetLevels(
                f"step {step.index + 1} ends at a noise of {b:.3f}, where {expected[0].b:.3f} is expected"
            )


def _moves(scheduler: Any, steps: Sequence[Step], options: Mapping[str, Any]) -> list[Move]:
    """The numbers of every step, read off a diffusers scheduler by giving it unit vectors for x and for each x0_hat.

    The last entry is 0 in all that is given, so what comes out there is the noise.
    """
    if scheduler.config.get("thresholding"):
        raise InputError("sampler.thresholding=true is not supported, since it is not linear: use sampler.clip=x0")
    if str(scheduler.config.get("variance_type")).startswith("learned"):
        raise InputError("sampler.variance_type=learned needs a network that predicts variances: use fixed_small")
    size = len(steps) + 2
    unit = torch.eye(size, dtype=torch.float64).view(size, 1, 1, size)
    moves = []
    for step in steps:
        x, x0_hat = unit[0], unit[1 + step.index]
        output = (x - x0_hat) / step.b if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else x0_hat
        generator = torch.Generator().manual_seed(0)
        untouched = generator.get_state()
        time = scheduler.timesteps[step.index]
        found = scheduler.step(output, time, x, generator=generator, return_dict=False, **options)[0]
        x_next = found.flatten().double()
        draws = not torch.equal(generator.get_state(), untouched)
        z = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        spread = float(x_next[-1] / z[-1]) if draws else 0.0
        keep, *blend = (x_next - spread * z)[: 2 + step.index].tolist()
        while len(blend) > 1 and abs(blend[0]) < NEGLIGIBLE:
            blend.pop(0)  # older than the scheduler looks back
        moves.append(Move(keep, tuple(reversed(blend)), spread if spread > NEGLIGIBLE else 0.0, draws))
    return moves
