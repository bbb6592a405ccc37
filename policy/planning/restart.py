"""Sampling from chunks that are known, made noisy again, instead of from noise: the later part of the same loop.

    x0 ──▶ a_k · x0 + b_k · z ──denoising steps k, k+1, …──▶ chunks

(SDEdit, Meng et al. 2022.) What the chunks have in common with the demonstrations at the noise b_k stays, the finer
rest is made anew: the more noise, the nearer to the demonstrations, the less noise, the nearer to x0.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.sampler import DenoiserCall, Hook, StepState
from action_diffusion.policy.diffusion.solver import Step


class Restart(Hook):
    """Begins at x0 [B, H, A], normalised, made noisy by the initial noise of the run. The last hook in the list.

    noise: the share of noise b to begin at, between 0 and 1; the first step that begins with no more of it is the first
    one that asks the network. Raises `InputError`, once sampling begins, where there is none but the very first.
    """

    def __init__(self, x0: Tensor, noise: float):
        self.x0, self.noise = x0, noise

    def begin(self, x: Tensor, steps: Sequence[Step]) -> None:
        if x.shape != self.x0.shape:
            raise InputError(f"chunks of shape {list(self.x0.shape)} to begin at, for new ones of {list(x.shape)}")
        level = step_at(steps, self.noise)
        self.first, self.noisy = level.index, level.a * self.x0 + level.b * x

    def wrap_denoiser(self, denoise: DenoiserCall) -> DenoiserCall:
        def late(x: Tensor, step: Step, rows: Tensor | None = None) -> Tensor:
            return x if step.index < self.first else denoise(x, step, rows)

        return late

    def edit_x0(self, state: StepState) -> Tensor:
        return self.x0 if state.k < self.first else state.x0_hat

    def after_step(self, state: StepState, x_next: Tensor) -> Tensor:
        return self.noisy if state.k == self.first - 1 else x_next


def step_at(steps: Sequence[Step], noise: float) -> Step:
    """The first step that begins with at most so much noise b, 0 to 1, of which some is left. Raises `InputError`."""
    found = next((step for step in steps[1:] if 0.0 < step.b <= noise), None)
    if found is None:
        most, least = (steps[1].b, steps[-1].b) if len(steps) > 1 else (1.0, 1.0)
        raise InputError(
            f"noise={noise:g} to begin at: the later steps of this sampler begin at {most:.3g} to {least:.3g}; take "
            "one between, or more steps (policy.sampler.num_inference_steps)"
        )
    return found
