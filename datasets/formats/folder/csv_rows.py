"""Rows of numbers as CSV, and back without losing a bit: the shortest text that gives the same number again.

state.0,state.1,action.0,action.1,reward        one column a number: `reward` is [N], `state` is [N, 2]
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.storage.store import reading
from action_diffusion.errors import InputError

_NUMBERED = re.compile(r"(?P<name>.+?)(?:[._]?(?P<plain>\d{1,6})|\[(?P<brackets>\d{1,6})\])$")
_COMMA = re.compile(r"\s*[+-]?\d+,\d+\s*")
_ENCODING = "utf-8-sig"  # a byte order mark is no part of the first name
_DELIMITERS = ",;\t"
_LONGEST = 64
"""Characters of a number. Longer texts are words, of which no more is kept."""
_FLAGS = {"True": "1", "False": "0", "true": "1", "false": "0"}
_EXACT = 2.0**53
"""Below this a float64 holds every whole number."""


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
    """Raises `InputError` for a file that is empty, and for a name that comes twice.

    A first column without a name is what pandas writes of its index, and is called so.
    """
    with _lines(path) as lines:
        names = [name.strip() for name in next(lines, [])]
    if len(names) > 1 and names[0] == "" and "index" not in names:
        names[0] = "index"
    if not names or "" in names or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1), None)
        problem = f"column {twice!r} is there twice" if twice else "no header, or a column without a name"
        raise InputError(f"{path}: {problem}")
    return names


@contextmanager
def _lines(path: Path) -> Iterator[Any]:
    """Its lines, between commas, semicolons or tabs, whichever the header has most of."""
    with path.open("rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise InputError(f"{path}: text in UTF-16: save it as UTF-8")
    with reading(str(path)), path.open(newline="", encoding=_ENCODING) as file:
        header = file.readline()
        file.seek(0)
        yield csv.reader(file, delimiter=max(_DELIMITERS, key=header.count))


def read_csv(path: Path) -> np.ndarray:
    """The texts [N, columns], without the header. Raises `InputError` where a line has another number of columns."""
    names = read_header(path)
    with _lines(path) as lines:
        next(lines)
        rows, blank = [], 0
        for line in lines:
            if not line:  # which is no row at the file's end
                blank = blank or lines.line_num
                continue
            if blank:
                raise InputError(f"{path}: line {blank} is empty, and others follow")
            if len(line) != len(names):
                raise InputError(f"{path}: line {lines.line_num} has {len(line)} columns, the header {len(names)}")
            rows.append([text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…" for text in line])
    return np.array(rows, dtype=str).reshape(len(rows), len(names))


def read_words(path: Path, name: str) -> list[str]:
    """The texts of column `name`, whole, of a file that `read_csv` has read."""
    column = read_header(path).index(name)
    with _lines(path) as lines:
        next(lines)
        return [line[column].strip() for line in lines if line]


def guessed(texts: np.ndarray, where: str) -> np.dtype | None:
    """int64 where every text is a whole number, bool where all are true or false, else float64; None for words.

    Raises `InputError` where some texts are numbers, and others are none.
    """
    if np.isin(texts, list(_FLAGS)).all():
        return np.dtype(np.bool_)
    for kind in ("int64", "uint64"):
        if _is(texts, np.dtype(kind)):
            return np.dtype(kind)
    number = np.dtype(np.float64)
    commas = [text for text in texts.ravel().tolist() if _COMMA.fullmatch(text)]
    if commas:
        raise InputError(f"{where}: {commas[0]!r} has a decimal comma: write it with a point")
    if not any(_is(text, number) for text in np.split(texts.ravel(), texts.size)):
        return None
    parse(texts, number, where)
    return number


def _is(texts: np.ndarray, dtype: np.dtype) -> bool:
    try:
        _parse(texts, dtype)
    except (ValueError, OverflowError):
        return False
    return True


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
        numbers = np.array([_FLAGS.get(text, text) for text in texts.ravel().tolist()]).astype(np.uint8)
        if (numbers > 1).any():
            raise ValueError("neither 0 nor 1")
        return numbers.reshape(texts.shape).astype(np.bool_)
    if (np.char.find(texts, "_") >= 0).any():
        raise ValueError("1_000 is a number in Python only")
    values = texts.astype(dtype)
    if dtype == np.float64:
        large = np.isfinite(values) & (np.abs(values) >= _EXACT)
        whole = [
            (text, value) for text, value in zip(texts[large], values[large].tolist(), strict=True) if _is_whole(text)
        ]
        if any(int(text) != value for text, value in whole):
            raise ValueError("a whole number that a float does not hold")
    return values


def _is_whole(text: str) -> bool:
    return text.strip().lstrip("+-").isdecimal()


def grouped(names: Sequence[str]) -> dict[str, list[int]]:
    """Key → its columns in the CSV: x.0, x.1, x.2 (or x_0, x[0], x0, also from 1 on) are one vector, others single."""
    numbered: dict[str, dict[int, int]] = {}
    for position, name in enumerate(names):
        if match := _NUMBERED.fullmatch(name):
            found = numbered.setdefault(match["name"], {})
            number = int(match["plain"] or match["brackets"])
            found[number if number not in found else -1] = position  # x_1 beside x1: no vector
    vectors = {key: _in_order(found) for key, found in numbered.items() if key not in names}
    vectors = {
        key: found for key, found in vectors.items() if len(found) > 1 or (found and names[found[0]] != f"{key}0")
    }
    belongs = {position: key for key, found in vectors.items() for position in found}
    groups: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        key = belongs.get(position, name)
        groups[key] = vectors[key] if position in belongs else [position]
    return groups


def _in_order(found: Mapping[int, int]) -> list[int]:
    """Number → column, as columns in their order; none where the numbers are not 0, 1, … or at least 1, 2."""
    whole = sorted(found)
    if whole == list(range(len(found))) or (len(found) > 1 and whole == list(range(1, len(found) + 1))):
        return [found[number] for number in whole]
    return []
