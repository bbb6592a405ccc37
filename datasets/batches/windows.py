"""Which rows make a sample: pure index arithmetic, so that it can be tested at the ends of episodes.

A window of `horizon` H rows slides over each episode. Step To-1 of it is "now": the policy sees the To
rows up to now, and executes the Ta rows from now on. An episode of L = 9 rows with To = 2, H = 8, Ta = 4:

    row of the episode    .  0  1  2  3  4  5  6  7  8  .  .  .
    first window          o  N  e  e  e  -  -  -                   start -1 = -(To-1),      now 0
    second window            o  N  e  e  e  -  -  -                start  0,                now 1
    last window                          o  N  e  e  e  .  .  .    start  4 = L - H + Ta-1, now 5

o observed, N now (observed and executed), e executed, - predicted only. A row outside of the episode (.)
repeats the nearest row inside it, and its mask is False. The first start lets "now" be the first row; the
last start is the last at which all executed rows are real. An episode too short for that gives one window
all the same. This is the padding of Chi et al., "Diffusion Policy" (RSS 2023): To-1 before, Ta-1 after.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from action_diffusion.errors import InputError


@dataclass(frozen=True)
class Windows:
    """Every window of a set of episodes, in order; `len()` of them.

    start: int64 [W], first row, which may lie before the episode
    first, end: int64 [W], the episode's own rows are first..end-1
    """

    start: np.ndarray
    first: np.ndarray
    end: np.ndarray
    horizon: int
    n_obs_steps: int
    n_action_steps: int

    def __len__(self) -> int:
        return len(self.start)

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """Rows of the windows `indices` [B], repeated at the ends of the episode: int64 [B, H]."""
        return self.rows_and_mask(indices)[0]

    def mask(self, indices: np.ndarray) -> np.ndarray:
        """Whether a step is a row of the episode rather than padding: bool [B, H]."""
        return self.rows_and_mask(indices)[1]

    def rows_and_mask(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Both at once."""
        steps = self.start[indices, None] + np.arange(self.horizon)
        rows = np.minimum(np.maximum(steps, self.first[indices, None]), self.end[indices, None] - 1)
        return rows, rows == steps

    def now(self, indices: np.ndarray) -> np.ndarray:
        """The row that each window's policy acts at: int64 [B]. It is always inside the episode."""
        result: np.ndarray = self.start[indices] + self.n_obs_steps - 1
        return result


def make_windows(
    episode_ends: np.ndarray,
    *,
    horizon: int,
    n_obs_steps: int,
    n_action_steps: int,
    episodes: np.ndarray | None = None,
) -> Windows:
    """The windows of `episodes` (indices; None for all) of a buffer with `episode_ends` [E].

    Raises `InputError` where the observed and executed steps do not fit into the horizon.
    """
    if min(n_obs_steps, n_action_steps) < 1 or n_obs_steps - 1 + n_action_steps > horizon:
        raise InputError(
            f"horizon {horizon} cannot hold n_obs_steps {n_obs_steps} and n_action_steps {n_action_steps}: "
            "both must be at least 1, and n_obs_steps - 1 + n_action_steps at most the horizon"
        )
    ends = np.asarray(episode_ends, dtype=np.int64)
    firsts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    if episodes is not None:
        firsts, ends = firsts[episodes], ends[episodes]
    lowest = firsts - (n_obs_steps - 1)
    highest = np.maximum(ends - horizon + n_action_steps - 1, lowest)
    counts = highest - lowest + 1
    before = np.cumsum(counts) - counts  # windows of the episodes before this one
    start = np.arange(counts.sum()) + np.repeat(lowest - before, counts)
    return Windows(
        start=start,
        first=np.repeat(firsts, counts),
        end=np.repeat(ends, counts),
        horizon=horizon,
        n_obs_steps=n_obs_steps,
        n_action_steps=n_action_steps,
    )


def split_episodes(n_episodes: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted episode indices for (training, validation), drawn with `seed`.

    `fraction` in [0, 1) goes to validation, rounded, but at least one episode on each side where it is
    above 0. Raises `InputError` where there is only one episode to split, or for another fraction.
    """
    if not 0 <= fraction < 1:
        raise InputError(f"validation fraction {fraction} must be at least 0 and less than 1")
    if fraction > 0 and n_episodes < 2:
        raise InputError("one episode cannot be split into training and validation: set the fraction to 0")
    n_validation = min(max(round(n_episodes * fraction), 1), n_episodes - 1) if fraction > 0 else 0
    order = np.random.default_rng(seed).permutation(n_episodes)
    return np.sort(order[n_validation:]), np.sort(order[:n_validation])


@lru_cache(maxsize=4)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` samples in an epoch: int64 [n], read-only, a pure function of its arguments."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.setflags(write=False)
    return order


def steps_per_epoch(n: int, batch_size: int, world: int = 1) -> int:
    """Batches that every one of `world` processes draws in an epoch; an incomplete last one is dropped."""
    if batch_size * world > n:
        raise InputError(
            f"a batch of {batch_size}{f' in {world} processes' if world > 1 else ''} needs more samples "
            f"than the {n} there are: use a batch size of at most {n // world}"
        )
    return n // (batch_size * world)


def batch_indices(n: int, batch_size: int, seed: int, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """Samples that process `rank` of `world` draws at `step` (0, 1, ... over all epochs): int64 [batch_size].

    A pure function, so resuming at a step needs no stored state. Together, the processes draw what one
    process would with a batch `world` times as large.
    """
    epoch, batch = divmod(step, steps_per_epoch(n, batch_size, world))
    first = (batch * world + rank) * batch_size
    return epoch_order(n, seed, epoch)[first : first + batch_size]
