"""A column of a buffer that lies in videos: frames are decoded when they are asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from action_diffusion.datasets.images.video import FRAGMENTS, Pixels, keyframe_every, video_path
from action_diffusion.datasets.storage.rows import Rows
from action_diffusion.datasets.storage.store import reading
from action_diffusion.errors import InputError


class VideoIndex(NamedTuple):
    """Where the encoded frames of a video are in its file, and what the decoder must know.

    places, sizes: bytes, int64 [N]. keys: the numbers of the key frames.
    """

    places: np.ndarray
    sizes: np.ndarray
    keys: list[int]
    header: bytes

    @classmethod
    def read(cls, path: Path) -> VideoIndex:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"{path}: holds no video")
            stream = container.streams.video[0]
            found = [(packet.pos, packet.size, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
            places, sizes = (np.array([frame[part] for frame in found], np.int64) for part in (0, 1))
            keys = [number for number, frame in enumerate(found) if frame[2]]
            return cls(places, sizes, keys, stream.codec_context.extradata or b"")

    def decode(self, path: Path, first: int, end: int) -> list[np.ndarray]:
        """Frames `first` (a key frame) to `end`, uint8 [H, W, 3]."""
        decoder = av.CodecContext.create("h264", "r")
        assert isinstance(decoder, av.VideoCodecContext)
        decoder.extradata, decoder.thread_count = self.header, 1
        decoded = []
        with path.open("rb") as file:
            for place, size in zip(self.places[first:end].tolist(), self.sizes[first:end].tolist(), strict=True):
                file.seek(place)
                decoded += decoder.decode(av.Packet(file.read(size)))
        decoded += decoder.decode(None)
        if len(decoded) != end - first:
            raise ValueError(f"frames {first} to {end - 1} decode to {len(decoded)}")
        pixels = Pixels()
        return [pixels.of(frame) for frame in decoded]


class VideoColumn(Rows):
    """Frames uint8 [N, H, W, 3] of a camera, rows as in numpy. The second around the last one is kept decoded.

    Args:
        buffer: the folder of the buffer.
        key: the camera.
        shape: [H, W, 3].
        every: frames from one key frame to the next.
        episode_ends: row after the last of each episode.

    Reading raises `InputError` with the name of a file that is missing, damaged, or has too few frames.
    """

    def __init__(self, buffer: Path, key: str, shape: tuple[int, ...], every: int, episode_ends: np.ndarray) -> None:
        self._buffer, self._key, self._ends = buffer, key, episode_ends.tolist()
        self.shape = (self._ends[-1], *shape)
        self.dtype = np.dtype(np.uint8)
        self._every = every
        self._indices: dict[int, VideoIndex] = {}  # by episode
        self._decoded: tuple[int, list[np.ndarray]] = (0, [])  # row of the first

    def units(self) -> np.ndarray:
        """See `store.InUnits`: from one key frame to the next. Raises `InputError` where an episode has no file."""
        starts = [0, *self._ends[:-1]]
        for episode in range(len(starts)):
            path = video_path(self._buffer, self._key, episode)
            if not path.is_file():
                raise InputError(f"{path} is missing: copy the buffer again")
        return np.concatenate([np.arange(*ends, self._every) for ends in zip(starts, self._ends, strict=True)])

    def _take(self, index: Any, rows: np.ndarray) -> Any:
        flat = rows.ravel()
        frames = np.empty((len(flat), *self.shape[1:]), np.uint8)
        first, decoded = self._decoded
        for place in np.argsort(flat, kind="stable"):
            row = int(flat[place])
            if not first <= row < first + len(decoded):
                first, decoded = self._second(row)
            frames[place] = decoded[row - first]
        self._decoded = first, decoded
        return frames.reshape(*rows.shape, *self.shape[1:])

    def _second(self, row: int) -> tuple[int, list[np.ndarray]]:
        """The frames between two key frames, with `row` among them, and the row of the first."""
        episode = bisect_right(self._ends, row)
        start = self._ends[episode - 1] if episode else 0
        path = video_path(self._buffer, self._key, episode)
        with reading(str(path)):
            index = self._indices.get(episode)
            if index is None:
                index = self._indices[episode] = VideoIndex.read(path)
            n_frames = self._ends[episode] - start
            if len(index.places) != n_frames or index.keys[:1] != [0]:
                has = f"{path} has {len(index.places)} frames"
                raise InputError(f"{has}, its episode has {n_frames} steps: copy it again")
            after = bisect_right(index.keys, row - start)
            end = [*index.keys, n_frames][after]
            first = index.keys[after - 1]
            frames = index.decode(path, first, min(end, n_frames))
            if frames[0].shape != self.shape[1:]:
                raise InputError(f"{path} has frames {list(frames[0].shape)}; they must be {list(self.shape[1:])}")
            return start + first, frames


def video_columns(path: Path, videos: Mapping[str, Any], episode_ends: np.ndarray) -> dict[str, VideoColumn]:
    """The columns of the buffer at `path` that its attribute `videos` speaks of."""
    with reading(f"{path}: attribute videos"):
        kinds = {
            key: (tuple(int(size) for size in video["shape"]), keyframe_every(float(video["rate"])))
            for key, video in videos.items()
        }
    return {key: VideoColumn(path, key, *kind, episode_ends) for key, kind in kinds.items()}


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
