"""The expert's model of pushing is the simulator's, its ways keep clear of the block, and it succeeds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion.envs.pusht.block import (
    FACES,
    FINGER,
    BlockPose,
    Ways,
    all_contacts,
    backed_off,
    crosses,
    on_face,
    pushed,
    room,
)
from action_diffusion.envs.pusht.expert import GOAL, PushTExpert, cost_to_go
from action_diffusion.envs.pusht.simulator import PushT

ANYWHERE = (-1e9, 1e9)


def state_of(pose: BlockPose, finger: np.ndarray) -> np.ndarray:
    origin = pose.to_world(np.array([0.0, -45.0]))
    return np.array([*pose.to_world(finger), *origin, pose.angle])


@given(st.floats(0, 512), st.floats(0, 512), st.floats(-7, 7), st.floats(-200, 200), st.floats(-200, 200))
@settings(max_examples=30, deadline=None)
def test_frames_are_inverse(x: float, y: float, angle: float, u: float, v: float) -> None:
    pose = BlockPose.of(np.array([0.0, 0.0, x, y, angle]))
    point = np.array([u, v])
    np.testing.assert_allclose(pose.to_block(pose.to_world(point)), point, atol=1e-9)
    np.testing.assert_allclose(state_of(pose, point)[2:], [x, y, angle], atol=1e-9)


@pytest.mark.parametrize("face", range(len(FACES)))
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_pushes_move_the_simulated_block_as_predicted(face: int, share: float) -> None:
    length = float(np.linalg.norm(FACES[face, 1] - FACES[face, 0]))
    contact = on_face(face, np.array([share * length]))
    pose = BlockPose(np.array([256.0, 256.0]), 0.4)
    env = PushT()
    env.restore(state_of(pose, contact.at[0]))
    travels = np.linspace(0, 40, 21)[1:]
    for travel in travels:
        after = pushed(pose, contact, np.array(travel))
        env.step(after.to_world(contact.at)[0])
    for _ in range(10):
        env.step(after.to_world(contact.at)[0])
    got = BlockPose.of(env.observe(["state"])["state"].astype(np.float64))
    np.testing.assert_allclose(got.centre, after.centre[0], atol=1.5)
    (angle,) = np.asarray(after.angle)
    assert got.angle == pytest.approx(float(angle), abs=0.03)


def test_contacts_touch_and_are_outside() -> None:
    contacts = all_contacts(4.0)
    assert (room(contacts.at) >= FINGER - 1e-9).all()
    assert (room(contacts.at + contacts.push) < FINGER).all()


def test_room_and_crossing() -> None:
    assert room(np.array([0.0, -70.0])) == 25.0
    above, below = np.array([0.0, -100.0]), np.array([0.0, 120.0])
    left, left_below = np.array([-100.0, -100.0]), np.array([-100.0, 120.0])
    margin = np.array(19.0)
    assert crosses(above, below, margin)
    assert not crosses(left, left_below, margin)
    assert crosses(left, left_below, np.array(45.0))


@given(st.floats(-150, 150), st.floats(-150, 150))
@settings(max_examples=60, deadline=None)
def test_backing_off_keeps_far_points_and_frees_near_ones(x: float, y: float) -> None:
    point = np.array([x, y])
    if room(point) < FINGER:
        return
    moved = backed_off(point, 22.0)
    assert room(moved) >= min(room(point), 22.0 / np.sqrt(2)) - 1e-6
    if room(point) > 22.0:
        np.testing.assert_array_equal(moved, point)


@given(st.floats(-200, 200), st.floats(-200, 200), st.floats(-4, 4))
@settings(max_examples=30, deadline=None)
def test_ways_reach_every_contact_without_touching_the_block(x: float, y: float, angle: float) -> None:
    start = np.array([x, y])
    if room(start) < 20:
        return
    contacts = all_contacts(16.0)
    targets = contacts.at - 10.0 * contacts.push
    pose = BlockPose(np.array([256.0, 256.0]), angle)
    ways = Ways(start=start, targets=targets, pose=pose, arena=ANYWHERE)
    assert (ways.lengths.min(axis=0) < 1000).all()
    for way, target in np.argwhere(ways.lengths < 1000):
        points = np.array([start, *ways.path(target, way)])
        length = np.linalg.norm(np.diff(points, axis=0), axis=-1).sum()
        assert length <= ways.lengths[way, target] + 1e-6
        first = int(length < ways.lengths[way, target] - 1e-6)  # a corner was passed by: that leg may brush the T
        assert not crosses(points[first:-1], points[first + 1 :], np.array(FINGER)).any()


def test_cost_falls_towards_the_goal() -> None:
    assert cost_to_go(GOAL) == 0.0
    turned = BlockPose(np.stack([GOAL.centre] * 3), np.array(GOAL.angle) + np.array([0.1, 0.5, 3.0]))
    shifted = BlockPose(GOAL.centre + np.array([[3.0, 0.0], [30.0, 0.0], [150.0, 0.0]]), np.full(3, GOAL.angle))
    for poses in (turned, shifted):
        costs = cost_to_go(poses)
        assert (np.diff(costs) > 0).all()
        assert (costs > 0).all()


def episode(seed: int, start: int) -> tuple[float, np.ndarray, np.ndarray]:
    env, expert = PushT(), PushTExpert(seed=seed)
    env.reset(start)
    states, actions, score, done = [env.observe(["state"])["state"]], [], 0.0, False
    expert.reset()
    while not done:
        actions.append(expert.act({"state": states[-1]}))
        reward, done = env.step(actions[-1])
        score = max(score, reward)
        states.append(env.observe(["state"])["state"])
    return score, np.array(states), np.array(actions)


@pytest.mark.slow
def test_the_expert_succeeds_smoothly() -> None:
    runs = [episode(0, start) for start in range(100000, 100006)]
    assert np.mean([score for score, _, _ in runs]) >= 0.98
    assert np.median([len(actions) for _, _, actions in runs]) < 100
    for _, states, actions in runs:
        assert actions.dtype == np.float32
        assert actions.min() >= 0
        assert actions.max() <= 512
        speeds = np.linalg.norm(np.diff(states[:, :2], axis=0), axis=-1)
        assert speeds.max() < 30
        assert np.linalg.norm(actions - states[:-1, :2], axis=-1).max() <= 60 + 1e-3


def test_same_seed_same_episode_and_another_seed_may_go_round_the_other_way() -> None:
    score, states, actions = episode(3, 100000)
    again = episode(3, 100000)
    assert score == again[0]
    np.testing.assert_array_equal(states, again[1])
    np.testing.assert_array_equal(actions, again[2])
    # The block's foot points at the finger, which has to get behind it: as long to the left as to the right.
    behind = state_of(BlockPose(GOAL.centre + np.array([-60.0, 60.0]), GOAL.angle + 0.02), np.array([0.0, -150.0]))
    firsts = []
    for seed in range(12):
        expert = PushTExpert(seed=seed)
        expert.reset()
        firsts.append(BlockPose.of(behind).to_block(expert.act({"state": behind}))[0])
    assert min(firsts) < -1
    assert max(firsts) > 1


@given(st.floats(20, 490), st.floats(20, 490), st.floats(60, 450), st.floats(60, 450), st.floats(-4, 4))
@settings(max_examples=50, deadline=None)
def test_any_state_has_an_action(x: float, y: float, block_x: float, block_y: float, angle: float) -> None:
    action = PushTExpert(seed=0).act({"state": np.array([x, y, block_x, block_y, angle])})
    assert np.isfinite(action).all()
    assert ((action >= 0) & (action <= 512)).all()
