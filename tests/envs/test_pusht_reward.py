"""PushT's reward from recorded states is the simulator's."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from action_diffusion.datasets.batches.sources import open_data
from action_diffusion.envs.pusht.reward import coverage, rewards
from action_diffusion.envs.pusht.simulator import PushT


def test_coverage_of_poses_that_are_known() -> None:
    goal, turn = np.array([0, 0, 256, 256, np.pi / 4]), np.array([0, 0, 0, 0, 2 * np.pi])
    moved = np.array([0, 0, *(256 + 15 * np.array([1, 1]) / np.sqrt(2)), np.pi / 4])  # along the bar, by 15 px
    away = np.array([0, 0, 60, 60, 0.0])
    bar, stem = 120 * 30, 30 * 90
    expected = [1, 1, (bar - 15 * 30 + stem - 15 * 90) / (bar + stem), 0]
    np.testing.assert_allclose(coverage(np.stack([goal, goal + turn, moved, away])), expected, atol=1e-12)
    assert coverage(np.empty((0, 5))).shape == (0,)


def test_coverage_is_the_simulators() -> None:
    random, env = np.random.default_rng(0), PushT()
    states = np.column_stack([np.full((200, 2), 30.0), 256 + random.normal(0, 40, (200, 2)), random.normal(0, 2, 200)])
    found = []
    for state in states:
        env.restore(state)
        found.append(env._sim._get_coverage())
    assert np.ptp(found) > 0.4
    np.testing.assert_allclose(coverage(states), found, atol=1e-9)


def test_a_finger_that_pushes_is_restored_with_its_velocity() -> None:
    """The block moves as it did, and is not flung away."""
    env = PushT()
    env.reset(3)
    env.restore(np.array([150.0, 245.0, 256.0, 256.0, np.pi / 4]))
    for _ in range(6):
        before, velocity = env.observe(["state"])["state"], env.velocity
        reward, _ = env.step(np.array([300.0, 300.0]))
    after = env.observe(["state"])["state"]
    assert abs(after - before)[2:4].max() > 0.5, "the finger has to push here"
    env.restore(before, velocity)
    assert env.step(np.array([300.0, 300.0]))[0] == pytest.approx(reward, abs=0.02)
    np.testing.assert_allclose(env.observe(["state"])["state"], after, atol=1.0)


def test_rewards_are_what_each_action_earned() -> None:
    """Of episodes of the simulator itself; the last action's is found although no state was recorded after it."""
    demos = open_data("pusht_expert")
    first, states, actions, earned, ends = 0, [], [], [], []
    for end in demos.episode_ends[:3]:
        env, done = PushT(), False
        env.restore(demos["state"][first])
        for action in demos["action"][first:end]:
            states.append(env.observe(["state"])["state"])
            actions.append(action)
            reward, done = env.step(action)
            earned.append(reward)
            if done:
                break
        first = end
        ends.append(len(states))
    found = rewards(np.stack(states), np.stack(actions), np.array(ends))
    last = np.array(ends) - 1
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.delete(found, last), np.delete(earned, last), atol=1e-6)
    np.testing.assert_allclose(found[last], np.array(earned)[last], atol=1e-3)
    assert (found[last] == 1).tolist() == [reward == 1 for reward in np.array(earned)[last]]


@pytest.mark.slow
def test_people_s_episodes_take_seconds() -> None:
    folder = os.environ.get("ACTION_DIFFUSION_DATA")
    if not folder:
        pytest.skip("ACTION_DIFFUSION_DATA is not set: no human demonstrations")
    store = zarr.storage.ZipStore(Path(folder) / "pusht_cchi_v7_replay.zarr.zip", mode="r")
    group: Any = zarr.open_group(store, mode="r")
    ends = np.asarray(group["meta/episode_ends"][:])
    found = rewards(np.asarray(group["data/state"][:]), np.asarray(group["data/action"][:]), ends)
    assert len(found) == 25_650
    assert np.maximum.reduceat(found, np.concatenate([[0], ends[:-1]])).mean() == pytest.approx(0.95, abs=0.03)
