"""PushT is the paper's: its starts, its physics, its pictures, its score."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from gym_pusht.envs.pusht import PushTEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from action_diffusion import envs
from action_diffusion.envs.pusht.simulator import PushT, initial_state, keypoints, render_states
from action_diffusion.errors import InputError

GOAL = np.array([100.0, 100.0, 256.0, 256.0, np.pi / 4])


@pytest.fixture(scope="module")
def human() -> Any:
    folder = os.environ.get("ACTION_DIFFUSION_DATA")
    if not folder:
        pytest.skip("ACTION_DIFFUSION_DATA is not set: no human demonstrations to compare with")
    path = Path(folder) / "pusht_cchi_v7_replay.zarr.zip"
    return zarr.open_group(zarr.storage.ZipStore(path, mode="r"), mode="r")


def test_starts_are_the_papers() -> None:
    np.testing.assert_allclose(initial_state(100000), [235, 124, 335, 128, -0.90492743], atol=1e-8)
    np.testing.assert_allclose(initial_state(100002), [159, 417, 295, 339, -6.11461674], atol=1e-8)
    env = PushT()
    env.reset(100000)
    state = env.observe(["state"])["state"]
    # The angle is set after the position and turns the block about its centre of gravity.
    angle = -0.90492743
    block = [335 + 45 * np.sin(angle), 128 + 45 - 45 * np.cos(angle)]
    np.testing.assert_allclose(state, [235, 124, *block, angle + 2 * np.pi], rtol=1e-6)


def test_the_same_seed_is_the_same_episode_and_reset_forgets() -> None:
    env, runs = PushT(), []
    for _ in range(2):
        env.reset(5)
        env.step(np.array([300.0, 300.0]))
        runs.append(env.observe(["state", "image"]))
    np.testing.assert_array_equal(runs[0]["state"], runs[1]["state"])
    np.testing.assert_array_equal(runs[0]["image"], runs[1]["image"])


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(InputError, match="seeds run from 0"):
        initial_state(seed)


@pytest.mark.slow
def test_human_episodes_replay(human: Any) -> None:
    states, actions = human["data/state"][:], human["data/action"][:]
    ends = human["meta/episode_ends"][:]
    env, start, scores = PushT(), 0, []
    for episode, end in enumerate(ends):
        env.reset(episode)
        replayed, score = [], 0.0
        for action in actions[start:end]:
            replayed.append(env.observe(["state"])["state"])
            score = max(score, env.step(action)[0])
        np.testing.assert_allclose(replayed, states[start:end], atol=1e-3)
        scores.append(score)
        start = end
    assert len(scores) == 206
    assert np.mean(scores) == pytest.approx(0.947, abs=5e-4)
    assert scores.count(1.0) == 7


@pytest.mark.slow
def test_recorded_states_look_as_recorded(human: Any) -> None:
    rows = slice(0, 640)  # the file's chunks hold 161 pictures
    pictures, states = human["data/img"][rows], human["data/state"][rows]
    error = np.abs(render_states(states).astype(np.float32) - pictures).mean(axis=(1, 2, 3))
    assert error.mean() < 0.1
    assert error.max() < 0.3


def test_keypoints_are_the_human_files(human: Any) -> None:
    error = np.abs(keypoints(human["data/state"][:]) - human["data/keypoint"][:])
    assert error.mean() < 0.02  # the file keeps those of a moment earlier: up to 2 px apart in motion
    assert np.quantile(error, 0.99) < 0.2


@given(st.integers(0, 2**32 - 1), st.lists(st.floats(0, 512), min_size=2, max_size=2))
@settings(max_examples=20, deadline=None)
def test_restore_puts_a_recorded_state_back(seed: int, action: list[float]) -> None:
    env, other = PushT(), PushT()
    env.reset(seed)
    for _ in range(3):
        reward, _ = env.step(np.array(action))
    now = env.observe(["state", "image", "keypoint", "agent_pos"])
    other.restore(now["state"])
    again = other.observe(["state", "image", "keypoint", "agent_pos"])
    for key, value in now.items():
        assert value.dtype == again[key].dtype
        assert np.abs(value.astype(np.float64) - again[key]).mean() < (0.1 if key == "image" else 1e-3)
    np.testing.assert_array_equal(render_states(now["state"][None])[0], again["image"])
    assert 0.0 <= reward <= 1.0


def test_steps_and_pictures_are_gym_pushts_to_the_last_bit() -> None:
    """A finger that pushes the block about, in the environment and in gym-pusht's own loop."""
    env, theirs, random = PushT(), PushTEnv(obs_type="state"), np.random.default_rng(0)
    env.reset(100003)
    theirs.reset(options={"reset_to_state": initial_state(100003)})
    moved = 0
    for _ in range(60):
        target = np.array(theirs.block.position) + random.uniform(-80, 80, 2)
        before = env._sim.block.angle
        reward, _ = env.step(target)
        _, their_reward, *_ = theirs.step(target)
        assert reward == pytest.approx(float(their_reward), abs=1e-12)  # which sums areas in any order
        assert np.array_equal(env._sim.get_obs(), theirs.get_obs())
        assert env._sim.agent.velocity == theirs.agent.velocity
        moved += env._sim.block.angle != before
    assert moved > 20
    expected = theirs._get_img(theirs._draw(), 96, 96)
    assert np.array_equal(env.observe(["image"])["image"], expected)


