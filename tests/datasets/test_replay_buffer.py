"""Buffers on disk and in memory: what is written comes back, kills lose nothing, damage is named."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from action_diffusion.datasets import ReplayBuffer
from action_diffusion.errors import InputError


def episode(length: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "action": rng.standard_normal((length, 2)).astype(np.float32),
        "img": rng.integers(0, 255, (length, 6, 5, 3), dtype=np.uint8),
        "state": rng.standard_normal((length, 3)),
    }


def in_memory(*lengths: int) -> ReplayBuffer:
    buffer = ReplayBuffer.from_arrays(episode(lengths[0]), [lengths[0]], {"rate": 10})
    for seed, length in enumerate(lengths[1:], start=1):
        buffer.append(episode(length, seed))
    return buffer


def assert_same(one: ReplayBuffer, other: ReplayBuffer) -> None:
    assert sorted(one.keys) == sorted(other.keys)
    assert one.episode_ends.tolist() == other.episode_ends.tolist()
    assert one.attrs == other.attrs
    for key in one.keys:
        assert one[key].dtype == other[key].dtype
        np.testing.assert_array_equal(one[key][:], other[key][:])


def write_foreign(path: Path, buffer: ReplayBuffer, *, prefix: str = "", zarr_format: Literal[2, 3] = 2) -> None:
    """As another program would: a chunk of few rows, and the folder zipped afterwards."""
    folder = path.with_suffix(".folder") if path.suffix == ".zip" else path
    root = zarr.open_group(LocalStore(folder / prefix), mode="w", zarr_format=zarr_format)
    with zarr.config.set({"array.write_empty_chunks": True}):
        for key in buffer.keys:
            array = buffer[key][:]
            chunks = (3, *array.shape[1:])
            root.create_array(f"data/{key}", shape=array.shape, dtype=array.dtype, chunks=chunks)[:] = array
        root.create_array("meta/episode_ends", shape=(buffer.n_episodes,), dtype="i8")[:] = buffer.episode_ends
    root.attrs.update(buffer.attrs)
    if folder != path:
        shutil.make_archive(str(path.with_suffix("")), "zip", folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "packed.zip"])
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
@settings(max_examples=8, deadline=None)
def test_what_is_saved_comes_back(tmp_path_factory: pytest.TempPathFactory, name: str, lengths: list[int]) -> None:
    buffer = in_memory(*lengths)
    path = tmp_path_factory.mktemp("saved") / name
    buffer.save(path)
    again = ReplayBuffer.open(path)
    assert_same(again, buffer)
    for index, (expected, found) in enumerate(zip(buffer.episodes(), again.episodes(), strict=True)):
        for key in expected:
            np.testing.assert_array_equal(found[key], expected[key])
            np.testing.assert_array_equal(again.episode(index - len(lengths))[key], expected[key])


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("name", ["plain.zarr", "packed.zarr.zip"])
@pytest.mark.parametrize("prefix", ["", "pusht/some.zarr"])
def test_files_of_others_open(tmp_path: Path, zarr_format: Literal[2, 3], name: str, prefix: str) -> None:
    buffer = in_memory(4, 7, 1)
    write_foreign(tmp_path / name, buffer, prefix=prefix, zarr_format=zarr_format)
    assert_same(ReplayBuffer.open(tmp_path / name), buffer)


def test_rows_are_indexed_as_in_numpy(tmp_path: Path) -> None:
    buffer = in_memory(4, 7)
    buffer.save(tmp_path / "saved")
    for key in buffer.keys:
        array, column = np.asarray(buffer[key][:]), ReplayBuffer.open(tmp_path / "saved")[key]
        indices: list[Any] = [3, -1, slice(None), slice(2, 5), slice(5, 2), slice(1, None, 3), slice(-3, None), ...]
        indices += [np.array([5, 0, 5]), np.array([], int), (slice(2, 6), 1), (3, 0), (slice(None), [1, 0])]
        for index in indices:
            np.testing.assert_array_equal(column[index], array[index])
        np.testing.assert_array_equal(np.asarray(column), array)
        with pytest.raises(IndexError):
            column[11]


def test_chunks_are_about_a_megabyte(tmp_path: Path) -> None:
    frames = np.zeros((80, 96, 96, 3), np.uint8)
    ReplayBuffer.from_arrays({"img": frames, "action": np.zeros((80, 2), np.float32)}, [80]).save(tmp_path / "a")
    data: Any = zarr.open_group(tmp_path / "a", mode="r")["data"]
    assert data["img"].chunks == (37, 96, 96, 3)
    assert data["action"].chunks[0] * 8 == 1 << 20
    assert data["img"].metadata.zarr_format == 3
    assert "zstd" in str(data["img"].compressors).lower()


def test_an_append_adds_one_episode(tmp_path: Path) -> None:
    on_disk, expected = ReplayBuffer.create(tmp_path / "grown", attrs={"rate": 10}), in_memory(3, 5, 2)
    assert on_disk.n_episodes == on_disk.n_steps == 0
    assert not (tmp_path / "grown").exists()
    for seed, length in enumerate([3, 5, 2]):
        on_disk.append(episode(length, seed))
        assert_same(on_disk, ReplayBuffer.open(tmp_path / "grown"))
    assert_same(on_disk, expected)
    with pytest.raises(InputError, match="exists"):
        ReplayBuffer.create(tmp_path / "grown")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop("state"), "has keys action, img; expected action, img, state"),
        (lambda rows: rows.update(state=rows["state"][:-1]), "rows"),
        (lambda rows: rows.update(state=rows["state"].astype(np.float32)), "state has rows .3. of float32"),
        (lambda rows: rows.update(action=rows["action"][:, :1]), "action has rows .1."),
        (lambda rows: rows.update({key: rows[key][:0] for key in rows}), "episode 0 is empty"),
        (lambda rows: rows["state"].__setitem__((2, 1), np.nan), "data/state is NaN at row 2, column 1"),
    ],
)
@pytest.mark.parametrize("on_disk", [True, False])
def test_an_episode_that_does_not_fit_is_refused(tmp_path: Path, change: Callable, message: str, on_disk: bool) -> None:
    buffer = in_memory(4)
    if on_disk:
        buffer.save(tmp_path / "a")
        buffer = ReplayBuffer.open(tmp_path / "a")
    rows = episode(4, 1)
    change(rows)
    with pytest.raises(InputError, match=message):
        buffer.append(rows)
    assert_same(buffer, in_memory(4))


class FullDisk:
    """Makes Zarr's write number `at` fail, and counts the writes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.at, self.writes = 0, 0
        original = LocalStore.set

        async def failing(store: LocalStore, key: str, value: Buffer) -> None:
            self.writes += 1
            if self.writes == self.at:
                raise OSError(28, "No space left on device")
            await original(store, key, value)

        monkeypatch.setattr(LocalStore, "set", failing)

    def fail(self, at: int) -> None:
        self.at, self.writes = at, 0


