"""Copies of real episodes to plant faults in, for `doctor`; `plants` has the faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from action_diffusion.datasets.doctor.still import motion
from action_diffusion.datasets.doctor.survey import Survey, is_action
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.store import Column

EDGE = 6
"""Rows between a jump or an outlier and the episode's ends."""


@dataclass(frozen=True)
class Planted:
    """Rows of the buffer with faults. either: of a duplicate, both episodes. size: 1 is the smallest."""

    kind: str
    key: str
    episode: int
    first: int
    last: int
    size: float
    either: tuple[int, ...] = ()


@dataclass
class CleanEpisode:
    """start: its first row in the source. low: {key: [T, …]}, copies. frames: {key: rows of the source [T]}.
    changed: {(key, step): frame}."""

    start: int

    low: dict[str, np.ndarray]
    frames: dict[str, np.ndarray]
    changed: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter((self.low | self.frames).values())))

    def take(self, steps: np.ndarray) -> None:
        """Keep these steps, in this order."""
        self.low = {key: values[steps] for key, values in self.low.items()}
        self.frames = {key: rows[steps] for key, rows in self.frames.items()}


class Frames:
    """Rows of a camera's column in another order, some of them changed."""

    def __init__(self, column: Column, rows: np.ndarray, changed: dict[int, np.ndarray]) -> None:
        self._column, self._rows, self._changed = column, rows, changed
        self.shape = (len(rows), *column.shape[1:])
        self.dtype = column.dtype

    def __getitem__(self, rows: Any, /) -> np.ndarray:
        frames = np.array(self._column[self._rows[rows]])
        for place, row in enumerate(np.arange(len(self._rows))[rows]):
            if int(row) in self._changed:
                frames[place] = self._changed[int(row)]
        return frames


Place = tuple[str, int, int, tuple[int, ...]] | None
"""Key, first and last step of the faulty episode, and for a duplicate both episodes; None where there is no room."""


class Planter:
    """Plants faults in copies of `buffer`, whose rows `survey` describes. Where and how big, `random` says."""

    def __init__(self, buffer: ReplayBuffer, survey: Survey, random: np.random.Generator) -> None:
        self._buffer, self._survey, self.random = buffer, survey, random
        self._motion = {key: motion(survey, key) for key in ("", *survey.low, *survey.cameras)}
        inner = ~survey.first
        self._usual = {key: np.quantile(low.steps[inner], 0.999, axis=0) for key, low in survey.low.items()}

    def plant(self, kinds: list[str], plant: Mapping[str, Plant]) -> tuple[ReplayBuffer, list[Planted]]:
        """A buffer with a fault of each of `kinds`, in episodes drawn at random; `plant` says how."""
        n = len(self._survey.ends)
        episodes = [self.episode(index) for index in range(n)]
        chosen = self.random.permutation(n)[: len(kinds)]
        self.untouched = np.setdiff1d(np.arange(n), chosen)
        found = []
        for place, (index, kind) in enumerate(zip(chosen, kinds, strict=True)):
            size = 1.0 if place // 10 % 2 == 0 else float(self.random.uniform(1, 4))
            faulty = self.episode(index)
            planted = plant[kind](self, faulty, int(index), size)
            if planted is not None:
                episodes[index] = faulty
                found.append((kind, int(index), size, *planted))
        buffer = self._joined(episodes)
        starts = np.concatenate([[0], buffer.episode_ends[:-1]])
        planted_rows = []
        for kind, index, size, key, first, last, either in found:
            rows = int(starts[index] + first), int(starts[index] + last)
            planted_rows.append(Planted(kind, key, index, *rows, size, either))
        return buffer, planted_rows

    def episode(self, index: int) -> CleanEpisode:
        rows = np.arange(self._survey.starts[index], self._survey.ends[index])
        low = {key: np.array(self._survey.low[key].raw[rows]) for key in self._survey.low}
        return CleanEpisode(int(rows[0]), low, {key: rows.copy() for key in self._survey.cameras})

    def _joined(self, episodes: list[CleanEpisode]) -> ReplayBuffer:
        ends = np.cumsum([len(episode) for episode in episodes])
        arrays: dict[str, Any] = {}
        for key in self._survey.low:
            joined = np.concatenate([episode.low[key] for episode in episodes])
            arrays[key] = joined.reshape(-1, *self._buffer[key].shape[1:])
        buffer = ReplayBuffer.from_arrays(arrays, ends, self._buffer.attrs)
        for key in self._survey.cameras:
            rows = np.concatenate([episode.frames[key] for episode in episodes])
            starts = np.concatenate([[0], ends[:-1]])
            changed = {
                int(start) + step: frame
                for start, episode in zip(starts, episodes, strict=True)
                for (changed_key, step), frame in episode.changed.items()
                if changed_key == key
            }
            buffer = buffer.with_column(key, Frames(self._buffer[key], rows, changed))
        return buffer

    def dimension(self, *, restless: bool = False) -> tuple[str, int]:
        """A key and a dimension of it that moves; `restless`: one that is hardly ever still."""
        choices = []
        for key, low in self._survey.low.items():
            still = np.mean(low.steps[~self._survey.first] == 0, axis=0)
            choices += [(key, int(d)) for d in np.flatnonzero(low.motion & (still < 0.2 if restless else True))]
        key = self.random.choice(sorted({key for key, _ in choices}))  # keys alike, however many dimensions they have
        of_key = [choice for choice in choices if choice[0] == key]
        return of_key[self.random.integers(len(of_key))]

    def step(self, episode: CleanEpisode, edge: int, without: str | None = None, moving: int = 1) -> int | None:
        """A step `edge` or more from the ends; if `without` is given, one from which on within `moving` steps the
        motion of other keys is half its median or more."""
        steps = np.arange(edge, len(episode) - edge)
        if without is not None:
            rows = np.arange(episode.start, episode.start + len(episode))
            enough = self._motion[without][rows] >= 0.5
            steps = np.asarray([step for step in steps if enough[step : step + moving].any()], int)
        return int(self.random.choice(steps)) if len(steps) else None

    def usual(self, key: str, d: int) -> float:
        return float(self._usual[key][d])

    def limits(self, key: str, d: int) -> tuple[float, float]:
        raw = self._survey.low[key].raw[:, d]
        return float(raw.min()), float(raw.max())

    def set(self, episode: CleanEpisode, key: str, d: int, steps: slice, values: np.ndarray | float) -> None:
        """Whole numbers stay whole, and angles that wrap stay where they belong."""
        low = self._survey.low[key]
        wrapped = not np.array_equal(low.raw[:, d], low.values[:, d])
        new = np.asarray(values, float)
        if wrapped:
            least, _ = self.limits(key, d)
            base = -np.pi if least < -0.1 else 0.0
            new = (new - base) % (2 * np.pi) + base
        episode.low[key][steps, d] = new

    def camera(self) -> str:
        return str(self.random.choice(sorted(self._survey.cameras)))

    def restless_keys(self) -> list[str]:
        low = self._survey.low
        return [key for key in low if low[key].motion.any() and not is_action(key) and low[key].repeats.mean() < 0.01]

    def other_episode(self) -> int:
        return int(self.random.choice(self.untouched))

    def frame(self, episode: CleanEpisode, key: str, step: int) -> np.ndarray:
        return np.array(self._buffer[key][int(episode.frames[key][step])])


Plant = Callable[[Planter, CleanEpisode, int, float], Place]
"""Changes a copy of the episode with that index; the size is 1 or more."""
