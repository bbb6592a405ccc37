"""ALOHA's recordings, and those of whoever followed it: a folder with an HDF5 file an episode. They are read only.

    episode_0.hdf5     action [T, A], observations/qpos, qvel, effort [T, A],
                       observations/images/<camera> [T, H, W, 3] uint8, or [T, P] where each row is a JPEG file

What of a file is a column, and under which name, is as for robomimic's demos: `demo`. One such file alone is
one episode. Episodes are in the order of the numbers in their names.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.formats.columns import PiecewiseColumn, RowRange, check_rows
from action_diffusion.datasets.formats.contract import Format, Opened, Settings
from action_diffusion.datasets.formats.journal import Journal
from action_diffusion.datasets.formats.paths import matching
from action_diffusion.datasets.hdf5.reading import Budget, check_sound, members, open_hdf5, reading_hdf5
from action_diffusion.datasets.robomimic.attributes import TASK_INDEX
from action_diffusion.datasets.robomimic.demo import (
    NAMES,
    Attributes,
    Demo,
    StoredColumn,
    columns_of,
    read_rows,
    said,
    survey,
    task_of,
    tasks_of,
)
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import Column
from action_diffusion.errors import InputError
from action_diffusion.progress import progress

SUFFIXES = (".hdf5", ".h5")


def is_aloha(path: Path) -> bool:
    """Whether `path` is a folder with HDF5 files in it, or an HDF5 file whose root holds the actions."""
    if path.is_dir():
        return any(file.suffix in SUFFIXES for file in matching(path, "*"))
    check_sound(path)
    with open_hdf5(path) as file, reading_hdf5(str(path)):
        return any(name in NAMES and not hasattr(item, "keys") for name, item in members(file, str(path)))


def opened(path: Path) -> Opened:
    """Raises `InputError` for links, and where episodes do not hold the same."""
    files = _files(path)
    check_sound(*files)
    kept, demos = Attributes(path), []
    with progress(f"reading what is in {path.name}", len(files)) as advance:
        for file in files:
            demos.append(_survey(file, kept))
            advance(1)
    found = columns_of(demos, files[0].name)
    ends = np.cumsum(found.lengths, dtype=np.int64)
    columns: dict[str, Column] = {
        column: PiecewiseColumn(stored.shape, stored.dtype, ends, functools.partial(_read, files, stored))
        for column, stored in found.stored.items()
    }
    attrs: dict[str, Any] = {
        "source": path.name,
        "layout": "aloha",
        "columns": {column: stored.path for column, stored in found.stored.items()},
        "hdf5_attributes": kept.text(),
    }
    words, task_index = tasks_of(demos)
    if words:
        attrs["tasks"] = words
    if len(words) > 1 and TASK_INDEX not in columns:
        numbers = np.array(task_index, np.int64)
        columns[TASK_INDEX] = PiecewiseColumn((), numbers.dtype, ends, functools.partial(_task_index, numbers))
    buffer = ReplayBuffer(columns=columns, episode_ends=ends, attrs=attrs, path=path)
    return Opened(buffer, tuple(said(kept.left_out | found.left_out)))


def _files(path: Path) -> list[Path]:
    """The episodes' files. Raises `InputError` for a folder that holds a link: it may lead anywhere."""
    if path.is_file():
        return [path]
    links = [file for file in path.rglob("*") if file.is_symlink()]
    if links:
        raise InputError(f"{links[0]} is a link; links are not followed: put the file itself there")
    files = [file for file in matching(path, "*") if file.suffix in SUFFIXES]
    return sorted(files, key=lambda file: [int(number) for number in re.findall("[0-9]+", file.stem)[-1:]] or [-1])


def _survey(file: Path, kept: Attributes) -> Demo:
    with open_hdf5(file) as root, reading_hdf5(str(file)):
        budget = Budget(file.stat().st_size)
        attrs = kept.add(file.stem, root, budget)
        demo = survey(root, str(file), budget)
        demo.task = demo.task or task_of(attrs)
        return demo


def _read(files: list[Path], stored: StoredColumn, piece: RowRange) -> np.ndarray:
    file = files[piece.number]
    with open_hdf5(file) as root, reading_hdf5(f"{file}: {stored.path}"):
        rows = read_rows(root, stored, piece.first, piece.end, str(file))
    return check_rows(rows, (piece.end - piece.first, *stored.shape), f"{file}: {stored.path}")


def _task_index(numbers: np.ndarray, piece: RowRange) -> np.ndarray:
    return np.full(piece.end - piece.first, numbers[piece.number])


def _write(buffer: ReplayBuffer, path: Path, journal: Journal, settings: Settings) -> None:
    raise InputError("format=aloha: that layout is only read; format=robomimic writes HDF5")


ALOHA = Format("aloha", opened, _write)
