"""Zarr on disk, seen as plain arrays with clear errors.

    data/<key>          one row a step
    meta/episode_ends   row after the last step of each episode

in Zarr v2 or v3, a folder or a zip, at its root or inside the one folder that holds it. What we write is
v3, zstd with a checksum, in chunks of about a megabyte (some frames, or many low-dimensional rows).
"""

from __future__ import annotations

import math
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, Store
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, ZipStore

from action_diffusion.datasets.storage.decoding import register_codecs
from action_diffusion.datasets.storage.rows import Rows
from action_diffusion.datasets.storage.zarr_metadata import (
    COMPLETE,
    MAX_METADATA,
    ArrayInfo,
    Listing,
    array_infos,
    check_plan,
    list_folder,
    list_zip,
    open_zip,
)
from action_diffusion.errors import InputError
from action_diffusion.memory import sized
from action_diffusion.progress import progress

if TYPE_CHECKING:
    from action_diffusion.datasets.storage.objects import ObjectCache, Objects

CHUNK_BYTES = 1 << 20
READ_BYTES = 4 << 20  # what is decoded at a time when an array is read from end to end
_DECODERS = 2
"""Threads that decode chunks. Zarr's default is many more, and the memory that each has freed stays with it."""
if zarr.config.get("threading.max_workers") is None:
    zarr.config.set({"threading.max_workers": _DECODERS})
_REASON = 300  # characters of what others say of an error
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
        reason = " ".join(str(error).split())[:_REASON] or type(error).__name__
        raise InputError(f"{what} cannot be read, the file is damaged or unsupported: {reason}") from error


class ZarrColumn(Rows):
    """The first `n_rows` rows of a Zarr array; reading errors are `InputError`s that name file and key.

    info: the array's metadata. place: in its group. exists: whether a key is in the store.
    """

    def __init__(
        self,
        array: zarr.Array[Any],
        info: ArrayInfo,
        *,
        place: str,
        n_rows: int,
        exists: Callable[[str], bool],
        where: str,
    ) -> None:
        self.array, self.place, self.where = array, place, where
        self.shape = (n_rows, *array.shape[1:])
        self.dtype = np.dtype(array.dtype)
        self._info, self._exists = info, exists
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

    def units(self) -> np.ndarray:
        """See `InUnits`: chunks, also those within a shard."""
        return np.arange(0, len(self), self.array.chunks[0])

    def absent(self) -> tuple[list[str], int]:
        """Places of the chunks that the store does not have, and how many there are with them."""
        sizes = self._info.chunks
        grid = [range(math.ceil(length / size)) for length, size in zip(self.shape, sizes, strict=True)]
        keys = (f"{self.array.path}/{self.array.metadata.encode_chunk_key(chunk)}" for chunk in product(*grid))
        return [key for key in keys if not self._exists(key)], math.prod(map(len, grid))

    def _check_complete(self) -> None:
        # A chunk that is not there holds the fill value, as the format says, unless whoever wrote the array says that
        # there are none of these: what we write does, so that a part of a copy does not train unnoticed.
        if self._complete or not (self._info.complete or self._info.fill_value is None):
            return
        missing, n_chunks = self.absent()
        if missing:
            raise InputError(
                f"{self.where} lacks {len(missing)} of {n_chunks} chunks, the first is {missing[0]}, and its "
                "description does not allow for that: copy the file again"
            )
        self._complete = True


