"""Columns of a buffer as the kinds of array that batches are made of, checked on the way in.

    state    float32 [N, ...]        robot state, key points, actions, rewards: must be finite
    image    uint8 [N, H, W, 3]      0 to 255; float images are converted where that loses nothing
    depth    uint16 [N, H, W]        mm, 0 where it is unknown
    points   float32 [N, P, 3 or 6]  places in one frame, and colours behind them: must be finite

Blocks of rows go through memory one at a time, so that converting a 2.8 GB float array to 0.7 GB of uint8
never holds the former. Where the result does not fit either, it is written once to an uncompressed file in
the cache folder and read from there through the page cache.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from action_diffusion.datasets.formats.columns import SlicedColumn
from action_diffusion.datasets.images.pictures import Picture, picture
from action_diffusion.datasets.storage.checks import check_finite, images_to_uint8
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import Column, blocks, units
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path, cache_folder, locked, require_space
from action_diffusion.progress import progress

_CACHE_VERSION = "2"


class ObsKey(NamedTuple):
    """An observation, or an action: the buffer key `source`, and which of its columns (axis 1; None for all)."""

    source: str
    columns: tuple[int, ...] | None
    kind: Literal["state", "image", "depth", "points", "action"]

    @property
    def dtype(self) -> np.dtype:
        """Of what `load` makes."""
        return np.dtype({"image": np.uint8, "depth": np.uint16}.get(self.kind, np.float32))


def seen_picture(buffer: ReplayBuffer, key: str) -> Picture:
    """The picture that a policy sees in a column. Raises `InputError` where there is none."""
    column = buffer[key]
    found = picture(column.shape, column.dtype)
    if found is not None and found.seen:
        return found
    hint = ""
    if found is not None and found.kind == "depth":
        hint = f"; one channel of {column.dtype} looks like depth, which is not learnt from as colours: kind: depth"
    raise InputError(
        f"{buffer.name}: data/{key} has shape {list(column.shape)}, images must be [N, H, W, 3], 0 to 255 (grey ones "
        f"[N, H, W] of uint8){hint}"
    )


def depth_size(buffer: ReplayBuffer, key: str) -> tuple[int, int]:
    """Height and width of a column of depth. Raises `InputError` where it is none."""
    column = buffer[key]
    found = picture(column.shape, column.dtype)
    if found is None or found.kind != "depth" or column.dtype != np.uint16:
        raise InputError(
            f"{buffer.name}: data/{key} has shape {list(column.shape)} of {column.dtype}, depth must be uint16 "
            "[N, H, W] in mm, 0 where it is unknown"
        )
    return found.size


def points_shape(buffer: ReplayBuffer, key: str) -> tuple[int, int]:
    """How many points a row of a column has, and values each of them. Raises `InputError` where it has none."""
    column = buffer[key]
    if len(column.shape) != 3 or column.shape[2] not in (3, 6) or column.dtype.kind != "f":
        raise InputError(
            f"{buffer.name}: data/{key} has shape {list(column.shape)} of {column.dtype}, points must be floats "
            "[N, P, 3], or [N, P, 6] with their colours from 0 to 1"
        )
    return column.shape[1], column.shape[2]


def from_zero_to_one(column: Column) -> bool:
    """Whether a picture of floats is from 0 to 1, and not to 255. Reads on until it is sure."""
    if column.dtype.kind != "f":
        return False
    highest = 0.0
    for _, rows in blocks(column):
        if rows.min(initial=0) < 0 or rows.max(initial=0) > 1:
            return False
        highest = max(highest, float(rows.max(initial=0)))
    return highest > 0


def array_shape(buffer: ReplayBuffer, wanted: ObsKey) -> tuple[int, ...]:
    """Shape [N, ...] of what `load` makes; of an action [N, A]. Raises `InputError` where source and columns do not
    fit."""
    shape = buffer[wanted.source].shape
    if wanted.kind == "image":
        return (shape[0], *seen_picture(buffer, wanted.source).size, 3)
    if wanted.kind == "depth":
        return (shape[0], *depth_size(buffer, wanted.source))
    if wanted.kind == "points":
        return (shape[0], *points_shape(buffer, wanted.source))
    if len(shape) == 1:
        shape = (*shape, 1)
    if wanted.kind == "action":
        return (shape[0], math.prod(shape[1:]))
    if wanted.columns is None:
        return shape
    bad = [column for column in wanted.columns if not 0 <= column < shape[1]]
    if bad:
        raise InputError(f"{buffer.name}: data/{wanted.source} has columns 0 to {shape[1] - 1}, not {bad[0]}")
    return (shape[0], len(wanted.columns), *shape[2:])


def array_bytes(buffer: ReplayBuffer, wanted: ObsKey) -> int:
    """Size of the array that `load` makes."""
    return math.prod(array_shape(buffer, wanted)) * wanted.dtype.itemsize


def load(buffer: ReplayBuffer, wanted: ObsKey) -> np.ndarray:
    """The array in memory; a column that is one already is used as it is, not copied."""
    column = buffer[wanted.source]
    ready = wanted.columns is None and column.shape == array_shape(buffer, wanted)
    if isinstance(column, np.ndarray) and column.dtype == wanted.dtype and ready:
        if column.dtype.kind == "f":
            check_finite(column, wanted.source, buffer.name)
        return np.ascontiguousarray(column)  # no copy, unless it is a view; crops need whole rows
    array = np.empty(array_shape(buffer, wanted), wanted.dtype)
    load_into(array.__setitem__, buffer, wanted)
    return array


def load_into(write: Callable[[slice, np.ndarray], object], buffer: ReplayBuffer, wanted: ObsKey) -> None:
    """Hands the converted rows to `write(rows, values)`, block by block, in order."""
    first = 0
    with progress(f"loading {wanted.source}", buffer.n_steps) as advance:
        for values in _converted(buffer, wanted):
            write(slice(first, first + len(values)), values)
            first += len(values)
            advance(len(values))


def load_cached(buffer: ReplayBuffer, wanted: ObsKey, folder: Path | None = None) -> np.ndarray:
    """The array as a read-only memory map of a file in `folder` (default: the cache), made if not there."""
    if not buffer.paths or isinstance(buffer[wanted.source], np.ndarray):
        return load(buffer, wanted)  # it is in memory, or mapped, already
    paths = [path.resolve() for path in buffer.paths]
    identity = digest(*map(str, paths), *wanted)
    return cached_array(
        f"{paths[0].stem}-{wanted.source}-{identity}",
        digest(_CACHE_VERSION, *chain.from_iterable(map(_state_of, paths))),
        shape=array_shape(buffer, wanted),
        dtype=wanted.dtype,
        parts=lambda: _converted(buffer, wanted),
        folder=folder,
        description=f"decoding {wanted.source}",
    )


def cached_array(
    name: str,
    version: str,
    *,
    shape: tuple[int, ...],
    dtype: np.dtype,
    parts: Callable[[], Iterator[np.ndarray]],
    folder: Path | None,
    description: str,
) -> np.ndarray:
    """Memory map of `<name>-<version>.npy` in the cache; where it is not there, `parts()` fill its rows.

    Other versions of the same name are deleted. Raises `InputError` where the disk is too small.
    """
    folder = folder or cache_folder()
    path = folder / f"{name}-{version}.npy"
    with locked(folder / name):
        if not path.exists():
            for abandoned in folder.glob(f".{glob.escape(name)}-*.partial.npy"):  # by a process that was killed
                abandoned.unlink()
            require_space(folder, math.prod(shape) * dtype.itemsize, description)
            with atomic_path(path) as temporary, progress(description, shape[0]) as advance:
                _write_npy(temporary, shape, dtype, parts(), advance)
            for other in folder.glob(f"{glob.escape(name)}-*.npy"):
                if other != path:
                    other.unlink(missing_ok=True)
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _write_npy(
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype,
    parts: Iterator[np.ndarray],
    advance: Callable[[int], None],
) -> None:
    # Plain writes, not a writable map: a disk that fills up is then an error, and not a fatal signal.
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for rows in parts:
            file.write(np.ascontiguousarray(rows, dtype).data)
            advance(len(rows))


def _converted(buffer: ReplayBuffer, wanted: ObsKey) -> Iterator[np.ndarray]:
    """Rows in their final shape and type, checked."""
    key, where, column = wanted.source, buffer.name, buffer[wanted.source]
    shape = array_shape(buffer, wanted)
    if wanted.kind == "image":
        yield from _converted_images(column, seen_picture(buffer, key), key, where)
        return
    if wanted.kind == "depth":
        yield from (rows.reshape(len(rows), *shape[1:]) for _, rows in blocks(column))
        return
    for first, rows in blocks(column):
        picked = rows if wanted.columns is None else rows.reshape(len(rows), *rows.shape[1:] or (1,))[:, wanted.columns]
        with np.errstate(over="ignore"):  # becomes infinite, which the check names
            values = picked.reshape(len(rows), *shape[1:]).astype(np.float32)
        check_finite(values, key, where, first)
        yield values


def _converted_images(column: Column, found: Picture, key: str, where: str) -> Iterator[np.ndarray]:
    scaled = from_zero_to_one(column)
    for first, rows in blocks(column):
        yield _seen(rows, found, scaled, key, where, first)


def _seen(rows: np.ndarray, found: Picture, scaled: bool, key: str, where: str, first: int) -> np.ndarray:
    """Rows from `first` on as uint8 [n, H, W, 3]. scaled: they are floats from 0 to 1."""
    if scaled:
        check_finite(rows, key, where, first)
        rows = np.rint(rows * np.float32(255))
    return images_to_uint8(found.pixels(rows), key, where, first)


class SeenColumn(SlicedColumn):
    """Pictures as a policy sees them, uint8 [N, H, W, 3], whatever they are stored as."""

    def __init__(self, buffer: ReplayBuffer, key: str) -> None:
        self._found = seen_picture(buffer, key)
        self._column, self._key, self._where = buffer[key], key, buffer.name
        super().__init__((self._column.shape[0], *self._found.size, 3), np.dtype(np.uint8))
        self._scaled = functools.cache(functools.partial(from_zero_to_one, self._column))  # which reads all of it

    def read(self, first: int, end: int) -> np.ndarray:
        return self._see(np.asarray(self._column[first:end]), first)

    def blocks(self, n_bytes: int, first: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Rows in blocks of the stored column's own chunks: `store.blocks`."""
        for row, rows in blocks(self._column, n_bytes, first, stop):
            yield row, self._see(rows, row)

    def units(self) -> np.ndarray | None:
        """Those of the stored column: `store.units`."""
        return units(self._column)

    def _take(self, index: Any, rows: np.ndarray) -> Any:
        if np.ndim(rows) and self._column.dtype == np.uint8:  # no value is wrong, so no row needs its number
            return self._see(np.asarray(self._column[index]), 0)
        return super()._take(index, rows)

    def _see(self, rows: np.ndarray, first: int) -> np.ndarray:
        return _seen(rows, self._found, self._scaled(), self._key, self._where, first)


class ShapedColumn(SlicedColumn):
    """Rows of another shape with as many values."""

    def __init__(self, column: Column, row: tuple[int, ...]) -> None:
        super().__init__((column.shape[0], *row), column.dtype)
        self._column = column

    def read(self, first: int, end: int) -> np.ndarray:
        return np.asarray(self._column[first:end]).reshape(end - first, *self.shape[1:])

    def units(self) -> np.ndarray | None:
        """Those of the stored column: `store.units`."""
        return units(self._column)


def seen_column(buffer: ReplayBuffer, wanted: ObsKey) -> Column:
    """Images or depth as `load` makes them, [N, H, W, 3] or [N, H, W], read where they are."""
    if wanted.kind == "image":
        return SeenColumn(buffer, wanted.source)
    return ShapedColumn(buffer[wanted.source], array_shape(buffer, wanted)[1:])


def _state_of(path: Path) -> tuple[int, int]:
    """Size and newest change of a file or of all files in a folder: tells whether a cache is still right."""
    files = [path] if path.is_file() else [Path(base, file) for base, _, names in os.walk(path) for file in names]
    stats = [file.stat() for file in files]
    return sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)


def digest(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]
