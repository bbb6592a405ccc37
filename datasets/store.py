"""Zarr on disk, seen as plain arrays with clear errors.

    data/<key>          one row a step
    meta/episode_ends   row after the last step of each episode

in Zarr v2 or v3, a folder or a zip, at its root or inside the one folder that holds it. What we write is
v3, zstd with a checksum, in chunks of about a megabyte (some frames, or many low-dimensional rows).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr
from zarr.codecs import ZstdCodec
from zarr.storage import LocalStore, ZipStore

from action_diffusion.datasets.progress import progress
from action_diffusion.datasets.rows import Rows
from action_diffusion.errors import InputError

CHUNK_BYTES = 1 << 20
READ_BYTES = 4 << 20  # what is decoded at a time when an array is read from end to end
_DECODERS = 2
"""Threads that decode chunks. Zarr's default is many more, and the memory that each has freed stays with it."""
if zarr.config.get("threading.max_workers") is None:
    zarr.config.set({"threading.max_workers": _DECODERS})
_MARKERS = ("meta/episode_ends/zarr.json", "meta/episode_ends/.zarray")


class Column(Protocol):
    """One key of a buffer, one row a step: a numpy array, or one on disk that reads as numpy."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    def __getitem__(self, rows: Any, /) -> Any: ...


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns whatever a damaged file makes Zarr, zip and the codecs raise into one `InputError`."""
    try:
        yield
    except (InputError, MemoryError, IndexError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} cannot be read, the file is damaged or unsupported: {reason}") from error


class ZarrColumn(Rows):
    """The first `n_rows` rows of a Zarr array; reading errors are `InputError`s that name file and key."""

    def __init__(self, array: zarr.Array, *, n_rows: int, exists: Callable[[str], bool], where: str) -> None:
        self.array, self.where = array, where
        self.shape = (n_rows, *array.shape[1:])
        self.dtype = np.dtype(array.dtype)
        self._exists = exists
        self._complete = False

    @property
    def chunk_rows(self) -> int:
        return (self.array.shards or self.array.chunks)[0]

    def _take(self, index: Any, rows: np.ndarray) -> Any:
        with reading(self.where):
            self._check_complete()
            if isinstance(index, slice) and index.step in (None, 1):
                start, stop, _ = index.indices(len(self))
                return np.asarray(self.array[start : max(start, stop)])
            if np.ndim(rows) == 0:
                return np.asarray(self.array[int(rows)])
            return np.asarray(self.array.oindex[rows])

    def _check_complete(self) -> None:
        # Zarr reads a chunk that is not there as zeros, so a lost part of a copy would train unnoticed. Only
        # a single value a row is plausibly zero for a whole chunk (a reward, a flag), and left out for that.
        if self._complete or math.prod(self.shape[1:]) == 1:
            return
        sizes = self.array.shards or self.array.chunks
        grid = [range(math.ceil(length / size)) for length, size in zip(self.shape, sizes, strict=True)]
        keys = [f"{self.array.path}/{self.array.metadata.encode_chunk_key(chunk)}" for chunk in product(*grid)]
        missing = [key for key in keys if not self._exists(key)]
        if missing:
            raise InputError(
                f"{self.where} lacks {len(missing)} of {len(keys)} chunks, the first is {missing[0]}: copy "
                "the file again (or, if those rows are all zero, write it with write_empty_chunks=True)"
            )
        self._complete = True


