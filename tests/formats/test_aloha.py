"""ALOHA's folders of HDF5 files: raw and JPEG, one file, words, and what is refused."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from robomimic_files import h5py

from action_diffusion.commands import data_convert
from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.formats.registry import detected
from action_diffusion.errors import InputError

LENGTHS = {0: 3, 1: 5, 2: 2, 10: 4}


def pixels(length: int, seed: int) -> np.ndarray:
    """[T, 8, 12, 3], smooth, red above blue."""
    ramp = np.linspace(0, 100, 12)[None, None, :, None] + np.array([120.0, 60.0, 10.0])
    return (ramp + np.arange(length)[:, None, None, None] + seed + np.zeros((1, 8, 1, 1))).astype(np.uint8)


def encoded(images: np.ndarray, kind: str = "JPEG") -> list[bytes]:
    found = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, kind, quality=95)
        found.append(file.getvalue())
    return found


def as_padded(group: Any, files: list[bytes]) -> None:
    longest = max(map(len, files))
    group["cam_high"] = np.stack([np.frombuffer(file.ljust(longest, b"\0"), np.uint8) for file in files])


def as_bytes(group: Any, files: list[bytes]) -> None:
    group["cam_high"] = np.array(files)


def as_ragged(group: Any, files: list[bytes]) -> None:
    dataset = group.create_dataset("cam_high", (len(files),), h5py.vlen_dtype(np.uint8))
    for row, file in enumerate(files):
        dataset[row] = np.frombuffer(file, np.uint8)


def write_aloha(folder: Path, encode: Callable[[Any, list[bytes]], None] | None = None, kind: str = "JPEG") -> Path:
    folder.mkdir()
    for number, length in LENGTHS.items():
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
            file.attrs["sim"] = False
            file["action"] = np.arange(length * 2, dtype=np.float32).reshape(length, 2) + 100 * number
            file["base_action"] = np.full((length, 2), float(number))
            file["observations/qpos"] = np.full((length, 2), number, np.float32)
            images = file.create_group("observations/images")
            if encode is None:
                images["cam_high"] = pixels(length, number)
            else:
                encode(images, encoded(pixels(length, number), kind))
                file["compress_len"] = np.full((1, length), 600)
    return folder


def converted(source: Path, output: Path) -> tuple[ReplayBuffer, dict[str, Any]]:
    summary = data_convert.run({"in": str(source), "out": str(output)})
    return ReplayBuffer.open(output), dict(summary)


def test_a_folder_is_episodes_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    assert detected(write_aloha(tmp_path / "a")) == "aloha"
    buffer, _ = converted(tmp_path / "a", tmp_path / "a.zarr")
    assert np.diff(buffer.episode_ends, prepend=0).tolist() == list(LENGTHS.values())
    assert set(buffer.keys) == {"action", "action.base_action", "qpos", "cam_high"}
    for (number, length), episode in zip(LENGTHS.items(), buffer.episodes(), strict=True):
        assert episode["action"][0].tolist() == [100 * number, 100 * number + 1]
        assert episode["qpos"].dtype == np.float32
        np.testing.assert_array_equal(episode["cam_high"], pixels(length, number))


@pytest.mark.parametrize("encode", [as_padded, as_bytes, as_ragged])
@pytest.mark.parametrize(("kind", "largest"), [("JPEG", 4), ("PNG", 0)])
def test_encoded_images_are_decoded(
    tmp_path: Path, encode: Callable[[Any, list[bytes]], None], kind: str, largest: int
) -> None:
    buffer, summary = converted(write_aloha(tmp_path / "a", encode, kind), tmp_path / "a.zarr")
    assert buffer["cam_high"].dtype == np.uint8
    for (number, length), episode in zip(LENGTHS.items(), buffer.episodes(), strict=True):
        errors = episode["cam_high"].astype(int) - pixels(length, number)
        assert np.abs(errors).max() <= largest  # with red and blue exchanged it would be 110
    assert "compress_len (one value a demo)" in str(summary["left_out"])


def test_a_file_alone_is_one_episode(tmp_path: Path) -> None:
    file = write_aloha(tmp_path / "a") / "episode_1.hdf5"
    assert detected(file) == "aloha"
    buffer, _ = converted(file, tmp_path / "a.zarr")
    assert buffer.episode_ends.tolist() == [5]


def test_words_are_tasks(tmp_path: Path) -> None:
    write_aloha(tmp_path / "a")
    for number in LENGTHS:
        with h5py.File(tmp_path / f"a/episode_{number}.hdf5", "a") as file:
            file["language_raw"] = np.array([f"task {number // 2}".encode()])
    buffer, _ = converted(tmp_path / "a", tmp_path / "a.zarr")
    assert buffer.attrs["tasks"] == ["task 0", "task 1", "task 5"]
    assert buffer["task_index"][:].tolist() == [0] * 8 + [1] * 2 + [2] * 4


def cut_off(file: Any) -> None:
    data = file["observations/images/cam_high"][()]
    data[1, 200:] = 0
    file["observations/images/cam_high"][...] = data


def other_size(file: Any) -> None:
    small = encoded(np.zeros((1, 4, 4, 3), np.uint8))[0]
    row = np.frombuffer(small.ljust(file["observations/images/cam_high"].shape[1], b"\0"), np.uint8)
    file["observations/images/cam_high"][1] = row[: file["observations/images/cam_high"].shape[1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut_off, r"episode_1.hdf5/observations/images/cam_high row 1: an image that cannot be decoded"),
        (other_size, r"cam_high row 1: an image \[4, 4, 3\], the first is \[8, 12, 3\]"),
        (lambda file: file.__delitem__("action"), "episode_1.hdf5 has no actions"),
        (lambda file: file.__delitem__("observations/qpos"), "episode_1.hdf5 lacks observations/qpos, which episode_0"),
        (lambda file: file.__setitem__("observations/link", h5py.SoftLink("/action")), "is a link to /action"),
    ],
)
def test_a_bad_episode_is_named(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    write_aloha(tmp_path / "a", as_padded)
    with h5py.File(tmp_path / "a/episode_1.hdf5", "a") as file:
        change(file)
    with pytest.raises(InputError, match=message) as caught:
        converted(tmp_path / "a", tmp_path / "a.zarr")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.zarr").exists()


def test_links_and_pipes_in_the_folder_are_refused(tmp_path: Path) -> None:
    write_aloha(tmp_path / "a")
    write_aloha(tmp_path / "b")
    os.mkfifo(tmp_path / "a/episode_3.hdf5")
    with pytest.raises(InputError, match=r"episode_3\.hdf5: no regular file"):
        converted(tmp_path / "a", tmp_path / "a.zarr")
    (tmp_path / "b/episode_3.hdf5").symlink_to(tmp_path / "a/episode_0.hdf5")
    with pytest.raises(InputError, match=r"b/episode_3\.hdf5 is a link; links are not followed"):
        converted(tmp_path / "b", tmp_path / "b.zarr")


def test_it_is_only_read(tmp_path: Path) -> None:
    converted(write_aloha(tmp_path / "a"), tmp_path / "a.zarr")
    with pytest.raises(InputError, match="unknown format 'aloha'"):
        data_convert.run({"in": str(tmp_path / "a.zarr"), "out": str(tmp_path / "b"), "format": "aloha"})
