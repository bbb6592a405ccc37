"""The faults that `benchmarks.robustness.doctor` plants, of known kind, rows and size.

One fault an episode. Every other one is as small as it gets, the others are up to four times that:

    nan        1 value, NaN or infinite
    dropped    1 row of all keys, or 1 frame that repeats the one before, where the motion is half its median or more
    frozen     5 rows alike, of a camera or of a state that never rests, where anything else moves as much
    jump       a step of 3 times the 99.9th percentile step of that dimension, up to the episode's end
    outlier    1 row as far from the mean of its neighbours; or a frame half as bright
    skew       a camera 2 rows early or late, for an episode or the last 40 rows of it
    constant   1 dimension in one episode
    saturated  8 rows in a row at the dimension's limit in the buffer: the episode is moved up or down, and clipped
    duplicate  60 % of another episode's rows, in the place of an episode
    idle       10 rows in which nothing moves, before the beginning or after the end
"""

from __future__ import annotations

import numpy as np

from benchmarks.robustness.planter import EDGE, CleanEpisode, Place, Plant, Planter


def _nan(planter: Planter, episode: CleanEpisode, index: int, size: float) -> Place:
    key, d = planter.dimension()
    step = int(planter.random.integers(len(episode)))
    episode.low[key][step, d] = planter.random.choice([np.nan, np.inf, -np.inf])
    return key, step, step, ()


def _dropped(planter: Planter, episode: CleanEpisode, index: int, size: float) -> Place:
    key = planter.camera() if episode.frames and planter.random.random() < 0.5 else ""
    step = planter.step(episode, EDGE, without=key)
    if step is None:
        return None
    if key:
        episode.frames[key][step] = episode.frames[key][step - 1]
        return key, step, step, ()
    episode.take(np.delete(np.arange(len(episode)), step))
    return "all", step, step, ()


def _frozen(planter: Planter, episode: CleanEpisode, index: int, size: float) -> Place:
    n = round(5 * size)
    key = str(planter.random.choice([*planter.restless_keys(), *episode.frames]))
    step = planter.step(episode, n, without=key, moving=4)
    if step is None:
        return None
    values = episode.frames[key] if key in episode.frames else episode.low[key]
    values[step : step + n - 1] = values[step - 1]
    return key, step, step + n - 2, ()


def _jump(planter: Planter, episode: CleanEpisode, index: int, size: float) -> Place:
    key, d = planter.dimension()
    step = planter.step(episode, EDGE)
    if step is None:
        return None
    values = episode.low[key][:, d].astype(float)
    height = 3 * size * planter.usual(key, d) * planter.random.choice([-1, 1])
    planter.set(episode, key, d, slice(step, None), values[step:] - values[step] + values[step - 1] + height)
    return key, step, step, ()


def _outlier(planter: Planter, episode: CleanEpisode, index: int, size: float) -> Place:
    step = planter.step(episode, EDGE)
    if step is None:
        return None
    if episode.frames and planter.random.random() < 0.3:
        key = planter.camera()
        episode.changed[key, step] = (planter.frame(episode, key, step) * (0.5 / size)).astype(np.uint8)
        return key, step, step, ()
    key, d = planter.dimension()
    around = episode.low[key][[step - 1, step + 1], d].astype(float)
    height = 3 * size * planter.usual(key, d) * planter.random.choice([-1, 1])
    planter.set(episode, key, d, slice(step, step + 1), around.mean() + height)
    return key, step, step, ()


def _skew(planter: Planter, episode: CleanEpisode, index: int, size: float) -> Place:
    key, lag = planter.camera(), min(5, round(2 * size))
    n = len(episode) - lag
    if n < 50:
        return None
    from_step = 0 if planter.random.random() < 0.5 else int(planter.random.integers(0, n - 40))
    rows = episode.frames[key]
    late = planter.random.random() < 0.5
    ahead, behind = rows[lag:], rows[:n]
    episode.take(np.arange(n) + (lag if late else 0))  # no frame is missing or there twice
    part = np.arange(n) >= from_step
    episode.frames[key] = np.where(part, behind, ahead) if late else np.where(part, ahead, behind)
    return key, from_step, n - 1, ()


def _constant(planter: Planter, episode: CleanEpisode, index: int, size: float) -> Place:
    key, d = planter.dimension(restless=True)
    episode.low[key][:, d] = episode.low[key][0, d]
    return key, 0, len(episode) - 1, ()


def _saturated(planter: Planter, episode: CleanEpisode, index: int, size: float) -> Place:
    key, d = planter.dimension(restless=True)
    values, n = episode.low[key][:, d].astype(float), round(8 * size)
    if len(values) < 2 * n:
        return None
    up = planter.random.random() < 0.5
    limit = planter.limits(key, d)[1 if up else 0]
    windows = np.lib.stride_tricks.sliding_window_view(values, n)
    # the highest level above which n values in a row lie, or the lowest below
    levels = windows.min(axis=1) if up else windows.max(axis=1)
    first = int(np.argmax(levels) if up else np.argmin(levels))
    moved = values + limit - levels[first]
    clipped = np.flatnonzero(moved >= limit if up else moved <= limit)
    episode.low[key][:, d] = np.minimum(moved, limit) if up else np.maximum(moved, limit)
    return key, int(clipped[0]), int(clipped[-1]), ()


def _duplicate(planter: Planter, episode: CleanEpisode, index: int, size: float) -> Place:
    other = planter.other_episode()
    copy = planter.episode(other)
    n = max(2, round(len(copy) * min(1.0, 0.6 * size)))
    first = int(planter.random.integers(0, len(copy) - n + 1))
    copy.take(np.arange(first, first + n))
    episode.low, episode.frames = copy.low, copy.frames
    return "all", 0, n - 1, (index, other)


def _idle(planter: Planter, episode: CleanEpisode, index: int, size: float) -> Place:
    n, steps = round(10 * size), np.arange(len(episode))
    if planter.random.random() < 0.5:
        episode.take(np.concatenate([np.zeros(n, int), steps]))
        return "all", 0, n - 1, ()
    episode.take(np.concatenate([steps, np.full(n, steps[-1])]))
    return "all", len(steps), len(steps) + n - 1, ()


PLANT: dict[str, Plant] = {
    "nan": _nan,
    "dropped": _dropped,
    "frozen": _frozen,
    "jump": _jump,
    "outlier": _outlier,
    "skew": _skew,
    "constant": _constant,
    "saturated": _saturated,
    "duplicate": _duplicate,
    "idle": _idle,
}