def test_image_is_gym_pushts_own() -> None:
    env = PushT()
    env.reset(3)
    np.testing.assert_array_equal(env.observe(["image"])["image"], env._sim._get_img(env._sim._draw(), 96, 96))


def test_reward_is_full_and_done_at_the_goal() -> None:
    env = PushT()
    env.restore(GOAL)
    assert env.step(GOAL[:2]) == (1.0, True)
    shifted = GOAL + np.array([0, 0, 10, 0, 0])
    env.restore(shifted)
    reward, done = env.step(shifted[:2])
    assert 0.5 < reward < 1.0
    assert not done


def test_done_when_the_steps_are_over() -> None:
    env = PushT(max_steps=3)
    env.reset(0)
    action = env.observe(["agent_pos"])["agent_pos"]
    assert [env.step(action)[1] for _ in range(3)] == [False, False, True]
    env.reset(0)
    assert not env.step(action)[1]


@pytest.mark.parametrize("action", [[1.0], [[1.0, 2.0]], [np.nan, 1.0], [1.0, np.inf]])
def test_wrong_actions_are_refused(action: list[float]) -> None:
    env = PushT()
    with pytest.raises(InputError, match="two finite numbers"):
        env.step(np.array(action))


def test_observations_and_pictures() -> None:
    env = envs.make("pusht", image_size=64)
    env.reset(1)
    observed = env.observe(["image", "state"])
    assert list(observed) == ["image", "state"]
    assert observed["image"].shape == (64, 64, 3)
    assert observed["image"].dtype == np.uint8
    env.step(np.array([256.0, 256.0]))
    picture = env.render(256)
    assert picture.shape == (256, 256, 3)
    assert tuple(picture[128, 128]) == (255, 0, 0)  # the target's cross
    with pytest.raises(InputError, match="did you mean image"):
        env.observe(["imgae"])
    env.close()


def test_unknown_environment() -> None:
    with pytest.raises(InputError, match="unknown environment 'puhst': did you mean pusht"):
        envs.make("puhst")


def test_a_drifted_actuator_aims_beside_every_target() -> None:
    plain, drifted = PushT(), PushT(actuator_drift=30.0)
    drifts = []
    for seed in range(3):
        drifted.reset(seed)
        plain.reset(seed)
        drift = drifted.observe(["drift"])["drift"].astype(np.float64)
        drifts.append(drift)
        first, second = (env.observe(["last_action"])["last_action"] for env in (plain, drifted))
        np.testing.assert_array_equal(first, second)
        for target in ([200.0, 210.0], [260.0, 300.0]):
            plain.step(np.array(target))
            drifted.step(np.array(target) - drift)
            np.testing.assert_allclose(drifted.observe(["last_action"])["last_action"], target - drift, rtol=1e-6)
        first, second = (env.observe(["state"])["state"] for env in (plain, drifted))
        np.testing.assert_allclose(first, second, atol=1e-3)
    assert not np.allclose(drifts[0], drifts[1])
    drifted.reset(0)
    np.testing.assert_array_equal(drifted.observe(["drift"])["drift"], np.float32(drifts[0]))
    assert not plain.observe(["drift"])["drift"].any()
