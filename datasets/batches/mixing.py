"""Parts of the data that are trained on in given shares: `data=[a.zarr,b.zarr] dataset.weights=[0.7,0.3]`.

A part is a data set, the episodes of a task, or those of a subset. Its share is that of all windows that are drawn.
With shares w, of the first n draws of a run

    n_1 = ⌊n w_1 + ½⌋,    n_2 = ⌊(n − n_1) w_2 / (1 − w_1) + ½⌋,    …

are of part 1, 2, …: as many as their shares say, but for one or so, however long the run is. Those of a part go through
its windows in a random order, and through another one when all were drawn once.

An epoch is as many draws as there are windows. A part with a share above that of its windows has more than one turn in
it, the others less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from action_diffusion.datasets.robomimic.attributes import subset
from action_diffusion.datasets.storage.replay_buffer import ReplayBuffer
from action_diffusion.datasets.storage.tasks import episode_tasks
from action_diffusion.errors import InputError, unknown

NONE = -1
"""The part of an episode that is in none: it is neither trained on nor held out."""
_MOST_SHOWN = 60
"""Characters of a part's name in a table; what a robot was to do can be a long sentence."""


@dataclass(frozen=True)
class Parts:
    """The parts of a buffer's episodes.

    names: of the parts. weights: how often their windows are drawn, beside each other; None: each window as often as
    any. of_episode: int64 [E], the part of each episode, or `NONE`.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...] | None
    of_episode: np.ndarray

    def shares(self, windows: np.ndarray) -> tuple[Fraction, ...]:
        """What each part's windows, int64 [P] of them, are of all that are drawn; they sum to 1."""
        weights = [Fraction(weight) for weight in (windows.tolist() if self.weights is None else self.weights)]
        return tuple(weight / sum(weights) for weight in weights)


def parts_of(buffer: ReplayBuffer, dataset: Mapping[str, Any], data: Sequence[str]) -> Parts:
    """The parts that the options `dataset.*` name; without weights, the data sets.

    data: what `data=` says, of which `buffer` is all, joined. A part of weight 0 is `NONE`.
    Raises `InputError` for tasks and subsets that are not there or empty, tasks without a weight, an episode in two
    subsets that have weights, and a number of weights that is not that of the data sets.
    """
    if dataset.get("task_weights"):
        names, weights, of_episode = _by_task(buffer, dataset["task_weights"])
    elif dataset.get("subset_weights"):
        names, weights, of_episode = _by_subset(buffer, dataset["subset_weights"])
    else:
        counts = buffer.parts or (buffer.n_episodes,)
        names, weights = _short(data), dataset.get("weights")
        of_episode = np.repeat(np.arange(len(counts)), counts)
        check_weights(weights, data)
    if weights is not None:
        for part, (name, weight) in enumerate(zip(names, weights, strict=True)):
            if weight and part not in of_episode:
                raise InputError(f"{name} has the weight {weight:g}, and no episode in {buffer.name}")
        of_episode = np.where(np.isin(of_episode, np.flatnonzero(weights)), of_episode, NONE)
    return Parts(tuple(names), None if weights is None else tuple(weights), of_episode)


def check_weights(weights: Sequence[float] | None, data: str | Sequence[str] | None) -> None:
    """`InputError` unless there is a weight for each data set that `data=` names, if there are any."""
    if weights is None or data is None:
        return
    if isinstance(data, str):
        raise InputError("dataset.weights are of several data sets: give data=[A,B], or leave them out")
    if len(weights) != len(data):
        raise InputError(
            f"dataset.weights has {len(weights)} values, and data= names {len(data)} data sets: give one for each"
        )


def _short(data: Sequence[str]) -> list[str]:
    """The names of files where they differ, else all of each path."""
    short = [Path(name).name or name for name in data]
    return short if len(set(short)) == len(short) else list(data)


