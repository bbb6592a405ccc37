"""robomimic's HDF5 to a buffer and back: everything arrives, kills do no harm, bad files are named."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from robomimic_files import ENV_ARGS, MODEL, contents, h5py, rows, write_robomimic, write_robosuite

from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.robomimic import conversion
from action_diffusion.datasets.robomimic.attributes import attributes, demo_names, subset
from action_diffusion.datasets.robomimic.conversion import convert
from action_diffusion.datasets.robomimic.export import export
from action_diffusion.datasets.robomimic.file import describe
from action_diffusion.datasets.storage import store
from action_diffusion.errors import InputError

COLUMNS = {
    "action": "actions",
    "states": "states",
    "reward": "rewards",
    "done": "dones",
    "object": "obs/object",
    "robot0_gripper_qpos": "obs/robot0_gripper_qpos",
    "agentview_image": "obs/agentview_image",
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of few rows, and blocks that neither begin nor end with an episode."""
    monkeypatch.setattr(store, "CHUNK_BYTES", 400)
    monkeypatch.setattr(conversion, "BLOCK_BYTES", 1000)


def assert_holds(buffer: ReplayBuffer, lengths: list[int], size: int = 8) -> None:
    assert buffer.episode_ends.tolist() == np.cumsum(lengths).tolist()
    assert set(buffer.keys) == {*COLUMNS, "demo"}
    for number, (length, episode) in enumerate(zip(lengths, buffer.episodes(), strict=True)):
        expected = rows(length, number, size)
        assert episode["demo"].tolist() == [number] * length
        for column, path in COLUMNS.items():
            assert episode[column].dtype == expected[path].dtype
            np.testing.assert_array_equal(episode[column], expected[path])


def test_everything_arrives(tmp_path: Path) -> None:
    summary = convert(write_robomimic(tmp_path / "a.hdf5"), tmp_path / "a.zarr")
    assert summary["episodes"] == 3
    assert summary["steps"] == 16
    assert summary["subsets"] == "train (2), valid (1)"
    assert "left_out" not in summary
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert_holds(buffer, [5, 8, 3])
    assert buffer.attrs["source"] == "a.hdf5"
    assert buffer.attrs["layout"] == "robomimic"
    assert buffer.attrs["env_args"] == ENV_ARGS
    assert buffer.attrs["columns"] == COLUMNS
    assert subset(buffer, "train").tolist() == [0, 1]
    assert subset(buffer, "valid").tolist() == [2]
    kept = dict(attributes(buffer))
    assert kept["data/demo_1"] == {"num_samples": 8, "model_file": MODEL.format(1)}
    assert kept["data/demo_1"]["num_samples"].dtype == np.int64
    assert kept["data"]["total"] == 16
    assert len(buffer.attrs["hdf5_attributes"]) < 3000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.hdf5", "a.zarr"]


@pytest.mark.slow
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=11), compressed=st.booleans())
@settings(max_examples=6, deadline=None)
def test_blocks_need_not_fit_the_episodes(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], compressed: bool
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    options: dict[str, Any] = {"compression": "gzip", "chunks": (1, 8, 8, 3)} if compressed else {}
    source = write_robomimic(folder / "a.hdf5", lengths, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "CHUNK_BYTES", 1500)
        patch.setattr(conversion, "BLOCK_BYTES", 4000)
        convert(source, folder / "a.zarr")
    assert_holds(ReplayBuffer.open(folder / "a.zarr"), lengths)  # demo_10 is after demo_2


@pytest.mark.slow
def test_processes_write_the_same(tmp_path: Path) -> None:
    convert(write_robomimic(tmp_path / "a.hdf5", [5, 8, 3, 20]), tmp_path / "a.zarr", workers=2)
    assert_holds(ReplayBuffer.open(tmp_path / "a.zarr"), [5, 8, 3, 20])


def test_a_small_file_needs_no_second_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = describe(write_robomimic(tmp_path / "a.hdf5"))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert conversion.default_workers(layout, observing=False) == 1
    assert conversion.default_workers(layout, observing=True) == 4
    monkeypatch.setattr(conversion, "WORKER_BYTES", 4000)
    assert conversion.default_workers(layout, observing=False) == 2


