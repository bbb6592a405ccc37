"""A replay buffer that grows while it is recorded, and opens at any moment with all rows up to its last commit.

    data/<key>     | 0 1 2 3 4 | 5 6 7 . . | . . . .      rows so far, and room
    <table>/<key>  | 0 1 2 …                              what has no place in a buffer, at a rate of its own
    episode_ends               5     8                    the last one moves on with every commit

`ReplayBuffer.append` adds whole episodes; what is recorded from a running robot must be on disk before its episode is
over. Chunks are written whole and under another name first, `episode_ends` comes last, and while it grows the buffer
is marked as one that is being appended to: whatever kills the writer, `ReplayBuffer.open` sees whole rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore

from action_diffusion.datasets.files import sync, writing
from action_diffusion.datasets.replay_buffer import APPENDING
from action_diffusion.datasets.store import CHUNK_BYTES, array_at, create_array, open_zarr, reading
from action_diffusion.errors import InputError

TIME = "time"
"""The column that every table has: above 0, written last, so that it tells how many rows are whole."""
_SMALL_BYTES = 1 << 16
_ENDS_BYTES = 1 << 13
Fields = Mapping[str, tuple[str, tuple[int, ...]]]
"""Column → (dtype, shape of a row)."""


class GrowingTable:
    """Columns in one group, each with the same number of rows. The chunk under way is kept in memory.

    Where there is a column `TIME`, it is written last.
    """

    def __init__(self, group: zarr.Group, fields: Fields) -> None:
        self.n_rows = 0
        self._arrays: dict[str, zarr.Array] = {}
        self._tails: dict[str, np.ndarray] = {}
        for key, (name, shape) in sorted(fields.items(), key=lambda field: field[0] == TIME):
            dtype = np.dtype(name)
            size = int(np.prod(shape)) * dtype.itemsize
            n_bytes = _SMALL_BYTES if size <= _SMALL_BYTES // 16 else CHUNK_BYTES
            rows = max(1, n_bytes // size)
            self._arrays[key] = create_array(group, key, (rows, *shape), dtype, n_bytes)
            self._tails[key] = np.zeros((rows, *shape), dtype)

    def add(self, rows: Mapping[str, Any]) -> None:
        """Add rows: every column [n, …], n at least 1."""
        n = len(next(iter(rows.values())))
        for key, array in self._arrays.items():
            self._write(array, self._tails[key], np.asarray(rows[key]))
        self.n_rows += n

    def _write(self, array: zarr.Array, tail: np.ndarray, values: np.ndarray) -> None:
        """Put `values` behind the rows that are there; whole chunks, so that nothing has to be read back."""
        done, size = 0, len(tail)
        while done < len(values):
            row = self.n_rows + done
            at, first = row % size, row - row % size
            if at == 0:
                tail[:] = 0
            part = values[done : done + size - at]
            tail[at : at + len(part)] = part
            if first + size > array.shape[0]:
                array.resize((2 * array.shape[0], *array.shape[1:]))
            array[first : first + size] = tail
            done += len(part)

    def finish(self) -> None:
        """Cut off the room behind the last row."""
        for array in self._arrays.values():
            array.resize((self.n_rows, *array.shape[1:]))


class GrowingBuffer:
    """A new buffer at `path`, with the columns `data`, and tables beside them.

    Raises `InputError` where `path` exists, and from every method where the disk refuses.
    """

    def __init__(self, path: Path, *, data: Fields, tables: Mapping[str, Fields], attrs: Mapping[str, Any]) -> None:
        if path.exists():
            raise InputError(f"{path} exists: choose another output folder")
        self.path = path
        with writing(str(path)), zarr.config.set({"array.write_empty_chunks": True}):
            path.parent.mkdir(parents=True, exist_ok=True)
            root = zarr.create_group(LocalStore(path), attributes=dict(attrs))
            self.data = GrowingTable(root.create_group("data"), data)
            self.tables = {name: GrowingTable(root.create_group(name), fields) for name, fields in tables.items()}
            self._meta = root.create_group("meta", attributes={APPENDING: True})
            rows = _ENDS_BYTES // 8
            self._ends = create_array(self._meta, "episode_ends", (rows,), np.dtype(np.int64), _ENDS_BYTES)

    def commit(self, episode_ends: Sequence[int]) -> None:
        """All rows up to the last of `episode_ends` are there, for everybody who opens the buffer from now on."""
        with writing(str(self.path)):
            size = self._ends.shape[0]
            if len(episode_ends) > size:
                size *= 2
                self._ends.resize((size,))
            ends = np.zeros(size, np.int64)
            ends[: len(episode_ends)] = episode_ends
            self._ends[:] = ends

    def finish(self, episode_ends: Sequence[int]) -> None:
        """The last commit: afterwards nothing shows that the buffer grew, and a power cut does it no harm."""
        self.commit(episode_ends)
        with writing(str(self.path)):
            for table in (*self.tables.values(), self.data):
                table.finish()
            self._ends.resize((len(episode_ends),))
            sync(self.path)
            del self._meta.attrs[APPENDING]


def read_table(path: Path, name: str) -> dict[str, np.ndarray]:
    """All columns of a table beside a buffer, up to its last whole row.

    Raises `InputError` where there is no such table, or where it cannot be read.
    """
    group, _ = open_zarr(path)
    table = group.get(name)
    if not isinstance(table, zarr.Group):
        raise InputError(f"{path} has no {name}: it is no record of a deployment")
    with reading(f"{path}: {name}"):
        columns = {key: np.asarray(array_at(table, key, f"{path}: {name}")[:]) for key in sorted(table.keys())}
    n_rows = len(np.trim_zeros(columns[TIME], "b"))
    return {key: column[:n_rows] for key, column in columns.items()}
