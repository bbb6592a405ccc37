"""A replay buffer in Zarr: what this stack trains from (v3), what older code reads (v2), and UMI's file (v2, JPEG XL).

    data/<key>, meta/episode_ends        a folder, or a zip of one

Arrays are made at their final size first and then filled in blocks of whole chunks, so that each block is a step that
can be repeated; `episode_ends` comes last. A zip is packed from the folder when that is complete.
"""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numcodecs import Zstd
from zarr.storage import LocalStore

from action_diffusion.datasets.formats.columns import (
    BLOCK_BYTES,
    ForwardColumn,
    as_images,
    as_stored,
    is_image,
    native,
    rows_a_block,
    spans,
)
from action_diffusion.datasets.formats.contract import Format, Opened, Settings
from action_diffusion.datasets.formats.journal import Journal, JournalStep
from action_diffusion.datasets.images.codecs import lossless
from action_diffusion.datasets.storage.replay_buffer import ENDS, ReplayBuffer
from action_diffusion.datasets.storage.store import (
    CHUNK_BYTES,
    Column,
    ZarrColumn,
    array_at,
    create_array,
    open_zarr,
    row_bytes,
)
from action_diffusion.datasets.storage.zarr_metadata import COMPLETE
from action_diffusion.errors import InputError
from action_diffusion.files import remove

DTYPES = "original_dtypes"
"""Attribute of a UMI file: of what type its images were, which JPEG XL keeps as uint8."""
_THREADS = 2


def opened(path: Path) -> Opened:
    """Any Zarr replay buffer, UMI's too."""
    buffer = ReplayBuffer.open(path)
    attrs = dict(buffer.attrs)
    dtypes = attrs.pop(DTYPES, {})
    if not isinstance(dtypes, dict):
        raise InputError(f"{buffer.name}: attribute {DTYPES} must say a type for each key, not {dtypes!r}")
    columns = {key: _restored(buffer[key], dtypes.get(key), key, buffer.name) for key in buffer.keys}
    whole = ReplayBuffer(columns=columns, episode_ends=buffer.episode_ends, attrs=attrs, path=path)
    return Opened(whole, (*(f"{key} ({reason})" for key, reason in buffer.left_out.items()), *_others(path)))


def _others(path: Path) -> list[str]:
    """What lies beside the columns, such as the tables of a deployment."""
    inside = [place.split("/") for place in open_zarr(path).places]
    groups = {f"{parts[0]}/" for parts in inside if len(parts) > 1 and parts[0] not in ("data", "meta")}
    metas = {f"meta/{parts[1]}" for parts in inside if len(parts) > 2 and parts[0] == "meta"}
    return sorted(groups | metas - {ENDS})


def _restored(column: Column, dtype: Any, key: str, where: str) -> Column:
    if isinstance(column, ZarrColumn):
        column = ForwardColumn(column)
    if dtype is None:
        return column
    try:
        return as_stored(column, column.shape[1:], np.dtype(dtype), f"{where}: {key}")
    except TypeError:
        raise InputError(f"{where}: attribute {DTYPES} gives {key} the type {dtype!r}, which is none") from None


def _write_v3(buffer: ReplayBuffer, path: Path, journal: Journal, settings: Settings) -> None:
    columns = {key: buffer[key] for key in buffer.keys}
    _write(columns, buffer.attrs, buffer.episode_ends, path, journal, zarr_format=3)


def _write_v2(buffer: ReplayBuffer, path: Path, journal: Journal, settings: Settings) -> None:
    columns = {key: buffer[key] for key in buffer.keys}
    _write(columns, buffer.attrs, buffer.episode_ends, path, journal, zarr_format=2)


def _write_umi(buffer: ReplayBuffer, path: Path, journal: Journal, settings: Settings) -> None:
    columns: dict[str, Column] = {}
    dtypes = {}
    for key in buffer.keys:
        column = columns[key] = buffer[key]
        if is_image(column) and column.dtype != np.uint8:
            columns[key], dtypes[key] = as_images(column, key, buffer.name), native(column.dtype).name
    attrs = {**buffer.attrs, DTYPES: dtypes} if dtypes else buffer.attrs
    _write(columns, attrs, buffer.episode_ends, path, journal, zarr_format=2, umi=True)


