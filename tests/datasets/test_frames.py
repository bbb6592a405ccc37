"""Images that are decoded when they are needed: the same batches as from memory, for every codec, and bounded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
import zarr
from numcodecs import Blosc
from zarr.codecs import ZstdCodec

from action_diffusion import memory
from action_diffusion.datasets import ReplayBuffer
from action_diffusion.datasets.batches.frames import DecodedRows, Decoders
from action_diffusion.datasets.batches.joining import joined
from action_diffusion.datasets.batches.loader import BatchSource, ObsKey
from action_diffusion.datasets.batches.sources import open_data
from action_diffusion.datasets.batches.windows import make_windows
from action_diffusion.datasets.formats.contract import Settings
from action_diffusion.datasets.formats.conversion import convert
from action_diffusion.datasets.formats.registry import named
from action_diffusion.datasets.formats.video import video_info
from action_diffusion.datasets.formats.zarr_buffer import ZARR
from action_diffusion.datasets.record.recorder import Recorder
from action_diffusion.errors import InputError
from action_diffusion.training.data import StepBatches

ENDS = np.array([14, 15, 40])
SHAPE = (16, 24, 3)
RATE = 6.0
IMAGE = {"img": ObsKey("img", None, "image")}


def pictures() -> np.ndarray:
    """A square that moves over noise, uint8 [N, H, W, 3]."""
    frames = np.random.default_rng(0).integers(0, 256, (int(ENDS[-1]), *SHAPE), np.uint8)
    for number, frame in enumerate(frames):
        frame[4:10, number % 16 : number % 16 + 8] = (number * 5, 200, 30)
    return frames


def demonstrations() -> ReplayBuffer:
    n = int(ENDS[-1])
    columns = {
        "img": pictures(),
        "action": np.arange(2 * n, dtype=np.float32).reshape(n, 2),
        "reward": np.linspace(0, 1, n, dtype=np.float32),
    }
    return ReplayBuffer.from_arrays(columns, ENDS, {"control_rate": RATE})


def zarr_of(**settings: Any) -> Callable[[Path], Path]:
    """Pictures in chunks and by a codec of somebody else's choice."""

    def write(folder: Path) -> Path:
        version = settings.get("zarr_format", 3)
        root, buffer = zarr.open_group(folder / "a.zarr", mode="w", zarr_format=version), demonstrations()
        for key in ("action", "reward"):
            root.create_array(f"data/{key}", data=np.asarray(buffer[key]))
        root.create_array(
            "data/img", data=np.asarray(buffer["img"]), **{k: v for k, v in settings.items() if k != "zarr_format"}
        )
        root.create_array("meta/episode_ends", data=ENDS)
        return folder / "a.zarr"

    return write


