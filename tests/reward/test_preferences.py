"""Preferences: what the loss is where it is known, and which way a step of it goes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny import demonstrations, tiny_policy

from action_diffusion.errors import InputError
from action_diffusion.training.reward.preferences import majority, preference_loss


def test_most_scorers_decide_and_a_divided_vote_does_not_count():
    votes = torch.tensor([[0.1, -5.0, 2.0, 0.0], [3.0, 0.2, -9.0, 0.0], [-90.0, -1.0, 0.0, 0.0]])
    assert majority(votes).tolist() == [1.0, -1.0, 0.0, 0.0]


def test_the_loss_begins_at_the_logarithm_of_two_and_a_step_prefers_what_was_chosen():
    policy = tiny_policy(demonstrations())
    reference = copy.deepcopy(policy).requires_grad_(False)
    random = torch.Generator().manual_seed(0)
    obs = {"state": 100 + torch.randn(16, 2, 5, generator=random)}
    first, second = (100 + place + torch.randn(16, 8, 2, generator=random) for place in (2.0, -2.0))

    def loss(preferred: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return preference_loss(policy, reference, obs, first, second, preferred, generator=generator)

    ones = torch.ones(16)
    assert float(loss(ones).detach()) == pytest.approx(math.log(2), abs=1e-5)
    assert float(loss(torch.zeros(16)).detach()) == 0.0
    optimizer = torch.optim.Adam(policy.denoiser.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        loss(ones).backward()
        optimizer.step()
    assert float(loss(ones).detach()) < math.log(2) - 0.05
    assert float(loss(-ones).detach()) > math.log(2) + 0.05


def test_a_policy_that_is_told_two_times_is_refused():
    policy = tiny_policy(
        demonstrations(),
        process={"name": "flow"},
        objective={"name": "flow_map"},
        sampler={"scheduler": "flow", "num_inference_steps": 1},
    )
    chunk = torch.zeros(1, 8, 2)
    with pytest.raises(InputError, match="two times"):
        preference_loss(policy, policy, {"state": torch.zeros(1, 2, 5)}, chunk, chunk, torch.ones(1))
