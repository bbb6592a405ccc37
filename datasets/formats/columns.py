"""Columns that are read in slices from whatever holds them: a demo of an HDF5 file, an episode's CSV, a video."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from action_diffusion.datasets.storage.checks import images_to_uint8
from action_diffusion.datasets.storage.rows import Rows
from action_diffusion.datasets.storage.store import Column, ZarrColumn, row_bytes
from action_diffusion.errors import InputError

BLOCK_BYTES = 8 << 20


class SlicedColumn(Rows):
    """A `Column` of which only `read` is left to write."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    @abstractmethod
    def read(self, first: int, end: int) -> np.ndarray:
        """Rows `first` to `end`, at least one, in the column's type."""

    def _take(self, index: Any, rows: np.ndarray) -> Any:
        if np.ndim(rows) == 0:
            return self.read(int(rows), int(rows) + 1)[0]
        if len(rows) == 0:
            return np.empty((0, *self.shape[1:]), self.dtype)
        if len(rows) == rows[-1] - rows[0] + 1 and (np.diff(rows) == 1).all():
            return self.read(int(rows[0]), int(rows[-1]) + 1)
        return np.stack([self.read(row, row + 1)[0] for row in rows.tolist()])


class RowRange(NamedTuple):
    """Rows `first` to `end` of the piece with this number."""

    number: int
    first: int
    end: int


def pieces(ends: np.ndarray, first: int, end: int) -> Iterator[RowRange]:
    """What rows `first` to `end` are made of, where pieces end at the rows `ends`."""
    index, row = int(np.searchsorted(ends, first, side="right")), first
    while row < end:
        start, stop = int(ends[index - 1]) if index else 0, min(end, int(ends[index]))
        yield RowRange(index, row - start, stop - start)
        index, row = index + 1, stop


class PiecewiseColumn(SlicedColumn):
    """Rows that lie in pieces one after the other. ends: the row after each; read_piece: some of its rows."""

    def __init__(
        self, row: tuple[int, ...], dtype: np.dtype, ends: np.ndarray, read_piece: Callable[[RowRange], np.ndarray]
    ) -> None:
        super().__init__((int(ends[-1]), *row), dtype)
        self._ends, self._read_piece = ends, read_piece

    def read(self, first: int, end: int) -> np.ndarray:
        parts = [self._read_piece(piece) for piece in pieces(self._ends, first, end)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class ForwardColumn(SlicedColumn):
    """A Zarr column whose chunks are decoded once where its rows are asked for in order, in whatever portions."""

    def __init__(self, column: ZarrColumn) -> None:
        super().__init__(column.shape, column.dtype)
        self._column, self._first, self._rows = column, 0, np.empty((0, *column.shape[1:]), column.dtype)

    def read(self, first: int, end: int) -> np.ndarray:
        unit, known = self._column.chunk_rows, self._first + len(self._rows)
        if not self._first <= first <= known:
            self._first = known = first - first % unit
            self._rows = self._rows[:0]
        if end > known:
            more = np.asarray(self._column[known : -(-end // unit) * unit])
            left = self._rows[first - self._first :]
            self._first = min(first, known)
            self._rows = np.concatenate([left, more]) if len(left) else more
        return self._rows[first - self._first : end - self._first]


class ChangedColumn(SlicedColumn):
    """Another column's rows, changed. change: gets rows and the index of the first."""

    def __init__(
        self,
        column: Column,
        change: Callable[[np.ndarray, int], np.ndarray],
        *,
        row: tuple[int, ...] | None = None,
        dtype: np.dtype | None = None,
    ) -> None:
        rows = column.shape[1:] if row is None else row
        super().__init__((column.shape[0], *rows), dtype or column.dtype)
        self._column, self._change = column, change

    def read(self, first: int, end: int) -> np.ndarray:
        return self._change(np.asarray(self._column[first:end]), first)


def as_stored(column: Column, row: tuple[int, ...], dtype: np.dtype, where: str) -> Column:
    """The column in another shape and type. Reading raises `InputError` for a value that the type does not hold."""
    if column.shape[1:] == row and column.dtype == dtype:
        return column
    wider = np.can_cast(column.dtype, dtype, "safe") and column.dtype.itemsize < dtype.itemsize

    def change(rows: np.ndarray, first: int) -> np.ndarray:
        with np.errstate(invalid="ignore", over="ignore"):  # the comparison finds it
            values = rows.astype(dtype, copy=False)
            back = values if wider or dtype == rows.dtype else values.astype(rows.dtype)
        if back is not values and not np.array_equal(back, rows, equal_nan=rows.dtype.kind == "f"):
            row_off = first + int(np.argmax((back != rows).reshape(len(rows), -1).any(axis=1)))
            raise InputError(
                f"{where}: row {row_off} has a value that {dtype} does not hold; it is stored as {rows.dtype}"
            )
        return values.reshape(len(rows), *row)

    return ChangedColumn(column, change, row=row, dtype=dtype)


class SomeRows(SlicedColumn):
    """Some rows of a column. rows: their numbers [n], increasing."""

    def __init__(self, column: Column, rows: np.ndarray) -> None:
        super().__init__((len(rows), *column.shape[1:]), column.dtype)
        self._column, self._rows = column, rows

    def read(self, first: int, end: int) -> np.ndarray:
        wanted, parts = self._rows[first:end], []
        for start, stop in spans(int(wanted[0]), int(wanted[-1]) + 1, rows_a_block(self._column)):
            inside = wanted[(wanted >= start) & (wanted < stop)]
            parts.append(np.asarray(self._column[start:stop])[inside - start])
        return np.concatenate(parts)


def is_image(column: Column) -> bool:
    """[N, H, W, 3], with more than a few pixels."""
    return len(column.shape) == 4 and column.shape[3] == 3


def as_images(column: Column, key: str, where: str) -> Column:
    """uint8 images; reading raises `InputError` where that would lose something."""
    if column.dtype == np.uint8:
        return column
    return ChangedColumn(column, lambda rows, first: images_to_uint8(rows, key, where, first), dtype=np.dtype(np.uint8))


def native(dtype: np.dtype) -> np.dtype:
    """The type in this machine's byte order."""
    return dtype.newbyteorder("=")


def rows_a_block(column: Column, n_bytes: int = BLOCK_BYTES) -> int:
    return max(1, n_bytes // row_bytes(column))


def spans(first: int, end: int, rows: int) -> Iterator[tuple[int, int]]:
    """(first, end) of parts of at most `rows` rows."""
    for start in range(first, end, rows):
        yield start, min(start + rows, end)


def check_rows(values: np.ndarray, shape: tuple[int, ...], where: str) -> np.ndarray:
    """`values`, which must be of `shape`."""
    if values.shape != shape:
        raise InputError(f"{where}: rows {list(values.shape)}, expected {list(shape)}")
    return values
