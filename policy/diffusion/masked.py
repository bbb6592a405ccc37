"""Masked diffusion of chunks whose every value is one of two: which valves are open, a gripper, a code in bits.

Noise takes values away and leaves nothing (0) in their place, more the noisier: at s from 1 (nothing is left) to 0,

    x_i = 0 with probability s, else x0_i;  x0_i is −1 or 1

("Simple and Effective Masked Diffusion Language Models", Sahoo et al. 2024, for a vocabulary of two.) The network's
output is the mean of x0_i given what is left, so (1 + output_i) / 2 is the probability of 1, and a squared error
teaches it. A step from s to r gives a value to each missing one with probability (s − r) / s, drawn by that
probability, and keeps all that there are: what is chosen first is known when the rest is chosen.

A step needs one normal number z a value, from the same generator as the steps of any scheduler: u = Φ(z) is uniform;
below p = (s − r) / s a value appears, and then u / p, which is uniform again, says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from action_diffusion.options.policy import check_member, check_n_inference
from action_diffusion.policy.diffusion.process import Flow, check_prediction, given
from action_diffusion.policy.diffusion.solver import Move, Solver, Step


class Masked:
    """The process; the network is told 100 · s. Values of the data other than the two at its ends go to the nearer."""

    family = "masked"

    def __init__(self, *, prediction: str = "sample") -> None:
        check_prediction(self.family, prediction)
        self.prediction = prediction

    def draw_times(self, n: int, *, generator: torch.Generator | None, device: torch.device) -> Tensor:
        return Flow.TIME_SCALE * (1.0 - torch.rand(n, generator=generator, device=device))

    def add_noise(self, x0: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        """eps standard normal [B, H, A] says which values go: those with Φ(eps) < s."""
        gone = torch.special.ndtr(eps) < (times / Flow.TIME_SCALE).to(x0.dtype).view(-1, 1, 1)
        return torch.where(gone, 0.0, self.target(x0, eps, times))

    def target(self, x0: Tensor, eps: Tensor, times: Tensor) -> Tensor:
        return torch.where(x0 < 0, -1.0, 1.0)

    def x0_from_output(self, output: Tensor, x: Tensor, step: Step) -> Tensor:
        """What is there is known."""
        return torch.where(x == 0, output, x)

    def solver(self, name: str, n_steps: int, **options: Any) -> Solver:
        check_member(self.family, name)
        check_n_inference(name, n_steps, None)
        given(name, options)
        return MaskedSolver(n_steps)


class MaskedSolver(Solver):
    """As many values appear in each step, in the mean; all are there after the last."""

    gaussian = False

    def __init__(self, n_steps: int) -> None:
        left = [1.0 - index / n_steps for index in range(n_steps)]
        steps = [Step(index, Flow.TIME_SCALE * s, 1.0 - s, s) for index, s in enumerate(left)]
        # What is kept, blended and spread is no number of a step here: `mean` and `noisy` say it.
        super().__init__(steps=steps, moves=[Move(0.0, (1.0,), 1.0, draws=True)] * n_steps, start=0.0)

    def mean(self, estimates: Sequence[Tensor], x: Tensor, step: Step) -> Tensor:
        """What would be there in the mean if all appeared now."""
        return estimates[0]

    def noisy(self, mean: Tensor, x: Tensor, z: Tensor, step: Step) -> Tensor:
        p = 1.0 / (len(self.steps) - step.index)
        u = torch.special.ndtr(z)
        value = torch.where(u < p * (1.0 + mean) / 2, 1.0, -1.0).to(x.dtype)
        return torch.where((x == 0) & (u <= p), value, x)
