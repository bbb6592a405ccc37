"""Parquet files of numbers, one row a step, through pyarrow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from action_diffusion.datasets.formats.columns import BLOCK_BYTES
from action_diffusion.datasets.formats.folder.images import ImageFile, decoded
from action_diffusion.datasets.storage.store import reading
from action_diffusion.errors import InputError


def pyarrow() -> Any:
    """The library, with what is used of it."""
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError:
        raise InputError("LeRobot's files need pyarrow: pip install 'action-diffusion[parquet]'") from None
    return pyarrow


class ParquetWriter:
    """A file that tables are added to. Vectors are lists of fixed length, single numbers are plain."""

    def __init__(self, path: Path) -> None:
        pyarrow()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._writer: Any = None

    def add(self, columns: Mapping[str, np.ndarray]) -> None:
        """columns: [n] or [n, D] each."""
        library = pyarrow()
        table = library.table({name: _array(values) for name, values in columns.items()})
        if self._writer is None:
            self._writer = library.parquet.ParquetWriter(str(self._path), table.schema, compression="snappy")
        self._writer.write_table(table)

    def __enter__(self) -> ParquetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()


def _array(values: np.ndarray) -> Any:
    flat = pyarrow().array(np.ascontiguousarray(values).reshape(-1))
    if values.ndim == 1 or values.shape[1] == 1:
        return flat
    return pyarrow().FixedSizeListArray.from_arrays(flat, values.shape[1])


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises `InputError` for a file that is damaged."""
    library = pyarrow()
    with reading(str(path)):
        return library.parquet.ParquetFile(path)


class ParquetTable(NamedTuple):
    """What a file holds. types: arrow's, by column; values: numbers of each column in all its rows, lists laid out."""

    path: Path
    rows: int
    types: dict[str, Any]
    values: dict[str, int]


def described(path: Path) -> ParquetTable:
    """Read from the file's end, where it says what it holds. Raises `InputError` for a name that comes twice."""
    with open_parquet(path) as file, reading(str(path)):
        schema, data = file.schema_arrow, file.metadata
        twice = [name for name in schema.names if schema.names.count(name) > 1]
        if twice:
            raise InputError(f"{path}: column {twice[0]!r} is there twice")
        groups = [data.row_group(index) for index in range(data.num_row_groups)]
        values: dict[str, int] = {}
        for index in range(data.num_columns):
            # a column of lists is one leaf, "action.list.element"; of pictures two, which nobody counts
            name = max((name for name in schema.names if _is_leaf_of(file.schema.column(index).path, name)), key=len)
            values[name] = values.get(name, 0) + sum(group.column(index).num_values for group in groups)
        return ParquetTable(path, int(data.num_rows), dict(zip(schema.names, schema.types, strict=True)), values)


def _is_leaf_of(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.")


class ParquetRows:
    """A column, read forwards: rows in order are decoded once, in batches. One file is open at a time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._path: Path | None = None
        self._batches: Any = None
        self._first, self._rest = 0, None  # the row of the first of those that are decoded and not read

    def read(self, path: Path, first: int, end: int, n_bytes: int) -> Any:
        """Rows `first` to `end` as an arrow array. n_bytes: of a row."""
        with reading(f"{path}: {self._name}"):
            if path != self._path or first < self._first:
                self._path, self._first, self._rest = path, 0, None
                batch = max(1, BLOCK_BYTES // max(1, n_bytes))
                self._batches = open_parquet(path).iter_batches(batch_size=batch, columns=[self._name])
            parts = []
            while self._first < end:
                rows = self._rest if self._rest is not None else next(self._batches).column(self._name)
                after = self._first + len(rows)
                if after > first:
                    parts.append(rows[max(0, first - self._first) : end - self._first])
                self._rest = rows[end - self._first :] if after > end else None
                self._first = min(after, end)
            return pyarrow().concat_arrays(parts)


def number_type(kind: Any) -> np.dtype | None:
    """numpy's type for the numbers of an arrow type, within lists too; None where they are none."""
    types = pyarrow().types
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        return None
    result: np.dtype | None = np.dtype(kind.to_pandas_dtype())
    return result


def is_picture(kind: Any) -> bool:
    """Encoded images: bytes, or {"bytes", "path"}."""
    types = pyarrow().types
    if types.is_struct(kind):
        return "bytes" in {kind.field(number).name for number in range(kind.num_fields)}
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def check_values(table: ParquetTable, name: str, row: tuple[int, ...]) -> None:
    """Raises `InputError` unless the file counts as many numbers as rows of this shape have, before any is read."""
    if table.values[name] != table.rows * math.prod(row):
        raise InputError(f"{table.path}: {name}: rows have other lengths than {list(row)}")


def numbers(array: Any, row: tuple[int, ...], where: str) -> np.ndarray:
    """An arrow array, of lists where rows have an extent, as [n, *row]. Raises `InputError` where some are missing."""
    library, n = pyarrow(), len(array)
    for length in row:
        types = library.types
        if not (types.is_list(array.type) or types.is_large_list(array.type) or types.is_fixed_size_list(array.type)):
            if row == (1,):
                break
            raise InputError(f"{where}: rows are {array.type}, expected {list(row)}")
        lengths = library.compute.list_value_length(array)
        if array.null_count or not library.compute.all(library.compute.equal(lengths, length)).as_py():
            raise InputError(f"{where}: rows have other lengths than {list(row)}")
        array = array.flatten()
    if array.null_count:
        raise InputError(f"{where}: has gaps")
    values = array.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "biuf":
        raise InputError(f"{where}: holds {array.type}, which are no numbers")
    return np.asarray(values).reshape(n, *row)


def contents(array: Any, where: str) -> list[bytes]:
    """The bytes of encoded images, by themselves or as {"bytes", "path"}."""
    found: list[Any] = [item.get("bytes") if isinstance(item, dict) else item for item in array.to_pylist()]
    if not all(found):
        raise InputError(f"{where}: images outside of the file are not read")
    return found


def images(array: Any, expected: ImageFile, where: str, *, colours: bool) -> np.ndarray:
    """An arrow array of encoded images as [n, H, W, 3], or [n, H, W] of grey and depth."""
    return np.stack([decoded(content, expected, where, colours=colours) for content in contents(array, where)])
