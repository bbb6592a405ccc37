"""A cost with a valley every 0.2, in eight dimensions, whose lowest place is known.

    J(x) = Σ (x − c)² + 0.05 (1 − cos 10 π (x − c))        chunks of 4 steps and 2 numbers, c in [-0.5, 0.5]

Chunks begin anywhere in [-1, 1], up to seven valleys a number from the lowest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from action_diffusion.policy.planning.annealing import Cost, anneal
from benchmarks.rows.system import Measured, System

CHUNKS, SHAPE, ROUNDS, PAIRS = 100, (4, 2), 80, 32


def descended(x: Tensor, cost: Cost, steps: int = 400) -> Tensor:
    """By the exact gradient, with Adam."""
    x = x.clone().requires_grad_()
    optimizer = torch.optim.Adam([x], lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        cost(x).sum().backward()
        optimizer.step()
    return x.detach()


def measure(seed: int) -> Measured:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(SHAPE, generator=generator) - 0.5
    begin = 2 * torch.rand(CHUNKS, *SHAPE, generator=generator) - 1

    def cost(x: Tensor) -> Tensor:
        off = x - centre
        return (off.square() + 0.05 * (1 - (10 * math.pi * off).cos())).sum(dim=(1, 2))

    def reached(x: Tensor) -> float:
        """The share of chunks whose every number is in the lowest valley."""
        return float(((x - centre).abs().amax(dim=(1, 2)) < 0.1).float().mean())

    asked = ROUNDS * (2 * PAIRS + 1)
    wide = begin + 0.5 * torch.randn(asked, *begin.shape, generator=generator)
    searched = wide[cost(wide.flatten(0, 1)).view(asked, -1).argmin(0), torch.arange(CHUNKS)]
    found = anneal(cost, begin, rounds=ROUNDS, pairs=PAIRS, generator=generator)
    measured = {"reached": reached(found), "cost": float(cost(found).mean())}
    baseline = {"cost at first": float(cost(begin).mean())}
    for name, other in (("gradient", descended(begin, cost)), ("random search", searched)):
        baseline |= {f"reached, {name}": reached(other), f"cost, {name}": float(cost(other).mean())}
    return Measured(measured, baseline, measured["reached"] >= 0.95 and baseline["reached, gradient"] <= 0.1)


SYSTEM = System(
    name="annealing",
    what="A chunk refined by a cost that is smoothed less and less ends at its lowest place, not in the next valley.",
    bar="at least 95 % of chunks in the lowest valley; at most 10 % by the gradient",
    measure=measure,
)
