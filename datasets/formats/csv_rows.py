"""Rows of numbers as CSV, and back without losing a bit: the shortest text that gives the same number again.

state.0,state.1,action.0,action.1,reward        one column a number: `reward` is [N], `state` is [N, 2]
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from action_diffusion.datasets.store import reading
from action_diffusion.errors import InputError

_NUMBERED = re.compile(r"(?P<name>.+?)(?:[._](?P<plain>\d+)|\[(?P<brackets>\d+)\])$")


def header(columns: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names of the CSV's columns. columns: the shape of a row of each key."""
    names = []
    for key, row in columns.items():
        names += [key] if row == () else [f"{key}.{index}" for index in range(int(np.prod(row)))]
    return names


def write_csv(path: Path, names: Sequence[str], columns: Sequence[np.ndarray]) -> None:
    """columns: [N, …] each, in the order of the names."""
    texts = np.concatenate([_texts(values.reshape(len(values), -1)) for values in columns], axis=1)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(texts.tolist())


def _texts(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.uint8) if values.dtype == np.bool_ else values).astype(str).astype(object)


def read_header(path: Path) -> list[str]:
    """Raises `InputError` for a file that is missing or empty, and for a name that comes twice."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with reading(str(path)), path.open(newline="") as file:
        names = [name.strip() for name in next(csv.reader(file), [])]
    if not names or "" in names or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1), None)
        problem = f"column {twice!r} is there twice" if twice else "no header, or a column without a name"
        raise InputError(f"{path}: {problem}")
    return names


def read_csv(path: Path) -> np.ndarray:
    """The texts [N, columns], without the header. Raises `InputError` where a line has another number of columns."""
    names = read_header(path)
    with reading(str(path)), path.open(newline="") as file:
        lines = csv.reader(file)
        next(lines)
        rows = []
        for line in lines:
            if len(line) != len(names):
                raise InputError(f"{path}: line {lines.line_num} has {len(line)} columns, the header {len(names)}")
            rows.append(line)
    return np.array(rows, dtype=str).reshape(len(rows), len(names))


def parse(texts: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """Numbers of `dtype`. Raises `InputError` that names row and text of the first that is none."""
    try:
        return _parse(texts, dtype)
    except (ValueError, OverflowError):
        for row, line in enumerate(texts):
            for text in line.tolist():
                try:
                    _parse(np.array([text]), dtype)
                except (ValueError, OverflowError):
                    raise InputError(f"{where}: {text!r} in row {row} is no {dtype.name}") from None
        raise


def _parse(texts: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if dtype == np.bool_:
        numbers = texts.astype(np.uint8)
        if (numbers > 1).any():
            raise ValueError("neither 0 nor 1")
        return numbers.astype(np.bool_)
    return texts.astype(dtype)


def grouped(names: Sequence[str]) -> dict[str, list[int]]:
    """Key → its columns in the CSV: x.0, x.1, x.2 (or x_0, x[0]) are one vector, all others by themselves."""
    numbered: dict[str, dict[int, int]] = {}
    for position, name in enumerate(names):
        if match := _NUMBERED.fullmatch(name):
            number = int(match["plain"] or match["brackets"])
            numbered.setdefault(match["name"], {})[number] = position
    vectors = {key: found for key, found in numbered.items() if sorted(found) == list(range(len(found)))}
    vectors = {key: found for key, found in vectors.items() if key not in names}
    belongs = {position: key for key, found in vectors.items() for position in found.values()}
    groups: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        key = belongs.get(position, name)
        vector = vectors[key] if position in belongs else {0: position}
        groups[key] = [vector[number] for number in range(len(vector))]
    return groups
