"""Shared memory between the processes of a run: rings of records with one writer each, and single moments.

    file      page 0                     slot 0            slot 1            …  slot n-1
              count | fields as JSON     seq | t | fields  seq | t | fields

Record i lies in slot i mod n. Nobody waits for anybody: the writer makes `seq` odd (2i + 1), writes, and makes it
2i + 2; a reader that does not find 2i + 2 both before and after its copy has a torn record and looks again. `count`
comes last, so whatever kills the writer at whatever point, readers see whole records.

The memory is files in /dev/shm (elsewhere: in the folder for temporary files), in a folder a run, rather than
`multiprocessing.shared_memory`, whose tracker unlinks a segment when any process that looked at it ends (until Python
3.13). The run holds a lock on its folder. The kernel lets go of it when the run dies, and the next run removes it.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from action_diffusion.errors import InputError

PREFIX = "action-diffusion-"
PAGE = 4096
_RETRIES = 100
Fields = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name → (dtype, shape); "S200" is text of at most 200 bytes."""


def shared_folder() -> Path:
    """Where runs put their folders: in memory, where the system offers it."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


class Segments:
    """The folder of a run's shared memory, `path`; removed by `remove`, or by a later run where this one was killed."""

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or shared_folder()
        sweep(parent)
        name = f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
        new = parent / f".{name}"  # nobody sweeps it until the lock is held
        new.mkdir(mode=0o700)
        self._lock = _lock(new)
        self.path = new.rename(parent / name)

    def remove(self) -> None:
        """Unlink everything. Processes that still have it open keep what they see. May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def sweep(parent: Path) -> list[Path]:
    """Remove the folders of runs that are dead; returns them."""
    removed = []
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            lock = _lock(folder)
        except OSError:  # of another user, or gone meanwhile
            continue
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
            removed.append(folder)
    return removed


def _lock(folder: Path) -> int | None:
    """The descriptor that holds the folder's lock until it is closed; None where another process has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


class Record(NamedTuple):
    """Record `number` (from 0) of a ring, captured at `t` (monotonic s); `values` are copies."""

    number: int
    t: float
    values: dict[str, np.ndarray]


class _Ring:
    def __init__(self, path: Path, *, writable: bool) -> None:
        with path.open("r+b" if writable else "rb") as file:
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            memory = mmap.mmap(file.fileno(), 0, access=access)
        described = memory[16 : 16 + int.from_bytes(memory[8:16], "little")]
        header = json.loads(described.decode("utf-8"))
        self.n_slots = int(header["n_slots"])
        self.fields = {name: (dtype, tuple(shape)) for name, (dtype, shape) in header["fields"].items()}
        self._count = np.frombuffer(memory, dtype=np.uint64, count=1)
        slots = np.frombuffer(memory, dtype=_slot(self.fields), count=self.n_slots, offset=PAGE)
        self._seq, self._t = slots["seq"], slots["t"]
        self._views = {name: slots[f"value {name}"] for name in self.fields}
        self._fence = threading.Lock()

    def _order(self) -> None:
        """What was read or written before stays before what comes after, on every kind of processor."""
        with self._fence:
            pass

    @property
    def count(self) -> int:
        """Records written so far."""
        return int(self._count[0])


