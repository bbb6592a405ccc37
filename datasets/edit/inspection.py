"""What a buffer holds, in numbers: `action-diffusion data inspect`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from action_diffusion.datasets.doctor.examine import control_rate
from action_diffusion.datasets.doctor.finding import spans
from action_diffusion.datasets.formats.cached import CONVERTED
from action_diffusion.datasets.images.pictures import picture
from action_diffusion.datasets.storage.dimensions import NAMES, dimension_names
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import Column, blocks
from action_diffusion.datasets.storage.tasks import TASKS, episode_tasks
from action_diffusion.datasets.storage.times import is_time
from action_diffusion.memory import sized
from action_diffusion.progress import progress
from action_diffusion.terminal import parted, width, wrapped

SAMPLE_ROWS = 2000
"""Frames of a camera that are looked at, evenly over the buffer."""
_BYTES = re.compile(r"[A-Za-z0-9+/_-]{70,}={0,2}")
"""Base64, which no hash or word is as long as."""
_ELSEWHERE = ("task", TASKS, NAMES, "control_rate", CONVERTED, "hdf5_attributes")
"""Attributes that have lines of their own, and what only conversions back need."""
DIMENSIONS = 8
"""Of a key, that are listed and plotted."""
ATTRIBUTE = 400
"""Characters of an attribute that are shown."""


@dataclass
class Key:
    """least, most, mean, step: [D] of each dimension, for images of all pixels [1]; step: median difference to the row
    before. sample: [n, D], rows evenly over the buffer; of images the frames' mean. names: of the dimensions, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int
    image: bool
    least: np.ndarray
    most: np.ndarray
    mean: np.ndarray
    step: np.ndarray
    sample: np.ndarray
    names: list[str] | None = None


@dataclass
class Inspection:
    """rate: rows a second, None where the buffer does not say. n_bytes: on disk; None in memory.

    tasks: what was to be done in words, and in which episodes.
    """

    name: str
    lengths: np.ndarray
    rate: float | None
    n_bytes: int | None
    attrs: dict[str, str]
    keys: list[Key]
    tasks: dict[str, list[int]]


def inspect(buffer: ReplayBuffer) -> Inspection:
    """Reads the low-dimensional keys, and some frames of each camera."""
    lengths = np.diff(buffer.episode_ends, prepend=0)
    first = np.zeros(buffer.n_steps, bool)
    first[buffer.episode_ends - lengths] = True
    with progress("reading", len(buffer.keys)) as advance:
        keys = []
        for key in buffer.keys:
            shown = picture(buffer[key].shape, buffer[key].dtype)
            keys.append(_low(key, buffer[key], first) if shown is None else _image(key, buffer[key]))
            keys[-1].names = dimension_names(buffer.attrs, key, len(keys[-1].least))
            advance(1)
    time = next((np.ravel(buffer[key][:]) for key in buffer.keys if is_time(key)), None)
    attrs = {name: _short(value, ATTRIBUTE) for name, value in buffer.attrs.items() if name not in _ELSEWHERE}
    if buffer.left_out:
        attrs["left out"] = "; ".join(f"{key}: {reason}" for key, reason in buffer.left_out.items())
    size = _size(buffer.path) if buffer.path else None
    return Inspection(buffer.name, lengths, control_rate(buffer, time), size, attrs, keys, _tasks(buffer))


def _tasks(buffer: ReplayBuffer) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for episode, words in enumerate(episode_tasks(buffer)):
        if words:
            found.setdefault(words, []).append(episode)
    return found


