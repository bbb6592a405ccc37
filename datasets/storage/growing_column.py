"""One array of a growing buffer: Zarr v3 files, written chunk by chunk.

Zarr's own writing would do, but it syncs nothing, and says nothing of the order in which its files come to be.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs.zstd import Zstd
from zarr.abc.store import Store
from zarr.storage import MemoryStore

from action_diffusion.datasets.storage.store import CHUNK_BYTES, create_array
from action_diffusion.disk import Disk
from action_diffusion.errors import InputError

_SMALL_BYTES = 1 << 16
_ENDS_BYTES = 1 << 13
_LEVEL = 1  # of compression; a higher one costs several times as much and saves a tenth
Fields = Mapping[str, tuple[str, tuple[int, ...]]]
"""Column → (dtype, shape of a row)."""


class GrowingColumn:
    """The array in `folder`, with `n_rows` rows so far. The chunk under way is kept in memory."""

    def __init__(self, disk: Disk, folder: Path, n_rows: int) -> None:
        self._disk, self._folder, self.n_rows = disk, folder, n_rows
        self._metadata = json.loads((folder / "zarr.json").read_bytes())
        array = zarr.open_array(folder, mode="r")
        self.dtype, self.shape = np.dtype(array.dtype), tuple(array.shape[1:])
        kinds = [codec["name"] for codec in self._metadata["codecs"]]
        if array.chunks[1:] != self.shape or kinds != ["bytes", "zstd"]:
            raise InputError(
                f"{folder} is not stored as a recorder does: save() a copy of the buffer and record to that"
            )
        self._key = array.metadata.encode_chunk_key
        self._tail = np.zeros(array.chunks, self.dtype)
        self._load()

    def _load(self) -> None:
        """The chunk that the next row goes to, as it is on disk; zeros behind the last row."""
        self._tail[:] = 0
        at = self.n_rows % len(self._tail)
        if at:
            self._tail[:at] = zarr.open_array(self._folder, mode="r")[self.n_rows - at : self.n_rows]
        self._changed = False

    def add(self, values: np.ndarray) -> None:
        """Add rows [n, …]. Whole chunks are written, the rest is kept until `flush`."""
        size, done = len(self._tail), 0
        while done < len(values):
            at = self.n_rows % size
            part = values[done : done + size - at]
            self._tail[at : at + len(part)] = part
            self._changed = True
            done += len(part)
            if at + len(part) == size:
                self.flush()
                self._tail[:] = 0
            self.n_rows += len(part)

    def flush(self) -> None:
        """Write the chunk under way, if it has changed."""
        if not self._changed:
            return
        chunk, size = self.n_rows // len(self._tail), len(self._tail)
        if (chunk + 1) * size > self._metadata["shape"][0]:
            self._resize(max(2 * self._metadata["shape"][0], (chunk + 1) * size))
        path = self._path(chunk)
        self._disk.make(path.parent)
        self._disk.write(path, Zstd(level=_LEVEL, checksum=True).encode(self._tail))
        self._changed = False

    def _path(self, chunk: int) -> Path:
        return self._folder / self._key((chunk, *[0] * len(self.shape)))

    def _resize(self, n_rows: int) -> None:
        self._metadata["shape"][0] = n_rows
        self._disk.write(self._folder / "zarr.json", json.dumps(self._metadata, indent=2).encode())

    def cut(self, n_rows: int) -> None:
        """Forget the rows behind the first `n_rows`. On disk the next `flush` makes those in their chunk zeros."""
        size = len(self._tail)
        before, self.n_rows = self.n_rows, n_rows
        if n_rows // size != before // size:
            self._load()
        self._tail[n_rows % size :] = 0
        self._changed = True

    def trim(self) -> None:
        """Delete the chunks behind that of the last row."""
        chunk = math.ceil(self.n_rows / len(self._tail))
        while self._disk.remove(self._path(chunk)):
            chunk += 1

    def finish(self) -> None:
        """Cut off the room behind the last row."""
        self.flush()
        self.trim()
        self._resize(self.n_rows)


def layout(groups: Mapping[str, Fields], *, attrs: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, bytes]:
    """Place → content of all files of a buffer without a row.

    Args:
        groups: the columns of each folder.
        attrs, meta: attributes of the buffer, and of meta/.
    """
    held: dict[str, Any] = {}
    store: Store = MemoryStore(held)
    root = zarr.create_group(store, attributes=dict(attrs))
    for name, fields in groups.items():
        group = root.create_group(name)
        for key, (dtype, shape) in fields.items():
            n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
            room = _SMALL_BYTES if n_bytes <= _SMALL_BYTES // 16 else CHUNK_BYTES
            create_array(group, key, (max(1, room // n_bytes), *shape), np.dtype(dtype), room)
    ends = root.create_group("meta", attributes=dict(meta))
    create_array(ends, "episode_ends", (_ENDS_BYTES // 8,), np.dtype(np.int64), _ENDS_BYTES)
    return {place: _flat(content.to_bytes()) for place, content in held.items()}


def _flat(content: bytes) -> bytes:
    """Chunks as files in one folder (c.7.0.0), not as folders in folders (c/7/0/0): fewer names to sync."""
    metadata = json.loads(content)
    if "chunk_key_encoding" in metadata:
        metadata["chunk_key_encoding"] = {"name": "default", "configuration": {"separator": "."}}
    return json.dumps(metadata, indent=2).encode()
