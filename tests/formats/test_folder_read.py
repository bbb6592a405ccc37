"""Folders of CSV files as people have them: which columns become what, and what is refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from action_diffusion.commands import data, data_convert
from action_diffusion.datasets.formats.folder.csv_rows import grouped
from action_diffusion.datasets.formats.folder.format import opened
from action_diffusion.datasets.formats.video import EncodedVideoWriter
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.tasks import episode_tasks
from action_diffusion.errors import InputError

VALUES = np.random.default_rng(0).normal(size=(2, 5, 6))


def runs(root: Path, names: list[str], values: np.ndarray = VALUES, *, before: str = "", between: str = ",") -> Path:
    """A CSV an episode. values: [episodes, rows, columns], of numbers or texts."""
    root.mkdir()
    for number, rows in enumerate(values):
        lines = [between.join(names), *(between.join(map(str, row)) for row in rows.tolist())]
        (root / f"run{number}.csv").write_text(before + "\n".join(lines) + "\n", "utf-8")
    return root


@pytest.mark.parametrize(
    ("names", "before", "between"),
    [
        ([f"joint_{n}" for n in range(6)], "", ","),
        ([f"joint_{n}" for n in range(1, 7)], "", ","),
        ([f"joint{n}" for n in range(1, 7)], "", ","),
        ([f"joint[{n}]" for n in range(6)], "", ","),
        ([f"joint.{n:02}" for n in range(6)], "", ","),
        ([f"joint_{n}" for n in range(6)], "\ufeff", ","),
        ([f'"joint_{n}"' for n in range(6)], "\ufeff", ";"),
        ([f"joint_{n}" for n in range(6)], "", "\t"),
    ],
)
def test_numbered_columns_are_one_vector(names: list[str], before: str, between: str, tmp_path: Path) -> None:
    buffer = opened(runs(tmp_path / "runs", names, before=before, between=between)).buffer
    assert buffer.keys == ["joint"]
    assert np.array_equal(buffer["joint"][:], VALUES.reshape(-1, 6))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x_1"], {"x_1": [0]}),
        (["a0", "ft300"], {"a0": [0], "ft300": [1]}),
        (["x_2", "x_3"], {"x_2": [0], "x_3": [1]}),
        (["x_1", "x_2", "x1"], {"x_1": [0], "x_2": [1], "x1": [2]}),
        (["x_2", "x_1", "y"], {"x": [1, 0], "y": [2]}),
    ],
)
def test_which_numbers_make_a_vector(names: list[str], expected: dict[str, list[int]]) -> None:
    assert grouped(names) == expected


def test_columns_are_chosen_by_name(tmp_path: Path) -> None:
    names = ["x", "y", "grip_0", "grip_1", "target_x", "target_y"]
    options = {"in": str(runs(tmp_path / "runs", names)), "out": str(tmp_path / "b.zarr")}
    said = data_convert.run({**options, "state": "y,x,grip", "action": "target_x,target_y"})["note"]
    assert said == "action is target_x, target_y; state is y, x, grip"
    buffer = ReplayBuffer.open(tmp_path / "b.zarr")
    assert buffer.keys == ["action", "state"]
    assert np.array_equal(buffer["state"][:], VALUES.reshape(-1, 6)[:, [1, 0, 2, 3]])
    assert np.array_equal(buffer["action"][:], VALUES.reshape(-1, 6)[:, [4, 5]])


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({"action": ["target_z"]}, "unknown column 'target_z' in .*run0.csv: did you mean target_[xy] or target_[xy]"),
        ({"action": ["x", "x"]}, "column x is asked for twice"),
        ({"action": ["x"], "state": ["x"]}, "column x is asked for twice"),
        ({"target_x": ["x"]}, "target_x is a column already"),
    ],
)
def test_what_cannot_be_chosen(vectors: dict[str, list[str]], message: str, tmp_path: Path) -> None:
    root = runs(tmp_path / "runs", ["x", "y", "z", "target_x", "target_y", "grip"])
    with pytest.raises(InputError, match=message):
        opened(root, vectors)


def texts(column: list[str]) -> np.ndarray:
    """Two columns of five rows, of which the second is given."""
    return np.array([[[str(row), text] for row, text in enumerate(column)]])


@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        (["True", "False", "True", "True", "False"], "bool"),
        (["1", "2", "3", "-4", "5"], "int64"),
        (["1", "2", "3", "18446744073709551615", "5"], "uint64"),
        (["1", "2.5", "nan", "-inf", "1e3"], "float64"),
    ],
)
def test_types_of_columns(column: list[str], dtype: str, tmp_path: Path) -> None:
    found = opened(runs(tmp_path / "runs", ["t", "v"], texts(column))).buffer["v"]
    assert found.dtype == dtype
    expected = np.array(column) == "True" if dtype == "bool" else np.array(column).astype(dtype)
    assert np.array_equal(found[:], expected, equal_nan=dtype == "float64")


@pytest.mark.parametrize("words", ["push it", "", "w" * 10**5])
def test_a_column_of_words_is_left_out_by_name(words: str, tmp_path: Path) -> None:
    found = opened(runs(tmp_path / "runs", ["t", "note"], texts([words] * 5)))
    assert found.left_out == ("note (words)",)
    assert found.buffer.keys == ["t"]


def test_the_column_task_says_what_was_to_be_done(tmp_path: Path) -> None:
    long = "put the red cup on the shelf, " * 10
    root = runs(tmp_path / "runs", ["t", "task"], texts(["open", "open", f'"{long}"', "open", ""]))
    (root / "run0.csv").rename(root / "run1.csv")
    (root / "run0.csv").write_text("t\n0\n1\n2\n")
    found = opened(root)
    assert found.left_out == ()
    assert found.buffer.attrs["tasks"] == ["", "open", long.strip()]
    assert found.buffer["task_index"][:].tolist() == [0, 0, 0, 1, 1, 2, 1, 0]
    assert episode_tasks(found.buffer) == ["", f"open; {long.strip()}; "]


@pytest.mark.parametrize(
    ("names", "column", "message"),
    [
        (["t", "v"], ["1", "2", "x", "4", "5"], "v: 'x' in row 2 is no float64"),
        (["t", "v"], ["1", "2", "", "4", "5"], "v: '' in row 2 is no float64"),
        (["t", "v"], ["1", "2", "1_000", "4", "5"], "v: '1_000' in row 2 is no float64"),
        (["t", "v"], ["0.5", "2", "9007199254740993", "4", "5"], "v: '9007199254740993' in row 2 is no float64"),
        (["v_0", "v_1"], ["a", "b", "c", "d", "e"], "v: 'a' in row 0 is no float64"),
        (
            ["t", "v"],
            ['"0,5"', '"1,5"', '"2"', '"0,25"', '"3,0"'],
            "v: '0,5' has a decimal comma: write it with a point",
        ),
        (["t", "../../x"], ["1", "2", "3", "4", "5"], "'../../x' is no key"),
        (["t", "__x"], ["1", "2", "3", "4", "5"], "'__x' is no key"),
        (["t", "zarr.json"], ["1", "2", "3", "4", "5"], "'zarr.json' is no key"),
    ],
)
def test_what_is_no_number_is_said(names: list[str], column: list[str], message: str, tmp_path: Path) -> None:
    root = runs(tmp_path / "runs", names, texts(column))
    with pytest.raises(InputError) as caught:
        data_convert.run({"in": str(root), "out": str(tmp_path / "b.zarr")})
    assert message in str(caught.value)


def test_what_pandas_and_spreadsheets_write(tmp_path: Path) -> None:
    """An index without a name, UTF-16, columns between bars, and what a Mac leaves beside each file."""
    root = runs(tmp_path / "runs", ["", *(f"joint_{n}" for n in range(5))])
    (root / "._run0.csv").write_bytes(b"\0\x05\x16\x07\xff")
    found = opened(root).buffer
    assert found.n_episodes == 2
    assert found["joint"].shape == (10, 5)
    assert found["index"].shape == (10,)
    (root / "run1.csv").write_text((root / "run1.csv").read_text(), encoding="utf-16")
    with pytest.raises(InputError, match=r"run1\.csv: text in UTF-16: save it as UTF-8"):
        opened(root)
    bars = runs(tmp_path / "bars", list("abcdef"), between="|")
    with pytest.raises(InputError, match="columns that are not between commas, semicolons or tabs"):
        opened(bars)


def test_empty_lines_at_the_end_are_no_rows(tmp_path: Path) -> None:
    root = runs(tmp_path / "runs", list("abcdef"))
    (root / "run0.csv").write_text((root / "run0.csv").read_text() + "\n\n")
    assert opened(root).buffer.n_steps == 10
    (root / "run0.csv").write_text((root / "run0.csv").read_text() + "1,2,3,4,5,6\n")
    with pytest.raises(InputError, match="line 7 is empty, and others follow"):
        opened(root)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """What `format=folder` writes: rows.csv, img.mp4, depth.npy, dataset.json."""
    random = np.random.default_rng(0)
    columns: dict[str, np.ndarray] = {
        "action": random.normal(size=(5, 2)),
        "img": random.integers(0, 256, size=(5, 16, 16, 3)).astype(np.uint8),
        "depth": random.integers(0, 2**16, size=(5, 40, 40)).astype(np.uint16),
    }
    ReplayBuffer.from_arrays(columns, [5], {"control_rate": 10}).save(tmp_path / "a.zarr")
    data_convert.run({"in": str(tmp_path / "a.zarr"), "out": str(tmp_path / "ours"), "format": "folder"})
    return tmp_path / "ours"


def notes(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def do(root: Path) -> None:
        content = json.loads((root / "dataset.json").read_text())
        change(content)
        (root / "dataset.json").write_text(json.dumps(content))

    return do


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Another thing in a file's place."""

    def do(root: Path) -> None:
        (root / name).unlink()
        make(root / name)

    return do


