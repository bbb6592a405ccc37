"""HDF5 as people have it: other names, values a demo, words, no simulator. The rows arrive, the rest is said."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from robomimic_files import ENV_ARGS, contents, h5py, rows, write_robomimic

from action_diffusion.commands import data_convert
from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.robomimic.attributes import subset, task_words
from action_diffusion.datasets.robomimic.conversion import convert
from action_diffusion.datasets.robomimic.export import export
from action_diffusion.datasets.robomimic.file import describe
from action_diffusion.errors import InputError

LENGTHS = [5, 8, 3]
CASES = Path(os.environ.get("ACTION_DIFFUSION_DATA", "none")).parent / "cases"
NO_CASES = "no folder cases/ beside ACTION_DIFFUSION_DATA"


def changed(path: Path, change: Callable[[Any, int], None]) -> Path:
    """A file in robomimic's layout of which `change` got each demo and its number."""
    write_robomimic(path, LENGTHS)
    with h5py.File(path, "a") as file:
        for number in range(len(LENGTHS)):
            change(file["data"][f"demo_{number}"], number)
    return path


def edited(path: Path, change: Callable[[Any], None]) -> Path:
    write_robomimic(path, LENGTHS)
    with h5py.File(path, "a") as file:
        change(file)
    return path


# What lies beside the rows.


def beside(demo: Any, number: int) -> None:
    """What Isaac Lab, MimicGen, LIBERO and user scripts keep in a demo."""
    length = LENGTHS[number]
    demo["initial_state/robot/joint_position"] = np.zeros((1, 6), np.float32)
    demo["length"] = length
    demo["obs/intrinsics"] = np.eye(3)
    demo["src_demo_inds"] = np.arange(2 + number)
    demo["name"] = "somebody's"
    demo["obs/subtask"] = np.array([b"reach", b"grasp"] * 8)[:length]
    demo["obs/points"] = np.zeros(length, [("x", "f4"), ("y", "f4")])
    demo["obs/phase"] = np.zeros(length, np.complex64)
    demo["obs/nothing"] = h5py.Empty("f4")
    demo.create_dataset("obs/ragged", (length,), h5py.vlen_dtype(np.float32))
    demo.attrs["box"] = h5py.Empty("f4")


@pytest.mark.slow
def test_what_is_no_row_is_left_out_and_said(tmp_path: Path) -> None:
    summary = convert(changed(tmp_path / "a.hdf5", beside), tmp_path / "a.zarr")
    assert set(ReplayBuffer.open(tmp_path / "a.zarr").keys) == {*describe(tmp_path / "a.hdf5").columns, "demo"}
    assert "obs/object" in ReplayBuffer.open(tmp_path / "a.zarr").attrs["columns"].values()
    said = summary["left_out"]
    assert "length, initial_state/robot/joint_position" in said or "initial_state/robot/joint_position, length" in said
    assert "(one value a demo)" in said
    assert "obs/intrinsics, src_demo_inds (not one row a step)" in said
    assert "name, obs/subtask (text)" in said
    assert "obs/points (no numbers: a record)" in said
    assert "obs/phase (no numbers: complex64)" in said
    assert "obs/ragged (no numbers: object)" in said
    assert "data/demo_0's attribute box" in said


@pytest.mark.slow
def test_every_kind_of_number_arrives(tmp_path: Path) -> None:
    kinds = ["f2", "f4", "f8", ">f4", "i1", "u2", ">i4", "u8", "?"]

    def add(demo: Any, number: int) -> None:
        random = np.random.default_rng(number)
        for kind in kinds:
            values = random.integers(0, 2, (LENGTHS[number], 2)).astype(kind)
            demo.create_dataset(f"obs/kind{kinds.index(kind)}", data=values)
        demo["obs/chw"] = random.integers(0, 256, (LENGTHS[number], 3, 4, 6), dtype=np.uint8)
        demo.create_dataset(
            "obs/packed", data=random.normal(size=(LENGTHS[number], 6)), compression="lzf", shuffle=True
        )

    source = changed(tmp_path / "a.hdf5", add)
    convert(source, tmp_path / "a.zarr")
    buffer, expected = ReplayBuffer.open(tmp_path / "a.zarr"), contents(source)
    for key in [*(f"kind{index}" for index in range(len(kinds))), "chw", "packed"]:
        values = np.concatenate([expected[f"data/demo_{number}/obs/{key}"] for number in range(3)])
        assert buffer[key].dtype == values.dtype.newbyteorder("=")
        np.testing.assert_array_equal(buffer[key][:], values)