@pytest.mark.slow
def test_dropped_episodes_keep_their_names(tmp_path: Path) -> None:
    convert(write_robomimic(tmp_path / "a.hdf5", [5, 8, 3, 4]), tmp_path / "a.zarr")
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    buffer.drop([1])
    assert demo_names(buffer) == ["demo_0", "demo_2", "demo_3"]
    assert subset(buffer, "train").tolist() == [0, 1]
    with pytest.raises(InputError, match=r"unknown subset 'trian' .*did you mean train\?"):
        subset(buffer, "trian")
    export(tmp_path / "a.zarr", tmp_path / "b.hdf5")
    found, expected = contents(tmp_path / "b.hdf5"), contents(tmp_path / "a.hdf5")
    assert found["mask/train"].tolist() == [b"demo_0", b"demo_2"]
    assert found["data.total"] == 12
    assert not any(name.startswith("data/demo_1") for name in found)
    np.testing.assert_array_equal(found["data/demo_2/obs/object"], expected["data/demo_2/obs/object"])


def test_the_way_back_gives_the_same_file(tmp_path: Path) -> None:
    source = write_robomimic(tmp_path / "a.hdf5")
    with h5py.File(source, "a") as file:
        file.attrs["made_by"] = "a test"
        file["data/demo_0"].attrs["numbers"] = np.arange(3, dtype=np.float32)
        file["data/demo_0"].attrs["words"] = ["one", "two"]
        for demo in file["data"].values():
            demo["datagen_info/pose"] = np.zeros((len(demo["actions"]), 4, 4), np.float32)
    convert(source, tmp_path / "a.zarr")
    assert "datagen_info.pose" in ReplayBuffer.open(tmp_path / "a.zarr")
    export(tmp_path / "a.zarr", tmp_path / "b.hdf5")
    found, expected = contents(tmp_path / "b.hdf5"), contents(source)
    assert set(found) == set(expected)
    for name, value in expected.items():
        if "/next_obs/" in name:  # the last row of these is the only thing that is not kept
            np.testing.assert_array_equal(found[name][:-1], value[:-1])
            np.testing.assert_array_equal(found[name][-1], expected[name.replace("next_obs", "obs")][-1])
        elif name == "data.env_args":
            assert json.loads(found[name]) == json.loads(value)
        else:
            assert np.asarray(found[name]).dtype == np.asarray(value).dtype, name
            np.testing.assert_array_equal(found[name], value)
    with h5py.File(tmp_path / "b.hdf5") as file:
        assert file.attrs["made_by"] == "a test"


def test_a_buffer_that_was_collected_can_go_to_robomimic(tmp_path: Path) -> None:
    arrays = {"object": np.ones((5, 10)), "action": np.zeros((5, 7)), "reward": np.zeros(5)}
    buffer = ReplayBuffer.from_arrays(arrays, [3, 5], {"env_args": ENV_ARGS})
    buffer.save(tmp_path / "a.zarr.zip")
    export(tmp_path / "a.zarr.zip", tmp_path / "a.hdf5")
    found = contents(tmp_path / "a.hdf5")
    assert found["data/demo_1/obs/object"].shape == found["data/demo_1/next_obs/object"].shape == (2, 10)
    assert found["data/demo_0/actions"].shape == (3, 7)
    assert found["data/demo_0/rewards"].shape == (3,)
    assert found["data/demo_1.num_samples"] == 2


# A next_obs of its own.


@pytest.mark.slow
def test_a_next_obs_that_is_another_is_reported(tmp_path: Path) -> None:
    source = write_robomimic(tmp_path / "a.hdf5")
    with h5py.File(source, "a") as file:
        file["data/demo_1/next_obs/object"][2, 0] += 1
    assert convert(source, tmp_path / "a.zarr")["left_out"] == "next_obs, which in 1 demos is not obs one step on"


# Cut off.

