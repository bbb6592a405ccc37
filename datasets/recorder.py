"""Demonstrations as they happen: one step at a time, an episode is kept as a whole or not at all.

open ─▶ add, add, … ─┬▶ keep ────▶ committed          undo ─▶ the last committed one is gone
                     └▶ discard ─▶ gone
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from action_diffusion.datasets.files import remove, writing
from action_diffusion.datasets.growing import Fields
from action_diffusion.datasets.replay_buffer import ReplayBuffer
from action_diffusion.errors import InputError


class Recorder:
    """The only writer of a replay buffer. Made by `open`; a context manager, which ends with `close`.

    A step that is refused (wrong keys, shapes, NaN) is an `InputError` of `add`, and the open episode is as before.
    Where the disk refuses, the next call of any method raises an `InputError`, and so does every one after that but
    `close`; committed episodes are intact, and `open` goes on once there is room.
    """

    def __init__(self, path: Path, fields: Fields, attrs: Mapping[str, Any], lock: Any) -> None:
        self.path = path
        self._fields = {key: (np.dtype(dtype), tuple(shape)) for key, (dtype, shape) in fields.items()}
        self._buffer = ReplayBuffer.open(path) if path.exists() else ReplayBuffer.create(path, attrs=attrs)
        self._rows: list[dict[str, np.ndarray]] = []
        self._lock = lock

    @classmethod
    def open(
        cls, path: str | Path, fields: Fields, attrs: Mapping[str, Any], *, video: Collection[str] = ()
    ) -> Recorder:
        """Create the buffer at `path`, or go on with it.

        Args:
            fields: column → (dtype, shape of a row), as in `add`.
            attrs: plain values that hold for all episodes; `control_rate` (Hz) says how many steps a second has.
            video: which of `fields` are images, uint8 [H, W, 3], to be kept as video.

        Raises:
            InputError: where another process records to `path` (the message says which), and where what is there
                has other fields or attributes.
        """
        path = Path(path).expanduser()
        lock = writer_lock(path)
        lock.__enter__()
        try:
            return cls(path, fields, attrs, lock)
        except BaseException:
            lock.__exit__(None, None, None)
            raise

    @property
    def n_episodes(self) -> int:
        """Committed ones."""
        return self._buffer.n_episodes

    @property
    def n_steps(self) -> int:
        """Of the open episode; after `open` those that an interrupted recording left, to be kept or discarded."""
        return len(self._rows)

    def add(self, step: Mapping[str, Any]) -> None:
        """One row of the open episode; the first one opens it. The values are copied, and written later."""
        self._rows.append({key: self._checked(key, step) for key in self._fields})

    def _checked(self, key: str, step: Mapping[str, Any]) -> np.ndarray:
        dtype, shape = self._fields[key]
        if set(step) != set(self._fields):
            raise InputError(f"a step for {self.path} has {', '.join(step)}; it must have {', '.join(self._fields)}")
        value = np.array(step[key], dtype)
        if value.shape != shape:
            raise InputError(f"a step for {self.path}: {key} is {list(value.shape)}; it must be {list(shape)}")
        return value

    def keep(self) -> int:
        """Commit the open episode; it is on disk when this returns its index. At least one step is needed."""
        if not self._rows:
            raise InputError(f"{self.path}: no step was recorded: there is nothing to keep")
        self._buffer.append({key: np.stack([row[key] for row in self._rows]) for key in self._fields})
        self._rows = []
        return self._buffer.n_episodes - 1

    def discard(self) -> None:
        """Drop the open episode, if there is one."""
        self._rows = []

    def undo(self) -> int:
        """Take the last committed episode back, for good; returns how many are left. None may be open."""
        if self._rows:
            raise InputError(f"{self.path}: an episode is open: discard or keep it first")
        if not self._buffer.n_episodes:
            raise InputError(f"{self.path}: there is no episode to take back")
        if self._buffer.n_episodes == 1:
            remove(self.path)
            self._buffer = ReplayBuffer.create(self.path, attrs=self._buffer.attrs)
        else:
            self._buffer.drop([self._buffer.n_episodes - 1])
        return self._buffer.n_episodes

    def close(self) -> None:
        """Let go. An episode that is still open stays aside: the next `open` has it, to be kept or discarded."""
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Nobody else writes to `path` meanwhile. Raises `InputError` that names the process which does already."""
    place = path.with_name(f".{path.name}.lock")
    with writing(str(path)):
        place.parent.mkdir(parents=True, exist_ok=True)
        file = place.open("a+")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip() or "another process"
            raise InputError(f"{path} is being recorded by {who}: end that first, or record elsewhere") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} ({' '.join(sys.argv)})")
        file.flush()
        yield
