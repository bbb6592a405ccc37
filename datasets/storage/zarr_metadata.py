"""What a Zarr store says of itself, weighed before Zarr opens it. Nothing is decoded here, and nothing followed.

names       no links, no pipes, no "..", at most MAX_FILES
metadata    at most MAX_METADATA bytes
codecs      those of CODECS: others might run what is in the file (pickle), or take any amount of memory
shapes      whole numbers, at most MAX_ROWS rows and MAX_CHUNKS chunks
bytes       chunks, and whatever is held in memory, against the memory that is free
"""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from action_diffusion.datasets.images.pictures import picture
from action_diffusion.errors import InputError
from action_diffusion.memory import free_memory, sized

MAX_FILES = 1_000_000
MAX_METADATA = 16 << 20
MAX_ARRAYS = 10_000
MAX_ROWS = 100_000_000
MAX_CHUNKS = 1_000_000
MAX_RATIO = 1000
"""What is not in the file to at least this part cannot claim more than the free memory."""
CHUNK_COPIES = 4
"""Of a chunk that are in memory while it is read: packed, unpacked, and two decoders."""
_IMAGES = ("imagecodecs_jpegxl", "imagecodecs_jpeg2k")
COMPRESSORS = frozenset(("zstd", "blosc", "gzip", "zlib", "lz4", "bz2", "lzma", *_IMAGES))
_FILTERS = ("shuffle", "delta", "fixedscaleoffset", "quantize", "bitround", "packbits", "astype", "fletcher32")
_WORDS = ("vlen-utf8", "vlen-bytes", "json2")  # which are not read
CODECS = COMPRESSORS.union(("bytes", "transpose", "sharding_indexed", "crc32c"), _FILTERS, _WORDS)
"""By their names in Zarr v2 and v3 (there also as numcodecs.NAME)."""
_FILTER_TYPES = ("dtype", "astype", "encode_dtype", "decode_dtype")
COMPLETE = "every_chunk_is_stored"
"""Attribute of the arrays that we write: a chunk that is not there was lost. Elsewhere it is the fill value."""
_REASON = 200  # characters of what others say of an error
_ZIP_TAIL = 1 << 17  # its comment has at most 64 kB
_ZIP_ENTRY = 128  # bytes of its directory for each entry, with a long name
METADATA = ("zarr.json", ".zarray", ".zgroup", ".zattrs")
_NUMPY_NUMBERS = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"])
_NUMBERS = {np.dtype(name).name: np.dtype(name) for name in _NUMPY_NUMBERS}


class ArrayInfo(NamedTuple):
    """An array as its metadata describe it. chunks: what is stored as one, a shard where there are any.

    dtype: None for what is no number; `values` are its values in words. fill_value: None where absent chunks hold
    nothing in particular. complete: whoever wrote it stored every chunk.
    """

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: np.dtype | None
    values: str
    fill_value: Any
    complete: bool

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize if self.dtype else 0

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunks) * self.dtype.itemsize if self.dtype else 0


_OF_A_MAC = "__MACOSX/"
"""Where a zip that was made on a Mac has what its files are called there."""


class Listing(NamedTuple):
    """Places of the metadata, how to read one, and the bytes that lie in the store."""

    places: list[str]
    read: Callable[[str], bytes]
    stored_bytes: Callable[[], int]


def list_folder(path: Path) -> Listing:
    """Raises `InputError` for links, pipes and devices anywhere in it, and for too many files."""
    files: list[str] = []
    for n, entry in enumerate(_entries(path)):
        if n >= MAX_FILES:
            raise InputError(f"{path} holds more than {MAX_FILES:,} files: pack it as a zip, or use larger chunks")
        if entry.name in METADATA:
            files.append(Path(entry.path).relative_to(path).as_posix())

    def read(place: str) -> bytes:
        with (path / place).open("rb") as file:
            _check_metadata_size(os.fstat(file.fileno()).st_size, place, path)
            return file.read(MAX_METADATA)

    return Listing(files, read, lambda: sum(entry.stat().st_size for entry in _entries(path)))