@pytest.mark.slow
def test_an_append_that_fails_at_any_write_leaves_the_earlier_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, after = in_memory(4, 3), in_memory(4, 3, 5)
    before.save(tmp_path / "initial")
    disk = FullDisk(monkeypatch)
    counts = []
    for at in range(1, 100):
        path = tmp_path / f"{at}"
        shutil.copytree(tmp_path / "initial", path)
        buffer = ReplayBuffer.open(path)
        disk.fail(at)
        with suppress(InputError):
            buffer.append(episode(5, 2))
        survivor = ReplayBuffer.open(path)
        assert_same(survivor, after if survivor.n_episodes == 3 else before)
        counts.append(survivor.n_episodes)
        if disk.writes < at:
            break
        if survivor.n_episodes == 2:  # whatever was left behind does no harm
            survivor.append(episode(5, 2))
            assert_same(ReplayBuffer.open(path), after)
    assert counts[0] == 2
    assert counts == sorted(counts)
    assert len(counts) > 8


def test_an_append_to_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory(4).save(tmp_path / "full")
    buffer = ReplayBuffer.open(tmp_path / "full")
    FullDisk(monkeypatch).fail(3)
    with pytest.raises(InputError, match=r"cannot write episode 1 to .*full .*unharmed.*No space left"):
        buffer.append(episode(5))
    assert_same(buffer, in_memory(4))


