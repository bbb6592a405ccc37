"""The inputs in ../shared/cases that are LeRobot's or CSV: what each one must become, or be refused with."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from action_diffusion.commands import data_convert
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError

pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra [parquet]")

CASES = Path(os.environ.get("ACTION_DIFFUSION_DATA", "")).parent / "cases"


def source(name: str) -> Path:
    folder = CASES / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}: ACTION_DIFFUSION_DATA names the folder beside it")
    return folder / "ds" if (folder / "ds").is_dir() else folder


def convert(name: str, tmp_path: Path, **options: str | float) -> tuple[dict[str, object], ReplayBuffer]:
    said = dict(data_convert.run({"in": str(source(name)), "out": str(tmp_path / "b.zarr"), **options}))
    return said, ReplayBuffer.open(tmp_path / "b.zarr")


def stored(name: str, column: str) -> np.ndarray:
    """A column of all parquet files, as it is stored."""
    files = sorted(source(name).glob("data/**/*.parquet"))
    return np.concatenate([np.stack(pq.read_table(file).column(column).to_pylist()) for file in files])


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("v3_nov", None),
        ("v3_next", "v3.1 is later than v3.0"),
        ("v3_fps_float", "the rows' timestamps are 10 Hz"),
        ("v3_fps_text", "the rows' timestamps are 10 Hz"),
        ("v3_tasks_none", "no words for the tasks"),
        ("v3_v2_templates", "video_path in info.json is not of v3.0"),
        ("v3_wrong_dtype", "action is float32 as it is stored; info.json says float16"),
        ("lerobot_action_parts", None),
        ("lerobot_depth16_chw", None),
        ("lerobot_depth_dtype", None),
        ("lerobot_feature_not_in_parquet", None),
        ("lerobot_rgba_image", "alpha channel, which was dropped"),
        ("lerobot_task_gap", None),
    ],
)
def test_values_are_as_they_are_stored(name: str, note: str | None, tmp_path: Path) -> None:
    said, buffer = convert(name, tmp_path)
    assert ("note" not in said) if note is None else note in str(said["note"])
    for key, column in {"action": "action", "state": "observation.state"}.items():
        assert np.array_equal(buffer[key][:].astype(np.float64), stored(name, column).astype(np.float64)), key
    for file in (CASES / name).glob("expected_*.npy"):
        expected = np.load(file)
        key = next(key for key in buffer.keys if key.startswith(file.stem.removeprefix("expected_")))
        assert buffer[key].dtype == expected.dtype
        assert np.array_equal(buffer[key][:], expected)


def test_versions_of_the_action(tmp_path: Path) -> None:
    _, buffer = convert("lerobot_action_parts", tmp_path)
    assert {key for key in buffer.keys if key.startswith("action")} == {
        "action",
        "action.joint_position",
        "action.cartesian_position",
    }


def test_a_feature_that_is_not_there(tmp_path: Path) -> None:
    said, _ = convert("lerobot_feature_not_in_parquet", tmp_path)
    assert said["left_out"] == "observation.effort (not in the parquet files)"


def test_words_of_a_task_that_is_left(tmp_path: Path) -> None:
    _, buffer = convert("lerobot_task_gap", tmp_path)
    assert buffer.attrs["tasks"] == ["push the cube", "", "open the drawer"]
    assert np.array_equal(buffer["task_index"][:].ravel(), stored("lerobot_task_gap", "task_index"))


def test_a_lower_rate(tmp_path: Path) -> None:
    said, buffer = convert("convert_rate_override", tmp_path, rate=10.0)
    assert "10 Hz of 30 Hz: rows 0, 3, 6, 9, … of each episode; 60 of 180" in str(said["note"])
    assert np.array_equal(buffer["action"][:], stored("convert_rate_override", "action")[::3])
    assert buffer.attrs["control_rate"] == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lerobot_action_not_in_parquet", "action: not in the parquet files"),
        ("lerobot_lfs_pointer", "is a pointer of Git LFS"),
        ("v3_ts_drift", "frame 0 is 0.2 frames early for 10 Hz"),
    ],
)
def test_what_is_refused(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        convert(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "state", "action"),
    [
        ("csv_bom", {}, "state", "action"),
        ("csv_joint_1_to_6", {}, "joint", "action"),
        ("csv_text_column", {}, "state", "action"),
        (
            "csv_names",
            {"state": "x,y,z,rx,ry,rz", "action": "target_x,target_y,target_z,target_rx,target_ry,target_rz"},
            "state",
            "action",
        ),
    ],
)
def test_csv(name: str, options: dict[str, str], state: str, action: str, tmp_path: Path) -> None:
    said, buffer = convert(name, tmp_path, **options)
    files = sorted(source(name).glob("*.csv"))
    rows = np.concatenate([np.genfromtxt(f, delimiter=",", skip_header=1, usecols=range(12)) for f in files])
    words = name == "csv_text_column"
    assert buffer.keys == [action, state, *["task_index"] * words]
    assert buffer.attrs.get("tasks") == (["push it"] if words else None)
    assert np.array_equal(buffer[state][:], rows[:, :6])
    assert np.array_equal(buffer[action][:], rows[:, 6:12])
    assert said.get("left_out") is None