def _entries(path: Path) -> Iterator[os.DirEntry[str]]:
    """Every file in and under `path`."""
    folders = [os.fspath(path)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                found = list(entries)
        except FileNotFoundError:  # it is being recorded to: what is renamed or removed meanwhile is not looked for
            continue
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        for entry in found:
            if entry.is_symlink():
                raise InputError(f"{entry.path} is a link: a data set must lie in its folder as a whole, copy it there")
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_file(follow_symlinks=False):
                yield entry
            elif os.path.lexists(entry.path):
                raise InputError(f"{entry.path} is no file (a pipe, a socket or a device): remove it")


def list_zip(archive: zipfile.ZipFile, path: Path) -> Listing:
    """Raises `InputError` for names that leave the zip."""
    sizes = {info.filename: info.file_size for info in archive.infolist() if not info.filename.startswith(_OF_A_MAC)}
    for name in sizes:
        if name.startswith("/") or (".." in name and ".." in PurePosixPath(name).parts):
            raise InputError(f"{path}: {name!r} in it is no name of a file in a data set")

    def read(place: str) -> bytes:
        _check_metadata_size(sizes[place], place, path)
        try:
            return archive.read(place)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise InputError(f"{path}: {place} in it is damaged: {error}") from None

    places = [name for name in sizes if name.rpartition("/")[2] in METADATA]
    return Listing(places, read, lambda: path.stat().st_size)


def open_zip(path: Path) -> zipfile.ZipFile:
    """Raises `InputError` for a damaged zip, and for too many entries before they are read."""
    try:
        with path.open("rb") as file:
            n = _n_entries(file)
        if n > MAX_FILES:
            raise InputError(f"{path} holds {n:,} entries; at most {MAX_FILES:,} are read: use larger chunks")
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, NotImplementedError, OSError, struct.error) as error:
        raise InputError(f"{path}: damaged or incomplete zip ({error}): copy or download it again") from error


def _n_entries(file: BinaryIO) -> int:
    """As the end of the zip says, or as its directory has room for."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _ZIP_TAIL))
    tail = file.read()
    place = tail.rfind(b"PK\x05\x06")
    if place < 0:
        return 0  # zipfile says what is wrong
    n, n_bytes = struct.unpack_from("<HI", tail, place + 10)
    large = tail.rfind(b"PK\x06\x06", 0, place)
    if large >= 0 and (n == 0xFFFF or n_bytes == 0xFFFFFFFF):
        n, n_bytes = struct.unpack_from("<QQ", tail, large + 32)
    return int(max(n, n_bytes // _ZIP_ENTRY))


def _check_metadata_size(n_bytes: int, place: str, path: Path | str) -> None:
    if n_bytes > MAX_METADATA:
        limit = f"at most {MAX_METADATA >> 20} MB of metadata are read"
        raise InputError(f"{path}: {place} has {n_bytes / 1e6:,.0f} MB; {limit}")


def array_infos(listing: Listing, places: Iterable[str], path: Path | str) -> dict[str, ArrayInfo]:
    """The arrays that the metadata at `places` describe, by their own places, such as `data/state`.

    Raises `InputError` for metadata that are too large or make no sense, and for codecs that are not on the list.
    """
    infos: dict[str, ArrayInfo] = {}
    formats = set()
    n_bytes = 0
    for place in sorted(places):
        content = listing.read(place)
        n_bytes += len(content)
        _check_metadata_size(n_bytes, "all together", path)
        folder, _, name = place.rpartition("/")
        if name not in ("zarr.json", ".zarray"):
            continue
        fields = _fields(content, place, path)
        if name == "zarr.json" and fields.get("node_type") != "array":
            continue
        formats.add(name)
        if len(infos) == MAX_ARRAYS:
            raise InputError(f"{path} holds more than {MAX_ARRAYS:,} arrays")
        try:
            _check_codecs(fields, f"{path}: {folder}")
            infos[folder] = _info(fields, name == "zarr.json")
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else str(error)[:_REASON]
            raise InputError(f"{path}: {place} cannot be read, it describes no array: {reason}") from None
    if len(formats) > 1:
        raise InputError(f"{path} holds arrays of Zarr v2 and of Zarr v3, as in {place}: keep those of one")
    return infos


def _fields(content: bytes, place: str, path: Path | str) -> dict[str, Any]:
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:_REASON]
        raise InputError(f"{path}: {place} cannot be read, the file is damaged: {reason}") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: {place} cannot be read, the file is damaged: it is no object")
    return fields


def _check_codecs(fields: Mapping[str, Any], where: str) -> None:
    """Codecs on the list, one compressor at most, filters that give numbers; inside of shards too."""
    filters = fields.get("filters") or []
    given = [*filters, fields.get("compressor"), *(fields.get("codecs") or []), *(fields.get("index_codecs") or [])]
    given += fields.get("storage_transformers") or []
    names = []
    for codec in (codec for codec in given if codec is not None):
        options: dict[str, Any] = {"name": codec} if isinstance(codec, str) else codec
        name = str(options.get("id", options.get("name"))).removeprefix("numcodecs.")
        if name not in CODECS:
            raise InputError(
                f"{where} is packed with {name[:40]!r}, which is not read (it might run what is in the file, or take "
                "any amount of memory): write it anew, with zstd"
            )
        names.append(name)
        configuration = options.get("configuration") or {}
        types = [
            (configuration | options).get(key, "<f4") for key in ("dtype", "astype", "encode_dtype", "decode_dtype")
        ]
        if not all(isinstance(dtype, str) and _is_number(dtype) for dtype in types):
            raise InputError(f"{where} is packed with {name!r} of {types}, which are no numbers")
        if name == "sharding_indexed":
            _check_codecs({"codecs": configuration.get("codecs")}, where)
            _check_codecs({"codecs": configuration.get("index_codecs")}, where)
    packed = [name for name in names if name in COMPRESSORS]
    if len(packed) > 1 or any(name in COMPRESSORS for name in names[: len(filters)]):
        raise InputError(f"{where} is packed with {' and '.join(names)}: write it anew, with zstd and without filters")


def _info(fields: Mapping[str, Any], v3: bool) -> ArrayInfo:
    shape = _sizes(fields["shape"])
    stored = fields["data_type"] if v3 else fields["dtype"]
    chunks = fields["chunk_grid"]["configuration"]["chunk_shape"] if v3 else fields["chunks"]
    attributes = fields.get("attributes") or {}
    if not isinstance(attributes, dict):
        raise TypeError("its attributes are no object")
    dtype, values = _dtype(stored)
    chunk = _sizes(chunks)
    if len(chunk) != len(shape) or any(size and not length for size, length in zip(shape, chunk, strict=True)):
        raise ValueError(f"its shape is {list(shape)}, its chunks {list(chunk)}")
    return ArrayInfo(
        shape,
        tuple(max(1, length) for length in chunk),
        dtype,
        values,
        fields.get("fill_value"),
        attributes.get(COMPLETE) is True,
    )


def _sizes(given: Any) -> tuple[int, ...]:
    if not isinstance(given, list) or not all(type(size) is int and 0 <= size <= 10**15 for size in given):
        raise ValueError(f"sizes are whole numbers of 0 to 10^15, not {str(given)[:60]}")
    return tuple(given)


def _dtype(stored: Any) -> tuple[np.dtype | None, str]:
    """The type of numbers, and what the values are in words."""
    name = stored.get("name") if isinstance(stored, dict) else stored
    if not isinstance(name, str):
        return None, "records"
    if _is_number(name):
        return np.dtype(name), np.dtype(name).name
    words = name == "|O" or "string" in name or "utf" in name or name[1:2] in "US"
    return None, "words" if words else f"{name[:40]} values"


def _is_number(name: str) -> bool:
    """Of NumPy's names of types, with the sign of a byte order or without."""
    return name in _NUMBERS or name.lstrip("<>|=") in _NUMPY_NUMBERS


