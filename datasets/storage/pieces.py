"""A buffer put together from stretches of others: rows are read from where they are, when they are written.

episodes of A    | 0 1 2 3 4 | 5 6 7 |         pieces    [1, 4) of A, [5, 8) of A, [0, 3) of B
episodes of B    | 0 1 2 |                     makes     | 1 2 3 | 5 6 7 | 0 1 2 |
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import Column, blocks, units, write_zarr
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path

SAME_RATE = 0.005
"""Share by which two rates may differ that mean the same, such as 29.97 and 30."""


@dataclass(frozen=True)
class Piece:
    """An episode to be: rows `first` to `stop` of a buffer. shifts: rows to add for some keys."""

    buffer: ReplayBuffer
    first: int
    stop: int
    shifts: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.stop - self.first


class JoinedColumn:
    """One key of all pieces, one after the other."""

    def __init__(self, key: str, pieces: Sequence[Piece]) -> None:
        self._parts = [(p.buffer[key], p.first + p.shifts.get(key, 0), len(p)) for p in pieces]
        self._starts = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])])
        self.columns = [column for column, _, _ in self._parts]
        self.shape = (int(self._starts[-1]), *self.columns[0].shape[1:])
        self.dtype = np.result_type(*{column.dtype for column in self.columns})

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        if not isinstance(rows, slice):
            return self._some(np.arange(self.shape[0])[np.atleast_1d(rows)])
        start, stop, step = rows.indices(self.shape[0])
        found = [np.empty((0, *self.shape[1:]), self.dtype)]
        place = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            column, first, _ = self._parts[place]
            end = min(stop, int(self._starts[place + 1]))
            offset = first - int(self._starts[place])
            found.append(np.asarray(column[start + offset : end + offset]))
            start, place = end, place + 1
        return np.concatenate(found, dtype=self.dtype)[::step]

    def _some(self, rows: np.ndarray) -> np.ndarray:
        """Rows [n] in any order, those of a piece at once."""
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        places = np.searchsorted(self._starts, rows, side="right") - 1
        for place in np.unique(places):
            column, first, _ = self._parts[place]
            found[places == place] = column[rows[places == place] - int(self._starts[place]) + first]
        return found

    def blocks(self, n_bytes: int, first: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Rows in blocks of each piece's own chunks: `store.blocks`."""
        for (column, begin, length), start in zip(self._parts, self._starts.tolist(), strict=False):
            shift = begin - start
            for row, rows in blocks(column, n_bytes, max(first, start) + shift, min(stop, start + length) + shift):
                yield row - shift, rows.astype(self.dtype, copy=False)

    def units(self) -> np.ndarray | None:
        """Those of each piece: `store.units`."""
        found = []
        for (column, begin, length), start in zip(self._parts, self._starts.tolist(), strict=False):
            own = units(column)
            if own is None:
                return None
            inside = own[(own > begin) & (own < begin + length)] - begin
            found.append(start + np.concatenate([np.zeros(1, np.int64), inside]))
        return np.concatenate(found)


class Changed:
    """A column with other values in some rows. values: [n, …] for `rows` [n], increasing."""

    def __init__(self, column: Column, rows: np.ndarray, values: np.ndarray) -> None:
        self._column, self._rows, self._values = column, rows, values
        self.shape, self.dtype = column.shape, column.dtype

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        wanted = np.arange(self.shape[0])[rows]
        found = np.array(self._column[rows])
        place = np.minimum(np.searchsorted(self._rows, wanted), len(self._rows) - 1)
        changed = self._rows[place] == wanted
        found[changed] = self._values[place[changed]]
        return found


def check_alike(buffers: Sequence[ReplayBuffer]) -> None:
    """Raises `InputError` unless all have the same keys, with rows of the same shape and type, and neither say other
    rates nor other units of a key."""
    check_rates_and_units(buffers)
    first = buffers[0]
    for other in buffers[1:]:
        missing = sorted(set(first.keys) ^ set(other.keys))
        if missing:
            raise InputError(f"{other.name} and {first.name} do not have the same keys: {', '.join(missing)}")
        for key in first.keys:
            one, two = first[key], other[key]
            if one.shape[1:] != two.shape[1:] or one.dtype != two.dtype:
                raise InputError(
                    f"{other.name}: {key} has rows {list(two.shape[1:])} of {two.dtype}, "
                    f"{first.name} has {list(one.shape[1:])} of {one.dtype}"
                )


def check_rates_and_units(buffers: Sequence[ReplayBuffer]) -> None:
    """Raises `InputError` where two say other rates, or other units of a key."""
    for number, first in enumerate(buffers):
        for other in buffers[number + 1 :]:
            if first.rate and other.rate and not math.isclose(first.rate, other.rate, rel_tol=SAME_RATE):
                raise InputError(
                    f"{other.name} has {other.rate:g} steps a second, {first.name} has {first.rate:g}: what is put "
                    "together must have one rate (data convert has rate=HZ, for a lower one)"
                )
            ours, theirs = units_of(first), units_of(other)
            for key in ours.keys() & theirs.keys():
                if ours[key] != theirs[key]:
                    raise InputError(f"{other.name}: {key} is in {theirs[key]!r}, {first.name} has it in {ours[key]!r}")


def units_of(buffer: ReplayBuffer) -> Mapping[str, Any]:
    """By key; a list is of the actions."""
    units = buffer.attrs.get("units") or {}
    return units if isinstance(units, Mapping) else {"action": units}


def write_pieces(
    path: Path, pieces: Sequence[Piece], attrs: Mapping[str, Any], columns: Mapping[str, Column] | None = None
) -> None:
    """Write the buffer that `pieces` make, block by block; `columns` are added, or stand for what would be there."""
    if path.exists():
        raise InputError(f"{path} exists: choose another path, or remove it")
    if not pieces:
        raise InputError("no episode would be left")
    made: dict[str, Column] = {key: JoinedColumn(key, pieces) for key in pieces[0].buffer.keys}
    with atomic_path(path) as temporary:
        write_zarr(temporary, made | dict(columns or {}), np.cumsum([len(piece) for piece in pieces]), attrs)
