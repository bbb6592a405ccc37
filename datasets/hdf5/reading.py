"""HDF5 files of anybody: nothing outside the file is read, and nothing is taken to be as large as it says it is.

An HDF5 file can name other files (links, external storage, virtual datasets) and programs (filters, which the library
loads by their number), and can claim 10^12 rows in a hundred bytes. Whoever walks through a file by `members` and
`walk`, and counts what it will read by a `Budget`, has refused all of that before the first value.
"""

from __future__ import annotations

import functools
import math
import os
import selectors
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any

import numpy as np

from action_diffusion.datasets.storage.store import reading
from action_diffusion.errors import InputError

FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 5: "nbit", 6: "scaleoffset", 32000: "lzf"}
"""By HDF5's numbers: those that come with the library."""
DENSEST = 1032
"""Bytes that gzip makes of one, at most."""
UNWRITTEN_BYTES = 256 << 20
"""What a file may claim beyond that: rows that were never written take no room in it."""
AT_ONCE_BYTES = 1 << 30
"""The most for a row, and for a chunk, which HDF5 unpacks as a whole."""
MOST_CHUNKS, SMALL_CHUNK_BYTES = 1 << 20, 256
"""More chunks than that must not be small: HDF5 takes some hundred bytes for each that it reads. A row: a 16th."""
ATTRIBUTE_BYTES = 16 << 20
ATTRIBUTES_BYTES = 1 << 30
"""The most for one attribute, and for all of a file."""
FEW_TEXTS = 16
NAME_BYTES = 200
MOST_LEVELS = 32
STALL_S = 30
"""As long as opening one thing in a file may take."""
PROBE = Path(__file__).with_name("probe.py")


@contextmanager
def open_hdf5(path: Path) -> Iterator[Any]:
    """The file, an `h5py.File` for reading. Raises `InputError` where it is missing, truncated or no HDF5."""
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path}: HDF5 files need h5py: pip install 'action-diffusion[robomimic]'") from None
    if not path.is_file():
        raise InputError(f"{path}: {'no regular file' if path.exists() else 'no such file'}")
    with reading_hdf5(str(path)):
        file = h5py.File(path, "r")
    with file:
        yield file