@pytest.mark.parametrize("path", ["obs/object", "states"])
def test_a_row_after_the_last_action_is_left_out(tmp_path: Path, path: str) -> None:
    longer = [np.concatenate([rows(length, number)[path], np.full((1, 1), 9.0).repeat(10 if "obs" in path else 32, 1)])
              for number, length in enumerate(LENGTHS)]  # fmt: skip

    def lengthen(demo: Any, number: int) -> None:
        del demo[path]
        demo[path] = longer[number]

    summary = convert(changed(tmp_path / "a.hdf5", lengthen), tmp_path / "a.zarr")
    assert f"{path}[-1] (the row after the last action)" in summary["left_out"]
    column = ReplayBuffer.open(tmp_path / "a.zarr")[path.removeprefix("obs/")]
    np.testing.assert_array_equal(column[:], np.concatenate([values[:-1] for values in longer]))


@pytest.mark.slow
def test_versions_of_the_action_are_not_observations(tmp_path: Path) -> None:
    paths = {
        "action_dict/abs_pos": "action_dict.abs_pos",
        "actions_abs": "actions_abs",
        "processed_actions": "action.processed_actions",
        "obs/actions": "actions",
        "datagen_info/gripper_action": "action.datagen_info.gripper_action",
        "datagen_info/target_pose": "action.datagen_info.target_pose",
        "datagen_info/eef_pose": "datagen_info.eef_pose",
    }

    def add(demo: Any, number: int) -> None:
        for index, path in enumerate(paths):
            demo[path] = np.full((LENGTHS[number], 2), index + number / 10)

    convert(changed(tmp_path / "a.hdf5", add), tmp_path / "a.zarr")
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    for index, (path, column) in enumerate(paths.items()):
        assert buffer.attrs["columns"][column] == path
        np.testing.assert_array_equal(buffer.episode(2)[column], np.full((3, 2), index + 0.2))


@pytest.mark.slow
def test_rows_that_were_never_written_are_said(tmp_path: Path) -> None:
    def unwritten(path: str) -> Callable[[Any], None]:
        def change(file: Any) -> None:
            shape = file[path].shape
            del file[path]
            file.create_dataset(path, shape, "f8", chunks=(1, *shape[1:]))[0] = 1

        return change

    summary = convert(edited(tmp_path / "a.hdf5", unwritten("data/demo_1/rewards")), tmp_path / "a.zarr")
    assert "rows of rewards (never written: they are the file's fill value)" in summary["left_out"]
    assert ReplayBuffer.open(tmp_path / "a.zarr").episode(1)["reward"].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    with pytest.raises(InputError, match="data/demo_1/actions has rows that were never written"):
        describe(edited(tmp_path / "b.hdf5", unwritten("data/demo_1/actions")))


# Words.


def as_dataset(demo: Any, number: int) -> None:
    demo["language_instruction"] = f"task {number % 2}"


def as_attribute(demo: Any, number: int) -> None:
    demo.attrs["language_instruction"] = f"task {number % 2}"


def as_rows(demo: Any, number: int) -> None:
    demo["obs/lang"] = np.array([f"task {number % 2}".encode()] * LENGTHS[number])