def check_plan(infos: Mapping[str, ArrayInfo], listing: Listing, path: Path | str) -> None:
    """Whether the arrays that will be read can be: rows, chunks and bytes. Raises `InputError` before any is."""
    free = free_memory()
    for place, info in infos.items():
        where = f"{path}: {place}"
        if info.shape[0] > MAX_ROWS:
            raise InputError(f"{where} claims {info.shape[0]:,} rows; at most {MAX_ROWS:,} are read")
        n_chunks = math.prod(math.ceil(size / chunk) for size, chunk in zip(info.shape, info.chunks, strict=True))
        if n_chunks > MAX_CHUNKS:
            raise InputError(f"{where} claims {n_chunks:,} chunks; at most {MAX_CHUNKS:,} are read: use larger ones")
        if CHUNK_COPIES * info.chunk_bytes > free:
            raise InputError(
                f"{where} has chunks of {sized(info.chunk_bytes)}, and reading one takes {CHUNK_COPIES} times that: "
                f"{sized(free)} are free; write it anew with smaller chunks"
            )
    held = sum(info.n_bytes for info in infos.values() if info.dtype and picture(info.shape, info.dtype) is None)
    if held > free:
        raise InputError(f"{path}: its columns without pictures take {sized(held)} of memory, {sized(free)} are free")
    total = sum(info.n_bytes for info in infos.values())
    if total > free and total > MAX_RATIO * listing.stored_bytes():
        raise InputError(
            f"{path} claims {sized(total)} and holds {sized(listing.stored_bytes())}: the file is damaged, or made to "
            "fill memory"
        )