def converted(kind: str, name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        demonstrations().save(folder / "own.zarr")
        convert(ZARR.open(folder / "own.zarr"), folder / name, named(kind), Settings(RATE))
        return folder / name

    return write


def recorded(folder: Path) -> Path:
    """The recorder's videos, a key frame a second."""
    buffer, fields = demonstrations(), {"img": ("u1", SHAPE), "action": ("f4", (2,)), "reward": ("f4", ())}
    with Recorder.open(folder / "a.zarr", fields, {"control_rate": RATE}, video=["img"]) as recorder:
        for row in range(buffer.n_steps):
            recorder.add({key: buffer[key][row] for key in fields})
            if row + 1 in ENDS:
                recorder.keep()
    return folder / "a.zarr"


def reordered(folder: Path) -> Path:
    """LeRobot's, with frames that are decoded in another order than shown, and key frames amid those."""
    path = converted("lerobot", "a")(folder)
    (file,) = path.glob("videos/**/*.mp4")
    with av.open(str(file)) as old:
        frames = [frame.to_ndarray(format="rgb24") for frame in old.decode(video=0)]
    with av.open(str(file), "w") as container:
        options = {"bf": "3", "g": "7", "sc_threshold": "0", "x264-params": "open-gop=1:b-adapt=0"}
        stream: Any = container.add_stream("libx264", rate=int(RATE), options=options)
        stream.height, stream.width, stream.pix_fmt = SHAPE[0], SHAPE[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    assert len(video_info(file).keys) > 3
    return path


WRITTEN: dict[str, Callable[[Path], Path]] = {
    "zstd": zarr_of(chunks=(7, *SHAPE), compressors=ZstdCodec()),
    "blosc": zarr_of(zarr_format=2, chunks=(1, *SHAPE), compressors=Blosc("lz4")),
    "shards": zarr_of(chunks=(3, *SHAPE), shards=(12, *SHAPE)),
    "JPEG XL": converted("umi", "a.zarr.zip"),
    "recorder": recorded,
    "lerobot": converted("lerobot", "a"),
    "lerobot21": converted("lerobot21", "a"),
    "reordered": reordered,
}


def source(buffer: ReplayBuffer, **settings: Any) -> BatchSource:
    return BatchSource(
        buffer=buffer,
        windows=make_windows(buffer.episode_ends, horizon=8, n_obs_steps=2, n_action_steps=4),
        observations=IMAGE,
        action_key="action",
        n_obs_steps=2,
        reward_key="reward",
        **settings,
    )


def opened(path: Path, cache: Path) -> ReplayBuffer:
    return open_data(path, cache_dir=cache, say=lambda _: None, images="decode")


@pytest.fixture(scope="module", params=WRITTEN)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITTEN[request.param](tmp_path_factory.mktemp("frames"))


@pytest.mark.parametrize("memory_gb", [1e-9, 2e-5, None], ids=["one unit", "some units", "all"])
def test_batches_are_those_from_memory(written: Path, memory_gb: float | None, tmp_path: Path) -> None:
    decoded = source(opened(written, tmp_path), mode="decode", memory_gb=memory_gb)
    expected = source(opened(written, tmp_path), mode="memory")
    order = np.random.default_rng(0).permutation(len(expected))
    for indices in np.array_split(order, 5):
        decoded.prefetch(indices, critic=True)
        offsets = np.full((len(indices), 2), 3)
        for crop in dict[str, Any](), {"crop": (9, 11), "offsets": offsets}:
            ours, theirs = (one.gather(indices, critic=True, **crop) for one in (decoded, expected))
            assert torch.equal(ours.obs["img"], theirs.obs["img"])
            assert torch.equal(ours.action, theirs.action)
            assert ours.critic is not None
            assert theirs.critic is not None
            assert torch.equal(ours.critic.next_obs["img"], theirs.critic.next_obs["img"])
    assert not [*tmp_path.rglob("*.npy"), *tmp_path.rglob("*.zarr")]  # no copy


def test_several_buffers_are_decoded_as_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    buffers = [opened(WRITTEN["zstd"](tmp_path), tmp_path), opened(recorded(tmp_path / "a"), tmp_path)]
    both = joined(buffers, ["img", "action", "reward"])
    decoded, expected = source(both, mode="decode", memory_gb=1e-9), source(both, mode="memory")
    indices = np.random.default_rng(1).permutation(len(expected))
    assert torch.equal(decoded.gather(indices).obs["img"], expected.gather(indices).obs["img"])


def test_a_step_s_batch_is_the_same_wherever_a_run_begins(tmp_path: Path) -> None:
    buffer = ReplayBuffer.open(WRITTEN["zstd"](tmp_path))

    def batches(mode: memory.Mode, steps: Iterator[int] | range) -> list[torch.Tensor]:
        made = StepBatches(source(buffer, mode=mode), seed=3, crop=(8, 8))
        return [made.batch(step, 8, torch.Generator()).obs["img"] for step in steps]

    whole, resumed, expected = (
        batches("decode", range(12)),
        batches("decode", range(7, 12)),
        batches("memory", range(12)),
    )
    assert all(torch.equal(one, other) for one, other in zip(whole, expected, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(resumed, expected[7:], strict=True))


class Counted:
    """Rows of their own number, in units of 5; `read`: the units that were decoded."""

    shape, dtype = (100, 2), np.dtype(np.uint8)

    def __init__(self) -> None:
        self.read: list[int] = []

    def units(self) -> np.ndarray:
        return np.arange(0, 100, 5)

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        numbers = np.arange(100, dtype=np.uint8)[rows]
        self.read += np.unique(numbers // 5).tolist()
        return np.stack([numbers, numbers], axis=1)


def test_the_units_that_were_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("action_diffusion.datasets.batches.frames._TASK_BYTES", 1)
    column = Counted()
    rows = DecodedRows(column, Decoders(30))  # three of 10 bytes
    for row in (3, 8, 14, 2, 19, 1, 9):  # units 0, 1, 2, 0, 3 (1 goes), 0, 1
        assert rows[row].tolist() == [row, row]
    assert column.read == [0, 1, 2, 3, 1]


def test_little_is_decoded_ahead_where_little_is_kept() -> None:
    column = Counted()
    rows = DecodedRows(column, Decoders(30))
    rows.prefetch(np.array([[3, 4]]))
    rows[99]
    assert column.read == [19]


class Broken(Counted):
    def __getitem__(self, rows: Any, /) -> np.ndarray:
        super().__getitem__(rows)
        raise InputError("the disk is gone")


def test_nothing_is_decoded_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("action_diffusion.datasets.batches.frames._TASK_BYTES", 1)
    column = Broken()
    rows = DecodedRows(column, Decoders(1000))
    with pytest.raises(InputError, match="the disk is gone"):
        rows[0]
    for row in range(5, 100):
        with pytest.raises(InputError, match="the disk is gone"):
            rows[row]
    assert column.read == [0]


def test_where_images_are_follows_from_the_room_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = ReplayBuffer.open(WRITTEN["zstd"](tmp_path))
    room = {"disk": 10**9, "decode": pictures().nbytes}
    for mode, free in room.items():
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        assert source(buffer, memory_gb=1e-5, cache_dir=tmp_path / "cache").mode == mode
    assert source(buffer, cache_dir=tmp_path / "cache").mode == "memory"


def test_a_lerobot_data_set_needs_no_room_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, said = WRITTEN["lerobot"](tmp_path), list[str]()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5}))
    with pytest.raises(InputError, match="make room"):
        open_data(path, cache_dir=tmp_path / "cache", say=said.append)
    buffer = open_data(path, cache_dir=tmp_path / "cache", say=said.append, images="auto")
    assert buffer["img"].shape == (40, *SHAPE)
    assert said == [f"{path} is a LeRobot data set, read where it is: its frames are decoded when they are needed"]


def test_a_damaged_chunk_is_named_when_it_is_needed(tmp_path: Path) -> None:
    path = WRITTEN["zstd"](tmp_path)
    chunk: Path = path / "data/img/c/2/0/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-40])
    made = source(ReplayBuffer.open(path), mode="decode")
    made.gather(np.array([0]))
    made.prefetch(np.array([0, 15]))
    with pytest.raises(InputError, match=r"a\.zarr: data/img cannot be read, the file is damaged"):
        made.gather(np.array([15]))


def test_a_damaged_video_is_named_when_it_is_needed_and_a_missing_one_at_once(tmp_path: Path) -> None:
    path = recorded(tmp_path)
    file = path / "videos/img/episode_000002.mp4"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    made = source(ReplayBuffer.open(path), mode="decode")
    made.gather(np.array([0]))
    with pytest.raises(InputError, match=r"episode_000002\.mp4 has \d+ frames, its episode has 25 steps"):
        made.gather(np.array([len(made) - 1]))
    file.unlink()
    with pytest.raises(InputError, match=r"episode_000002\.mp4 is missing"):
        source(ReplayBuffer.open(path), mode="decode")