def _by_task(
    buffer: ReplayBuffer, weights: Mapping[str, float]
) -> tuple[Sequence[str], Sequence[float] | None, np.ndarray]:
    tasks = episode_tasks(buffer)
    for name in weights:
        if name not in tasks:
            raise unknown("task", name, dict.fromkeys(tasks), f"dataset.task_weights of {buffer.name}")
    for task in dict.fromkeys(tasks):
        if task not in weights:
            raise InputError(
                f"dataset.task_weights names no weight for the task {task!r} of {buffer.name}: give it one, 0 to leave "
                "it out"
            )
    places = {name: place for place, name in enumerate(weights)}
    return list(weights), list(weights.values()), np.array([places[task] for task in tasks])


def _by_subset(
    buffer: ReplayBuffer, weights: Mapping[str, float]
) -> tuple[Sequence[str], Sequence[float] | None, np.ndarray]:
    of_episode = np.full(buffer.n_episodes, NONE)
    names = list(weights)
    for place, name in enumerate(names):
        members = subset(buffer, name)
        twice = members[of_episode[members] != NONE]
        if len(twice):
            other = names[of_episode[twice[0]]]
            raise InputError(
                f"dataset.subset_weights: episode {twice[0]} of {buffer.name} is in both {other} and {name}, which "
                "have weights of their own: name subsets that share no episode"
            )
        of_episode[members] = place
    return names, list(weights.values()), of_episode


class Draws:
    """Which windows a step's batch holds: a pure function of seed, step and process, see above.

    of_window: int64 [W], the part of each window. shares: of each part; those of parts without windows are 0.
    """

    def __init__(self, of_window: np.ndarray, shares: Sequence[Fraction], seed: int) -> None:
        self._windows = [np.flatnonzero(of_window == part) for part in range(len(shares))]
        self._shares, self._seed = shares, seed
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # part → turn, and its windows in that turn's order

    def batch(self, batch_size: int, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Windows that process `rank` of `world` draws at `step` (0, 1, …): int64 [batch_size], parts mixed; its share
        of the batch that they draw together."""
        first, batch_size = step * world * batch_size, world * batch_size
        befores, afters = (_counts(self._shares, n) for n in (first, first + batch_size))
        drawn = [self._of_part(part, *ends) for part, ends in enumerate(zip(befores, afters, strict=True))]
        mixed: np.ndarray = np.random.default_rng([self._seed, step, 0, 1]).permutation(np.concatenate(drawn))
        return np.split(mixed, world)[rank]

    def _of_part(self, part: int, first: int, end: int) -> np.ndarray:
        """Draws `first` to `end` of a part's windows."""
        n, found = len(self._windows[part]), [np.zeros(0, np.int64)]
        while first < end:
            turn, place = divmod(first, n)
            taken = self._order(part, turn)[place : place + end - first]
            found.append(taken)
            first += len(taken)
        return np.concatenate(found)

    def _order(self, part: int, turn: int) -> np.ndarray:
        known = self._orders.get(part)
        if known is None or known[0] != turn:
            order = np.random.default_rng([self._seed, turn, part]).permutation(self._windows[part])
            self._orders[part] = known = (turn, order)
        return known[1]


def _counts(shares: Sequence[Fraction], n: int) -> list[int]:
    """Of the first `n` draws, how many are of each part; none falls as n grows."""
    counts, rest = [], Fraction(1)
    for share in shares:
        counts.append(math.floor(n * share / rest + Fraction(1, 2)) if rest else 0)
        n, rest = n - counts[-1], rest - share
    return counts


def table(parts: Parts, trained: np.ndarray, held_out: np.ndarray, windows: np.ndarray) -> list[str]:
    """Lines of a table of the parts: how many episodes are trained on and held out, int64 [P] each, windows to train
    on, int64 [P], weights, and shares."""
    columns = {"trained on": [name if len(name) <= _MOST_SHOWN else f"{name[:_MOST_SHOWN]}…" for name in parts.names]}
    for title, counts in {"episodes": trained, "held out": held_out, "windows": windows}.items():
        columns[title] = [f"{count:,}" for count in counts]
    if parts.weights is not None:
        columns["weight"] = [f"{weight:g}" for weight in parts.weights]
    columns["share"] = [f"{100 * float(share):.1f} %" for share in parts.shares(windows)]
    widths = [max(len(text) for text in (title, *column)) for title, column in columns.items()]
    rows = [list(columns), *map(list, zip(*columns.values(), strict=True))]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
