"""Plans under a cost: the tilted distribution, the drift's fixed point, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gaussian import gaussian_policy

from action_diffusion.errors import InputError
from action_diffusion.policy.planning.drifting import drift, resampled, weights
from action_diffusion.policy.planning.restart import step_at

SD, TARGET = 0.3, 0.2
"""Normalised; the data's units are ten times as large (`gaussian_policy`)."""


def observed(rows: int = 1) -> dict[str, torch.Tensor]:
    return {"state": torch.zeros(rows, 1, 5)}


def distance(action: torch.Tensor) -> torch.Tensor:
    """Of the first number of a chunk from a target, squared."""
    return (action[:, 0, 0] / 10 - TARGET).square()


def test_weights_are_the_tilt_at_the_temperature_of_the_spread():
    costs = torch.tensor([[1.0, 2.0, 4.0], [5.0, 5.0, 5.0]])
    scale = 0.5 * costs[0].std()
    expected = torch.exp(-costs[0] / scale)
    torch.testing.assert_close(weights(costs, 0.5)[0], expected / expected.sum())
    torch.testing.assert_close(weights(costs, 0.5)[1], torch.full((3,), 1 / 3))


def test_resampling_keeps_each_as_often_as_its_weight_says_and_within_its_observation():
    weight = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]])
    rows = resampled(weight, torch.Generator().manual_seed(0))
    assert rows.tolist() == [0, 0, 1, 2, 7, 7, 7, 7]


def test_re_weighted_samples_have_the_mean_of_the_tilted_gaussian():
    """N(0, s²) · exp(−(x − c)² / λ) has its mean at 2 c s² / (λ + 2 s²)."""
    policy = gaussian_policy(SD)
    made = policy.sample(observed(), n_samples=20_000, noise_generator=torch.Generator().manual_seed(0)).action[0]
    costs, temperature, sd = distance(made)[None], 0.7, float(made.std()) / 10
    assert sd == pytest.approx(SD, rel=0.06)
    scale = temperature * float(costs.std())
    kept = made[resampled(weights(costs, temperature), torch.Generator().manual_seed(1)), 0, 0] / 10
    assert kept.mean().item() == pytest.approx(2 * TARGET * sd**2 / (scale + 2 * sd**2), abs=0.005)
    others = made[resampled(weights(costs, temperature), torch.Generator().manual_seed(1)), 1:] / 10
    assert others.std().item() == pytest.approx(sd, rel=0.02)


def test_the_plan_is_the_cheapest_of_what_is_allowed():
    policy = gaussian_policy(SD)

    def plan(allowed):
        generator = torch.Generator().manual_seed(0)
        return drift(policy, observed(3), distance, n_samples=8, rounds=2, allowed=allowed, generator=generator)

    free, below, never = (plan(a) for a in (None, lambda a: a[:, 0, 0] < 1.0, lambda a: a[:, 0, 0] > 1e6))
    assert (free.action[:, 0, 0] > 1.0).any()
    assert (below.action[:, 0, 0] < 1.0).all()
    assert below.allowed.all()
    assert (below.cost >= free.cost).all()
    torch.testing.assert_close(below.cost, distance(below.action))
    assert not never.allowed.any()
    torch.testing.assert_close(never.action, free.action)


def test_a_drift_and_its_denoising_move_the_mean_as_computed():
    """A linear cost moves chunks by s_r √(H A); denoising from a, b takes a mean m to ρ m, ρ = a s / √(a² s² + b²)."""
    policy, rounds = gaussian_policy(SD), 4
    options: dict[str, Any] = {"n_samples": 4000, "rounds": rounds, "temperature": 1e6, "step": 0.05, "noise": 0.6}
    found = drift(policy, observed(), lambda a: -a[:, 0, 0] / 10, generator=torch.Generator().manual_seed(0), **options)
    mean, expected = 0.0, [0.0]
    for turn in range(rounds):
        share = 1 - turn / rounds
        level = step_at(policy.sampler.steps, 0.6 * (1 + share) / 2)
        rho = level.a * SD / math.sqrt(level.a**2 * SD**2 + level.b**2)
        mean = rho * (mean + 0.05 * share * 4)
        expected.append(mean)
    torch.testing.assert_close(-found.costs[:, 0].mean(dim=1), torch.tensor(expected), rtol=0.06, atol=0.012)


def test_the_plan_is_the_cheapest_chunk_of_all_rounds_and_costs_what_it_says():
    found = drift(gaussian_policy(SD), observed(3), distance, n_samples=8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.cost, found.costs.amin(dim=(0, 2)))
    torch.testing.assert_close(distance(found.action), found.cost, rtol=1e-3, atol=1e-6)
    assert found.action.shape == (3, 8, 2)
    assert found.costs.shape == (9, 3, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_samples": 1}, "n_samples=1"),
        ({"rounds": 0}, "rounds=0"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"step": -1.0}, "step=-1"),
        ({"noise": 0.0}, "noise=0 to begin at"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        drift(gaussian_policy(), observed(), distance, **options)


@pytest.mark.parametrize(
    "cost",
    [
        lambda a: a.sum(),
        lambda a: a[:, 0, 0] * math.nan,
        lambda a: a[:, 0, 0].detach(),
    ],
    ids=["one number", "NaN", "not differentiable"],
)
def test_a_cost_that_is_none_is_refused(cost):
    with pytest.raises(InputError, match="the cost of 32 chunks"):
        drift(gaussian_policy(), observed(), cost)
