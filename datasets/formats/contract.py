"""What a format is: something that a path can hold, that reads as a replay buffer and can be written from one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from action_diffusion.datasets.formats.columns import as_stored, native
from action_diffusion.datasets.formats.journal import Journal
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import Column
from action_diffusion.errors import InputError

Quality = Literal["high", "lossless"]
MARK = "action_diffusion"
"""Under this name a format that has a place for it keeps what it cannot say otherwise: see `kept`."""


class Settings(NamedTuple):
    """rate: steps a second, Hz. quality: of videos."""

    rate: float
    quality: Quality = "high"


class Opened(NamedTuple):
    """A buffer whose columns read from the file when they are indexed.

    left_out: what of the file is not in it. said: what was read otherwise than the file's description has it, in words.
    """

    buffer: ReplayBuffer
    left_out: tuple[str, ...] = ()
    said: tuple[str, ...] = ()


class Format(NamedTuple):
    """One way to keep demonstrations.

    open: raises `InputError` for what does not fit together, such as a video with fewer frames than rows.
    write: makes the path, in steps that a journal knows, so that a call after a kill goes on where it was.
    lossy: whether images come back otherwise than they were, with these settings.
    holds: of a plugin's format: whether a path is of it, told from its content.
    """

    name: str
    open: Callable[[Path], Opened]
    write: Callable[[ReplayBuffer, Path, Journal, Settings], None]
    lossy: Callable[[Settings], bool] = lambda settings: False
    holds: Callable[[Path], bool] = lambda path: False


def kept(buffer: ReplayBuffer, names: Mapping[str, str]) -> dict[str, Any]:
    """What another format has no place for, as plain values. names: what each key is called there."""
    columns = {
        key: {"name": name, "dtype": native(buffer[key].dtype).name, "shape": list(buffer[key].shape[1:])}
        for key, name in names.items()
    }
    return {"attrs": buffer.attrs, "columns": columns}


def restored(stored: Mapping[str, Column], notes: Any, where: str) -> tuple[dict[str, Column], dict[str, Any]]:
    """Columns (by their names there) and attributes as they were before `kept`. Columns that it lacks are left.

    Raises `InputError` for notes that are damaged, or of other columns than there are.
    """
    try:
        columns, left = dict[str, Column](), dict(stored)
        for key, note in notes["columns"].items():
            row, dtype = tuple(int(length) for length in note["shape"]), np.dtype(note["dtype"])
            column = left.pop(note["name"])
            if min(row, default=0) < 0 or math.prod(row) != math.prod(column.shape[1:]) or dtype.kind not in "biuf":
                raise ValueError(f"{key} is {dtype} {list(row)}, the file has {list(column.shape[1:])}")
            columns[key] = as_stored(column, row, dtype, f"{where}: {key}")
        return {**columns, **{key: column for key, column in left.items() if key not in columns}}, dict(notes["attrs"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{where}: {MARK} does not describe this data: {problem}") from None