class RingWriter(_Ring):
    """The one writer of the ring at `path`, which it makes.

    Args:
        fields: what a record holds beside its time. Their description must fit into a page.
        n_slots: readers find at least the last `n_slots - 1` records (>= 2).
    """

    def __init__(self, path: Path, *, fields: Fields, n_slots: int) -> None:
        if n_slots < 2:
            raise InputError(f"a ring needs at least 2 slots, got {n_slots}")
        header = json.dumps({"n_slots": n_slots, "fields": {name: list(field) for name, field in fields.items()}})
        described = header.encode("utf-8")
        if len(described) > PAGE - 16:
            raise InputError(f"the description of a ring's {len(fields)} fields does not fit into {PAGE} bytes")
        new = path.with_name(f".{path.name}")
        with new.open("xb") as file:
            file.write(bytes(8) + len(described).to_bytes(8, "little") + described)
            file.truncate(PAGE + n_slots * _slot(fields).itemsize)
        new.rename(path)
        super().__init__(path, writable=True)
        self._shapes = {name: shape for name, (_, shape) in self.fields.items()}

    def append(self, t: float, values: Mapping[str, object]) -> int:
        """Add a record captured at `t` with a value for every field; returns its index.

        Raises `ValueError` where a value is missing or has another shape; the ring is then as before.
        """
        arrays = {name: np.asarray(value) for name, value in values.items()}
        shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != self._shapes:
            raise ValueError(f"a record of {shapes} does not fit a ring of {self._shapes}")
        index = self.count
        slot = index % self.n_slots
        self._seq[slot] = 2 * index + 1
        self._order()
        self._t[slot] = t
        for name, array in arrays.items():
            self._views[name][slot] = array
        self._order()
        self._seq[slot] = 2 * index + 2
        self._order()
        self._count[0] = index + 1
        return index


class RingReader(_Ring):
    """A reader of the ring at `path`. Any number of processes may have some, and a dead writer does not disturb them.

    Raises `FileNotFoundError` where there is no such ring (yet).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, writable=False)

    def read(self, index: int) -> Record | None:
        """Record number `index`; None where it is not there yet, or already overwritten."""
        slot, whole = index % self.n_slots, 2 * index + 2
        if index < 0 or int(self._seq[slot]) != whole:
            return None
        self._order()
        t = float(self._t[slot])
        values = {name: np.array(view[slot]) for name, view in self._views.items()}
        self._order()
        return Record(index, t, values) if int(self._seq[slot]) == whole else None

    def times(self, k: int) -> list[tuple[int, float]]:
        """(number, t) of the last `k` records that are still there, oldest first, without copying what they hold."""
        count = self.count
        found = []
        for number in range(max(0, count - min(k, self.n_slots)), count):
            t = float(self._t[number % self.n_slots])
            self._order()
            if int(self._seq[number % self.n_slots]) == 2 * number + 2:
                found.append((number, t))
        return found

    def latest(self) -> Record | None:
        """The newest record; None where there is none."""
        for _ in range(_RETRIES):
            count = self.count
            if count == 0:
                return None
            record = self.read(count - 1)
            if record is not None:
                return record
        raise RuntimeError("the ring's writer laps its reader: give the ring more slots")

    def last(self, k: int) -> list[Record]:
        """The last `k` records that are still there, oldest first."""
        return self.after(self.count - k - 1)

    def after(self, index: int) -> list[Record]:
        """The records with higher numbers than `index` that are still there, oldest first; -1 asks for all."""
        count = self.count
        first = max(index + 1, count - self.n_slots, 0)
        records = [self.read(number) for number in range(first, count)]
        return [record for record in records if record is not None]

    def since(self, t: float) -> list[Record]:
        """The records captured after `t` that are still there, oldest first."""
        found: list[Record] = []
        for number in range(self.count - 1, max(-1, self.count - 1 - self.n_slots), -1):
            record = self.read(number)
            if record is None or record.t <= t:
                break
            found.append(record)
        return found[::-1]


class Moment:
    """A time (monotonic s) that any process may `mark` and read: a heartbeat, an emergency stop. 0: not marked."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            memory = mmap.mmap(file.fileno(), 8)
        self._value = np.frombuffer(memory, dtype=np.float64)

    @classmethod
    def create(cls, path: Path) -> Moment:
        """Make it, not marked."""
        with path.open("xb") as file:
            file.write(bytes(8))
        return cls(path)

    def mark(self) -> None:
        """It is now."""
        self._value[0] = time.monotonic()

    def clear(self) -> None:
        """It is not marked."""
        self._value[0] = 0.0

    @property
    def t(self) -> float:
        """When it was marked last."""
        return float(self._value[0])


def _slot(fields: Fields) -> np.dtype:
    names = ["seq", "t", *(f"value {name}" for name in fields)]
    return np.dtype({"names": names, "formats": ["u8", "f8", *fields.values()]}, align=True)
