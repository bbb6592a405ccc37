"""States to observations: every demo once, whatever is cut off, and in robomimic's layout afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from robomimic_files import MODEL, FakeObserver, h5py, rows, write_robomimic, write_robosuite

from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.robomimic.conversion import convert
from action_diffusion.datasets.robomimic.export import export
from action_diffusion.datasets.robomimic.file import describe
from action_diffusion.envs.robosuite.states import SimulatorObserver, state_keys, with_render_settings
from action_diffusion.errors import InputError


def assert_observed(path: Path, lengths: list[int]) -> None:
    buffer = ReplayBuffer.open(path)
    assert set(buffer.keys) == {"action", "states", "object", "agentview_image", "demo"}
    assert buffer.episode_ends.tolist() == np.cumsum(lengths).tolist()
    for number, (length, episode) in enumerate(zip(lengths, buffer.episodes(), strict=True), start=1):
        expected = rows(length, number)
        np.testing.assert_array_equal(episode["states"], expected["states"])
        np.testing.assert_array_equal(episode["action"], expected["actions"])
        shown = FakeObserver()(MODEL.format(number), expected["states"])
        for key, values in shown.items():
            np.testing.assert_array_equal(episode[key], values)
            assert episode[key].dtype == values.dtype


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_states_are_looked_at_through_the_simulator(tmp_path: Path, workers: int) -> None:
    source = write_robosuite(tmp_path / "a.hdf5", [5, 8, 3])
    convert(source, tmp_path / "a.zarr", observer=FakeObserver(), workers=workers)
    assert_observed(tmp_path / "a.zarr", [5, 8, 3])
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert buffer.attrs["layout"] == "robosuite"
    assert buffer.attrs["observed"] == {"keys": ["object"]}
    assert buffer.attrs["columns"]["object"] == "obs/object"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.hdf5", "a.zarr"]
    export(tmp_path / "a.zarr", tmp_path / "b.hdf5")
    with h5py.File(tmp_path / "b.hdf5") as file:
        assert set(file["data/demo_3/obs"]) == set(file["data/demo_3/next_obs"]) == {"object", "agentview_image"}
        assert file["data/demo_3"].attrs["num_samples"] == 3


@pytest.mark.slow
def test_what_was_rendered_is_not_rendered_again(tmp_path: Path) -> None:
    source, output = write_robosuite(tmp_path / "a.hdf5", [5, 8, 3]), tmp_path / "a.zarr"
    with pytest.raises(InputError, match="no graphics"):
        convert(source, output, observer=FakeObserver(bad=3), workers=1)
    assert not output.exists()
    convert(source, output, observer=FakeObserver(bad=5), workers=1)  # which was finished before
    assert_observed(output, [5, 8, 3])


def test_other_settings_render_anew(tmp_path: Path) -> None:
    source, output = write_robosuite(tmp_path / "a.hdf5", [5, 8, 3]), tmp_path / "a.zarr"
    with pytest.raises(InputError, match="no graphics"):
        convert(source, output, observer=FakeObserver(bad=3), workers=1)
    with pytest.raises(InputError, match="no graphics"):
        convert(source, output, observer=FakeObserver(settings={"keys": ["more"]}, bad=5), workers=1)


@pytest.mark.slow
def test_a_simulator_that_dies_is_reported(tmp_path: Path) -> None:
    source, output = write_robosuite(tmp_path / "a.hdf5", [5, 8, 3]), tmp_path / "a.zarr"
    with pytest.raises(InputError, match="a process with a simulator was killed"):
        convert(source, output, observer=FakeObserver(bad=3, error="kill"), workers=2)
    convert(source, output, observer=FakeObserver(), workers=1)
    assert_observed(output, [5, 8, 3])


@pytest.mark.parametrize(
    ("error", "message"),
    [("short", "data/demo_1/object has 4 rows, the states 5"), ("nan", "data/demo_1/object is NaN at row 0")],
)
def test_a_simulator_that_shows_something_else_is_refused(tmp_path: Path, error: str, message: str) -> None:
    source = write_robosuite(tmp_path / "a.hdf5", [5])
    with pytest.raises(InputError, match=message):
        convert(source, tmp_path / "a.zarr", observer=FakeObserver(bad=5, error=error), workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.hdf5"]


@pytest.mark.slow
def test_observations_are_added_to_those_of_the_file(tmp_path: Path) -> None:
    source = write_robomimic(tmp_path / "a.hdf5", [4, 6])
    with pytest.raises(InputError, match="has observations agentview_image already"):
        convert(source, tmp_path / "a.zarr", observer=FakeObserver(), workers=1)
    with h5py.File(source, "a") as file:
        for demo in file["data"].values():
            del demo["obs/object"], demo["obs/agentview_image"]
    summary = convert(source, tmp_path / "a.zarr", observer=FakeObserver(), workers=1)
    assert summary["subsets"] == "train (1), valid (1)"
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert {"object", "robot0_gripper_qpos", "agentview_image", "reward", "done"} <= set(buffer.keys)
    assert buffer.attrs["subsets"] == {"train": ["demo_0"], "valid": ["demo_1"]}


def test_without_states_there_is_nothing_to_look_at(tmp_path: Path) -> None:
    source = write_robomimic(tmp_path / "a.hdf5")
    with h5py.File(source, "a") as file:
        for demo in file["data"].values():
            del demo["states"]
    with pytest.raises(InputError, match="has no states: the simulator cannot show"):
        convert(source, tmp_path / "a.zarr", observer=FakeObserver())


def test_default_observations_are_those_of_every_arm() -> None:
    one = ("object", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
    for robots in ("Panda", ["Panda"]):
        assert state_keys({"env_kwargs": {"robots": robots}}) == one
    two = state_keys({"env_kwargs": {"robots": ["Panda", "Panda"]}})
    assert two == (*one, "robot1_eef_pos", "robot1_eef_quat", "robot1_gripper_qpos")


@pytest.mark.slow
def test_the_real_simulator_shows_the_human_demonstrations(tmp_path: Path) -> None:
    pytest.importorskip("robosuite", reason="the extra [robomimic] is not installed")
    pytest.importorskip("action_diffusion.envs.robosuite.tasks", reason="there is no such environment yet")
    folder = os.environ.get("ACTION_DIFFUSION_DATA")
    if not folder:
        pytest.skip("ACTION_DIFFUSION_DATA is not set")
    source = tmp_path / "a.hdf5"
    with h5py.File(Path(folder) / "robosuite_lift_human.hdf5") as human, h5py.File(source, "w") as file:
        data = file.create_group("data")
        data.attrs.update(human["data"].attrs)
        demo = data.create_group("demo_1")
        demo.attrs["model_file"] = human["data/demo_1"].attrs["model_file"]
        for name in ("states", "actions"):
            demo[name] = human[f"data/demo_1/{name}"][:20]
    layout = with_render_settings(describe(source))
    observer = SimulatorObserver(layout.env_args, state_keys(layout.env_args))
    convert(layout, tmp_path / "a.zarr", observer=observer, workers=1)
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    # A state is the time, the joints of arm (7) and gripper (2), then the cube's position.
    np.testing.assert_allclose(buffer["object"][:, :3], buffer["states"][:, 10:13], atol=1e-6)
    np.testing.assert_allclose(buffer["robot0_gripper_qpos"][:], buffer["states"][:, 8:10], atol=1e-6)
    assert buffer.attrs["env_args"]["render"] == buffer.attrs["observed"]["render"]
    assert buffer.attrs["observed"]["robosuite"].startswith("1.")
