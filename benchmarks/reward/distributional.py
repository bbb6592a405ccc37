"""A chain whose returns are known, learnt by a path-coupled Bellman flow.

    s₀ ──0──▶ s₁ ──±1, as likely──▶ s₂ ──±½ + N(0, 0.1²)──▶ end,   γ = 0.9

From s₀ returns gather around four places, ±0.9 ± 0.405: no normal distribution is like it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from action_diffusion.policy.value.averages import follow
from action_diffusion.training.reward.returns import ReturnFlow, path_coupled_loss, wasserstein
from benchmarks.rows.system import Measured, System

GAMMA, STEPS, BATCH, DRAWN = 0.9, 3000, 256, 4000
HIDDEN = (64, 64, 64)


def rows(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """n transitions, each state as often."""
    state = torch.randint(3, (n,), generator=generator)
    states = torch.eye(3)
    return {
        "condition": states[state],
        "reward": rewards(state, generator),
        "discount": GAMMA * (state < 2).float(),
        "next_condition": states[(state + 1).clamp_max(2)],
    }


def rewards(state: Tensor, generator: torch.Generator) -> Tensor:
    sign = 2.0 * torch.randint(2, state.shape, generator=generator) - 1.0
    noise = 0.1 * torch.randn(state.shape, generator=generator)
    return torch.where(state == 0, 0.0, torch.where(state == 1, sign, 0.5 * sign + noise))


def returns(state: int, n: int, generator: torch.Generator) -> Tensor:
    """Of n episodes from a state."""
    each = [GAMMA ** (s - state) * rewards(torch.full((n,), s), generator) for s in range(state, 3)]
    return torch.stack(each).sum(0)


def learnt(seed: int, coupling: float) -> ReturnFlow:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    flow = ReturnFlow(condition_dim=3, hidden=HIDDEN)
    target = copy.deepcopy(flow).requires_grad_(False)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        loss = path_coupled_loss(flow, target, rows(BATCH, generator), coupling=coupling, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        follow(target, flow, 0.02)
    flow.steps = 50
    return flow


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed + 1)
    flows = {"": learnt(seed, 0.0), ", coupling 0.5": learnt(seed, 0.5)}
    measured: dict[str, float] = {}
    baseline: dict[str, float] = {}
    for state in range(3):
        truth = returns(state, DRAWN, generator)
        seen = torch.eye(3)[state].expand(DRAWN, 3)
        for name, flow in flows.items():
            with torch.no_grad():
                drawn = flow.draw(torch.randn(DRAWN, generator=generator), seen)
            measured[f"W1 at s{state}{name}"] = wasserstein(drawn, truth)
        normal = truth.mean() + truth.std() * torch.randn(DRAWN, generator=generator)
        baseline[f"W1 of a normal at s{state}"] = wasserstein(normal, truth)
        baseline[f"W1 of other episodes at s{state}"] = wasserstein(returns(state, DRAWN, generator), truth)
    passed = all(measured[f"W1 at s{state}"] <= 0.5 * baseline[f"W1 of a normal at s{state}"] for state in range(3))
    return Measured(measured, baseline, passed)


SYSTEM = System(
    name="distributional",
    what="A flow that learns returns from its own estimates recovers a known distribution of them.",
    bar="in every state at most half of the Wasserstein distance of the normal with the true mean and spread",
    measure=measure,
)
