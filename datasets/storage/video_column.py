"""A column of a buffer that lies in videos: frames are decoded when they are asked for."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from action_diffusion.datasets.images.video import FRAGMENTS, video_path
from action_diffusion.datasets.storage.rows import Rows
from action_diffusion.datasets.storage.store import reading
from action_diffusion.errors import InputError


class Packets(NamedTuple):
    """A video as it is stored: the encoded frames, the numbers of the key frames, and what the decoder must know."""

    frames: list[bytes]
    keys: list[int]
    header: bytes

    @classmethod
    def read(cls, path: Path) -> Packets:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: holds no video")
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size]
            keys = [number for number, packet in enumerate(packets) if packet.is_keyframe]
            return cls([bytes(packet) for packet in packets], keys, stream.codec_context.extradata or b"")

    def decode(self, first: int, end: int) -> list[np.ndarray]:
        """Frames `first` (a key frame) to `end`, uint8 [H, W, 3]."""
        decoder = av.CodecContext.create("h264", "r")
        assert isinstance(decoder, av.VideoCodecContext)
        decoder.extradata, decoder.thread_count = self.header, 1
        decoded = [frame for packet in self.frames[first:end] for frame in decoder.decode(av.Packet(packet))]
        decoded += decoder.decode(None)
        if len(decoded) != end - first:
            raise ValueError(f"frames {first} to {end - 1} decode to {len(decoded)}")
        return [frame.to_ndarray(format="rgb24") for frame in decoded]


class VideoColumn(Rows):
    """Frames uint8 [N, H, W, 3] of a camera, rows as in numpy. The second around the last one is kept decoded.

    Args:
        buffer: the folder of the buffer.
        key: the camera.
        shape: [H, W, 3].
        episode_ends: row after the last of each episode.

    Reading raises `InputError` with the name of a file that is missing, damaged, or has too few frames.
    """

    def __init__(self, buffer: Path, key: str, shape: tuple[int, ...], episode_ends: np.ndarray) -> None:
        self._buffer, self._key, self._ends = buffer, key, episode_ends.tolist()
        self.shape = (self._ends[-1], *shape)
        self.dtype = np.dtype(np.uint8)
        self._lock = threading.Lock()
        self._episode: tuple[int, Packets] | None = None
        self._decoded: tuple[int, list[np.ndarray]] = (0, [])  # row of the first

    def _take(self, index: Any, rows: np.ndarray) -> Any:
        flat = rows.ravel()
        frames = np.empty((len(flat), *self.shape[1:]), np.uint8)
        with self._lock:
            for place in np.argsort(flat, kind="stable"):
                frames[place] = self._frame(int(flat[place]))
        return frames.reshape(*rows.shape, *self.shape[1:])

    def _frame(self, row: int) -> np.ndarray:
        first, frames = self._decoded
        if not first <= row < first + len(frames):
            first, frames = self._decoded = self._second(row)
        return frames[row - first]

    def _second(self, row: int) -> tuple[int, list[np.ndarray]]:
        """The frames between two key frames, with `row` among them, and the row of the first."""
        episode = bisect_right(self._ends, row)
        start = self._ends[episode - 1] if episode else 0
        path = video_path(self._buffer, self._key, episode)
        with reading(str(path)):
            packets = self._packets(episode, path)
            n_frames = self._ends[episode] - start
            if len(packets.frames) != n_frames or packets.keys[:1] != [0]:
                has = f"{path} has {len(packets.frames)} frames"
                raise InputError(f"{has}, its episode has {n_frames} steps: copy it again")
            after = bisect_right(packets.keys, row - start)
            end = [*packets.keys, n_frames][after]
            first = packets.keys[after - 1]
            frames = packets.decode(first, min(end, n_frames))
            if frames[0].shape != self.shape[1:]:
                raise InputError(f"{path} has frames {list(frames[0].shape)}; they must be {list(self.shape[1:])}")
            return start + first, frames

    def _packets(self, episode: int, path: Path) -> Packets:
        if self._episode is None or self._episode[0] != episode:
            self._episode = episode, Packets.read(path)
        return self._episode[1]


def video_columns(path: Path, videos: Mapping[str, Any], episode_ends: np.ndarray) -> dict[str, VideoColumn]:
    """The columns of the buffer at `path` that its attribute `videos` speaks of."""
    with reading(f"{path}: attribute videos"):
        shapes = {key: tuple(int(size) for size in video["shape"]) for key, video in videos.items()}
    return {key: VideoColumn(path, key, shape, episode_ends) for key, shape in shapes.items()}


def shortened(path: Path, n_frames: int) -> bytes:
    """The first `n_frames` frames of a video, as they are encoded, as a video."""
    short = BytesIO()
    with av.open(str(path)) as source, av.open(short, "w", format="mp4", options={"movflags": FRAGMENTS}) as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for number, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            if number < n_frames:
                packet.stream = copy
                target.mux(packet)
    return short.getvalue()
