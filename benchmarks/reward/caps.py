"""Chunks of a trained policy under a budget of what their actions add up to, of a known total.

Chunks are ramps of 8 steps, 2 numbers, whose height the state says and which add up to about twice the least budget.
"""

from __future__ import annotations

import numpy as np
import torch

from action_diffusion.policy.planning.caps import Caps, allowance, capped
from benchmarks.rows.policies import trained
from benchmarks.rows.system import Measured, System

HORIZON, TRIED = 8, 200


def demonstrated(state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    ramp = np.linspace(0.2, 1.0, HORIZON)[None, :, None] * np.array([1.0, -0.5])
    return np.asarray((2 + state[:, :, :1]) * ramp + rng.normal(0, 0.05, (len(state), HORIZON, 2)), np.float32)


def measure(seed: int) -> Measured:
    rng = np.random.default_rng(seed)
    state = rng.uniform(-1, 1, (2000, 1, 1)).astype(np.float32)
    small = {"name": "unet1d", "channels": [16, 32], "n_groups": 4, "kernel_size": 3, "time_dim": 32}
    sampler = {"scheduler": "ddim", "num_inference_steps": 10}
    policy = trained(
        {"state": state}, demonstrated(state, rng), steps=300, seed=seed, batch_size=64, denoiser=small, sampler=sampler
    )
    obs = {"state": torch.from_numpy(state[:TRIED])}
    cost = torch.ones(2)
    spent = torch.from_numpy(rng.uniform(0, 10, TRIED).astype(np.float32))
    left = allowance(1.0, 2 * HORIZON, spent)
    noise = torch.randn(TRIED, HORIZON, 2, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        free = policy.sample(obs, noise=noise).action
        kept = policy.sample(obs, noise=noise, hooks=[Caps(policy, policy.see(obs), left, cost)]).action
    scaled = free * (left / free.abs().sum(dim=(1, 2))).clamp_max(1).view(-1, 1, 1)

    def over(plan: torch.Tensor) -> float:
        return float((plan.abs().sum(dim=(1, 2)) / left - 1).amax())

    def changed(plan: torch.Tensor) -> float:
        return float((plan - free).square().mean().sqrt())

    measured = {
        "over the budget": over(kept),
        "change": changed(kept),
        "change, the end alone": changed(capped(free, left, cost)),
    }
    baseline = {"over the budget": over(free), "change, scaled": changed(scaled)}
    passed = measured["over the budget"] <= 1e-4 < baseline["over the budget"]
    return Measured(measured, baseline, passed and measured["change, the end alone"] <= baseline["change, scaled"])


SYSTEM = System(
    name="caps",
    what="Plans spend no more than what is left, and are the nearest ones that do not.",
    bar="no total above its budget (1e-4 of it: rounding); the mapping changes no more than scaling a plan does",
    measure=measure,
)
