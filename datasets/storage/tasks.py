"""What the robot was to do, in words: of each row the column `task_index`, a place in attrs["tasks"].

A column, so that the words stay right when episodes are dropped, cut or joined; a buffer whose episodes all have one
task may have just attrs["task"].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from action_diffusion.errors import InputError

if TYPE_CHECKING:
    from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer

TASK, TASKS = "task_index", "tasks"
TASK_WORDS = ("language_instruction", "language_raw", "language", "lang", "instruction", "task", "task_description")
"""What other people's files call the words."""


def task_words(attrs: Mapping[str, Any]) -> list[str]:
    """The words by number; [""] where there are none."""
    tasks = attrs.get(TASKS)
    if isinstance(tasks, list) and tasks and all(isinstance(task, str) for task in tasks):
        return list(tasks)
    return [str(attrs.get("task", ""))]


def with_task(
    buffer: ReplayBuffer, episode: Mapping[str, np.ndarray], task: str | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The episode with its `task_index`, and the buffer's attributes with its words.

    An episode without words in a buffer that has some gets "". Raises `InputError` for words that are no text.
    """
    rows = dict(episode)
    if task is None and (TASK not in buffer or TASK in rows):
        return rows, buffer.attrs
    if (task is not None and not isinstance(task, str)) or TASK in rows:
        raise InputError(f"{buffer.name}: task={task!r}: expected words, in the place of {TASK}")
    has_words = buffer.n_steps or "task" in buffer.attrs or TASKS in buffer.attrs
    tasks = task_words(buffer.attrs) if has_words else []
    tasks += [] if (task or "") in tasks else [task or ""]
    like = buffer[TASK] if TASK in buffer else np.zeros(0, np.int64)
    length = len(np.atleast_1d(next(iter(rows.values()), ())))
    rows[TASK] = np.full((length, *like.shape[1:]), tasks.index(task or ""), like.dtype)
    return rows, {**buffer.attrs, TASKS: tasks}


def episode_tasks(buffer: ReplayBuffer) -> list[str]:
    """What each episode was, in words; of an episode with several tasks all, in the order of their rows."""
    words = task_words(buffer.attrs)
    if TASK not in buffer:
        return [words[0]] * buffer.n_episodes
    indices = np.asarray(buffer[TASK][:]).ravel()
    found = []
    for rows in np.split(indices, buffer.episode_ends[:-1]):
        numbers = [int(number) for number in dict.fromkeys(rows.tolist())]
        found.append("; ".join(words[n] if 0 <= n < len(words) else f"task {n}" for n in numbers))
    return found


def row_tasks(buffer: ReplayBuffer) -> tuple[list[str], np.ndarray]:
    """The tasks that rows have, in words, and of each row which of them it is, int64 [N].

    Raises `InputError` for rows without words.
    """
    words, rows = joined_tasks([(buffer, 0, buffer.n_steps)])
    if "" in words:
        first = int(np.flatnonzero(rows == words.index(""))[0])
        episode = int(np.searchsorted(buffer.episode_ends, first, side="right"))
        raise InputError(
            f"{buffer.name}: episode {episode} does not say in words what was to be done: give it task=…, or drop it"
        )
    return words, rows


def renamed_tasks(attrs: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """Attributes whose words become `tasks`, where they say otherwise."""
    words = task_words(attrs)
    unnamed = [f"task {number}" for number in range(len(words), len(tasks))]
    if not tasks or list(tasks) == [*words, *unnamed]:
        return dict(attrs)
    if TASKS not in attrs and len(tasks) == 1:
        return {**attrs, "task": tasks[0]}
    return {**{name: value for name, value in attrs.items() if name != "task"}, TASKS: list(tasks)}


def joined_tasks(pieces: Sequence[tuple[ReplayBuffer, int, int]]) -> tuple[list[str], np.ndarray]:
    """The words of all pieces, (buffer, first row, end), and into these `task_index` of their rows."""
    tasks: dict[str, int] = {}
    indices = []
    for buffer, first, end in pieces:
        words = task_words(buffer.attrs)
        rows = np.asarray(buffer[TASK][first:end]) if TASK in buffer else np.zeros(end - first, np.int64)
        numbers, place = np.unique(rows, return_inverse=True)
        names = [words[n] if 0 <= n < len(words) else f"task {n}" for n in numbers.tolist()]
        new = np.array([tasks.setdefault(name, len(tasks)) for name in names], np.int64)
        indices.append(new[place].ravel())
    return list(tasks), np.concatenate(indices)
