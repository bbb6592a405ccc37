"""One stream over a buffer: what the checks need of every row, in memory that images do not fill.

    low-dimensional keys   values [N, D]: finite, angles unwrapped, rotations without jumps of their numbers
    cameras                of each frame, whether it repeats the one before, and a picture of 8 × 8 points

Each of the 8 × 8 points weighs pixels by a hat over its neighbourhood, twice as wide as their distance. The centre of
a thing that moves is then a linear function of the points (hats interpolate linearly), so that a linear model finds it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from action_diffusion.datasets.doctor.turns import placed, recognised
from action_diffusion.datasets.formats.columns import ChangedColumn
from action_diffusion.datasets.images.pictures import Picture, picture
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.rotations import declared_rotations
from action_diffusion.datasets.storage.store import Column, blocks
from action_diffusion.progress import progress
from action_diffusion.rotations import RotationColumns, continuous_rows

POINTS = 8
DISCRETE = 20
"""A dimension with no more different values is a label or a switch, and no motion."""
_NO_MOTION = ("reward", "done", "success", "demo", "index", "time", "stamp", "label")
_PERIODS = (2 * np.pi, 360.0)


@dataclass
class Values:
    """A low-dimensional key.

    Args:
        raw: [N, D] as recorded.
        values: float64 [N, D] for differences: what is not finite is interpolated, angles are unwrapped.
        rotations: that the buffer says, or whose numbers jump.
        finite: [N].
        motion: [D] whether the dimension is a measure of motion: continuous, and no reward or time.
        steps: float64 [N, D] absolute difference to the row before, 0 in an episode's first.
        repeats: [N] the row is the same as the one before it in its episode.
    """

    raw: np.ndarray
    values: np.ndarray
    finite: np.ndarray
    motion: np.ndarray
    steps: np.ndarray
    repeats: np.ndarray
    rotations: Sequence[RotationColumns] = ()


@dataclass
class CameraColumn:
    """repeats, finite: [N]. points: float32 [N, F] in 0 to 1. steps: [N], how far the points are from those before."""

    repeats: np.ndarray
    finite: np.ndarray
    points: np.ndarray
    steps: np.ndarray


@dataclass
class Survey:
    """starts, ends: [E]. episode: [N]. first: [N] whether a row is its episode's first."""

    starts: np.ndarray
    ends: np.ndarray
    episode: np.ndarray
    first: np.ndarray
    low: dict[str, Values]
    cameras: dict[str, CameraColumn]

    @property
    def n_rows(self) -> int:
        return len(self.episode)

    @property
    def observations(self) -> dict[str, Values]:
        """Low-dimensional keys that tell where things are: with motion, and no actions where there is anything else."""
        moving = {key: low for key, low in self.low.items() if low.motion.any()}
        seen = {key: low for key, low in moving.items() if not is_action(key)}
        return seen or moving


def is_action(key: str) -> bool:
    return "action" in key


def is_image(column: Column) -> bool:
    """[N, H, W, colours], at least 8 × 8."""
    return len(column.shape) == 4 and column.shape[3] in (1, 3, 4) and min(column.shape[1:3]) >= POINTS


def survey(buffer: ReplayBuffer, folder: Path) -> Survey:
    """Reads every row once. `folder` takes the cameras' points, 768 bytes a row, for as long as they are used."""
    ends = buffer.episode_ends
    starts = np.concatenate([[0], ends[:-1]])
    first = np.zeros(buffer.n_steps, bool)
    first[starts] = True
    pictures = {key: picture(buffer[key].shape, buffer[key].dtype) for key in buffer.keys}
    images = [key for key in buffer.keys if is_image(buffer[key]) or pictures[key] is not None]
    with progress("reading", buffer.n_steps * (1 + len(images))) as advance:
        low, declared = {}, declared_rotations(buffer)
        for key in buffer.keys:
            if key not in images:
                low[key] = _values(key, np.asarray(buffer[key][:]), first, starts, ends, declared.get(key, ()))
        advance(buffer.n_steps)
        cameras = {}
        for key in images:
            shown = pictures[key]
            if shown is not None and shown.kind == "unknown":
                continue
            column = buffer[key] if shown is None or is_image(buffer[key]) else _colours_last(buffer[key], shown)
            camera = _Camera(column, folder, depth=shown is not None and shown.kind == "depth")
            for row, frames in blocks(column):
                camera.add(row, frames)
                advance(len(frames))
            cameras[key] = camera.finish(first)
    return Survey(starts, ends, np.cumsum(first) - 1, first, low, cameras)


def _colours_last(column: Column, shown: Picture) -> Column:
    return ChangedColumn(column, lambda rows, _: shown.pixels(rows), row=(*shown.size, 3))


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="action-diffusion-doctor-")


