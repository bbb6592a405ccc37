"""What the robot was to do in each row of a LeRobotDataset: `meta/tasks`, and its rows' `task_index`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.formats.columns import SlicedColumn, rows_a_block, spans
from action_diffusion.datasets.formats.lerobot.episodes import lines
from action_diffusion.datasets.formats.lerobot.info import Info
from action_diffusion.datasets.formats.parquet import open_parquet
from action_diffusion.datasets.formats.paths import TEXT_BYTES, inside
from action_diffusion.datasets.storage.store import reading
from action_diffusion.errors import InputError

_MOST = 100_000


def read_tasks(info: Info) -> list[str]:
    """The words of each task by its number; of a number that is not there, "". Raises `InputError` for two of one."""
    root = info.root
    names = [name for name in ("meta/tasks.parquet", "meta/tasks.jsonl") if (root / name).exists()]
    if not names:
        info.said.append("there is no meta/tasks: what was to be done is not known in words")
        return []
    file = inside(root, names[0], most=TEXT_BYTES)
    found = _table(file) if file.suffix == ".parquet" else _lines(file)
    tasks: dict[int, str] = {}
    for number, words in found:
        if not isinstance(number, int) or not 0 <= number < _MOST:
            raise InputError(f"{file}: task_index {number!r}, expected a whole number from 0 to {_MOST - 1}")
        if number in tasks:
            raise InputError(f"{file}: task_index {number} is there twice")
        tasks[number] = words if isinstance(words, str) else ""
    if tasks and not any(tasks.values()) and any(words is None for _, words in found):
        info.said.append(f"{names[0]} has no words for the tasks")
    return [tasks.get(number, "") for number in range(max(tasks, default=-1) + 1)]


def _lines(file: Path) -> list[tuple[Any, Any]]:
    with reading(str(file)):
        return [(line["task_index"], line.get("task")) for line in lines(file)]


def _table(file: Path) -> list[tuple[Any, Any]]:
    """The words are the pandas index, or a column, `task` before any other."""
    with open_parquet(file) as opened, reading(str(file)):
        if opened.metadata.num_rows > _MOST:
            raise InputError(f"{file} has {opened.metadata.num_rows} rows, at most {_MOST} are read")
        table = opened.read().to_pydict()
    if "task_index" not in table:
        raise InputError(f"{file} lacks task_index")
    numbers = table.pop("task_index")
    texts = [name for name, values in table.items() if any(isinstance(value, str) for value in values)]
    chosen = next((name for name in ("task", "__index_level_0__") if name in texts), texts[0] if texts else None)
    return list(zip(numbers, table[chosen] if chosen else [None] * len(numbers), strict=True))


def check_indices(info: Info, column: SlicedColumn, tasks: list[str]) -> None:
    """Raises `InputError` for a row whose task_index is none of the tasks'."""
    for first, end in spans(0, column.shape[0], rows_a_block(column)):
        found = np.asarray(column[first:end]).ravel()
        bad = ~((found >= 0) & (found < len(tasks)))
        if bad.any():
            row = int(np.argmax(bad))
            raise InputError(
                f"{info.root}: row {first + row} has task_index {found[row]:g}, which meta/tasks does not describe"
            )