def check_sound(*paths: Path) -> None:
    """Raises `InputError` for files that HDF5's library crashes or hangs on. Nothing is opened by this process.

    Another one opens all that is in them: `probe`. What it found sound is not asked again until it changes.
    """
    stats = [(path, path.stat()) for path in paths if path.is_file()]
    if stats:
        _probe(tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@functools.lru_cache
def _probe(files: tuple[tuple[str, int, int], ...]) -> None:
    program = [sys.executable, "-P", str(PROBE)]
    with (
        subprocess.Popen(program, stdin=PIPE, stdout=PIPE, stderr=DEVNULL) as probe,
        selectors.DefaultSelector() as wait,
    ):
        assert probe.stdin is not None
        assert probe.stdout is not None
        with suppress(BrokenPipeError):  # it ended: h5py is missing, say
            probe.stdin.write(b"\0".join(os.fsencode(path) for path, *_ in files))
            probe.stdin.close()
        wait.register(probe.stdout, selectors.EVENT_READ)
        while alive := wait.select(STALL_S):
            if not os.read(probe.stdout.fileno(), 1 << 16):
                break
        if not alive:
            probe.kill()
    if probe.returncode < 0:
        problem = "crashes" if alive else f"says nothing for {STALL_S} s"
        raise InputError(f"{files[0][0]}: HDF5's library {problem} when it looks at it: the file is damaged")


@contextmanager
def reading_hdf5(what: str) -> Iterator[None]:
    """Turns whatever a damaged file makes HDF5 raise into one `InputError`."""
    try:
        with reading(what):
            yield
    except MemoryError:
        raise InputError(f"{what} needs more memory than there is, or is damaged") from None
    except IndexError as error:
        raise InputError(f"{what} cannot be read, the file is damaged or unsupported: {error}") from error


def members(group: Any, where: str, linked: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """What lies in a group, by name: groups and datasets.

    linked: names of files of our own making that external links may lead to. Raises `InputError` for every other link,
    for a dataset whose values lie elsewhere or need another filter, and for a name that no file could have.
    """
    import h5py

    for name in group:
        check_name(name, where)
        place = f"{where}/{name}"
        link = group.get(name, getlink=True)
        if link is None:
            raise InputError(f"{place} is listed and cannot be found: the file is damaged")
        if not isinstance(link, h5py.HardLink) and getattr(link, "filename", None) not in linked:
            target = " in ".join(filter(None, (link.path, getattr(link, "filename", ""))))
            raise InputError(f"{place} is a link to {target}; links are not followed: put the data itself there")
        item = group[name]
        if isinstance(item, h5py.Dataset):
            _check_storage(item, place)
        if isinstance(item, h5py.Dataset | h5py.Group):
            yield name, item


def member(group: Any, name: str, where: str) -> Any:
    """The one of `members` with this name; None where there is none."""
    return dict(members(group, where)).get(name)


def walk(group: Any, where: str, linked: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Every dataset under a group by its path. Raises `InputError` as `members`, and for a group with two names."""
    seen = {group}

    def below(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, item in members(group, f"{where}/{prefix}".rstrip("/"), linked):
            if not hasattr(item, "keys"):
                yield f"{prefix}{name}", item
                continue
            if prefix.count("/") >= MOST_LEVELS:
                raise InputError(f"{where}/{prefix:.60}…: groups more than {MOST_LEVELS} deep")
            if item in seen:
                raise InputError(f"{where}/{prefix}{name} is the same group as another: keep one of them")
            seen.add(item)
            yield from below(item, f"{prefix}{name}/")

    yield from below(group, "")


def check_name(name: str, where: str) -> None:
    """Names become names of files: raises `InputError` for those that could lead elsewhere, or be none."""
    printable = name.isprintable() and not set(name) & set("/\\")
    if not printable or name in ("", ".", "..") or len(name.encode(errors="replace")) > NAME_BYTES:
        raise InputError(f"{where} holds {name[:60]!r}, which is no name for data: rename it")


def _check_storage(dataset: Any, place: str) -> None:
    if dataset.is_virtual or dataset.external:
        raise InputError(f"{place} has its values in another file: files that name others are not read: copy them in")
    plist = dataset.id.get_create_plist()
    numbers = (plist.get_filter(index)[0] for index in range(plist.get_nfilters()))
    strange = [number for number in numbers if number not in FILTERS]
    if strange:
        known = ", ".join(FILTERS.values())
        raise InputError(f"{place} needs HDF5's filter {strange[0]}; {known} are read: h5repack -f GZIP=1 makes it so")


def dtype_of(dataset: Any) -> np.dtype | None:
    """Its type, in this machine's byte order; None where numpy has none."""
    try:
        dtype: np.dtype = dataset.dtype.newbyteorder("=")
    except (TypeError, ValueError):
        return None
    return dtype


def unwritten(dataset: Any) -> bool:
    """Whether some of its values were never written, so that HDF5 makes them up: its fill value."""
    if dataset.size == 0:
        return False
    if dataset.chunks is None:
        return int(dataset.id.get_storage_size()) == 0
    return int(dataset.id.get_num_chunks()) < math.prod(_chunk_grid(dataset))


def _chunk_grid(dataset: Any) -> list[int]:
    return [-(-length // size) for length, size in zip(dataset.shape, dataset.chunks, strict=True)]


class Budget:
    """Adds up what a file claims to hold, before any of it is read. size: of the file, bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.limit = DENSEST * size + UNWRITTEN_BYTES
        self._claimed = self._stored = self._attributes = 0

    def add(self, dataset: Any, place: str) -> None:
        """A dataset. Raises `InputError` for more than the file can hold, and for more at once than memory has."""
        self._stored += dataset.id.get_storage_size()
        if self._stored > self.size:
            raise InputError(f"{place}: with it the file claims more bytes than it has: is something there twice?")
        self.claim(dataset.shape, dataset.dtype.itemsize, place)
        if dataset.chunks is not None:
            n_bytes, grid = math.prod(dataset.chunks) * dataset.dtype.itemsize, _chunk_grid(dataset)
            _check_at_once(n_bytes, "chunk", place)
            if math.prod(grid[1:]) > MOST_CHUNKS >> 4 or (
                math.prod(grid) > MOST_CHUNKS and n_bytes < SMALL_CHUNK_BYTES
            ):
                raise InputError(
                    f"{place} is cut into {math.prod(grid):,} chunks of {n_bytes:,} bytes: make them larger"
                )

    def claim(self, shape: tuple[int, ...], itemsize: int, place: str) -> None:
        """As `add`, for an array of that shape."""
        self._claimed += math.prod(shape) * itemsize
        if self._claimed > self.limit:
            raise InputError(
                f"{place}, {list(shape)}: with it the file claims {self._claimed:,} bytes, more than the "
                f"{self.limit:,} that its {self.size:,} can hold (gzip makes {DENSEST} of one at most)"
            )
        _check_at_once(math.prod(shape[1:]) * itemsize, "row", place)

    def attributes(self, item: Any, where: str) -> tuple[dict[str, Any], list[str]]:
        """(attributes that are texts or numbers, names of the others). Raises `InputError` for too much of them."""
        kept, others = dict[str, Any](), []
        for name in item.attrs:
            place = f"{where}: attribute {name!r:.60}"
            with reading_hdf5(place):
                value = self._attribute(item.attrs, name, place)
            if value is None:
                others.append(name)
            else:
                kept[name] = value
        return kept, others

    def _attribute(self, attrs: Any, name: str, place: str) -> Any:
        """A text, a list of texts or numbers; None for what is neither."""
        found = attrs.get_id(name)
        try:
            dtype, count = found.dtype, math.prod(found.shape)
        except TypeError:  # numpy has no such type
            return None
        if count * dtype.itemsize > ATTRIBUTE_BYTES:
            raise InputError(f"{place} claims {count * dtype.itemsize:,} bytes, {ATTRIBUTE_BYTES:,} are the most")
        many = dtype.kind == "O" and count > FEW_TEXTS and count * self.size > ATTRIBUTES_BYTES
        if dtype.kind not in "biufSUO" or many:  # each of many texts may be the same long one
            return None
        value = attrs[name]
        if isinstance(value, str | bytes):
            text = value.decode() if isinstance(value, bytes) else value
            self._count(len(text), place)
            return text
        array = np.asarray(value)
        if array.dtype.kind in "biuf":
            self._count(array.nbytes, place)
            return value
        texts = [item.decode() if isinstance(item, bytes) else item for item in array.ravel().tolist()]
        if array.ndim != 1 or not all(isinstance(text, str) for text in texts):
            return None
        self._count(sum(map(len, texts)), place)
        return texts

    def _count(self, n_bytes: int, place: str) -> None:
        self._attributes += n_bytes
        if n_bytes > ATTRIBUTE_BYTES or self._attributes > ATTRIBUTES_BYTES:
            raise InputError(
                f"{place}: attributes may have {ATTRIBUTE_BYTES:,} bytes each and {ATTRIBUTES_BYTES:,} together"
            )


def _check_at_once(n_bytes: int, what: str, place: str) -> None:
    most = AT_ONCE_BYTES
    if AT_ONCE_BYTES >> 4 < n_bytes <= AT_ONCE_BYTES:
        from action_diffusion.memory import (
            free_memory,  # which imports torch: only where it matters
        )

        most = free_memory() // 3
    if n_bytes > most:
        raise InputError(f"{place}: a {what} of {n_bytes:,} bytes; {most:,} are the most that memory has room for here")