@pytest.mark.slow
@pytest.mark.parametrize("say", [as_dataset, as_attribute, as_rows])
def test_a_task_in_words_belongs_to_the_episode(tmp_path: Path, say: Callable[[Any, int], None]) -> None:
    summary = convert(changed(tmp_path / "a.hdf5", say), tmp_path / "a.zarr")
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert summary["tasks"] == "'task 0', 'task 1'"
    assert "left_out" not in summary
    assert buffer.attrs["tasks"] == ["task 0", "task 1"]
    assert buffer["task_index"][:].tolist() == [0] * 5 + [1] * 8 + [0] * 3
    assert task_words(buffer) == ["task 0", "task 1", "task 0"]
    buffer.drop([0])
    export(tmp_path / "a.zarr", tmp_path / "b.hdf5")
    assert task_words(ReplayBuffer.open(tmp_path / "a.zarr")) == ["task 1", "task 0"]
    found = contents(tmp_path / "b.hdf5")
    assert found["data/demo_1/language_instruction"] == b"task 1"
    assert "data/demo_1/obs/task_index" not in found


def test_one_task_for_all_is_one_text(tmp_path: Path) -> None:
    def libero(file: Any) -> None:
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": "open the drawer"})

    convert(edited(tmp_path / "a.hdf5", libero), tmp_path / "a.zarr")
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert buffer.attrs["tasks"] == ["open the drawer"]
    assert "task_index" not in buffer
    assert task_words(buffer) == ["open the drawer"] * 3


# Names.


def observations(demo: Any) -> None:
    demo.move("obs", "observations")
    demo.move("next_obs", "next_observations")


@pytest.mark.parametrize("group", ["data/", ""])
@pytest.mark.parametrize("name", ["episode_{}", "traj_{}", "demo_{:06d}", "ep{}", "{}"])
def test_demos_and_observations_may_have_other_names(tmp_path: Path, group: str, name: str) -> None:
    lengths = [3, 2, 4, 1, 2, 3, 2, 2, 1, 3, 5]
    write_robomimic(tmp_path / "a.hdf5", lengths)
    with h5py.File(tmp_path / "a.hdf5", "a") as file:
        del file["mask"]
        for number in range(len(lengths)):
            observations(file[f"data/demo_{number}"])
            file.move(f"data/demo_{number}", group + name.format(number))
        if not group:
            del file["data"]
    layout = describe(tmp_path / "a.hdf5")
    assert layout.demos == [name.format(number) for number in range(len(lengths))]  # 10 comes after 9
    assert np.diff(layout.ends, prepend=0).tolist() == lengths
    assert layout.columns["object"].path == "observations/object"
    assert layout.has_observations


def test_other_names_go_back_as_robomimic_s(tmp_path: Path) -> None:
    def rename(file: Any) -> None:
        for number in range(3):
            observations(file[f"data/demo_{number}"])
            file.move(f"data/demo_{number}", f"data/episode_{number}")
        file["mask/valid"][:] = b"demo_2"
        del file["mask"]
        file["mask/few"] = np.array([b"episode_0", b"episode_2"])

    convert(edited(tmp_path / "a.hdf5", rename), tmp_path / "a.zarr")
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert subset(buffer, "few").tolist() == [0, 2]
    export(tmp_path / "a.zarr", tmp_path / "b.hdf5")
    found, expected = contents(tmp_path / "b.hdf5"), contents(tmp_path / "a.hdf5")
    assert found["mask/few"].tolist() == [b"demo_0", b"demo_2"]
    assert found["data/demo_1.num_samples"] == 8
    for number in range(3):
        values = expected[f"data/episode_{number}/observations/object"]
        np.testing.assert_array_equal(found[f"data/demo_{number}/obs/object"], values)


def test_actions_may_be_called_action_and_have_one_axis(tmp_path: Path) -> None:
    def change(demo: Any, number: int) -> None:
        del demo["actions"]
        demo["action"] = np.arange(LENGTHS[number]) + 0.5
        del demo.attrs["num_samples"]

    convert(changed(tmp_path / "a.hdf5", change), tmp_path / "a.zarr")
    assert ReplayBuffer.open(tmp_path / "a.zarr").episode(2)["action"].tolist() == [0.5, 1.5, 2.5]