@runtime_checkable
class InBlocks(Protocol):
    """A column that knows which rows are best read together, because it is made of others."""

    def blocks(self, n_bytes: int, first: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """As `blocks`."""


def blocks(
    column: Column, n_bytes: int = READ_BYTES, first: int = 0, stop: int | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Rows `first` to `stop` (all) as (first row, rows), whole chunks of about `n_bytes` at a time."""
    stop = column.shape[0] if stop is None else stop
    if isinstance(column, InBlocks):
        yield from column.blocks(n_bytes, first, stop)
        return
    unit = column.chunk_rows if isinstance(column, ZarrColumn) else 1
    rows = unit * max(1, n_bytes // (unit * row_bytes(column)))
    while first < stop:
        end = min(stop, (first // rows + 1) * rows)
        yield first, np.asarray(column[first:end])
        first = end


@runtime_checkable
class InUnits(Protocol):
    """A column that may be read by several threads at once, and knows which rows are decoded together."""

    def units(self) -> np.ndarray | None:
        """The first row of each such unit, int64 [M], increasing from 0; None where a part of it is no such column."""


def units(column: Column) -> np.ndarray | None:
    """`InUnits.units`; None for a column that one thread at a time may read."""
    if isinstance(column, np.ndarray):
        return np.arange(len(column))
    return column.units() if isinstance(column, InUnits) else None


def row_bytes(column: Column) -> int:
    return max(1, math.prod(column.shape[1:]) * column.dtype.itemsize)


def array_at(group: zarr.Group, name: str, where: str) -> zarr.Array[Any]:
    """The array `name` of the group, or an `InputError` where that is something else."""
    array = group.get(name)
    if not isinstance(array, zarr.Array) or array.ndim == 0:
        raise InputError(f"{where}: {name} must be an array with one row a step")
    return array


@dataclass(frozen=True)
class ZarrFile:
    """A store with a replay buffer, checked by `zarr_metadata` and not read yet.

    group: holds data/ and meta/. infos: place in the group → array. places: of all metadata in the group. exists:
    whether a key is in the store.
    """

    path: Path | str
    group: zarr.Group
    infos: dict[str, ArrayInfo]
    places: list[str]
    exists: Callable[[str], bool]
    listing: Listing

    def check(self, places: Iterable[str]) -> None:
        """Raises `InputError` where the arrays at `places` cannot be read all together."""
        check_plan({place: self.infos[place] for place in places}, self.listing, self.path)

    def column(self, place: str, n_rows: int) -> ZarrColumn:
        where = f"{self.path}: {place}"
        with reading(where):
            array = array_at(self.group, place, str(self.path))
        return ZarrColumn(array, self.infos[place], place=place, n_rows=n_rows, exists=self.exists, where=where)


def open_zarr(path: Path | str, cache: ObjectCache | None = None) -> ZarrFile:
    """What lies at a path, or at a URL in an object store, by way of `cache` (default: the user's).

    Raises `InputError` for a path that is missing, no Zarr, damaged, or holds no replay buffer, for links and pipes
    in it, for codecs that are not known to be harmless, and for sizes beyond the limits of `zarr_metadata`.
    """
    register_codecs()
    store, listing, exists = _remote(path, cache) if isinstance(path, str) else _local(path)
    roots = {place.removesuffix(marker) for place in listing.places for marker in _MARKERS if place.endswith(marker)}
    if len(roots) != 1:
        found = f"more than one ({', '.join(sorted(roots)[:4])})" if roots else "none"
        raise InputError(f"{path}: a replay buffer holds one meta/episode_ends array, found {found}")
    root = roots.pop()
    places = [place for place in listing.places if place.startswith(root)]
    infos = {place.removeprefix(root): info for place, info in array_infos(listing, places, path).items()}
    store.limit = 2 * max((info.chunk_bytes for info in infos.values()), default=0) + MAX_METADATA
    with reading(str(path)):
        group = zarr.open_group(store, path=root.strip("/"), mode="r", use_consolidated=False)
    return ZarrFile(path, group, infos, [place.removeprefix(root) for place in places], exists, listing)


_Opened = tuple["_Limited | Objects", Listing, Callable[[str], bool]]


def _remote(url: str, cache: ObjectCache | None) -> _Opened:
    from action_diffusion.datasets.storage import objects  # not before it is wanted

    return objects.opened(url, cache or objects.object_cache())


def _local(path: Path) -> _Opened:
    if not path.exists():
        previous = path.with_name(f"{path.name}.previous")
        hint = f"; an interrupted replacement left {previous}: rename it back" if previous.exists() else ""
        raise InputError(f"{path}: no such file or folder{hint}")
    return _folder(path) if path.is_dir() else _zip(path)


class _Limited(Store):
    """Reads no file that is larger than what can belong to a chunk of its arrays."""

    limit = MAX_METADATA

    def _size(self, key: str) -> int:
        raise NotImplementedError

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        if byte_range is None and self._size(key) > self.limit:
            raise ValueError(f"{key} has {sized(self._size(key))} where at most {sized(self.limit)} can belong")
        return await super().get(key, prototype, byte_range)  # type: ignore[safe-super]


class _Folder(_Limited, LocalStore):  # type: ignore[misc]  # it has a default where the others have none
    def _size(self, key: str) -> int:
        path = self.root / key
        return path.stat().st_size if path.is_file() else 0


class _Zip(_Limited, ZipStore):
    """Does not read the zip's directory once more, which takes seconds for some hundred thousand entries."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        super().__init__(path, mode="r")
        self._lock = threading.RLock()
        self._zf = archive
        self._is_open = True

    def _size(self, key: str) -> int:
        entry = self._zf.NameToInfo.get(key)
        return entry.file_size if entry else 0


def _folder(path: Path) -> _Opened:
    return _Folder(path, read_only=True), list_folder(path), lambda key: (path / key).exists()


def _zip(path: Path) -> _Opened:
    is_zip = False
    if path.is_file():  # not a pipe, which nobody may write to
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
    if not is_zip:
        raise InputError(f"{path}: neither a Zarr folder nor a zip of one")
    archive = open_zip(path)
    return _Zip(path, archive), list_zip(archive, path), frozenset(archive.namelist()).__contains__


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
) -> zarr.Array[Any]:
    """An array of ours at `key`, one row a step, in chunks of about `chunk_bytes` (default: `CHUNK_BYTES`)."""
    rows = max(1, (chunk_bytes or CHUNK_BYTES) // max(1, math.prod(shape[1:]) * dtype.itemsize))
    return group.create_array(
        key,
        shape=shape,
        dtype=dtype,
        chunks=(rows, *shape[1:]),
        compressors=ZstdCodec(level=3, checksum=True),
        attributes={COMPLETE: True},
        config={"write_empty_chunks": True},  # so that a missing chunk is a lost one
    )
