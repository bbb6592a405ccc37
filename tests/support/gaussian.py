"""Denoisers and policies whose chunks are Gaussian, so that what comes out is known."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from action_diffusion.policy.build import build_policy
from action_diffusion.policy.diffusion.sampler import DenoiserCall
from action_diffusion.policy.diffusion.solver import Step
from action_diffusion.policy.model import normalizer
from action_diffusion.policy.model.denoisers.denoiser import Denoiser, Film
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec


def gaussian(sd: float) -> DenoiserCall:
    """The exact denoiser, predicting the sample, of chunks whose numbers are independent N(0, sd²)."""

    def denoise(x: Tensor, step: Step, rows: Tensor | None = None) -> Tensor:
        return _mean(x, sd, step.a, step.b)

    return denoise


class Gaussian(Denoiser):
    """The same for a policy: chunks N(0, sd²) whatever is observed. levels: (time, a, b) of the sampler's steps."""

    def __init__(self, sd: float, steps: list[Step]):
        super().__init__()
        self.sd = sd
        self.weight = nn.Parameter(torch.zeros(1))
        self.levels = torch.tensor([(step.a, step.b) for step in steps])

    def prepare(self, condition: Tensor, times: Tensor) -> Film:
        return Film(self.levels[: len(times)], torch.zeros(len(condition), 2))

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        a, b = film[:, 0].view(-1, 1, 1), film[:, 1].view(-1, 1, 1)
        return _mean(x, self.sd, a, b)


def _mean(x: Tensor, sd: float, a: float | Tensor, b: float | Tensor) -> Tensor:
    return a * sd**2 / (a**2 * sd**2 + b**2) * x


def gaussian_policy(sd: float = 0.3, *, horizon: int = 8, steps: int = 50) -> DiffusionPolicy:
    """A policy of one state (5 numbers) whose normalised chunks [H, 2] are N(0, sd²); an action is 10 times as much."""
    statistics = {"state": np.array([[-1.0] * 5, [1.0] * 5]), "action": np.array([[-10.0] * 2, [10.0] * 2])}
    spec = PolicySpec(
        observations={"state": ObservationSpec(shape=(5,), source="state")},
        action=ActionSpec(shape=(2,)),
        n_obs_steps=1,
        horizon=horizon,
        n_action_steps=4,
        control_rate=10.0,
        normalizer={key: normalizer.fit(value) for key, value in statistics.items()},
    )
    policy = build_policy(
        {
            "normalizer": {"default": "minmax"},
            "encoder": {"name": "observation"},
            "denoiser": {"name": "unet1d", "channels": [8, 16], "time_dim": 16},
            "process": {"name": "diffusion", "prediction": "sample"},
            "sampler": {"scheduler": "ddim", "num_inference_steps": steps, "clip": None},
            "objective": {"name": "denoising"},
        },
        spec,
    )
    policy.denoiser = Gaussian(sd, policy.sampler.steps)
    return policy.eval().requires_grad_(False)
