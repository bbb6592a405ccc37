"""Parquet files of numbers, one row a step, through pyarrow."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from action_diffusion.datasets.store import reading
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
    """A `pyarrow.parquet.ParquetFile`. Raises `InputError` for a file that is missing or damaged."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    library = pyarrow()
    with reading(str(path)):
        return library.parquet.ParquetFile(path)


def read_rows(path: Path, name: str, first: int, end: int, where: str) -> Any:
    """Rows of a column as an arrow array; only the row groups that hold them are read."""
    with open_parquet(path) as file, reading(where):
        ends = np.cumsum([file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)])
        groups = np.flatnonzero((ends > first) & (np.concatenate([[0], ends[:-1]]) < end)).tolist()
        table = file.read_row_groups(groups, columns=[name])
        before = int(ends[groups[0] - 1]) if groups[0] else 0
        return table.column(0).combine_chunks().slice(first - before, end - first)


def numbers(array: Any, row: tuple[int, ...], dtype: np.dtype, where: str) -> np.ndarray:
    """An arrow array, of lists where rows have an extent, as [n, *row]. Raises `InputError` where some are missing."""
    library, n = pyarrow(), len(array)
    for length in row:
        if not (library.types.is_list(array.type) or library.types.is_fixed_size_list(array.type)):
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
    return np.asarray(values, dtype).reshape(n, *row)


def images(array: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """An arrow array of encoded images ({"bytes", "path"}) as uint8 [n, H, W, 3]."""
    from PIL import Image

    found = []
    for item in array.to_pylist():
        content = item.get("bytes") if isinstance(item, dict) else None
        if not content:
            raise InputError(f"{where}: images outside of the file are not read")
        with reading(where):
            found.append(np.asarray(Image.open(BytesIO(content)).convert("RGB")))
        if found[-1].shape != (*size, 3):
            raise InputError(f"{where}: an image is {list(found[-1].shape)}, expected {[*size, 3]}")
    return np.stack(found)
