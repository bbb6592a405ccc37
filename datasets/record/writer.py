"""What a recorder does with its steps, in the thread that writes.

rows     data/<key>       in chunks, written whole; the one under way at every flush
images   videos/<key>     frame by frame
aside    so many rows of the open episode are whole, in all of them
ends     the episode is committed
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.images.video import GrowingVideo, video_path
from action_diffusion.datasets.storage.growing import GrowingBuffer
from action_diffusion.datasets.storage.growing_column import Fields
from action_diffusion.datasets.storage.replay_buffer import VIDEOS
from action_diffusion.datasets.storage.store import reading
from action_diffusion.datasets.storage.video_column import shortened
from action_diffusion.errors import InputError
from action_diffusion.files import remove, writing

_RATE = 30.0


class EpisodeWriter:
    """See `Recorder`. `n_steps` are those of the open episode, `interrupted` says that an earlier writer left them.

    Raises `InputError` where the disk refuses; committed episodes are then as they were.
    """

    def __init__(self, path: Path, fields: Fields, attrs: Mapping[str, Any], video: Collection[str]) -> None:
        plain = {key: (np.dtype(dtype).str, shape) for key, (dtype, shape) in fields.items() if key not in video}
        rate = attrs.get("control_rate", _RATE)
        if not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise InputError(f"control_rate is {rate!r}; it must be a number of steps per second")
        videos: dict[str, Any] = {key: {"shape": list(fields[key][1]), "rate": float(rate)} for key in sorted(video)}
        wanted = {**attrs, **({VIDEOS: videos} if videos else {})}
        if path.exists():
            self._buffer = GrowingBuffer.open(path)
            _check_same(path, plain, self._buffer.fields, "columns")
            _check_same(path, wanted, self._buffer.attrs, "attributes")
        else:
            self._buffer = GrowingBuffer.create(path, data=plain, attrs=wanted)
        self.path, self._videos = path, videos
        self._writers: dict[str, GrowingVideo] = {}
        self.n_steps = self._buffer.n_aside
        self.interrupted = self.n_steps > 0
        if not self.n_steps:  # what a killed writer left unfinished is nobody's
            self._forget()

    @property
    def n_episodes(self) -> int:
        return len(self._buffer.ends)

    def _path(self, key: str) -> Path:
        return video_path(self.path, key, self.n_episodes)

    def add(self, row: Mapping[str, np.ndarray]) -> None:
        """One more row of the open episode."""
        with writing(str(self.path)):
            for key, video in self._videos.items():
                if not self.n_steps:
                    place, shape, rate = self._path(key), video["shape"], video["rate"]
                    self._writers[key] = GrowingVideo(self._buffer.disk, place, shape=shape, rate=rate)
                self._writers[key].add([row[key]])
            self._buffer.data.add({key: value[np.newaxis] for key, value in row.items() if key not in self._videos})
        self.n_steps += 1

    def flush(self) -> None:
        """What there is of the open episode is on disk, and an interruption leaves it there."""
        if not self.n_steps or self.interrupted:
            return
        with writing(str(self.path)):
            whole = [writer.flush() for writer in self._writers.values()]
        self._buffer.flush()
        self._buffer.set_aside(min([self.n_steps, *whole]))

    def keep(self) -> int:
        """Commit the open episode; returns its index."""
        self._close_videos()
        for path in [self._path(key) for key in self._videos] if self.interrupted else []:
            with reading(str(path)):
                video = shortened(path, self.n_steps)
            with writing(str(path)):
                self._buffer.disk.write(path, video)
        self._buffer.commit([*self._buffer.ends, self._buffer.n_rows + self.n_steps])
        self._begin()
        return self.n_episodes - 1

    def discard(self) -> None:
        """Forget the open episode."""
        self._buffer.set_aside(0)
        self._forget()

    def undo(self) -> int:
        """Forget the last committed episode; returns how many are left."""
        self._buffer.set_aside(0)  # what was set aside before that episode's last rows would look like an open one
        self._buffer.commit(self._buffer.ends[:-1])
        self._forget()
        return self.n_episodes

    def _forget(self) -> None:
        """Delete what lies behind the last committed episode, which nothing points at any more."""
        self.abandon()
        with writing(str(self.path)):
            self._buffer.data.cut(self._buffer.n_rows)
            for key in self._videos:
                self._buffer.disk.remove(self._path(key))
        self._begin()

    def _close_videos(self) -> None:
        with writing(str(self.path)):
            for writer in self._writers.values():
                writer.close()
        self._writers = {}

    def abandon(self) -> None:
        """Let go of all files."""
        for writer in self._writers.values():
            writer.abandon()
        self._writers = {}

    def _begin(self) -> None:
        self.n_steps, self.interrupted = 0, False

    def close(self) -> None:
        """The end: an open episode stays aside; where there is none, the buffer is like any other."""
        if self.interrupted:
            return
        if self.n_steps:
            self._close_videos()
            self._buffer.flush()
            self._buffer.set_aside(self.n_steps)
        elif self.n_episodes:
            self._buffer.finish(self._buffer.ends)
        else:
            remove(self.path)


def _check_same(path: Path, given: Mapping[str, Any], there: Mapping[str, Any], what: str) -> None:
    """Raises `InputError` where a file that is there does not hold what is `given`."""
    for name in sorted({*given, *there}):
        if name not in given and what == "attributes":
            continue
        ours, theirs = _plain(given.get(name)), _plain(there.get(name))
        if ours != theirs:
            raise InputError(f"{path} has other {what}: {name} is {theirs}, not {ours}: record to another file")


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