def blocks(column: Column, n_bytes: int = READ_BYTES) -> Iterator[tuple[int, np.ndarray]]:
    """The column from end to end as (first row, rows), whole chunks of about `n_bytes` at a time."""
    unit = column.chunk_rows if isinstance(column, ZarrColumn) else 1
    rows = unit * max(1, n_bytes // (unit * row_bytes(column)))
    for first in range(0, column.shape[0], rows):
        yield first, np.asarray(column[first : first + rows])


def row_bytes(column: Column) -> int:
    return max(1, math.prod(column.shape[1:]) * column.dtype.itemsize)


def array_at(group: zarr.Group, name: str, where: str) -> zarr.Array:
    """The array `name` of the group, or an `InputError` where that is something else."""
    array = group.get(name)
    if not isinstance(array, zarr.Array) or array.ndim == 0:
        raise InputError(f"{where}: {name} must be an array with one row a step")
    return array


def open_zarr(path: Path) -> tuple[zarr.Group, Callable[[str], bool]]:
    """The group that holds data/ and meta/, and whether a key exists in its store.

    Raises `InputError` for a path that is missing, no Zarr, damaged, or holds no replay buffer.
    """
    if not path.exists():
        previous = path.with_name(f"{path.name}.previous")
        hint = f"; an interrupted replacement left {previous}: rename it back" if previous.exists() else ""
        raise InputError(f"{path}: no such file or folder{hint}")
    store, names = _folder(path) if path.is_dir() else _zip(path)
    roots = sorted({name.removesuffix(marker) for name in names for marker in _MARKERS if name.endswith(marker)})
    if len(roots) != 1:
        found = f"more than one ({', '.join(roots)})" if roots else "none"
        raise InputError(f"{path}: a replay buffer holds one meta/episode_ends array, found {found}")
    with reading(str(path)):
        group = zarr.open_group(store, path=roots[0].strip("/"), mode="r", use_consolidated=False)
    if path.is_dir():
        return group, lambda key: (path / key).exists()
    return group, frozenset(names).__contains__


def _folder(path: Path) -> tuple[LocalStore, list[str]]:
    depths = ("", "*/", "*/*/")
    found = (file for depth in depths for marker in _MARKERS for file in path.glob(depth + marker))
    return LocalStore(path, read_only=True), [file.relative_to(path).as_posix() for file in found]


def _zip(path: Path) -> tuple[ZipStore, list[str]]:
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if not is_zip:
        raise InputError(f"{path}: neither a Zarr folder nor a zip of one")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise InputError(f"{path}: damaged or incomplete zip ({error}): copy or download it again") from error
    return ZipStore(path, mode="r"), names


def write_zarr(path: Path, columns: Mapping[str, Column], episode_ends: np.ndarray, attrs: Mapping[str, Any]) -> None:
    """Write a whole buffer as Zarr v3, a zip where `path` ends in .zip, block by block."""
    store = ZipStore(path, mode="w") if path.suffix == ".zip" else LocalStore(path)
    root = zarr.create_group(store, attributes=dict(attrs))
    data = root.create_group("data")
    total = sum(column.shape[0] * row_bytes(column) for column in columns.values())
    with closing(store), progress("writing the buffer", total) as advance:
        for key, column in columns.items():
            array = create_array(data, key, column.shape, column.dtype)
            # whole chunks, because an entry of a zip can be written only once
            rows = array.chunks[0] * max(1, READ_BYTES // (array.chunks[0] * row_bytes(column)))
            for first in range(0, column.shape[0], rows):
                values = np.asarray(column[first : first + rows])
                array[first : first + rows] = values
                advance(values.nbytes)
        ends = np.asarray(episode_ends, np.int64)
        create_array(root.create_group("meta"), "episode_ends", ends.shape, ends.dtype)[:] = ends


def create_array(
    group: zarr.Group, key: str, shape: tuple[int, ...], dtype: np.dtype, chunk_bytes: int | None = None
) -> zarr.Array:
    """An array of ours at `key`, one row a step, in chunks of about `chunk_bytes` (default: `CHUNK_BYTES`)."""
    rows = max(1, (chunk_bytes or CHUNK_BYTES) // max(1, math.prod(shape[1:]) * dtype.itemsize))
    return group.create_array(
        key,
        shape=shape,
        dtype=dtype,
        chunks=(rows, *shape[1:]),
        compressors=ZstdCodec(level=3, checksum=True),
        config={"write_empty_chunks": True},  # so that a missing chunk is a lost one
    )
