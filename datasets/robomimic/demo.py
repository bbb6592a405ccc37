"""What the demos of HDF5 files hold, and which of it is a column: found out before a value is read.

    actions, action    [T, …]      ─▶ column action
    rewards, dones     [T]         ─▶ columns reward, done
    obs/<key>          [T(+1), …]  ─▶ column <key>         also observations/<key> and observations/images/<key>;
                                                           a row after the last action is left out
    <other>            [T(+1), …]  ─▶ column <other>       with . for /; versions of the action begin with action
    next_obs/<key>     [T, …]         left out: obs one step on
    words                          ─▶ the demo's task      language_instruction, …: one text, or the same in each row
    anything else                     left out, and said: one row a demo, texts, types that are no numbers

JPEG and PNG, a file a row, count as what they show (`encoded_images`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from action_diffusion.datasets.hdf5.encoded_images import decoded, image_shape
from action_diffusion.datasets.hdf5.reading import Budget, check_name, dtype_of, unwritten, walk
from action_diffusion.datasets.robomimic.attributes import DEMO, Packer
from action_diffusion.datasets.storage.tasks import TASK_WORDS
from action_diffusion.errors import InputError

PLACES = {"action": "actions", "reward": "rewards", "done": "dones"}
"""Where robomimic keeps these columns, in a demo."""
NAMES = {path: column for column, path in PLACES.items()} | {"action": "action"}
_OBSERVATIONS = re.compile(r"obs(ervations)?(/|$)")
_NEXT = re.compile(r"next_obs(ervations)?(/|$)")
_ANSWER = re.compile(r"action|datagen_info/target")
_LONGEST_TASK = 4096
_ACTIONS = "robomimic's files keep them in data/demo_0/actions, ALOHA's in action"
_RESERVED = {DEMO: "the number of the demo", "zarr.json": "a file of Zarr's"}


class StoredColumn(NamedTuple):
    """What a column is in the file: the path inside a demo, the shape of a row, the type (native byte order).

    encoded: each row is a JPEG or PNG file, and shape and type are those of the picture.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    encoded: bool = False

    @property
    def n_bytes(self) -> int:
        """Of a row."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Demo:
    """What one demo holds. numbers: path → its rows, and what each is; others: path → why it is no column.

    made_up: paths with rows that were never written, so that they are HDF5's fill value.
    """

    where: str
    n_samples: int | None = None
    numbers: dict[str, tuple[int, StoredColumn]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    made_up: set[str] = field(default_factory=set)
    task: str | None = None

    @property
    def length(self) -> int:
        """Rows of the actions. Raises `InputError` where there are none."""
        names = [name for name in NAMES if NAMES[name] == "action" and name in self.numbers]
        if not names:
            why = next((f" ({name}: {self.others[name]})" for name in ("actions", "action") if name in self.others), "")
            raise InputError(f"{self.where} has no actions{why}: {_ACTIONS}")
        if names[0] in self.made_up:
            raise InputError(f"{self.where}/{names[0]} has rows that were never written: cut off, or too long?")
        return self.numbers[names[0]][0]


def is_observation(path: str) -> bool:
    return _OBSERVATIONS.match(path) is not None


def read_rows(demo: Any, stored: StoredColumn, first: int, end: int, where: str) -> np.ndarray:
    """Rows `first` to `end` of a column of the group `demo`, as fewer as the dataset has. where: of the demo."""
    dataset, place = demo[stored.path], f"{where}/{stored.path}"
    if stored.encoded:
        return decoded(dataset, first, min(end, len(dataset)), stored.shape, place)
    return np.asarray(dataset[first:end])


def survey(group: Any, where: str, budget: Budget, linked: Iterable[str] = ()) -> Demo:
    """Looks at what is under a group, and adds it to what the file claims. Reads texts, and no numbers.

    Raises `InputError` as `walk` and `Budget.add`.
    """
    demo = Demo(where)
    for path, item in walk(group, where, tuple(linked)):
        dtype = dtype_of(item)
        if dtype is None or item.shape is None:
            demo.others[path] = "no numbers"
            continue
        is_next = _NEXT.match(path) is not None
        budget.add(item, f"{where}/{path}")
        image = None if is_next else image_shape(item, f"{where}/{path}")
        if image is not None:
            shape, dtype = image
            budget.claim((len(item), *shape), dtype.itemsize, f"{where}/{path}")
            demo.numbers[path] = len(item), StoredColumn(path, shape, dtype, encoded=True)
        elif dtype.kind in "biuf" and dtype.itemsize <= 8:
            if not is_next:
                demo.numbers[path] = item.shape[0] if item.ndim else 0, StoredColumn(path, item.shape[1:], dtype)
                demo.made_up |= {path} if unwritten(item) else set()
        elif is_text(item):
            words = _one_text(item) if demo.task is None and path.rpartition("/")[2] in TASK_WORDS else None
            demo.task = demo.task or words
            if words is None:
                demo.others[path] = "text"
        elif not is_next:
            demo.others[path] = f"no numbers: {dtype if dtype.names is None else 'a record'}"
    return demo


def is_text(dataset: Any) -> bool:
    import h5py

    return h5py.check_string_dtype(dataset.dtype) is not None


def _one_text(dataset: Any) -> str | None:
    """The text that a dataset holds, in each of its rows; None where they differ, or are long or no UTF-8."""
    if dataset.dtype.itemsize > _LONGEST_TASK or dataset.ndim > 1 or 0 in dataset.shape:
        return None
    first = dataset[()] if dataset.ndim == 0 else dataset[0]
    if len(first) > _LONGEST_TASK or any(
        dataset[row] != first for row in range(1, len(dataset) if dataset.ndim else 0)
    ):
        return None
    try:
        return str(bytes(first).decode()) or None
    except UnicodeDecodeError:
        return None


class Columns(NamedTuple):
    """What all demos have. lengths: steps of each; left_out: path → why it is no column, or which row is not in it."""

    stored: dict[str, StoredColumn]
    lengths: list[int]
    left_out: dict[str, str]


def columns_of(demos: Sequence[Demo], first: str) -> Columns:
    """Decides what of the demos becomes columns. first: the name of the first demo, for what is said.

    Raises `InputError` for a demo that is empty or has no actions, for lengths that differ within one or from its
    `n_samples`, for demos that do not hold the same, and for two datasets that would become one column.
    """
    lengths = [demo.length for demo in demos]
    left_out = {path: why for demo in demos for path, why in demo.others.items()}
    for path in {path: None for demo in demos for path in demo.numbers}:
        rows = [
            (demo.numbers[path][0], length) for demo, length in zip(demos, lengths, strict=True) if path in demo.numbers
        ]
        why = _why_no_column(path, rows)
        if why is not None:
            left_out[path] = why
        elif any(count == length + 1 for count, length in rows):
            left_out[f"{path}[-1]"] = "the row after the last action"
        if why is None and any(path in demo.made_up for demo in demos):
            left_out[f"rows of {path}"] = "never written: they are the file's fill value"
    stored: dict[str, StoredColumn] = {}
    for demo, length in zip(demos, lengths, strict=True):
        _check_lengths(demo, length, left_out)
        found = _named(demo, left_out)
        _check_same(found, stored or found, demo.where, first)
        stored = stored or found
    return Columns(stored, lengths, left_out)


def _why_no_column(path: str, rows: list[tuple[int, int]]) -> str | None:
    """rows: (rows, steps) in each demo that has it. None where it is a column, or ought to be one."""
    if path in NAMES:
        return None
    telling = [(count, length) for count, length in rows if length > 1]
    fitting = [count in _allowed(path, length) for count, length in telling]
    if all(fitting):
        return None
    counts, lengths = ({row[part] for row in telling} for part in (0, 1))
    if max(counts) <= 1:
        return "one value a demo"
    same_in_all = len(counts) == 1 and (len(lengths) > 1 or 2 * max(counts) < max(lengths))
    by_chance = 2 * sum(fitting) <= len(fitting) and not (is_observation(path) or path == "states")
    return "not one row a step" if same_in_all or by_chance else None


def _allowed(path: str, length: int) -> tuple[int, ...]:
    exact = path in NAMES or (_ANSWER.search(path) and not is_observation(path))
    return (length,) if exact else (length, length + 1)


def _check_lengths(demo: Demo, length: int, left_out: Mapping[str, str]) -> None:
    if length == 0:
        raise InputError(f"{demo.where} is an episode without steps: leave it out")
    rows = {path: count for path, (count, _) in demo.numbers.items() if path not in left_out}
    wrong = any(count not in _allowed(path, length) for path, count in rows.items())
    if demo.n_samples is not None:
        rows["num_samples"] = demo.n_samples
        wrong |= demo.n_samples != length
    if wrong:
        others = ", ".join(f"{path} {count}" for path, count in rows.items() if count != length)
        raise InputError(f"{demo.where} has unequal lengths: actions {length}, but {others}")


def _named(demo: Demo, left_out: Mapping[str, str]) -> dict[str, StoredColumn]:
    columns: dict[str, StoredColumn] = {}
    for path, (_, stored) in demo.numbers.items():
        if path in left_out:
            continue
        column = _column(path)
        check_name(column, demo.where)
        if column.startswith(".") or column in _RESERVED or column in columns:
            taken = columns[column].path if column in columns else _RESERVED.get(column, "no name for one")
            raise InputError(f"{demo.where}/{path} would become column {column}, which is {taken}: rename it")
        if 0 in stored.shape:
            raise InputError(f"{demo.where}/{path} has no values: its shape is {[demo.length, *stored.shape]}")
        columns[column] = stored
    return columns


def _column(path: str) -> str:
    if path in NAMES:
        return NAMES[path]
    if is_observation(path):
        name = path.removeprefix("obs/").removeprefix("observations/images/").removeprefix("observations/")
    else:
        name = path
    if _ANSWER.search(path) and not is_observation(path) and not name.startswith("action"):
        name = f"action/{name}"  # so that nobody takes it for what the policy may know
    return name.replace("/", ".")


def _check_same(
    found: Mapping[str, StoredColumn], expected: Mapping[str, StoredColumn], where: str, first: str
) -> None:
    for column in {**expected, **found}:
        one, other = found.get(column), expected.get(column)
        if one is None:
            raise InputError(f"{where} lacks {expected[column].path}, which {first} has")
        if other is None:
            raise InputError(f"{where} has {one.path}, which {first} lacks")
        if one != other:
            raise InputError(
                f"{where}/{one.path} has rows {list(one.shape)} of {one.dtype}, in {first} they are "
                f"{list(other.shape)} of {other.dtype}"
            )


def said(left_out: Mapping[str, str]) -> Iterator[str]:
    """What is left out, a part a reason."""
    for why in dict.fromkeys(left_out.values()):
        paths = [path for path, reason in left_out.items() if reason == why]
        more = f" and {len(paths) - 8} more" if len(paths) > 8 else ""
        yield f"{', '.join(paths[:8])}{more} ({why})"


def tasks_of(demos: Sequence[Demo]) -> tuple[list[str], list[int]]:
    """The tasks in words, each once, and for each demo its number; no words where no demo has any."""
    texts = [demo.task or "" for demo in demos]
    words = list(dict.fromkeys(texts))
    return ([], [0] * len(texts)) if words == [""] else (words, [words.index(text) for text in texts])


def task_of(*places: Mapping[str, Any]) -> str | None:
    """What attributes say in words; LIBERO's is in the JSON of `problem_info`."""
    for attrs in places:
        for name in TASK_WORDS:
            if isinstance(attrs.get(name), str):
                return str(attrs[name])
    try:
        words = json.loads(places[-1]["problem_info"])["language_instruction"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return words if isinstance(words, str) else None


class Attributes:
    """Reads and packs the attributes of groups. left_out: those that are neither texts nor numbers, and why."""

    def __init__(self, path: Path) -> None:
        self.left_out: dict[str, str] = {}
        self._path, self._packer = path, Packer(str(path))

    def add(self, place: str, item: Any, budget: Budget) -> dict[str, Any]:
        """The attributes of the group `item` that are texts or numbers."""
        found, others = budget.attributes(item, f"{self._path}: {place}")
        self.left_out.update({f"{place}'s attribute {name}": "neither text nor numbers" for name in others})
        self._packer.add(place, found)
        return found

    def text(self) -> str:
        return self._packer.text()