_CONVERTER = """
import sys, time
from action_diffusion.datasets.robomimic import conversion
from action_diffusion.datasets.storage import store
store.CHUNK_BYTES, conversion.BLOCK_BYTES = 2000, 4000
def unhurried(*arguments):
    for done in in_processes(*arguments):
        yield done
        time.sleep(0.01)  # so that the test comes in time to kill it
in_processes, conversion.in_processes = conversion.in_processes, unhurried
conversion.convert(sys.argv[1], sys.argv[2], workers=2)
"""


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_loads_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [40, 60, 50, 80]
    source, output = write_robomimic(tmp_path / "a.hdf5", lengths, size=32), tmp_path / "a.zarr"
    journal = tmp_path / ".a.zarr.converting/journal"
    with subprocess.Popen([sys.executable, "-c", _CONVERTER, str(source), str(output)]) as converter:
        while converter.poll() is None and (not journal.exists() or journal.read_text().count("\n") < 20):
            time.sleep(0.001)
        os.kill(converter.pid, signal.SIGKILL)
    assert converter.returncode == -signal.SIGKILL
    assert not output.exists()
    for path in [tmp_path, *tmp_path.rglob("*")]:
        with pytest.raises(InputError):
            ReplayBuffer.open(path)
    done = journal.read_text().split("\n")[:-1]
    assert 20 <= len(done) < 230
    written: list[str] = []
    original = conversion._write

    def recording(source: Path, folder: Path, block: conversion.Block) -> None:
        written.append(block.line)
        original(source, folder, block)

    monkeypatch.setattr(store, "CHUNK_BYTES", 2000)
    monkeypatch.setattr(conversion, "BLOCK_BYTES", 4000)
    monkeypatch.setattr(conversion, "_write", recording)
    convert(source, output)
    assert written
    assert not set(written) & set(done)
    assert_holds(ReplayBuffer.open(output), lengths, size=32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.hdf5", "a.zarr"]
    assert not list(output.rglob("*.partial"))


def failing_at(number: int, error: BaseException) -> Callable[[Path, Path, conversion.Block], None]:
    """Writes blocks until that one, at which it fails."""
    original, count = conversion._write, itertools.count()

    def write(source: Path, folder: Path, block: conversion.Block) -> None:
        if next(count) == number:
            raise error
        original(source, folder, block)

    return write


@pytest.mark.slow
def test_another_source_is_converted_from_the_start(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write_robomimic(tmp_path / "a.hdf5"), tmp_path / "a.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_write", failing_at(4, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            convert(source, output)
    assert len((tmp_path / ".a.zarr.converting/journal").read_text().split()) == 8
    write_robomimic(source, [6, 2])
    convert(source, output)
    assert_holds(ReplayBuffer.open(output), [6, 2])


@pytest.mark.slow
def test_a_kill_after_the_last_block_does_no_harm(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = write_robomimic(tmp_path / "a.hdf5"), tmp_path / "a.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "sync", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(source, output)
    assert not output.exists()
    convert(source, output)
    assert_holds(ReplayBuffer.open(output), [5, 8, 3])


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ChildProcessError("a process that converts was killed")]
)
def test_a_full_disk_and_a_killed_process_keep_what_is_done(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    source, output = write_robomimic(tmp_path / "a.hdf5"), tmp_path / "a.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_write", failing_at(5, error))
        with pytest.raises(InputError, match=r"cannot write .*a.zarr .*is kept.*: (No space left|a process that)"):
            convert(source, output)
    assert len((tmp_path / ".a.zarr.converting/journal").read_text().split()) == 10
    convert(source, output)
    assert_holds(ReplayBuffer.open(output), [5, 8, 3])


@pytest.mark.slow
@pytest.mark.parametrize("column", ["object", "agentview_image", "done"])
def test_what_arrives_otherwise_is_noticed(
    tmp_path: Path, small_blocks: None, monkeypatch: pytest.MonkeyPatch, column: str
) -> None:
    source, output = write_robomimic(tmp_path / "a.hdf5"), tmp_path / "a.zarr"
    original = conversion._write

    def wrong(source: Path, folder: Path, block: conversion.Block) -> None:
        original(source, folder, block)
        if block.column == column and block.end == 16:
            rows: Any = conversion._array(folder, f"data/{column}")
            rows[15] += 1

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_write", wrong)
        with pytest.raises(InputError, match=f"data/demo_2/{COLUMNS[column]} did not arrive"):
            convert(source, output)
    assert [path.name for path in tmp_path.iterdir()] == ["a.hdf5"]
    convert(source, output)


# Bad files.


def replace(path: str, values: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        if path in file:
            del file[path]
        file[path] = values

    return change


def set_attribute(path: str, name: str, value: Any) -> Callable[[Any], None]:
    return lambda file: file[path].attrs.__setitem__(name, value)


NAN = np.zeros((8, 10))
NAN[4, 2] = np.nan
BAD = [
    (set_attribute("data", "env_args", "{"), "data's attribute env_args is no JSON"),
    (set_attribute("data", "env_args", "[]"), "data's attribute env_args must be an object with env_name, env_kwargs"),
    (set_attribute("data", "env_args", '{"env_name": "Lift", "env_kwargs": 3}'), "an object with env_kwargs"),
    (set_attribute("data/demo_1", "num_samples", 9), "demo_1 has unequal lengths: actions 8, but num_samples 9"),
    (
        replace("data/demo_1/actions", np.zeros((7, 7))),
        "unequal lengths: actions 7, but dones 8, obs/agentview_image 8",
    ),
    (replace("data/demo_1/obs/object", np.zeros((7, 10))), "unequal lengths: actions 8, but obs/object 7"),
    (replace("data/demo_1/obs/object", np.zeros((8, 11))), r"demo_1/obs/object has rows \[11\] of float64, in demo_0"),
    (replace("data/demo_1/obs/object", np.zeros((8, 10), "f4")), r"has rows \[10\] of float32, in demo_0 .* float64"),
    (replace("data/demo_1/obs/object", NAN), "data/demo_1/obs/object is NaN at row 4, column 2"),
    (replace("data/demo_1/obs/more", np.zeros((8, 2))), "data/demo_1 has obs/more, which demo_0 lacks"),
    (replace("data/demo_0/obs/more", np.zeros((5, 2))), "data/demo_1 lacks obs/more, which demo_0 has"),
    (replace("data/demo_0/obs/action", np.zeros((5, 2))), "obs/action would become column action, which is actions"),
    (replace("data/demo_0/obs/demo", np.zeros((5, 2))), "would become column demo, which is the number of the demo"),
    (replace("data/demo_0/obs/none", np.zeros((5, 0))), r"obs/none has no values: its shape is \[5, 0\]"),
    (replace("mask/train", np.array([b"demo_0", b"demo_7"])), "mask/train names demo_7, which is not in data/"),
    (lambda file: file["data/demo_1"].__delitem__("actions"), "data/demo_1 has no actions: robomimic's files"),
    (lambda file: file.move("data/demo_1", "data/one"), "unknown layout .data/one is no demo_<number>.: robomimic's"),
    (lambda file: file.__delitem__("data"), "unknown layout .holds no data/demo_<number>.: robomimic's files"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    source = write_robomimic(tmp_path / "a.hdf5")
    with h5py.File(source, "a") as file:
        change(file)
    with pytest.raises(InputError, match=message) as caught:
        convert(source, tmp_path / "a.zarr")
    assert str(source) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.hdf5"]


@pytest.mark.slow
def test_damage_and_what_is_no_hdf5_is_named(tmp_path: Path) -> None:
    source = write_robomimic(tmp_path / "a.hdf5", size=84, compression="gzip")
    (tmp_path / "short.hdf5").write_bytes(source.read_bytes()[:-100_000])
    (tmp_path / "text.hdf5").write_text("no HDF5")
    flipped = bytearray(source.read_bytes())
    with h5py.File(source) as file:
        offset = file["data/demo_0/obs/agentview_image"].id.get_chunk_info(0).byte_offset
    flipped[offset + 100 : offset + 120] = bytes(20)
    (tmp_path / "flipped.hdf5").write_bytes(flipped)
    for name in ("short", "text", "flipped"):
        with pytest.raises(InputError, match=rf"{name}.hdf5.* cannot be read, the file is damaged or unsupported"):
            convert(tmp_path / f"{name}.hdf5", tmp_path / "a.zarr")
    with pytest.raises(InputError, match=r"none\.hdf5: no such file"):
        convert(tmp_path / "none.hdf5", tmp_path / "a.zarr")


def test_an_output_is_never_overwritten(tmp_path: Path) -> None:
    source = write_robomimic(tmp_path / "a.hdf5")
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "b.hdf5").write_text("")
    with pytest.raises(InputError, match=r"a\.zarr exists: choose another path"):
        convert(source, tmp_path / "a.zarr")
    with pytest.raises(InputError, match=r"b\.zarr\.zip: a conversion makes a folder"):
        convert(source, tmp_path / "b.zarr.zip")
    convert(source, tmp_path / "c.zarr")
    with pytest.raises(InputError, match=r"b\.hdf5 exists"):
        export(tmp_path / "c.zarr", tmp_path / "b.hdf5")


@pytest.mark.parametrize(
    ("arrays", "attrs", "message"),
    [
        ({"action": np.zeros((3, 2))}, {}, r"robomimic's files need attrs\['env_args'\]"),
        ({"object": np.zeros((3, 2))}, {"env_args": ENV_ARGS}, "has no column action; it has object"),
        (
            {"action": np.zeros((3, 2)), "demo": np.full(3, 4)},
            {"env_args": ENV_ARGS, "demos": ["demo_0"]},
            r"data/demo must name one of attrs\['demos'\]",
        ),
        (
            {"action": np.zeros((3, 2))},
            {"env_args": ENV_ARGS, "hdf5_attributes": "AAAA"},
            "'hdf5_attributes'. is damaged",
        ),
    ],
)
def test_a_buffer_that_cannot_go_back_is_refused(
    tmp_path: Path, arrays: dict[str, np.ndarray], attrs: dict[str, Any], message: str
) -> None:
    ReplayBuffer.from_arrays(arrays, [3], attrs).save(tmp_path / "a.zarr")
    with pytest.raises(InputError, match=message):
        export(tmp_path / "a.zarr", tmp_path / "a.hdf5")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


# robomimic itself.


@pytest.mark.slow
@pytest.mark.parametrize("cache", [None, "low_dim", "all"])
def test_robomimic_reads_what_comes_back(tmp_path: Path, cache: str | None) -> None:
    pytest.importorskip("six", reason="robomimic needs six")
    pytest.importorskip("robomimic", reason="the extra [robomimic] is not installed")
    from robomimic.utils import file_utils, obs_utils
    from robomimic.utils.dataset import SequenceDataset

    lengths = [5, 8, 3]
    convert(write_robomimic(tmp_path / "a.hdf5", lengths), tmp_path / "a.zarr")
    export(tmp_path / "a.zarr", tmp_path / "b.hdf5")
    low_dim, images = ["object", "robot0_gripper_qpos"], ["agentview_image"]
    obs_utils.initialize_obs_utils_with_obs_specs({"obs": {"low_dim": low_dim, "rgb": images}})
    path = str(tmp_path / "b.hdf5")
    assert file_utils.get_env_metadata_from_dataset(path) == ENV_ARGS
    shapes = file_utils.get_shape_metadata_from_dataset(path)
    assert shapes["ac_dim"] == 7
    assert sorted(shapes["all_obs_keys"]) == sorted(low_dim + images)
    assert file_utils.get_demos_for_filter_key(path, "valid") == ["demo_2"]
    datasets = [
        SequenceDataset(
            file,
            obs_keys=low_dim + images,
            dataset_keys=["actions", "rewards", "dones"],
            frame_stack=2,
            seq_length=4,
            hdf5_cache_mode=cache,
            filter_by_attribute="train",
        )
        for file in (path, str(tmp_path / "a.hdf5"))
    ]
    assert len(datasets[0]) == len(datasets[1]) == 13
    for index in range(len(datasets[0])):
        found, expected = (dataset[index] for dataset in datasets)
        for group in ("obs", "next_obs"):
            at_end = group == "next_obs" and index in (*range(1, 5), *range(9, 13))  # holds the last row
            for key in low_dim + images:
                if not at_end:
                    np.testing.assert_array_equal(found[group][key], expected[group][key])
        for key in ("actions", "rewards", "dones"):
            np.testing.assert_array_equal(found[key], expected[key])


# Demonstrations by people.


def test_the_human_lift_demonstrations(tmp_path: Path) -> None:
    folder = os.environ.get("ACTION_DIFFUSION_DATA")
    if not folder:
        pytest.skip("ACTION_DIFFUSION_DATA is not set")
    source = Path(folder) / "robosuite_lift_human.hdf5"
    convert(source, tmp_path / "a.zarr")
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert np.diff(buffer.episode_ends, prepend=0).tolist() == [482, 510, 392]
    assert demo_names(buffer) == ["demo_1", "demo_2", "demo_3"]
    assert buffer.attrs["env_args"]["env_name"] == "Lift"
    assert buffer.attrs["env_args"]["env_version"] == "1.4.0"
    expected = contents(source)
    export(tmp_path / "a.zarr", tmp_path / "b.hdf5")
    found = contents(tmp_path / "b.hdf5")
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_robosuite_s_layout_is_recognised(tmp_path: Path) -> None:
    summary = convert(write_robosuite(tmp_path / "a.hdf5"), tmp_path / "a.zarr")
    buffer = ReplayBuffer.open(tmp_path / "a.zarr")
    assert summary["keys"] == "action, states"
    assert buffer.attrs["layout"] == "robosuite"
    assert buffer.attrs["env_args"] == ENV_ARGS | {"env_version": "1.4.0"}
    for number, length in enumerate([5, 8]):
        np.testing.assert_array_equal(buffer.episode(number)["states"], rows(length, number + 1)["states"])
        np.testing.assert_array_equal(buffer.episode(number)["action"], rows(length, number + 1)["actions"])
