"""Plans within a budget: the nearest ones, by bisection of the same dual, and in the denoising loop."""

from __future__ import annotations

import pytest
import torch
from gaussian import gaussian_policy

from action_diffusion.errors import InputError
from action_diffusion.policy.planning.caps import Caps, allowance, capped


def by_bisection(plan: torch.Tensor, left: float, cost: torch.Tensor) -> torch.Tensor:
    """One plan [H, A], the price of the budget found by halving."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        total = float((cost * (plan.abs() - middle * cost).clamp_min(0)).sum())
        low, high = (middle, high) if total > left else (low, middle)
    return plan.sign() * (plan.abs() - high * cost).clamp_min(0)


@pytest.mark.parametrize("cost", [[1.0, 1.0, 1.0], [0.2, 1.0, 3.0], [0.0, 1.0, 0.5]])
def test_plans_are_the_nearest_within_their_budget(cost):
    generator = torch.Generator().manual_seed(0)
    plans = torch.randn(20, 4, 3, generator=generator, dtype=torch.float64)
    left, price = torch.linspace(0, 12, 20, dtype=torch.float64), torch.tensor(cost, dtype=torch.float64)
    found = capped(plans, left, price)
    for plan, rest, one in zip(plans, left.tolist(), found, strict=True):
        fits = float((price * plan.abs()).sum()) <= rest
        torch.testing.assert_close(one, plan if fits else by_bisection(plan, rest, price), atol=1e-9, rtol=0)
    assert ((price * found.abs()).sum(dim=(1, 2)) <= left + 1e-9).all()


def test_what_is_left_counts_the_steps_of_the_plan_and_what_is_spent():
    left = allowance(0.5, 12, torch.tensor([0.0, 4.0, 7.0]))
    assert left.tolist() == [6.0, 2.0, 0.0]


def test_sampled_plans_keep_their_budget():
    policy = gaussian_policy(steps=5)
    obs = {"state": torch.zeros(3, 1, 5)}
    left, cost = torch.tensor([0.0, 5.0, 1e6]), torch.tensor([1.0, 0.5])
    noise = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        free = policy.sample(obs, noise=noise).action
        kept = policy.sample(obs, noise=noise, hooks=[Caps(policy, policy.see(obs), left, cost)]).action
    total = (cost * kept.abs()).sum(dim=(1, 2))
    assert float(total[0]) == pytest.approx(0.0, abs=1e-4)
    assert float(total[1]) == pytest.approx(5.0, abs=1e-4)
    torch.testing.assert_close(kept[2], free[2], atol=1e-4, rtol=0)


def test_impossible_budgets_are_refused():
    plans = torch.ones(2, 3, 2)
    for left, cost in (([-1.0, 1.0], [1.0, 1.0]), ([1.0], [1.0, 1.0]), ([1.0, 1.0], [1.0]), ([1.0, 1.0], [-1.0, 1.0])):
        with pytest.raises(InputError, match="0 or more"):
            capped(plans, torch.tensor(left), torch.tensor(cost))
