"""Two states whose values a gradient's steps find, and Adam's do not.

    s₁ ──0──▶ s₂ ──1──▶ end,   V = x · θ,   x₁ = (1, 0.05),  x₂ = (0.3, 1.5),   γ = 0.9;  s₂ is seen 3 times in 1,000

V(s₂) = 1 and V(s₁) = 0.9, which these features can say. x₁ hardly depends on the second weight and x₂ mostly on it;
Adam moves both by as much. Every step knows both states, by how often they are seen, so that nothing is left to chance.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from action_diffusion.training.reward.optimizers import AdamO
from benchmarks.rows.system import Measured, System

FEATURES, SEEN = torch.tensor([[1.0, 0.05], [0.3, 1.5]]), torch.tensor([1.0, 0.003])
GAMMA, STEPS, LR = 0.9, 5000, 0.01


def learnt(make: Any, begin: torch.Tensor, steps: int = STEPS) -> float:
    """The largest error of a value in the last fifth of the steps."""
    theta = torch.nn.Parameter(begin.clone())
    optimizer, truth = make([theta], lr=LR), torch.tensor([GAMMA, 1.0])
    worst = 0.0
    for index in range(steps):
        said = FEATURES @ theta
        aim = torch.stack([GAMMA * said[1], torch.tensor(1.0)]).detach()
        optimizer.zero_grad()
        (0.5 * SEEN * (aim - said).square()).sum().backward()
        optimizer.step()
        if index >= steps * 4 // 5:
            worst = max(worst, float((FEATURES @ theta.detach() - truth).abs().max()))
    return worst


def measure(seed: int) -> Measured:
    begin = 0.1 * torch.randn(2, generator=torch.Generator().manual_seed(seed))
    measured = {"error of adamo": learnt(partial(AdamO, budget=0.0), begin)}
    measured |= {"error of adamo, budget 0.1": learnt(AdamO, begin)}
    baseline = {"error of adam": learnt(torch.optim.Adam, begin)}
    return Measured(measured, baseline, max(measured.values()) <= 0.05 and baseline["error of adam"] >= 10)


SYSTEM = System(
    name="adamo",
    what="Adam that stays near the gradient's direction finds values that Adam runs away from.",
    bar="the last values within 0.05 of the known ones, where Adam's are off by 10 or more",
    measure=measure,
)