def _write(
    columns: Mapping[str, Column],
    attrs: Mapping[str, Any],
    ends: np.ndarray,
    path: Path,
    journal: Journal,
    *,
    zarr_format: int,
    umi: bool = False,
) -> None:
    folder = path.with_name(f"{path.name}.folder") if path.suffix == ".zip" else path
    if journal.empty:
        remove(folder)
        _create(folder, columns, attrs, zarr_format, umi)
    steps = [step for key, column in columns.items() for step in _steps(folder, key, column, umi)]
    journal.each(steps, "writing the buffer")
    for abandoned in (folder / "data").rglob("*.partial"):  # chunks that a killed process was writing
        abandoned.unlink()
    _write_ends(folder, ends)
    if folder != path:
        journal.each([JournalStep("zip", 1, functools.partial(_zip, folder, path))], "packing the zip")


def _create(folder: Path, columns: Mapping[str, Column], attrs: Mapping[str, Any], version: int, umi: bool) -> None:
    """All arrays at their final size, without their chunks, and no `episode_ends`."""
    root = zarr.create_group(LocalStore(folder), attributes=dict(attrs), zarr_format=version)  # type: ignore[arg-type]
    data = root.create_group("data")
    for key, column in columns.items():
        dtype = native(column.dtype)
        if version == 3:
            create_array(data, key, column.shape, dtype)
            continue
        one = umi and is_image(column)
        rows = 1 if one else max(1, CHUNK_BYTES // row_bytes(column))
        data.create_array(
            key,
            shape=column.shape,
            dtype=dtype,
            chunks=(rows, *column.shape[1:]),
            compressors=lossless() if one else Zstd(level=3),
            attributes={COMPLETE: True},
        )


def _write_ends(folder: Path, ends: np.ndarray) -> None:
    """Last, because nothing opens the buffer without it."""
    root = zarr.open_group(LocalStore(folder), mode="r+", use_consolidated=False)
    array = root.require_group("meta").create_array(
        "episode_ends", shape=ends.shape, dtype=np.int64, chunks=ends.shape, compressors=None, overwrite=True
    )
    array[:] = ends


def _steps(folder: Path, key: str, column: Column, umi: bool) -> Iterator[JournalStep]:
    """Blocks of whole chunks."""
    chunk = _array(folder, f"data/{key}").chunks[0]
    rows = chunk * max(1, rows_a_block(column, BLOCK_BYTES) // chunk)
    for first, end in spans(0, column.shape[0], rows):
        fill = functools.partial(_fill_images if umi and is_image(column) else _fill, folder, key, column, first, end)
        yield JournalStep(f"{first}-{end} {key}", (end - first) * row_bytes(column), fill)


def _fill(folder: Path, key: str, column: Column, first: int, end: int) -> None:
    _array(folder, f"data/{key}")[first:end] = np.asarray(column[first:end])


def _fill_images(folder: Path, key: str, column: Column, first: int, end: int) -> None:
    """What Zarr would write, a chunk an image, without its second for every thousand of them."""
    codec = lossless()

    def write(row: int, image: np.ndarray) -> None:
        (folder / "data" / key / f"{row}.0.0.0").write_bytes(codec.encode(image))

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(write, range(first, end), np.asarray(column[first:end])))


def _array(folder: Path, name: str) -> zarr.Array[Any]:
    with zarr.config.set({"array.write_empty_chunks": True}):  # so that a missing chunk is a lost one
        return array_at(zarr.open_group(LocalStore(folder), mode="r+", use_consolidated=False), name, str(folder))


def _zip(folder: Path, path: Path) -> None:
    """Chunks are compressed already, and are stored as they are."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            archive.write(file, file.relative_to(folder).as_posix())


ZARR = Format("zarr", opened, _write_v3)
ZARR2 = Format("zarr2", opened, _write_v2)
UMI = Format("umi", opened, _write_umi)