def _values(
    key: str,
    rows: np.ndarray,
    first: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    rotations: Sequence[RotationColumns],
) -> Values:
    raw = rows.reshape(len(rows), -1)
    values = raw.astype(np.float64)
    finite = np.isfinite(values)
    few = min(DISCRETE, max(2, len(raw) // 10))
    motion = np.asarray([_n_different(raw[:, d], few) > few for d in range(raw.shape[1])])
    no_motion = raw.dtype == bool or any(word in key for word in _NO_MOTION)
    if no_motion:
        motion[:] = False
    for column, good in zip(values.T, finite.T, strict=True):
        if not good.any():
            column[:] = 0
        elif not good.all():
            column[~good] = np.interp(np.flatnonzero(~good), np.flatnonzero(good), column[good])
    periods = [_period(column, first) if moves else None for column, moves in zip(values.T, motion, strict=True)]
    if not rotations and not no_motion and raw.dtype.kind == "f":
        rotations = recognised(key, values, ~first, periods)
    rotations = [placed(rotation, values, starts) for rotation in rotations]
    turning = {column for rotation in rotations for column in range(rotation.first, rotation.columns.stop)}
    for start, end in zip(starts, ends, strict=True):
        for rotation in rotations:
            values[start:end, rotation.columns] = continuous_rows(values[start:end], rotation)
        for d, period in enumerate(periods):
            if period is not None and d not in turning:
                values[start:end, d] = np.unwrap(values[start:end, d], period=period)
    steps = np.abs(np.diff(values, axis=0, prepend=values[:1]))
    steps[first] = 0
    repeats = np.zeros(len(raw), bool)
    repeats[1:] = (raw[1:] == raw[:-1]).all(axis=1)
    return Values(raw, values, np.asarray(finite.all(axis=1)), motion, steps, repeats & ~first, rotations)


def _n_different(column: np.ndarray, few: int) -> int:
    """How many different values; as soon as there are more than `few`, that suffices."""
    head = len(np.unique(column[: 50 * few]))
    return head if head > few else len(np.unique(column))


def _period(column: np.ndarray, first: np.ndarray) -> float | None:
    """Of an angle that wraps: nearly all values lie within one period, and some steps are about that long."""
    steps = np.abs(np.diff(column, prepend=column[:1]))[~first]
    for period in _PERIODS:
        for low in (0.0, -period / 2):
            inside = np.mean((column >= low - 0.01) & (column <= low + period + 0.01)) > 0.95
            if inside and np.any(np.abs(steps - period) < 0.1 * period):
                return period
    return None


class _Camera:
    """Takes frames in order. depth: values are distances, of which the largest is taken as 1, as 255 is of colours."""

    def __init__(self, column: Column, folder: Path, *, depth: bool = False) -> None:
        n, height, width, colours = column.shape
        self._depth = depth
        self._scale = 1.0 / 255 if column.dtype.kind in "iu" and not depth else 1.0
        self._down, self._across = _hats(height), _hats(width)
        file = folder / f"points-{id(self)}.npy"
        size = POINTS * POINTS * colours
        self.points = np.lib.format.open_memmap(file, "w+", np.dtype(np.float32), (n, size))
        self.repeats, self.finite = np.zeros(n, bool), np.ones(n, bool)
        self._last: np.ndarray | None = None

    def add(self, row: int, frames: np.ndarray) -> None:
        rows = slice(row, row + len(frames))
        flat = np.ascontiguousarray(frames).reshape(len(frames), -1)
        if frames.dtype.kind == "f":
            self.finite[rows] = np.isfinite(flat.sum(axis=1))
        before = flat[:1] if self._last is None else self._last
        self.repeats[row] = np.array_equal(flat[0], before[0])
        for i in range(1, len(flat)):  # frame by frame: most differ in their first pixels that are compared
            self.repeats[row + i] = np.array_equal(flat[i, ::97], flat[i - 1, ::97]) and np.array_equal(
                flat[i], flat[i - 1]
            )
        self._last = flat[-1:].copy()
        for i in range(0, len(frames), 64):
            part = np.nan_to_num(frames[i : i + 64].astype(np.float32), posinf=0.0, neginf=0.0) * self._scale
            across = np.tensordot(part, self._across, ([2], [0]))  # n, H, colours, 8
            points = np.tensordot(across, self._down, ([1], [0]))  # n, colours, 8, 8
            self.points[row + i : row + i + len(part)] = points.reshape(len(part), -1)

    def finish(self, first: np.ndarray) -> CameraColumn:
        most = float(self.points.max())
        if self._depth and most > 0:
            self.points /= most
        elif self._scale == 1.0 and most > 2:  # floats from 0 to 255
            self.points /= 255
        steps = np.zeros(len(self.points))
        for i in range(1, len(self.points), 4096):
            rows = np.asarray(self.points[i - 1 : i + 4096])
            steps[i : i + len(rows) - 1] = np.linalg.norm(np.diff(rows, axis=0), axis=1)
        return CameraColumn(self.repeats & ~first, self.finite, self.points, np.where(first, 0, steps))


def _hats(n: int) -> np.ndarray:
    """Weights [n, POINTS] of pixels; those of a point sum to about 1."""
    centres = np.linspace(0, n - 1, POINTS)
    distance = centres[1] - centres[0]
    weights: np.ndarray = np.maximum(0, 1 - np.abs(np.arange(n)[:, None] - centres) / distance) / distance
    return weights.astype(np.float32)
