"""Plans of overlapping chunks: how they lie, what agrees, and what is known of a Gaussian."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gaussian import gaussian, gaussian_policy

from action_diffusion.errors import InputError
from action_diffusion.policy.diffusion.process import Diffusion
from action_diffusion.policy.diffusion.sampler import Sampler
from action_diffusion.policy.model.frames import Position
from action_diffusion.policy.planning.composition import Composition, Layout, compose

LAYOUT = Layout(n_chunks=3, horizon=8, overlap=2)
OBS = {"state": torch.zeros(1, 1, 5)}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ends_of(plans: int) -> tuple[torch.Tensor, torch.Tensor]:
    return randn(plans, 2, seed=1).clamp(-1, 1), randn(plans, 2, seed=2).clamp(-1, 1)


def hook(plans: int, rounds: int = 0) -> Composition:
    ends = torch.zeros(plans, LAYOUT.length, 2)
    ends[:, 0], ends[:, -1] = ends_of(plans)
    fixed = torch.zeros(LAYOUT.length, dtype=torch.bool)
    fixed[[0, -1]] = True
    return Composition(LAYOUT, Diffusion(prediction="sample"), ends, fixed, rounds=rounds)


def test_chunks_lie_in_a_plan_as_they_overlap():
    assert LAYOUT.length == 20
    assert LAYOUT.steps[:, [0, -1]].tolist() == [[0, 7], [6, 13], [12, 19]]
    plan = randn(4, 20, 2)
    chunks = LAYOUT.cut(plan)
    torch.testing.assert_close(chunks[4], plan[0, 6:14])  # row k · N + n
    torch.testing.assert_close(LAYOUT.join(chunks), plan)
    torch.testing.assert_close(LAYOUT.gaps(chunks), torch.zeros(4))


def test_overlaps_are_the_mean_of_their_chunks_and_gaps_their_distance():
    chunks = torch.zeros(3, 8, 2)
    chunks[1] = torch.tensor([3.0, 4.0])
    plan = LAYOUT.join(chunks)[0]
    torch.testing.assert_close(plan[6:8], torch.tensor([[1.5, 2.0]] * 2))
    torch.testing.assert_close(plan[8:12], torch.tensor([[3.0, 4.0]] * 4))
    torch.testing.assert_close(LAYOUT.gaps(chunks), torch.tensor([5.0]))
    assert Layout(3, 8, 6).join(torch.ones(3, 8, 1)).unique().tolist() == [1.0]  # three chunks have a step


@pytest.mark.parametrize("rounds", [0, 2])
def test_what_comes_out_has_no_gap_and_ends_where_it_is_told(rounds):
    sampler = Sampler(process=Diffusion(prediction="sample"), scheduler="ddim", num_inference_steps=20)
    found, _ = sampler.run(gaussian(0.5), randn(6, 8, 2), hooks=[hook(2, rounds)])
    torch.testing.assert_close(LAYOUT.gaps(found), torch.zeros(2), atol=1e-5, rtol=0)
    start, goal = ends_of(2)
    torch.testing.assert_close(found[:2, 0], start)
    torch.testing.assert_close(found[-2:, -1], goal)


def test_of_independent_steps_a_plain_plan_is_as_each_step_by_itself():
    """Where no step knows of another, composition changes nothing but the ends: p(plan) = Π p(step)."""
    sampler = Sampler(process=Diffusion(prediction="sample"), scheduler="ddim", num_inference_steps=20, clip=None)
    noise = LAYOUT.cut(randn(2, 20, 2))
    alone, _ = sampler.run(gaussian(0.5), noise)
    found, _ = sampler.run(gaussian(0.5), noise, hooks=[hook(2)])
    torch.testing.assert_close(LAYOUT.join(found)[:, 1:-1], LAYOUT.join(alone)[:, 1:-1])


def test_a_round_goes_down_the_reconstruction_error_by_its_gradient():
    """D(y) = ρ y: r = ρ (a x̂0 + b z), and x̂0 − ∇E = r."""
    made = hook(2, rounds=1)
    sampler = Sampler(process=Diffusion(prediction="sample"), scheduler="ddim", num_inference_steps=20, clip=None)
    step = sampler.steps[12]
    made.wrap_denoiser(gaussian(0.5))
    made.generator = torch.Generator().manual_seed(3)
    x0 = LAYOUT.cut(randn(2, 20, 2))
    z = LAYOUT.cut(randn(2, 20, 2, seed=3))
    leaf = x0.clone().requires_grad_()
    rho = step.a * 0.25 / (step.a**2 * 0.25 + step.b**2)
    r = rho * (step.a * x0 + step.b * z)
    (0.5 * (leaf - r).square().sum()).backward()
    torch.testing.assert_close(made.reconstructed(x0, step), x0 - leaf.grad)


def test_plans_are_in_the_datas_units_and_the_best_of_the_candidates():
    policy = gaussian_policy(0.5)
    start, goal = (10 * end for end in ends_of(3))
    options: dict[str, Any] = {"n_chunks": 3, "overlap": 2, "rounds": 1, "restarts": (0.9, 0.5)}
    found = compose(policy, OBS, start, goal, **options, generator=torch.Generator().manual_seed(0))
    assert found.action.shape == (3, 20, 2)
    torch.testing.assert_close(found.action[:, 0], start)
    torch.testing.assert_close(found.action[:, -1], goal)
    one = compose(policy, OBS, start, goal, **options, n_candidates=1, generator=torch.Generator().manual_seed(0))
    assert (found.error + found.gap).mean() < (one.error + one.gap).mean()


def test_what_cannot_be_is_refused():
    policy = gaussian_policy()
    start, goal = torch.zeros(1, 2), torch.ones(1, 2)

    def refused(words: str, **changes) -> None:
        given: dict[str, Any] = {"obs": OBS, "start": start, "goal": goal, "n_chunks": 3, "overlap": 2} | changes
        with pytest.raises(InputError, match=words):
            compose(policy, **given)

    refused("2 chunks at least", n_chunks=1)
    refused("an overlap of 1 to 7", overlap=8)
    refused("expected \\[B, 2\\]", goal=torch.ones(2, 2))
    refused("one for each of 3 chunks", obs={"state": torch.zeros(2, 1, 5)})
    refused("outside of what was demonstrated", goal=torch.full((1, 2), 11.0))
    refused("outside of what was demonstrated", goal=torch.full((1, 2), torch.nan))
    refused("n_candidates=0", n_candidates=0)
    refused("rounds=-1", rounds=-1)
    refused("noise=0 to begin at", restarts=(0.0,))
    policy.action_frame = Position(n=5, n_action=2, observation="state", columns=[0, 1], action_columns=[0, 1])
    refused("policy.action_frame")
