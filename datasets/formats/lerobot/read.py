"""LeRobotDataset v2.0, v2.1 and v3.0 as columns, after checking that rows, episodes and videos belong together.

What a column holds is told from the files: the type that is stored, pictures as they are stored. `meta/info.json`
says which columns there are, and what it says otherwise is reported.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.formats.columns import PiecewiseColumn, RowRange
from action_diffusion.datasets.formats.contract import Opened, restored
from action_diffusion.datasets.formats.folder.images import ImageFile, picture
from action_diffusion.datasets.formats.lerobot.episodes import Files, check_rows, files_of
from action_diffusion.datasets.formats.lerobot.info import FeatureInfo, Info, read_info
from action_diffusion.datasets.formats.lerobot.names import INFO, OWN, keys_for
from action_diffusion.datasets.formats.lerobot.tasks import check_indices, read_tasks
from action_diffusion.datasets.formats.lerobot.video import camera
from action_diffusion.datasets.formats.parquet import (
    ParquetRows,
    check_values,
    contents,
    images,
    is_picture,
    number_type,
    numbers,
)
from action_diffusion.datasets.storage.dimensions import NAMES
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import Column, reading
from action_diffusion.datasets.storage.tasks import TASK, TASKS, renamed_tasks
from action_diffusion.errors import InputError


def opened(path: Path) -> Opened:
    """Raises `InputError` for a version that is not read, and for whatever does not fit together."""
    with reading(str(path)):
        return _opened(path)


def _opened(path: Path) -> Opened:
    info = read_info(path)
    files = files_of(info)
    check_rows(info, files, lambda name: _numbers(info, files, name, FeatureInfo("", (1,))))
    stored: dict[str, Column] = {}
    left_out = [f"{name} (not in meta/info.json)" for name in files.tables[0].types if name not in info.features]
    for name, feature in info.features.items():
        if name in OWN:
            continue
        if feature.dtype == "video" and name not in files.tables[0].types:
            stored[name] = camera(info, files, name, feature)
        elif reason := _reason(files, name, feature):
            if name == "action":
                raise InputError(f"{files.tables[0].path}: action: {reason}, but meta/info.json lists it")
            left_out.append(f"{name} ({reason})")
        else:
            stored[name] = _column(info, files, name, feature)
    tasks = read_tasks(info)
    if TASK in files.tables[0].types and tasks:
        column = _numbers(info, files, TASK, FeatureInfo("int64", (1,)))
        check_indices(info, column, tasks)
        if len(tasks) > 1 or _noted(info, TASK):
            stored[TASK] = column
    if info.notes is not None:
        columns, attrs = restored(stored, info.notes, str(path / INFO))
        attrs = renamed_tasks(attrs, tasks)
    else:
        keys = keys_for(stored)
        columns = {keys[name]: column for name, column in stored.items()}
        attrs = {"source": path.name, "control_rate": info.rate, TASKS: tasks or [""]}
        attrs |= {"robot_type": info.robot} if info.robot else {}
        named = {keys[name]: list(info.features[name].names) for name in stored if info.features[name].names}
        attrs |= {NAMES: named} if named else {}
    buffer = ReplayBuffer(columns=columns, episode_ends=files.episode_ends, attrs=attrs, path=path)
    return Opened(buffer, tuple(left_out), tuple(info.said))


def _noted(info: Info, name: str) -> bool:
    """Whether our notes speak of this column."""
    columns = info.notes.get("columns") if isinstance(info.notes, dict) else None
    return isinstance(columns, dict) and any(note.get("name") == name for note in columns.values())


def _reason(files: Files, name: str, feature: FeatureInfo) -> str | None:
    """Why a feature is no column of ours. Raises `InputError` where only some of the files have it."""
    holding = [name in table.types for table in files.tables]
    if not any(holding):
        return "not in the parquet files"
    if not all(holding):
        raise InputError(f"{files.tables[holding.index(False)].path} lacks {name}, which other files have")
    if 0 in feature.shape:
        return "no values"
    kind = files.tables[0].types[name]
    if is_picture(kind) or number_type(kind) is not None:
        return None
    return "words" if "string" in str(kind) else f"no numbers but {str(kind)[:40]}"


def _column(info: Info, files: Files, name: str, feature: FeatureInfo) -> PiecewiseColumn:
    if is_picture(files.tables[0].types[name]):
        return _pictures(info, files, name, feature)
    return _numbers(info, files, name, feature)


def _numbers(info: Info, files: Files, name: str, feature: FeatureInfo) -> PiecewiseColumn:
    """A feature of numbers, in the type that the files have. An empty `feature.dtype`: whatever that is."""
    row = () if name.startswith("next.") and feature.shape == (1,) else feature.shape
    dtypes = []
    for table in files.tables:
        found = number_type(table.types[name]) if name in table.types else None
        if found is None:
            raise InputError(f"{table.path}: {name} is {table.types.get(name, 'not there')}, expected numbers")
        check_values(table, name, row)
        dtypes.append(found)
    dtype = np.result_type(*dtypes)
    if len({found.kind for found in dtypes}) > 1:
        listed = ", ".join(sorted({str(found) for found in dtypes}))
        raise InputError(f"{info.root}: {name} is {listed} in different files, expected one type")
    if feature.dtype and feature.dtype != dtype.name:
        info.said.append(f"{name} is {dtype.name} as it is stored; info.json says {feature.dtype}")
    n_bytes, rows = int(np.prod(row, dtype=np.int64)) * dtype.itemsize, ParquetRows(name)
    read = functools.partial(_read_numbers, files, rows, name, dtype, row, n_bytes)
    return PiecewiseColumn(row, dtype, files.ends, read)


def _read_numbers(
    files: Files, rows: ParquetRows, name: str, dtype: np.dtype, row: tuple[int, ...], n_bytes: int, piece: RowRange
) -> np.ndarray:
    path = files.tables[piece.number].path
    array = rows.read(path, piece.first, piece.end, n_bytes)
    return numbers(array, row, f"{path}: {name}").astype(dtype, copy=False)


def _pictures(info: Info, files: Files, name: str, feature: FeatureInfo) -> PiecewiseColumn:
    """Encoded images, of the first one's shape and type."""
    rows, path = ParquetRows(name), files.tables[0].path
    colours = len(feature.shape) == 3 and 3 in (feature.shape[0], feature.shape[-1])
    first = contents(rows.read(path, 0, 1, 1 << 30), f"{path}: {name}")[0]
    found = picture(first, f"{path}: {name}", colours=colours)
    said_size = sorted(length for length in feature.shape if length > 4)
    if said_size and said_size != sorted(found.shape[:2]):
        info.said.append(f"{name} is {list(found.shape)} as it is stored; info.json says {list(feature.shape)}")
    if found.alpha:
        info.said.append(f"{name} has an alpha channel, which was dropped: the colours are as they are stored")
    read = functools.partial(_read_pictures, files, rows, name, found, colours)
    return PiecewiseColumn(found.shape, found.dtype, files.ends, read)


def _read_pictures(
    files: Files, rows: ParquetRows, name: str, expected: ImageFile, colours: bool, piece: RowRange
) -> np.ndarray:
    path = files.tables[piece.number].path
    n_bytes = int(np.prod(expected.shape)) * expected.dtype.itemsize
    array: Any = rows.read(path, piece.first, piece.end, n_bytes)
    return images(array, expected, f"{path}: {name}", colours=colours)
