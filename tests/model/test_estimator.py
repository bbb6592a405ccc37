"""An estimated state: told from the embedding, never read from the observations, and used like one that is observed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY

from action_diffusion.errors import InputError
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.model import normalizer
from action_diffusion.policy.model.estimator import PlanarPose
from action_diffusion.policy.rtc import continuing, running_chunks
from action_diffusion.policy.spec import IN_FRAME, ActionSpec, ObservationSpec, PolicySpec

POSE: dict[str, Any] = {"pose": [2, 3, 4], "known": {"agent_pos": [0, 1]}, "low": 0.0, "high": 512.0}


def estimator() -> PlanarPose:
    torch.manual_seed(0)
    return PlanarPose(state="state", embedding_dim=6, n=5, **POSE)


def test_an_estimate_is_the_inverse_of_what_the_loss_asks_for():
    pose = torch.tensor([[100.0, 400.0, 2.0], [256.0, 30.0, -3.0]])
    state = torch.cat([torch.tensor([[7.0, 8.0], [9.0, 10.0]]), pose], dim=1)
    x_y = (pose[:, :2] - 256) / 256
    output = torch.cat([x_y, pose[:, 2:].sin(), pose[:, 2:].cos()], dim=1)
    assert estimator().loss(output, state) == 0
    obs = {"agent_pos": torch.stack([torch.zeros(2, 2), state[:, :2]], dim=1)}
    torch.testing.assert_close(estimator().estimate(3 * output - 2 * output, obs), state)
    longer = torch.cat([x_y, 5 * output[:, 2:]], dim=1)  # only the angle's direction counts
    torch.testing.assert_close(estimator().estimate(longer, obs), state)


@pytest.mark.parametrize(
    "change",
    [{"pose": [2, 3]}, {"known": {}}, {"known": {"agent_pos": [0, 2]}}, {"high": 0.0}],
)
def test_columns_and_ranges_are_checked(change):
    with pytest.raises(InputError, match="estimator planar_pose"):
        PlanarPose(state="state", embedding_dim=6, n=5, **POSE | change)


def make_policy():
    """Observes the finger and two numbers that hold the pose; a policy that estimates it, in the object's frame."""
    torch.manual_seed(0)
    spec = PolicySpec(
        observations={"agent_pos": ObservationSpec(shape=(2,)), "seen": ObservationSpec(shape=(3,))},
        estimates={"state": ObservationSpec(shape=(5,))},
        action=ActionSpec(shape=(2,)),
        n_obs_steps=2,
        horizon=8,
        n_action_steps=4,
        control_rate=10.0,
        normalizer={
            "agent_pos": normalizer.fit(np.array([[0.0] * 2, [512.0] * 2])),
            "seen": normalizer.fit(np.array([[-1.0] * 3, [1.0] * 3])),
            "state": normalizer.fit(np.array([[-512.0] * 6, [512.0] * 6])),
            "action": normalizer.fit(np.array([[0.0] * 2, [512.0] * 2])),
            IN_FRAME: normalizer.fit(np.array([[-300.0] * 2, [300.0] * 2])),
        },
    )
    config = {
        **TINY,
        "features": {"state": {"name": "sin_cos", "columns": [4]}},
        "action_frame": {"name": "planar_object", "observation": "state", "pose": [2, 3, 4]},
        "estimator": {"name": "planar_pose", "state": "state", **POSE},
    }
    return build_policy(config, PolicySpec.from_json(spec.to_json(), "here"))


def batch(n: int = 16):
    generator = torch.Generator().manual_seed(1)
    state = torch.rand(n, 2, 5, generator=generator) * torch.tensor([512.0, 512, 512, 512, 6]) - torch.tensor(
        [0.0, 0, 0, 0, 3]
    )
    seen = torch.cat([state[..., 2:4] / 256 - 1, state[..., 4:] / math.pi], dim=-1)
    action = state[:, -1:, 2:4] + torch.randn(n, 8, 2, generator=generator)
    return {"agent_pos": state[..., :2], "seen": seen, "state": state}, action


def test_the_recorded_state_is_a_target_and_no_input():
    policy, (obs, action) = make_policy().eval(), batch()
    other = {**obs, "state": obs["state"] + 50}
    observed = {key: obs[key] for key in policy.spec.observations}
    torch.testing.assert_close(policy.see(obs).condition, policy.see(observed).condition)
    noise = torch.randn(16, 8, 2, generator=torch.Generator().manual_seed(0))
    chunk, again = (policy.sample(o, noise=noise, generator=torch.Generator()).action for o in (other, observed))
    torch.testing.assert_close(chunk, again)
    losses = [policy(o, action, generator=torch.Generator().manual_seed(2)) for o in (obs, other)]
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_it_learns_to_tell_the_pose():
    policy, (obs, action) = make_policy(), batch()
    optimiser = torch.optim.Adam(policy.parameters(), 1e-2)
    for _ in range(200):
        optimiser.zero_grad()
        policy(obs, action, generator=torch.Generator().manual_seed(2)).backward()
        optimiser.step()
    found = policy.see(obs).obs["state"][:, 0]
    assert (found - obs["state"][:, -1])[:, 2:4].abs().mean() < 15
    assert torch.equal(found[:, :2], obs["agent_pos"][:, -1])


def test_what_cannot_be_estimated_is_named():
    policy = make_policy()
    for change, message in (
        ({"state": "stat"}, "policy.estimator.state"),
        ({"known": {"agent": [0, 1]}}, "policy.estimator.known"),
    ):
        config = {**TINY, "estimator": {"name": "planar_pose", "state": "state", **POSE} | change}
        with pytest.raises(InputError, match=message):
            build_policy(config, policy.spec)


def test_a_running_chunk_continues_in_the_estimated_frame():
    policy, (obs, _) = make_policy().eval(), batch(2)
    observed = {key: obs[key].numpy() for key in policy.spec.observations}
    running = [np.full((7, 2), 200.0, np.float32), None]
    hook = continuing(policy, running_chunks(policy, observed, running, [2, 0]))
    pose = policy.see({key: obs[key] for key in observed}).obs["state"]
    chunk = policy.unnormalize_action(hook.running, {"state": pose})
    torch.testing.assert_close(chunk[0, 1:], torch.full((7, 2), 200.0), atol=1e-2, rtol=0)
