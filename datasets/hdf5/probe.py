"""Run as a program, with paths of HDF5 files: opens everything in them, and writes a dot for each thing that it opened.

HDF5's library can hang or crash on a damaged file, and takes the process with it: so another one goes first, which may
be ended (`hdf5.check_sound`). It says nothing of the files: what raises here raises where they are read as well. Only
h5py is imported, so that it begins at once.
"""

from __future__ import annotations

import math
import os
import sys
from contextlib import suppress
from typing import Any

import h5py

_MOST_BYTES = 16 << 20


def main(paths: list[bytes]) -> None:
    for path in paths:
        with suppress(Exception), h5py.File(path, "r") as file:
            _open(file, set())


def _open(group: Any, seen: set[Any]) -> None:
    _read_attributes(group)
    for name in group:
        os.write(1, b".")
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        item = group[name]
        if item in seen:
            continue
        seen.add(item)
        if isinstance(item, h5py.Group):
            _open(item, seen)
        elif isinstance(item, h5py.Dataset) and not item.is_virtual and not item.external:
            _read_index(item)


def _read_attributes(item: Any) -> None:
    for name in item.attrs:
        found = item.attrs.get_id(name)
        if math.prod(found.shape) * found.dtype.itemsize <= _MOST_BYTES:
            item.attrs[name]
        os.write(1, b".")


def _read_index(dataset: Any) -> None:
    """Where its values are; of texts also the first, since they lie in another place."""
    dataset.id.get_storage_size()
    if dataset.chunks is not None:
        dataset.id.get_num_chunks()
    if dataset.dtype.kind == "O" and dataset.size and not dataset.chunks:
        dataset[(0,) * dataset.ndim]


if __name__ == "__main__":
    main(sys.stdin.buffer.read().split(b"\0"))
