"""LeRobotDataset v2.1 and v3.0 from a replay buffer. Both hold the same rows; v3.0 puts many episodes in a file.

    v2.1  data/chunk-000/episode_000000.parquet      videos/chunk-000/<camera>/episode_000000.mp4     meta/*.jsonl
    v3.0  data/chunk-000/file-000.parquet            videos/<camera>/chunk-000/file-000.mp4           meta/**.parquet

A file with all videos of its episodes is a step of the journal, which also keeps their statistics.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from action_diffusion.datasets.formats.columns import as_images, as_stored, is_image, native, rows_a_block, spans
from action_diffusion.datasets.formats.contract import Settings
from action_diffusion.datasets.formats.journal import Journal, JournalStep
from action_diffusion.datasets.formats.lerobot.meta import write_meta21, write_meta30
from action_diffusion.datasets.formats.lerobot.names import (
    EPISODES_A_CHUNK,
    OWN,
    V21,
    V30,
    make_info,
    names_for,
    tasks_of,
    vector_length,
    whole_rate,
)
from action_diffusion.datasets.formats.lerobot.stats import ColumnStatistics
from action_diffusion.datasets.formats.parquet import ParquetWriter
from action_diffusion.datasets.formats.video import EncodedVideoWriter
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import Column, row_bytes

DATA = {V21: "data/chunk-{chunk:03d}/episode_{file:06d}.parquet", V30: "data/chunk-{chunk:03d}/file-{file:03d}.parquet"}
VIDEO = {
    V21: "videos/chunk-{chunk:03d}/{key}/episode_{file:06d}.mp4",
    V30: "videos/{key}/chunk-{chunk:03d}/file-{file:03d}.mp4",
}
FILE_BYTES = 512 << 20
"""Uncompressed, of all columns: what is encoded again at most after a kill."""
KEYFRAME_EVERY = 2
"""As LeRobot does: training reads frames at random."""


class WrittenEpisode(NamedTuple):
    number: int
    first: int
    end: int


class WriteTask(NamedTuple):
    """What to write: columns by LeRobot's names, as LeRobot holds them."""

    root: Path
    version: str
    columns: Mapping[str, Column]
    task_index: np.ndarray
    settings: Settings


def write(buffer: ReplayBuffer, path: Path, journal: Journal, settings: Settings, *, version: str) -> None:
    """Raises `InputError` for images that are not 0 to 255, a rate that is not whole, and names that would be alike."""
    names = names_for(buffer)
    info = make_info(buffer, names, settings, version)
    tasks = tasks_of(buffer)
    task_index = np.zeros(buffer.n_steps, np.int64)
    if "task_index" in buffer:
        task_index[:] = np.asarray(buffer["task_index"][:]).ravel()
    columns = {name: _stored(buffer, key) for key, name in names.items()}
    task = WriteTask(path, version, columns, task_index, settings)
    size = sum(row_bytes(column) for column in columns.values())
    steps = []
    for number, episodes in enumerate(_files(buffer.episode_ends, size, version)):
        do = functools.partial(_write_file, task, number, episodes)
        steps.append(JournalStep(f"file {number}", (episodes[-1].end - episodes[0].first) * size, do))
    rows = [row for told in journal.each(steps, "writing the episodes").values() for row in told]
    for row in rows:
        row["tasks"] = [tasks[index] for index in row["task_indices"]]
    (write_meta21 if version == V21 else write_meta30)(path, info, rows, tasks)


def _stored(buffer: ReplayBuffer, key: str) -> Column:
    column = buffer[key]
    if is_image(column):
        return as_images(column, key, buffer.name)
    return as_stored(column, (vector_length(column.shape),), native(column.dtype), f"{buffer.name}: {key}")


def _files(ends: np.ndarray, size: int, version: str) -> list[list[WrittenEpisode]]:
    """Which episodes share a file: in v3.0 up to about `FILE_BYTES`, at `size` bytes a row."""
    firsts = np.concatenate([[0], ends[:-1]])
    files: list[list[WrittenEpisode]] = []
    for index, (first, end) in enumerate(zip(firsts.tolist(), ends.tolist(), strict=True)):
        full = not files or version == V21 or (end - files[-1][0].first) * size > FILE_BYTES
        files += [[]] if full else []
        files[-1].append(WrittenEpisode(index, first, end))
    return files


def _write_file(task: WriteTask, number: int, episodes: list[WrittenEpisode]) -> list[dict[str, Any]]:
    """Rows and videos of some episodes; returns what the meta data says of each."""
    place = {"chunk": number // EPISODES_A_CHUNK, "file": number if task.version == V21 else number % EPISODES_A_CHUNK}
    rate = whole_rate(task.settings)
    with ExitStack() as stack:
        videos = {}
        for name, column in task.columns.items():
            if is_image(column):
                writer = EncodedVideoWriter(
                    task.root / VIDEO[task.version].format(key=name, **place),
                    (column.shape[1], column.shape[2]),
                    rate=rate,
                    quality=task.settings.quality,
                    keyframe_every=KEYFRAME_EVERY,
                )
                videos[name] = stack.enter_context(writer)
        rows = stack.enter_context(ParquetWriter(task.root / DATA[task.version].format(**place)))
        return [
            {"file": number, **_write_episode(task, episode, episodes[0].first, rows, videos)} for episode in episodes
        ]


def _write_episode(
    task: WriteTask, episode: WrittenEpisode, first: int, rows: ParquetWriter, videos: Mapping[str, EncodedVideoWriter]
) -> dict[str, Any]:
    rate = whole_rate(task.settings)
    stats = {name: ColumnStatistics(image=name in videos) for name in (*task.columns, *OWN)}
    block = min(rows_a_block(column) for column in task.columns.values())
    for start, end in spans(episode.first, episode.end, block):
        table = {}
        for name, column in task.columns.items():
            values = np.asarray(column[start:end])
            stats[name].add(values)
            if name in videos:
                videos[name].add(values)
            else:
                table[name] = values
        table |= _own(episode, np.arange(start, end), task.task_index[start:end], rate)
        for name in OWN:
            stats[name].add(table[name])
        rows.add(table)
    indices = np.unique(task.task_index[episode.first : episode.end])
    return {
        "episode_index": episode.number,
        "length": episode.end - episode.first,
        "from": episode.first,
        "to": episode.end,
        "from_timestamp": (episode.first - first) / rate,
        "to_timestamp": (episode.end - first) / rate,
        "task_indices": indices.tolist(),
        "stats": {name: found.result() for name, found in stats.items()},
    }


def _own(episode: WrittenEpisode, index: np.ndarray, task_index: np.ndarray, rate: int) -> dict[str, np.ndarray]:
    frame = index - episode.first
    return {
        "timestamp": (frame / rate).astype(np.float32),
        "frame_index": frame,
        "episode_index": np.full(len(index), episode.number),
        "index": index,
        "task_index": task_index,
    }
