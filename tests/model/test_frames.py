"""Action frames: there and back, and what a policy in a frame no longer has to learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from action_diffusion.errors import InputError
from action_diffusion.policy.build import build_policy
from action_diffusion.policy.model.features import PlanarObject as PlanarFeature
from action_diffusion.policy.model.frames import PlanarObjectFrame, Position

PLANAR = {"name": "planar_object", "observation": "state", "pose": [2, 3, 4]}
POSITION = {"name": "position", "observation": "state", "columns": [0, 1], "action_columns": [0, 1]}
FRAMES = {
    "planar": PlanarObjectFrame(observation="state", pose=[2, 3, 4], n=5, n_action=2),
    "position": Position(observation="state", columns=[3, 0], action_columns=[0, 1], n=5, n_action=2),
}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(sorted(FRAMES)))
def test_there_and_back(seed, name):
    generator = torch.Generator().manual_seed(seed)
    action = 500 * torch.randn(3, 8, 2, generator=generator)
    now = torch.tensor([200.0, 200, 200, 200, 6]) * torch.randn(3, 5, generator=generator)
    frame = FRAMES[name]
    torch.testing.assert_close(frame.leave(frame.enter(action, now), now), action, atol=1e-2, rtol=1e-4)


def test_the_planar_frame_is_the_inverse_of_the_pose():
    now = torch.tensor([[0.0, 0.0, 100.0, 50.0, 0.7]])
    beside = torch.tensor([[[30.0, -20.0], [0.0, 0.0]]])
    turn = Rotation.from_euler("z", 0.7).as_matrix()[:2, :2]
    world = beside.numpy() @ turn.T + [100, 50]
    np.testing.assert_allclose(FRAMES["planar"].leave(beside, now), world, atol=1e-4)


def test_a_position_frame_leaves_the_other_action_columns_alone():
    frame = Position(observation="arm", columns=[0, 1, 2], action_columns=[0, 1, 2], n=7, n_action=4)
    action = torch.arange(8.0).view(1, 2, 4)
    entered = frame.enter(action, torch.full((1, 7), 10.0))
    assert entered.tolist() == [[[-10, -9, -8, 3], [-6, -5, -4, 7]]]


def test_landmarks_are_where_the_object_sees_them():
    feature = PlanarFeature(n=3, pose=[0, 1, 2], points=[], landmarks=[[10.0, 0.0]])
    seen = feature(torch.tensor([[0.0, 0.0, np.pi / 2], [10.0, 0.0, 0.3]]))
    assert feature.output_dim == seen.shape[1]
    np.testing.assert_allclose(seen[:, -2:], [[0, -10], [0, 0]], atol=1e-5)


def test_a_policy_in_the_frame_of_an_object_acts_alike_wherever_the_object_is(make_policy):
    """With nothing but what the object sees, moving everything moves the actions along."""
    seen = {"name": "planar_object", "pose": [2, 3, 4], "points": [], "relative": [0, 1]}
    policy = make_policy(action_frame=PLANAR, features={"state": seen})
    with torch.no_grad():  # the last two features are the finger in the object's frame: blind to all others
        policy.normalizer.state__scale[:-2] = 0.0
    state = torch.tensor([[30.0, -20.0, 0.0, 0.0, 0.0]] * 2)
    angle, offset = 0.9, torch.tensor([40.0, 60.0])
    turn = torch.tensor(Rotation.from_euler("z", angle).as_matrix()[:2, :2], dtype=torch.float32)
    moved = torch.cat([state[:, :2] @ turn.T + offset, offset.expand(2, 2), torch.full((2, 1), angle)], dim=1)
    noise = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(0))
    here = policy.sample({"state": state[None]}, noise=noise).action
    there = policy.sample({"state": moved[None]}, noise=noise).action
    torch.testing.assert_close(there, here @ turn.T + offset, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("frame", [None, PLANAR, POSITION], ids=str)
def test_chunks_are_normalised_within_the_clip_range_and_back(make_policy, buffer, frame):
    policy = make_policy(action_frame=frame)
    obs = {"state": torch.from_numpy(np.stack([buffer["state"][4:6], buffer["state"][50:52]]))}
    action = torch.from_numpy(np.stack([buffer["action"][4:12], buffer["action"][50:58]]))
    normalized = policy.normalize_action(action, obs)
    assert normalized.abs().max() <= 1.0001
    torch.testing.assert_close(policy.unnormalize_action(normalized, obs), action, atol=1e-3, rtol=1e-4)
    twice = policy.unnormalize_action(normalized.repeat_interleave(2, dim=0), obs)  # as for n_samples=2
    torch.testing.assert_close(twice, action.repeat_interleave(2, dim=0), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ({**PLANAR, "observation": "stat"}, "unknown state in policy.action_frame.observation 'stat'"),
        ({**PLANAR, "pose": [2, 3, 5]}, "column 5 does not exist in an observation of 5 values"),
        ({**PLANAR, "pose": [2, 3]}, "pose takes three columns"),
        ({**POSITION, "action_columns": [0]}, "2 columns for 1 action_columns"),
        ({**POSITION, "action_columns": [0, 2]}, "column 2 does not exist in an action of 2 values"),
        ({**PLANAR, "name": "polar"}, "unknown action_frame.name 'polar'"),
    ],
)
def test_what_does_not_fit_is_refused(make_policy, frame, message):
    with pytest.raises(InputError, match=message):
        make_policy(action_frame=frame)


def test_a_frame_without_its_statistics_is_refused(make_policy, tiny_config):
    policy = make_policy()
    with pytest.raises(InputError, match="no normaliser statistics for 'action_in_frame'"):
        build_policy(tiny_config | {"action_frame": PLANAR}, policy.spec)
