"""Demonstrated actions lie near half a circle; what earns most lies beyond its end, and off it.

A chunk is two numbers, (c₁, c₂), on the half circle of radius 0.6 with c₂ ≥ 0, give or take 0.02. The reward is
−‖c − g‖², g = (0.9, 0). The policy is exact: its denoiser is the posterior mean of points on the curve. Both maps learn
from their own trials, with the same networks, for several sizes of what they may change; they are compared where they
earn the same, by how far from the half circle they end.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor, nn

from action_diffusion.policy.build import build_policy
from action_diffusion.policy.diffusion.solver import Step
from action_diffusion.policy.extensions.transport import Transport
from action_diffusion.policy.model import normalizer
from action_diffusion.policy.model.denoisers.denoiser import Denoiser, Film
from action_diffusion.policy.policy import DiffusionPolicy
from action_diffusion.policy.spec import ActionSpec, ObservationSpec, PolicySpec
from action_diffusion.training.reward.methods.fisher import Fisher
from benchmarks.rows.system import Measured, System

RADIUS, THICK, POINTS = 0.6, 0.02, 128
GOAL = torch.tensor([0.9, 0.0])
BUDGETS = (0.003, 0.01, 0.03, 0.08)
"""ε of both maps, mean squares of a displacement where all directions are alike."""
TURNS, AT_ONCE, TRIED = 60, 32, 1000


class HalfCircle(Denoiser):
    """The exact denoiser, predicting the sample, of chunks [2, 1] near the half circle."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        angle = torch.linspace(0, math.pi, POINTS)
        self.points = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
        self.levels = torch.tensor([(step.a, step.b) for step in steps])

    def prepare(self, condition: Tensor, times: Tensor) -> Film:
        return Film(self.levels[: len(times)], torch.zeros(len(condition), 2))

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        a, b = film[:, :1, None], film[:, 1:, None]
        variance = a**2 * THICK**2 + b**2
        off = x.flatten(1).unsqueeze(1) - a * self.points
        share = torch.softmax(-off.square().sum(dim=2, keepdim=True) / (2 * variance), dim=1)
        mean = (share * (self.points + a * THICK**2 / variance * off)).sum(dim=1)
        return mean.unsqueeze(2)


def half_circle() -> DiffusionPolicy:
    ends = {"state": np.array([[-1.0], [1.0]]), "action": np.array([[-1.0], [1.0]])}
    spec = PolicySpec(
        observations={"state": ObservationSpec(shape=(1,), source="state")},
        action=ActionSpec(shape=(1,)),
        n_obs_steps=1,
        horizon=2,
        n_action_steps=2,
        control_rate=10.0,
        normalizer={key: normalizer.fit(value) for key, value in ends.items()},
    )
    policy = build_policy(
        {
            "normalizer": {"default": "minmax"},
            "encoder": {"name": "observation"},
            "denoiser": {"name": "unet1d", "channels": [8, 16], "time_dim": 16},
            "process": {"name": "diffusion", "prediction": "sample"},
            "sampler": {"scheduler": "ddim", "num_inference_steps": 20, "clip": None},
            "objective": {"name": "denoising"},
        },
        spec,
    )
    policy.denoiser = HalfCircle(policy.sampler.steps)
    return policy.eval().requires_grad_(False)


def reward(chunk: Tensor) -> Tensor:
    return -(chunk.flatten(1) - GOAL).square().sum(dim=1)


def off(chunk: Tensor) -> Tensor:
    """Of chunks [N, 2, 1] the distance from the half circle, [N]."""
    place = chunk.flatten(1)
    ends = torch.stack([(place - torch.tensor([side * RADIUS, 0.0])).norm(dim=1) for side in (1, -1)]).amin(0)
    return torch.where(place[:, 1] >= 0, (place.norm(dim=1) - RADIUS).abs(), ends)


def moved(metric: str, budget: float, seed: int) -> tuple[float, float]:
    """The mean reward and distance of a map that learnt."""
    policy = half_circle()
    method = Fisher(
        policy, metric=metric, divergence=budget, noise=0.25, seed=seed, hidden=(64, 64), octaves=0, updates=0.2,
        batch_size=128, lr=3e-3, follow=0.05, warmup=256,
    )  # fmt: skip
    obs = {"state": np.zeros((AT_ONCE, 1, 1), np.float32)}
    for _ in range(TURNS):
        acted = method.act(obs)
        got, condition = reward(torch.from_numpy(acted.chunk)), acted.remembered["condition"]
        method.learn({**acted.remembered, "reward": got, "discount": torch.zeros(AT_ONCE), "next_condition": condition})
    policy.extensions = [Transport(policy, method.fitted()["transport"])]
    return tried(policy, seed)


def tried(policy: DiffusionPolicy, seed: int) -> tuple[float, float]:
    noise = torch.randn(TRIED, 2, 1, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        chunk = policy.sample({"state": torch.zeros(TRIED, 1, 1)}, noise=noise).action
    return float(reward(chunk).mean()), float(off(chunk).mean())


def measure(seed: int) -> Measured:
    frozen = tried(half_circle(), seed)
    found = {
        metric: sorted([frozen, *(moved(metric, budget, seed) for budget in BUDGETS)])
        for metric in ("fisher", "euclidean")
    }
    plain = np.array(found["euclidean"])
    measured: dict[str, float] = {}
    baseline = {"reward, frozen": frozen[0], "off, frozen": frozen[1]}
    below = []
    for index, (earned, distance) in enumerate(found["fisher"][1:]):
        if earned <= plain[-1, 0]:  # the other one earns as much with some budget between those that were tried
            same = float(np.interp(earned, plain[:, 0], plain[:, 1]))
            measured |= {f"reward {index}": earned, f"off {index}": distance}
            baseline |= {f"off of a plain square at reward {index}": same}
            below.append(distance < same)
    gains = [b[0] - a[0] for a, b in itertools.pairwise(found["fisher"])]
    return Measured(measured, baseline, len(below) >= 2 and all(below) and sum(gains) > 0)


SYSTEM = System(
    name="fisher",
    what="A map that knows the policy's Fisher information moves along what was demonstrated, and hardly off it.",
    bar="nearer to the demonstrated curve than a map with a plain square, wherever both earn the same",
    measure=measure,
)
