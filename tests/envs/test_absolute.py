"""Absolute actions, made from relative ones, end where the recording did."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("robosuite", reason="needs the extra [robomimic]")

from action_diffusion.cli import main
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.envs.collect import collect
from action_diffusion.envs.robosuite.absolute import COLUMN, add_absolute
from action_diffusion.envs.robosuite.tasks import Manipulation
from action_diffusion.errors import InputError


@pytest.fixture(scope="module")
def lift(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lift") / "lift.zarr"
    collect(env_name="lift", episodes=2, seed=3, output=path)
    return path


def smooth(task: str, path: Path, *, steps: int, seed: int) -> None:
    """An episode of random smooth relative actions."""
    env = Manipulation(task=task, max_steps=10**9)
    random = np.random.default_rng(seed)
    times = np.arange(steps)[:, None] / 20
    waves = [
        np.sin(2 * np.pi * random.uniform(0.2, 1.0, env.action_shape) * times + random.uniform(0, 6, env.action_shape))
        for _ in range(2)
    ]
    actions = (0.3 * np.sum(waves, axis=0)).astype(np.float32)
    env.reset(seed)
    states, rewards = [], []
    for action in actions:
        states.append(env.state())
        rewards.append(env.step(action)[0])
    arrays = {"states": np.stack(states), "action": actions, "reward": np.array(rewards, np.float32)}
    ReplayBuffer.from_arrays(arrays, [steps], env.metadata()).save(path)
    env.close()


@pytest.mark.slow
def test_scripted_episodes_are_reproduced_with_a_small_drift(lift, tmp_path, capsys):
    out = tmp_path / "absolute.zarr"
    assert main(["data", "absolute", f"in={lift}", f"out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "recorded_successes: 2" in printed
    assert "replayed_successes: 2" in printed
    assert float(re.findall("drift_largest_m: (.*)", printed)[0]) < 1e-3
    before, after = ReplayBuffer.open(lift), ReplayBuffer.open(out)
    assert after[COLUMN].shape == (before.n_steps, 10)
    assert set(after.keys) == {*before.keys, COLUMN}
    np.testing.assert_array_equal(after["action"][:], before["action"][:])
    goals = after[COLUMN][:]
    assert np.linalg.norm(goals[:, :3] - after["robot0_eef_pos"][:], axis=1).max() < 0.05 * np.sqrt(3) + 1e-3
    np.testing.assert_allclose(np.linalg.norm(goals[:, 3:6], axis=1), 1.0, atol=1e-5)
    np.testing.assert_array_equal(goals[:, 9], before["action"][:, 6])
    assert after.attrs["env_args"] == before.attrs["env_args"]


@pytest.mark.slow
def test_two_arms_on_random_smooth_episodes(tmp_path):
    smooth("transport", tmp_path / "smooth.zarr", steps=20, seed=1)
    found = add_absolute(tmp_path / "smooth.zarr", tmp_path / "absolute.zarr")
    assert ReplayBuffer.open(tmp_path / "absolute.zarr")[COLUMN].shape == (20, 20)
    assert found["drift_largest_m"] < 1e-3


@pytest.mark.slow
def test_people_s_episodes_are_converted_and_their_drift_is_reported(tmp_path):
    folder = os.environ.get("ACTION_DIFFUSION_DATA")
    if not folder:
        pytest.skip("ACTION_DIFFUSION_DATA is not set: no demonstrations by people")
    source = Path(folder) / "robosuite_lift_human.hdf5"
    whole, short = tmp_path / "human.zarr", tmp_path / "short.zarr"
    words = [f"in={source}", f"out={whole}", "observations=robot0_eef_pos", "workers=1"]
    assert main(["data", "convert", *words]) == 0
    buffer = ReplayBuffer.open(whole)
    buffer.drop([1, 2])
    buffer.save(short)
    found = add_absolute(short, tmp_path / "absolute.zarr")
    assert found["steps"] == 482
    assert 0 < found["drift_mean_m"] < found["drift_largest_m"] < 0.2


@pytest.mark.parametrize(
    ("missing", "message"),
    [("env_args", "does not say what simulator"), ("states", "has no column states")],
)
def test_what_cannot_be_converted_is_refused(lift, tmp_path, missing, message):
    buffer = ReplayBuffer.open(lift)
    columns = {key: buffer[key][:] for key in buffer.keys if key != missing}
    attrs = {key: value for key, value in buffer.attrs.items() if key != missing}
    ReplayBuffer.from_arrays(columns, buffer.episode_ends, attrs).save(tmp_path / "bad.zarr")
    with pytest.raises(InputError, match=message):
        add_absolute(tmp_path / "bad.zarr", tmp_path / "absolute.zarr")
    assert not (tmp_path / "absolute.zarr").exists()
