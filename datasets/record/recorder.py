"""Demonstrations as they happen: one step at a time, an episode is kept as a whole or not at all.

    open ─▶ add, add, … ─┬▶ keep ────▶ committed          undo ─▶ the last committed one is gone
                         └▶ discard ─▶ gone

    caller's thread      add: check, copy ─▶ queue
    a thread that writes                     queue ─▶ EpisodeWriter ─▶ disk, synced four times a second

Whatever happens to the process, the disk or the power: committed episodes are as they were, and of the open one all
but the last second is there, aside, for the next `open` to be kept or discarded.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

import numpy as np

from action_diffusion.datasets.record.writer import EpisodeWriter
from action_diffusion.datasets.storage.checks import check_dtype, check_finite
from action_diffusion.datasets.storage.growing_column import Fields
from action_diffusion.errors import InputError
from action_diffusion.files import writer_lock

FLUSH = 0.25
"""Between two flushes (s). What came after the last one is lost with the process, and so is one under way."""
MOST_WAITING = 256 << 20
"""Bytes of steps that may wait for a slow disk."""
_SWITCH = 0.001
Work = Callable[[], Any]


class Recorder:
    """The only writer of a replay buffer. Made by `open`; a context manager, which ends with `close`.

    A step that is refused (wrong keys, shapes, NaN) is an `InputError` of `add`, and the open episode is as before.
    Where the disk refuses, the next call raises an `InputError`, and so does every later one but `close`; committed
    episodes are intact, and `open` goes on once there is room. Not for several threads at a time.
    """

    def __init__(self, path: Path, fields: Fields, writer: EpisodeWriter, held: ExitStack) -> None:
        self.path, self._writer, self._held = path, writer, held
        self._fields = {key: (np.dtype(dtype), tuple(shape)) for key, (dtype, shape) in fields.items()}
        self._step_bytes = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in self._fields.values())
        self._n_steps, self._n_added, self._n_written = writer.n_steps, 0, 0
        self._error: Exception | None = None
        self._is_told = False
        self._closed = False
        # While Python runs in the thread that writes, the caller waits for so long at most: 1 ms, where 5 is usual.
        sys.setswitchinterval(min(_SWITCH, sys.getswitchinterval()))
        self._works: SimpleQueue[tuple[Work, Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

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
            InputError: where another process writes to `path` (the message says which), and where what is there
                has other fields or attributes.
        """
        path = Path(path).expanduser()
        _check_fields(fields, video)
        with ExitStack() as held:
            held.enter_context(writer_lock(path))
            writer = EpisodeWriter(path, fields, attrs, video)
            recorder = cls(path, fields, writer, held.pop_all())
        return recorder

    @property
    def n_episodes(self) -> int:
        """Committed ones."""
        return self._writer.n_episodes

    @property
    def n_steps(self) -> int:
        """Of the open episode; after `open` those that an interrupted recording left, to be kept or discarded."""
        return self._n_steps

    def add(self, step: Mapping[str, Any]) -> None:
        """One row of the open episode; the first one opens it. The values are copied, and written later."""
        self._check_running()
        if self._writer.interrupted:
            raise InputError(f"{self.path}: {self._n_steps} steps were left by an interruption: keep or discard them")
        if (self._n_added - self._n_written) * self._step_bytes > MOST_WAITING:
            raise InputError(f"{self.path}: the disk is {self._n_added - self._n_written} steps behind: it is too slow")
        row = self._checked(step)
        self._works.put((lambda: self._write(row), Future()))
        self._n_added += 1
        self._n_steps += 1

    def keep(self) -> int:
        """Commit the open episode; it is on disk when this returns its index. At least one step is needed."""
        self._check_running()
        if not self._n_steps:
            raise InputError(f"{self.path}: no step was recorded: there is nothing to keep")
        index: int = self._wait(self._writer.keep)
        self._n_steps = 0
        return index

    def discard(self) -> None:
        """Drop the open episode, if there is one."""
        self._check_running()
        self._wait(self._writer.discard)
        self._n_steps = 0

    def undo(self) -> int:
        """Take the last committed episode back, for good; returns how many are left. None may be open."""
        self._check_running()
        if self._n_steps:
            raise InputError(f"{self.path}: an episode is open: keep or discard it first")
        if not self.n_episodes:
            raise InputError(f"{self.path}: there is no episode to take back")
        left: int = self._wait(self._writer.undo)
        return left

    def close(self) -> None:
        """Let go. An episode that is still open stays aside: the next `open` has it, to be kept or discarded.

        Raises `InputError` where the disk refuses, if no call before has said so. May be called twice.
        """
        if self._closed:
            return
        self._closed = True
        try:
            if not self._is_told:
                self._wait(self._writer.close)
        finally:
            self._works.put(None)
            self._thread.join()
            self._writer.abandon()
            self._held.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _checked(self, step: Mapping[str, Any]) -> dict[str, np.ndarray]:
        where = f"a step for {self.path}"
        if step.keys() != self._fields.keys():
            raise InputError(f"{where} has {', '.join(step) or 'nothing'}; it must have {', '.join(self._fields)}")
        row = {}
        for key, (dtype, shape) in self._fields.items():
            given = np.asarray(step[key])
            check_dtype(given.dtype, key, where)
            if given.shape != shape:
                raise InputError(f"{where}: {key} is {list(given.shape)}; it must be {list(shape)}")
            with np.errstate(invalid="ignore", over="ignore"):
                row[key] = given.astype(dtype)
            check_finite(row[key][np.newaxis], key, where)
            if dtype.kind != "f" and dtype != given.dtype and not np.array_equal(row[key], given):
                raise InputError(f"{where}: {key} does not fit {dtype}")
        return row

    def _check_running(self) -> None:
        if self._closed:
            raise InputError(f"{self.path}: this recorder is closed")
        self._check_disk()

    def _check_disk(self) -> None:
        if self._error is not None:
            self._is_told = True
            raise InputError(f"{self._error} (committed episodes: {self.n_episodes}, all intact)") from self._error

    def _wait(self, work: Work) -> Any:
        """What `work` returns, once all that waits is written."""
        done: Future[Any] = Future()
        self._works.put((work, done))
        done.exception()  # waits
        self._check_disk()
        return done.result()

    def _write(self, row: Mapping[str, np.ndarray]) -> None:
        self._writer.add(row)
        self._n_written += 1

    def _work(self) -> None:
        """In the thread that writes: one after the other, and a flush from time to time."""
        flushed = time.monotonic()
        while True:
            with suppress(Empty):
                item = self._works.get(timeout=max(0.0, flushed + FLUSH - time.monotonic()))
                if item is None:
                    return
                self._do(*item)
            if time.monotonic() >= flushed + FLUSH:
                self._do(self._writer.flush, Future())
                flushed = time.monotonic()

    def _do(self, work: Work, done: Future[Any]) -> None:
        if self._error is None:
            try:
                done.set_result(work())
                return
            except Exception as error:  # told by the next call
                self._error = error
        done.set_exception(self._error)


def _check_fields(fields: Fields, video: Collection[str]) -> None:
    for key, (dtype, _) in fields.items():
        check_dtype(np.dtype(dtype), key, "a recording")
        if not re.fullmatch(r"\w[\w.-]*", key):
            raise InputError(f"a column cannot be called {key!r}: letters, digits, _, - and . make names of files")
    for key in video:
        if key not in fields:
            raise InputError(f"no field {key!r} to keep as video; there are {', '.join(fields)}")
        dtype, shape = fields[key]
        if np.dtype(dtype) != np.uint8 or len(shape) != 3 or shape[2] != 3:
            raise InputError(f"{key} is {np.dtype(dtype)} {list(shape)}; a video has frames uint8 [H, W, 3]")
    if not set(fields) - set(video):
        raise InputError("a recording needs a column that is no video")
