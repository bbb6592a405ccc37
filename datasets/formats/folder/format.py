"""A plain folder: for each episode a CSV file with a row a step, and an MP4 a camera with a frame a row.

    dataset.json                        what is what; not needed for reading somebody else's folder
    episode_000000/rows.csv             state.0,state.1,…,action.0,action.1
    episode_000000/img.mp4
    episode_000000/depth.npy            what has too many numbers a row for a CSV

Somebody else's: a folder with a CSV an episode, in a folder of its own beside its videos, or NAME.csv beside
NAME.mp4 or NAME_<camera>.mp4. Numbers are int64 where all of a key are whole, else float64. A column
`task` or `language_instruction` of words is what the robot was to do; other columns of words are left out.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.formats.columns import (
    PiecewiseColumn,
    RowRange,
    as_images,
    check_rows,
    is_image,
    native,
    rows_a_block,
    spans,
)
from action_diffusion.datasets.formats.contract import MARK, Format, Opened, Settings, kept, restored
from action_diffusion.datasets.formats.folder.csv_rows import header, read_words, write_csv
from action_diffusion.datasets.formats.folder.episodes import FolderEpisode, description, episodes_of, unused
from action_diffusion.datasets.formats.journal import Journal, JournalStep
from action_diffusion.datasets.formats.video import EncodedVideoWriter, Part, VideoFilesColumn, check_times
from action_diffusion.datasets.storage.dimensions import NAMES, are_names
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import Column, reading, row_bytes
from action_diffusion.datasets.storage.tasks import TASK, TASK_WORDS, TASKS
from action_diffusion.errors import InputError
from action_diffusion.files import atomic_path

CSV_NUMBERS = 1000
"""A row of more numbers than this goes to a file of its own."""
KEYFRAME_EVERY = 30
_NAME = re.compile(r"\w[\w .+-]*")


def opened(path: Path, vectors: Mapping[str, Sequence[str]] | None = None) -> Opened:
    """vectors: key → the columns of somebody else's CSVs that it is made of.

    Raises `InputError` where videos, arrays and rows of an episode are not of one length, or episodes differ.
    """
    notes = description(path)
    with reading(str(path)):
        episodes = episodes_of(path, notes, vectors or {})
    ends = np.cumsum([episode.length for episode in episodes])
    columns: dict[str, Column] = {}
    for key, kind in episodes[0].keys.items():
        if kind.video is not None:
            parts = [Part(episode.keys[key].path, 0, episode.length) for episode in episodes]
            if notes is not None:  # in somebody else's frame i belongs to row i, whenever it was taken
                _check_times(episodes, key, parts, float(notes["rate"]))
            infos = {kind.path: kind.video for kind in (episode.keys[key] for episode in episodes) if kind.video}
            columns[key] = VideoFilesColumn(parts, kind.video.kind, ends, infos)
        else:
            read = functools.partial(_read, episodes, key)
            columns[key] = PiecewiseColumn(kind.row, kind.dtype, ends, read)
    attrs: dict[str, Any] = {"source": path.name}
    chosen = {key: list(names) for key, names in (vectors or {}).items()}
    named = {key: names for key, names in chosen.items() if are_names(names, *columns[key].shape[1:])}
    if named:
        attrs[NAMES] = named
    if notes is not None:
        columns, attrs = restored(columns, notes.get(MARK), str(path))
    left_out = unused(path, episodes)
    words = next((name for name in TASK_WORDS if f"{name} (words)" in left_out and TASK not in columns), None)
    if words is not None:
        columns[TASK], attrs[TASKS] = _task_words(episodes, words)
        left_out.remove(f"{words} (words)")
    buffer = ReplayBuffer(columns=columns, episode_ends=ends, attrs=attrs, path=path)
    said = tuple(f"{key} is {', '.join(names)}" for key, names in (vectors or {}).items())
    return Opened(buffer, tuple(left_out), said)


def _task_words(episodes: list[FolderEpisode], name: str) -> tuple[np.ndarray, list[str]]:
    """Of each row the number of its task [N], and the tasks in words (`datasets.storage.tasks`), from the column
    `name`; "" where an episode does not say."""
    rows = [
        text
        for episode in episodes
        for text in (read_words(episode.csv, name) if name in episode.words else [""] * episode.length)
    ]
    places = {text: place for place, text in enumerate(dict.fromkeys(rows))}
    return np.array([places[text] for text in rows], np.int64), list(places)


def _check_times(episodes: list[FolderEpisode], key: str, parts: list[Part], rate: float) -> None:
    for number, (episode, part) in enumerate(zip(episodes, parts, strict=True)):
        video = episode.keys[key].video
        if video is not None:
            check_times(video, part, 0.0, rate, number)


def _read(episodes: list[FolderEpisode], key: str, piece: RowRange) -> np.ndarray:
    episode = episodes[piece.number]
    kind = episode.keys[key]
    where = f"{kind.path}: {key}"
    if kind.path.suffix == ".npy":
        with reading(where):
            rows = np.load(kind.path, mmap_mode="r", allow_pickle=False)[piece.first : piece.end]
    else:
        rows = episode.numbers(key)[piece.first : piece.end]
    return check_rows(np.asarray(rows), (piece.end - piece.first, *kind.row), where)


def _write(buffer: ReplayBuffer, path: Path, journal: Journal, settings: Settings) -> None:
    path.mkdir(parents=True, exist_ok=True)
    for key in buffer.keys:
        if not _NAME.fullmatch(key):
            raise InputError(f"{buffer.name}: {key!r} is no name for a file: rename it")
    firsts = np.concatenate([[0], buffer.episode_ends[:-1]]).tolist()
    size = sum(row_bytes(buffer[key]) for key in buffer.keys)
    steps = []
    for index, (first, end) in enumerate(zip(firsts, buffer.episode_ends.tolist(), strict=True)):
        write = functools.partial(_write_episode, buffer, path / f"episode_{index:06d}", first, end, settings)
        steps.append(JournalStep(f"episode {index}", (end - first) * size, write))
    journal.each(steps, "writing the episodes")
    lengths = np.diff(buffer.episode_ends, prepend=0).tolist()
    notes = {
        "rate": settings.rate,
        "episodes": [{"folder": f"episode_{index:06d}", "length": length} for index, length in enumerate(lengths)],
        "csv": {key: _in_csv(buffer[key], key) for key in buffer.keys if _file(buffer[key], key) == "rows.csv"},
        MARK: kept(buffer, {key: key for key in buffer.keys}),
    }
    with atomic_path(path / "dataset.json") as temporary:
        temporary.write_text(json.dumps(notes, indent=2) + "\n")


def _file(column: Column, key: str) -> str:
    if is_image(column):
        return f"{key}.mp4"
    return "rows.csv" if np.prod(column.shape[1:]) <= CSV_NUMBERS else f"{key}.npy"


def _in_csv(column: Column, key: str) -> dict[str, Any]:
    return {"columns": header({key: column.shape[1:]}), "dtype": native(column.dtype).name}


def _write_episode(buffer: ReplayBuffer, folder: Path, first: int, end: int, settings: Settings) -> None:
    folder.mkdir(exist_ok=True)
    rows: dict[str, np.ndarray] = {}
    for key in buffer.keys:
        column, name = buffer[key], _file(buffer[key], key)
        if name.endswith(".mp4"):
            _write_video(as_images(column, key, buffer.name), folder / name, first, end, settings)
        elif name.endswith(".npy"):
            _write_npy(column, folder / name, first, end)
        else:
            rows[key] = np.asarray(column[first:end])
    if not rows:  # a CSV is what makes a folder an episode
        rows["row"] = np.arange(end - first)
    names = header({key: values.shape[1:] for key, values in rows.items()})
    write_csv(folder / "rows.csv", names, list(rows.values()))


def _write_video(column: Column, path: Path, first: int, end: int, settings: Settings) -> None:
    size = (column.shape[1], column.shape[2])
    with EncodedVideoWriter(
        path, size, rate=settings.rate, quality=settings.quality, keyframe_every=KEYFRAME_EVERY
    ) as video:
        for start, stop in spans(first, end, rows_a_block(column)):
            video.add(np.asarray(column[start:stop]))


def _write_npy(column: Column, path: Path, first: int, end: int) -> None:
    shape = (end - first, *column.shape[1:])
    array = np.lib.format.open_memmap(path, mode="w+", dtype=native(column.dtype), shape=shape)
    for start, stop in spans(first, end, rows_a_block(column)):
        array[start - first : stop - first] = column[start:stop]
    array.flush()


FOLDER = Format("folder", opened, _write, lambda settings: settings.quality != "lossless")
