"""One decision, whose reward is known: chunks of a flow map after FMQ, beside ten steps of the flow, guided.

The state is s in [-1, 1]², demonstrations go to one of two sides, chunk = ±(0.5 + 0.2 s₁) and noise, and what earns is

    r = exp(−4 · mean (chunk − c)²),   c = 0.6 + 0.2 s₁ + 0.2 s₂,

on the upper side, not far from where it was demonstrated. Both are guided by the critic that FMQ learns from
its trials.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from action_diffusion.policy.diffusion.sampler import Hook, Sampler, StepState
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.value.networks import Value
from action_diffusion.training.reward.methods.fmq import Fmq
from benchmarks.rows.policies import trained
from benchmarks.rows.system import Measured, System

HORIZON, TURNS, AT_ONCE, TRIED = 4, 60, 64, 500
SCALES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Of the guidance in each of ten steps, of which the best counts."""
FLOW: dict[str, Any] = {
    "denoiser": {"name": "unet1d", "channels": [16, 32], "n_groups": 4, "kernel_size": 3, "time_dim": 32},
    "process": {"name": "flow"},
    "objective": {"name": "flow_map"},
    "sampler": {"scheduler": "flow", "num_inference_steps": 1},
}


def states(n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-1, 1, (n, 1, 2)).astype(np.float32)


def demonstrated(state: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    side = rng.choice([-1.0, 1.0], (len(state), 1, 1))
    return np.asarray(side * (0.5 + 0.2 * state[:, :, :1]) + rng.normal(0, 0.1, (len(state), HORIZON, 1)), np.float32)


def reward(state: np.ndarray, chunk: np.ndarray) -> np.ndarray:
    """[N]; 1 is the most."""
    best = 0.6 + 0.2 * state[:, :, :1] + 0.2 * state[:, :, 1:]
    return np.asarray(np.exp(-4 * np.square(chunk - best).mean(axis=(1, 2))))


class Uphill(Hook):
    """Each estimate of the clean chunk goes a step up the gradient of the critic, of a given root mean square."""

    def __init__(self, critic: Value, condition: Tensor, scale: float) -> None:
        self.critic, self.condition, self.scale = critic, condition, scale

    def edit_x0(self, state: StepState) -> Tensor:
        with torch.enable_grad():
            chunk = state.x0_hat.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.critic(self.condition, chunk.flatten(1)).amin(0).sum(), chunk)
        rms = gradient.square().mean(dim=(1, 2), keepdim=True).sqrt()
        return state.x0_hat + self.scale * gradient / rms.clamp_min(1e-12)


def earned(policy: DiffusionPolicy, state: np.ndarray, seed: int, hooks: list[Hook] | None = None) -> float:
    generator = torch.Generator().manual_seed(seed)
    obs = {"state": torch.from_numpy(state)}
    with torch.no_grad():
        chunk = policy.sample(obs, noise_generator=generator, hooks=hooks or []).action
    return float(reward(state, chunk.numpy()).mean())


def measure(seed: int) -> Measured:
    rng = np.random.default_rng(seed)
    state = states(4000, rng)
    policy = trained(
        {"state": state}, demonstrated(state, rng), steps=500, n_action_steps=HORIZON, seed=seed, batch_size=64, **FLOW
    )
    ten = copy.deepcopy(policy)
    ten.sampler = Sampler(process=ten.process, scheduler="flow", num_inference_steps=10, two_times=True)
    tests = states(TRIED, rng)
    baseline = {"cloning, 1 step": earned(policy, tests, seed)}

    method = Fmq(
        policy, seed=seed, hidden=(64, 64), octaves=0, updates=0.1, batch_size=64, lr=1e-3, follow=0.05, warmup=256,
        radius=0.5, policy_lr=3e-4,
    )  # fmt: skip
    for _ in range(TURNS):
        obs = {"state": states(AT_ONCE, rng)}
        acted = method.act(obs)
        got = torch.from_numpy(reward(obs["state"], acted.chunk)).float()
        condition = acted.remembered["condition"]
        method.learn(
            {**acted.remembered, "reward": got, "discount": torch.zeros_like(got), "next_condition": condition}
        )
    with torch.no_grad():
        condition = ten.see({"state": torch.from_numpy(tests)}).condition
    guided = [earned(ten, tests, seed, [Uphill(method.critic, condition, scale)]) for scale in SCALES]
    baseline |= {"flow, 10 steps": guided[0], "guided flow, 10 steps": max(guided)}
    measured = {"fmq, 1 step": earned(policy, tests, seed)}
    passed = measured["fmq, 1 step"] >= 0.95 * max(guided) and max(guided) > guided[0]
    return Measured(measured, baseline, passed)


SYSTEM = System(
    name="fmq",
    what="A policy of one step, moved to where its critic says, earns what ten guided steps of the flow earn.",
    bar="at least 95 % of the return of the ten-step flow guided by the same critic, at its best scale",
    measure=measure,
)