def other_video(rate: float) -> Callable[[Path], None]:
    def do(path: Path) -> None:
        with EncodedVideoWriter(path, (16, 16), rate=rate, quality="high", keyframe_every=5) as video:
            video.add(np.zeros((5, 16, 16, 3), np.uint8))

    return do


FIRST = "episode_000000"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (instead(f"{FIRST}/rows.csv", os.mkfifo), "rows.csv is a named pipe, expected a file"),
        (instead(f"{FIRST}/img.mp4", os.mkfifo), "img.mp4 is a named pipe, expected a file"),
        (instead(f"{FIRST}/depth.npy", os.mkfifo), "depth.npy is a named pipe, expected a file"),
        (instead("dataset.json", os.mkfifo), "dataset.json is a named pipe, expected a file"),
        (instead(f"{FIRST}/rows.csv", lambda path: path.symlink_to("/etc/passwd")), "outside of the folder"),
        (instead(f"{FIRST}/depth.npy", lambda path: np.save(path, np.array([{}] * 5))), "depth.npy"),
        (instead(f"{FIRST}/depth.npy", lambda path: np.save(path, np.array(["a"] * 5))), "expected one row of numbers"),
        (instead(f"{FIRST}/img.mp4", other_video(12)), "frame 1 is 0.2 frames early"),
        (notes(lambda content: content.update(rate="fast")), "dataset.json cannot be read"),
        (notes(lambda content: content.update(rate=-1)), "rate is -1, expected rows a second above 0"),
        (notes(lambda content: content["episodes"][0].update(folder="../../etc")), "outside of the folder"),
        (notes(lambda content: content.update(episodes=[])), "expected a folder for each episode"),
        (notes(lambda content: content["episodes"].append(content["episodes"][0])), "none of them twice"),
        (notes(lambda content: content["csv"]["action"].update(dtype="O")), "action must be numbers"),
        (notes(lambda content: content["csv"]["action"].update(columns=[])), "action must be numbers"),
        (
            notes(lambda content: content["action_diffusion"]["columns"]["action"].update(dtype="int32")),
            "int32 does not",
        ),
        (notes(lambda content: content["action_diffusion"]["columns"]["action"].update(shape=[-1, -2])), "action is"),
    ],
)
def test_what_a_folder_must_not_hold(change: Callable[[Path], None], message: str, ours: Path, tmp_path: Path) -> None:
    change(ours)
    with pytest.raises(InputError) as caught:
        data_convert.run({"in": str(ours), "out": str(tmp_path / "b.zarr")})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pipe_in_somebody_else_s_folder(tmp_path: Path) -> None:
    os.mkfifo(runs(tmp_path / "runs", list("abcdef")) / "run2.csv")
    with pytest.raises(InputError, match=r"run2\.csv is a named pipe, expected a file"):
        opened(tmp_path / "runs")


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    root = runs(tmp_path / "runs", list("abcdef"))
    (root / "run1.csv").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    with pytest.raises(InputError, match=r"run1\.csv is a pointer of Git LFS.*: git lfs pull in"):
        opened(root)


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf", "fast", "1e-9", "1e9"])
def test_a_rate_that_is_none(rate: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rate=.*(: expected| must be) steps a second, from 0.01 to 10000"):
        data.run(["convert", "in=a.zarr", f"out={tmp_path / 'b'}", "format=folder", f"rate={rate}"])


def test_chosen_columns_keep_their_names(tmp_path: Path) -> None:
    root = runs(tmp_path / "runs", ["x", "y", "v_0", "v_1", "a", "b"])
    attrs = opened(root, {"action": ["x", "y"], "state": ["v", "a"]}).buffer.attrs
    assert attrs["names"] == {"action": ["x", "y"]}  # one name of v's two values says neither


def test_time_stamps_tell_the_rate_that_rate_lowers(tmp_path: Path) -> None:
    times = [str(row / 20) for row in range(5)]
    root = runs(tmp_path / "runs", ["v", "timestamp"], texts(times))
    with pytest.raises(InputError, match=r"rate=60: .*runs has 20 Hz"):
        data_convert.run({"in": str(root), "out": str(tmp_path / "a.zarr"), "rate": 60.0})
    data_convert.run({"in": str(root), "out": str(tmp_path / "b.zarr"), "rate": 10.0})
    buffer = ReplayBuffer.open(tmp_path / "b.zarr")
    assert buffer.attrs["control_rate"] == 10
    assert buffer["timestamp"][:3].tolist() == [0.0, 0.1, 0.2]