def _low(name: str, column: Column, first: np.ndarray) -> Key:
    rows = np.concatenate([np.asarray(block).reshape(len(block), -1).astype(float) for _, block in blocks(column)])
    with np.errstate(invalid="ignore"):
        steps = np.abs(np.diff(rows, axis=0))[~first[1:]]
        step = np.median(steps, axis=0) if len(steps) else np.zeros(rows.shape[1])
        every = max(1, len(rows) // SAMPLE_ROWS)
        least, most, mean = rows.min(axis=0), rows.max(axis=0), rows.mean(axis=0)
    return Key(name, column.shape, str(column.dtype), _bytes(column), False, least, most, mean, step, rows[::every])


def _image(name: str, column: Column) -> Key:
    n = column.shape[0]
    starts = np.unique(np.linspace(0, max(0, n - 10), max(1, min(n, SAMPLE_ROWS) // 100)).astype(int))
    parts = [np.asarray(column[start : start + 10]).astype(np.float32) for start in starts]
    steps = [np.abs(np.diff(part, axis=0)).mean() for part in parts if len(part) > 1]
    least, most = np.min([part.min() for part in parts], keepdims=True), np.max([p.max() for p in parts], keepdims=True)
    brightness = np.concatenate([part.reshape(len(part), -1).mean(axis=1) for part in parts])[:, None]
    mean, step = brightness.mean(axis=0), np.asarray([np.median(steps) if steps else 0.0])
    n_bytes = _bytes(column)
    return Key(name, column.shape, str(column.dtype), n_bytes, True, least, most, mean, step, brightness)


def _bytes(column: Column) -> int:
    return math.prod(column.shape) * column.dtype.itemsize


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [Path(base, file) for base, _, names in os.walk(path) for file in names]
    return sum(file.stat().st_size for file in files)


def _short(value: object, most: int = 80) -> str:
    """In `most` characters; bytes that are written as text are only counted."""
    if isinstance(value, dict):
        value = ", ".join(f"{name}: {of_name}" for name, of_name in value.items())
    text = _BYTES.sub(lambda found: f"({len(found[0])} characters of base64)", " ".join(str(value).split()))
    return text if len(text) <= most else f"{text[: most - 3]}…"


def show(found: Inspection) -> None:
    """The numbers, and a table of the keys."""
    lengths = found.lengths
    print(f"{found.name}")
    print(f"episodes: {len(lengths)}, steps: {lengths.sum()}")
    print(f"lengths: {lengths.min()} to {lengths.max()}, median {np.median(lengths):g}")
    if found.rate is None:
        print("rate: not said (attribute control_rate); data convert rate=HZ says it, else 10 Hz is taken")
    else:
        print(f"rate: {found.rate:g} Hz, {lengths.sum() / found.rate / 60:.1f} minutes")
    raw = sum(key.n_bytes for key in found.keys)
    if found.n_bytes is not None:
        print(f"on disk: {sized(found.n_bytes)}, {sized(raw)} unpacked")
    for name, text in found.attrs.items():
        print(wrapped(f"{name}: {text}"))
    for words, episodes in found.tasks.items():
        print(
            wrapped(f"task {_short(words)!r}: {len(episodes)} of {len(lengths)} episodes ({_short(spans(episodes))})")
        )
    console = Console(highlight=False, markup=False)
    console.print(_key_table(found.keys))
    print()
    console.print(_range_table(found.keys))


def _key_table(keys: Sequence[Key]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("key", no_wrap=True)
    for heading in ("shape", "type"):
        table.add_column(heading, no_wrap=True)
    table.add_column("unpacked", justify="right", no_wrap=True)
    for key in keys:
        table.add_row(parted(key.name, width() // 2), shaped(key), key.dtype, sized(key.n_bytes))
    return table


def _range_table(keys: Sequence[Key]) -> Table:
    """Where a line is short the names of keys and dimensions are parted, and numbers stay whole."""
    headings = ("key", "dimension", "least", "most", "mean", "median step")
    rows = [("" if n else key.name, *cells) for key in keys for n, cells in enumerate(ranges_of(key))]
    widths = [2 + max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    room = max(24, width() - sum(widths[2:]))
    of_places = min(widths[1], max(room // 2, room - widths[0])) - 2
    of_keys = room - of_places - 4
    table = Table(box=None, pad_edge=False)
    table.add_column("key", no_wrap=True)
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, place, *cells in rows:
        table.add_row(parted(name, of_keys), parted(place, of_places), *cells)
    return table


def ranges_of(key: Key) -> list[tuple[str, ...]]:
    """Of the first dimensions, and of all others together: place, least, most, mean and median step in words."""
    rows = []
    for d in range(min(len(key.least), DIMENSIONS)):
        place = "pixels" if key.image else key.names[d] if key.names else str(d) if len(key.least) > 1 else ""
        rows.append((place, *(f"{values[d]:.4g}" for values in (key.least, key.most, key.mean, key.step))))
    if len(key.least) > DIMENSIONS:
        rows.append((f"… {len(key.least) - 1}", *_overall(key)))
    return rows


def shaped(key: Key) -> str:
    return "×".join(map(str, key.shape[1:])) or "1"


def _overall(key: Key) -> Sequence[str]:
    """Of the dimensions that have no line of their own."""
    rest = slice(DIMENSIONS, None)
    values = key.least[rest].min(), key.most[rest].max(), key.mean[rest].mean(), np.median(key.step[rest])
    return [f"{value:.4g}" for value in values]