_RECORDER = """
import sys, numpy as np
from action_diffusion.datasets import ReplayBuffer
buffer = ReplayBuffer.create(sys.argv[1])
for number in range(10_000):
    rows = np.full((5 + number % 7, 4), number, np.float32)
    buffer.append({"state": rows, "action": rows[:, :2]})
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_killed_recorder_loses_no_finished_episode(tmp_path: Path) -> None:
    path = tmp_path / "recorded"
    with subprocess.Popen([sys.executable, "-c", _RECORDER, str(path)], stdout=subprocess.PIPE, text=True) as recorder:
        assert recorder.stdout
        finished = 0
        for line in recorder.stdout:
            finished = int(line) + 1
            if finished == 8:
                os.kill(recorder.pid, signal.SIGKILL)
    buffer = ReplayBuffer.open(path)
    assert buffer.n_episodes in (finished, finished + 1)
    for number, rows in enumerate(buffer.episodes()):
        assert rows["state"].shape == (5 + number % 7, 4)
        assert (rows["state"] == number).all()
        assert (rows["action"] == number).all()


def test_only_what_can_grow_grows(tmp_path: Path) -> None:
    buffer = in_memory(4)
    buffer.save(tmp_path / "a.zip")
    write_foreign(tmp_path / "b", buffer)
    for name in ("a.zip", "b"):
        with pytest.raises(InputError, match="only a Zarr v3 folder can grow"):
            ReplayBuffer.open(tmp_path / name).append(episode(2))
    with pytest.raises(InputError, match="a zip cannot grow"):
        ReplayBuffer.create(tmp_path / "c.zip")


@pytest.mark.parametrize("name", [None, "folder", "packed.zip"])
def test_dropped_episodes_are_gone(tmp_path: Path, name: str | None) -> None:
    buffer = in_memory(4, 2, 5, 3)
    kept = [buffer.episode(1), buffer.episode(3)]
    if name:
        buffer.save(tmp_path / name)
        buffer = ReplayBuffer.open(tmp_path / name)
    buffer.drop([0, 2])
    for found in [buffer, ReplayBuffer.open(tmp_path / name) if name else buffer]:
        assert found.episode_ends.tolist() == [2, 5]
        for expected, rows in zip(kept, found.episodes(), strict=True):
            np.testing.assert_array_equal(rows["img"], expected["img"])
    with pytest.raises(InputError, match="there are 2 episodes"):
        buffer.drop([2])
    with pytest.raises(InputError, match="cannot drop all 2"):
        buffer.drop([0, 1])
    assert not name or [path.name for path in tmp_path.iterdir()] == [name]


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("folder", "packed.zip"):
        in_memory(4).save(tmp_path / name)
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
            with pytest.raises(InputError, match="No space left"):
                in_memory(4, 2).save(tmp_path / name)
        assert_same(ReplayBuffer.open(tmp_path / name), in_memory(4))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "packed.zip"]


def test_a_column_can_be_added_without_writing() -> None:
    buffer = in_memory(4, 2)
    extended = buffer.with_column("more", np.arange(6))
    assert "more" in extended
    assert "more" not in buffer
    assert extended.episode(1)["more"].tolist() == [4, 5]
    with pytest.raises(InputError, match="row 6, but the arrays have 5 rows"):
        buffer.with_column("more", np.arange(5))


def test_unknown_keys_and_episodes_are_named() -> None:
    buffer = in_memory(4)
    with pytest.raises(InputError, match="no key 'stat' in data/; it has action, img, state"):
        buffer["stat"]
    with pytest.raises(InputError, match="no episode 1, there are 1"):
        buffer.episode(1)


def rewrite(path: Path, name: str, array: np.ndarray) -> None:
    root = zarr.open_group(path, mode="r+")
    del root[name]
    root.create_array(name, shape=array.shape, dtype=array.dtype)[...] = array


def delete(path: Path, name: str) -> None:
    del zarr.open_group(path, mode="r+")[name]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(byte ^ 0x5A for byte in content[len(content) // 2 :])
    path.write_bytes(content)


def chunk(path: Path, key: str) -> Path:
    return next(file for file in (path / "data" / key / "c").rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (
            lambda path: rewrite(path, "data/state", np.zeros((9, 3))),
            r"unequal length \(action 10, img 10, state 9 rows\)",
        ),
        (
            lambda path: rewrite(path, "data/state", np.zeros((12, 3))),
            "unequal length .*state 12 rows.*episode_ends says 10",
        ),
        (
            lambda path: rewrite(path, "meta/episode_ends", np.array([4, 9])),
            "stops at row 9, but the arrays have 10 rows",
        ),
        (
            lambda path: rewrite(path, "meta/episode_ends", np.array([4, 11])),
            "goes up to row 11, but the arrays have 10 rows",
        ),
        (
            lambda path: rewrite(path, "meta/episode_ends", np.array([4, 3, 10])),
            "episode 1 ends before it starts",
        ),
        (
            lambda path: rewrite(path, "meta/episode_ends", np.array([4, 4, 10])),
            "episode 1 is empty .rows 4 to 4",
        ),
        (lambda path: rewrite(path, "meta/episode_ends", np.array([0, 10])), "episode 0 is empty"),
        (
            lambda path: rewrite(path, "meta/episode_ends", np.array([4.5, 10.0])),
            "whole numbers, got float64",
        ),
        (lambda path: rewrite(path, "meta/episode_ends", np.zeros(0, int)), "holds no episodes"),
        (lambda path: delete(path, "data"), "no arrays under data"),
        (lambda path: delete(path, "meta"), "one meta/episode_ends array, found none"),
        (lambda path: shutil.copytree(path, path / "other"), "found more than one"),
        (lambda path: damage(path / "data/state/zarr.json"), "cannot be read"),
        (lambda path: damage(path / "meta/episode_ends/c/0"), "meta/episode_ends cannot be read"),
        (lambda path: damage(chunk(path, "img")), "data/img cannot be read"),
        (
            lambda path: chunk(path, "img").write_bytes(chunk(path, "img").read_bytes()[:40]),
            "data/img cannot be",
        ),
        (lambda path: chunk(path, "img").unlink(), "data/img lacks 1 of 1 chunks"),
    ],
)
def test_planted_faults_in_a_folder_are_named_in_one_line(tmp_path: Path, plant: Callable, message: str) -> None:
    path = tmp_path / "planted"
    in_memory(4, 6).save(path)
    plant(path)
    with pytest.raises(InputError, match=message) as caught:
        ReplayBuffer.open(path)["img"][:]
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.01])
def test_a_truncated_zip_is_named(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "cut.zip"
    in_memory(40, 60).save(path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(InputError, match="damaged or incomplete zip"):
        ReplayBuffer.open(path)


def test_a_flipped_byte_in_a_zip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "flipped.zip"
    in_memory(40, 60).save(path)
    with zipfile.ZipFile(path) as archive:
        entry = next(item for item in archive.infolist() if item.filename.startswith("data/img/c/"))
    content = bytearray(path.read_bytes())
    content[entry.header_offset + entry.compress_size // 2] ^= 1
    path.write_bytes(content)
    buffer = ReplayBuffer.open(path)
    np.testing.assert_array_equal(buffer["state"][:], in_memory(40, 60)["state"][:])
    with pytest.raises(InputError, match=r"flipped.zip: data/img cannot be read"):
        buffer["img"][:]


def test_what_is_no_buffer_at_all_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.hdf5").write_bytes(b"\x89HDF\r\n")
    (tmp_path / "empty").mkdir()
    for name, message in {
        "missing": "no such file or folder",
        "text.hdf5": "neither a Zarr folder nor a zip",
        "empty": "found none",
    }.items():
        with pytest.raises(InputError, match=message):
            ReplayBuffer.open(tmp_path / name)
    in_memory(2).save(tmp_path / "moved.previous")
    with pytest.raises(InputError, match=r"interrupted replacement left .*moved\.previous"):
        ReplayBuffer.open(tmp_path / "moved")


def test_arrays_in_memory_are_checked_too() -> None:
    for arrays, ends, message in [
        ({"a": np.zeros((4, 1)), "b": np.zeros((3, 1))}, [4], "unequal length .a 4, b 3 rows."),
        ({"a": np.zeros((4, 1))}, [2, 2, 4], "episode 1 is empty"),
        ({"a": np.array([None] * 4)}, [4], "object"),
        ({}, [4], "no arrays"),
    ]:
        with pytest.raises(InputError, match=message):
            ReplayBuffer.from_arrays(arrays, ends)


def test_the_human_file_opens_as_it_is() -> None:
    folder = os.environ.get("ACTION_DIFFUSION_DATA")
    if not folder:
        pytest.skip("ACTION_DIFFUSION_DATA is not set: the folder with pusht_cchi_v7_replay.zarr.zip")
    buffer = ReplayBuffer.open(Path(folder) / "pusht_cchi_v7_replay.zarr.zip")
    assert buffer.keys == ["action", "img", "keypoint", "n_contacts", "state"]
    assert (buffer.n_episodes, buffer.n_steps) == (206, 25650)
    assert buffer["state"][:].shape == (25650, 5)
    assert buffer["img"].shape == (25650, 96, 96, 3)
    assert buffer["img"].dtype == np.float32
    random = np.random.RandomState(0)  # the first episode starts where the paper's seeding puts the agent
    agent = [random.randint(50, 450), random.randint(50, 450)]
    np.testing.assert_array_equal(buffer.episode(0)["state"][0, :2], agent)