# No simulator.


@pytest.mark.slow
@pytest.mark.parametrize("env_args", [None, "", "{}", "null", '{"type": 3}'])
def test_a_real_robot_names_no_simulator(tmp_path: Path, env_args: str | None) -> None:
    def change(file: Any) -> None:
        del file["data"].attrs["env_args"]
        if env_args is not None:
            file["data"].attrs["env_args"] = env_args

    source = edited(tmp_path / "a.hdf5", change)
    data_convert.run({"in": str(source), "out": str(tmp_path / "a.zarr")})
    assert "env_args" not in ReplayBuffer.open(tmp_path / "a.zarr").attrs
    with pytest.raises(InputError, match="observations= has robosuite render its states"):
        data_convert.run({"in": str(source), "out": str(tmp_path / "b.zarr"), "observations": "object"})
    data_convert.run({"in": str(tmp_path / "a.zarr"), "out": str(tmp_path / "b.hdf5")})
    assert contents(tmp_path / "b.hdf5")["data/demo_1/actions"].shape == (8, 7)


@pytest.mark.slow
def test_a_simulator_without_settings_goes_back(tmp_path: Path) -> None:
    bare = {"env_name": "Isaac-Stack-Cube-v0", "type": 2}
    source = edited(tmp_path / "a.hdf5", lambda file: file["data"].attrs.__setitem__("env_args", json.dumps(bare)))
    convert(source, tmp_path / "a.zarr")
    assert ReplayBuffer.open(tmp_path / "a.zarr").attrs["env_args"] == bare
    export(tmp_path / "a.zarr", tmp_path / "b.hdf5")
    assert json.loads(contents(tmp_path / "b.hdf5")["data.env_args"]) == bare


@pytest.mark.slow
def test_what_is_no_demo_is_said(tmp_path: Path) -> None:
    def change(file: Any) -> None:
        file["data/info"] = np.zeros(3)
        file["data"].create_group("meta")

    assert describe(edited(tmp_path / "a.hdf5", change)).left_out == {"data/info": "no demo", "data/meta": "no demo"}
    both = edited(tmp_path / "b.hdf5", lambda file: file.move("data/demo_1", "data/episode_1"))
    with pytest.raises(InputError, match="holds both demo_<number> and episode_<number>"):
        describe(both)
    assert describe(write_robomimic(tmp_path / "c.hdf5")).env_args == ENV_ARGS


# Files in the shape of public reports.


def _cases() -> list[Path]:
    return sorted(CASES.glob("hdf5_*")) if CASES.is_dir() else []


@pytest.mark.slow
@pytest.mark.parametrize("case", _cases() or [None], ids=lambda case: case.name if case else "none")
def test_the_cases_arrive_as_they_are_stored(tmp_path: Path, case: Path | None) -> None:
    if case is None:
        pytest.skip(NO_CASES)
    source = next(path for path in sorted(case.iterdir()) if path.suffix == ".hdf5" or path.is_dir())
    data_convert.run({"in": str(source), "out": str(tmp_path / "a.zarr")})
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert np.diff(buffer.episode_ends, prepend=0).tolist() == [30] * 4
    for number in range(4):
        path = source / f"episode_{number}.hdf5" if source.is_dir() else source
        prefix = "" if source.is_dir() else f"data/{buffer.attrs['demos'][number]}/"
        stored, episode = contents(path), buffer.episode(number)
        for column, place in buffer.attrs["columns"].items():
            if "compressed" in case.name and "images" in place:  # see test_aloha
                assert episode[column].shape == (30, 32, 40, 3)
                continue
            np.testing.assert_array_equal(episode[column], stored[f"{prefix}{place}"][:30])
