"""Episodes that are there twice, as a whole or in part: rows are compared by a hash of all their numbers.

A copy at another rate has other rows. There the way through the columns is compared, point by point along it:

    long   ·──·──·──·──·──·──·──·──·       a row of the short one, k, is at k · step of the long one,
    short  ·─────·─────·─────·             (n_long − 1) / n_short < step ≤ (n_long − 1) / (n_short − 1)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np

from action_diffusion.datasets.doctor.finding import Finding
from action_diffusion.datasets.doctor.survey import Survey

SHARED = 0.5
"""Of the shorter episode's rows."""
RESAMPLED, CLOSE, SAME_PLACES = 1.2, 0.025, 0.8
"""A copy at another rate is so many times longer or shorter at least, and lies at so many of its places within that
share of the columns' ranges. Of 206 demonstrations of PushT by people, no two of such lengths are closer than 0.085;
their copies at rates from a third to thrice theirs are within 0.015."""
_PLACES, _STEPS, _SHORTEST = 32, 4, 8
_MANY = 20
"""Episodes that may share a row before it counts as a common state, such as the start."""


def duplicates(survey: Survey) -> Iterator[Finding]:
    """The later of two episodes that share rows, with the first and last of those rows."""
    hashes = _hashes(survey)
    if hashes is None:
        return
    rows_of = defaultdict(list)
    order = np.argsort(hashes, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(hashes[order])) + 1)
    for group in groups:
        episodes = np.unique(survey.episode[group])
        if 1 < len(episodes) <= _MANY:
            for row in group:
                for earlier in episodes[episodes < survey.episode[row]]:
                    rows_of[int(earlier), int(survey.episode[row])].append(int(row))
    lengths = survey.ends - survey.starts
    told = Counter[int]()
    for (earlier, later), rows in sorted(rows_of.items()):
        share = len(set(rows)) / min(lengths[earlier], lengths[later])
        if share >= SHARED and len(set(rows)) > 1 and not told[later]:
            told[later] += 1
            words = f"{share:.0%} of the rows are those of episode {earlier}"
            yield Finding("duplicate", "all", later, min(rows), max(rows), share / SHARED, words)
    for earlier, later in _resampled(survey):
        if not told[later]:
            told[later] += 1
            words = f"the way of episode {earlier} at another rate: {lengths[later]} rows for {lengths[earlier]}"
            start, end = int(survey.starts[later]), int(survey.ends[later])
            yield Finding("duplicate", "all", later, start, end - 1, 1 / SHARED, words)


def _resampled(survey: Survey) -> Iterator[tuple[int, int]]:
    """Pairs of episodes of which one is the other at another rate, by the columns that move."""
    columns = [low.values[:, low.motion] for low in survey.low.values() if low.motion.any()]
    if not columns:
        return
    values = np.concatenate(columns, axis=1)
    values = values / np.maximum(np.ptp(values, axis=0), 1e-12)
    ways = [values[start:end] for start, end in zip(survey.starts, survey.ends, strict=True)]
    lengths = np.array([len(way) for way in ways])
    firsts = np.array([way[0] for way in ways])  # of copies they are the same
    for later in np.flatnonzero(lengths >= _SHORTEST):
        ratio = lengths[:later] / lengths[later]
        near = (np.abs(firsts[:later] - firsts[later]) <= CLOSE).mean(axis=1) >= SAME_PLACES
        other = (np.maximum(ratio, 1 / np.maximum(ratio, 1e-9)) >= RESAMPLED) & (lengths[:later] >= _SHORTEST)
        for earlier in np.flatnonzero(near & other):
            if _apart(*sorted((ways[earlier], ways[later]), key=len)) <= CLOSE:
                yield int(earlier), int(later)
                break


def _apart(short: np.ndarray, long: np.ndarray) -> float:
    """How far two ways [n, D] are apart at `SAME_PLACES` of the places, at the step that fits best."""
    places = np.linspace(0, len(short) - 1, _PLACES)
    here = _along(short, places)
    steps = np.linspace((len(long) - 1) / len(short), (len(long) - 1) / (len(short) - 1), _STEPS)
    far = [np.abs(_along(long, places * step) - here).max(axis=1) for step in steps]
    return float(min(np.quantile(one, SAME_PLACES) for one in far))


def _along(way: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The way [n, D] at places [K] between its rows."""
    row = np.minimum(places.astype(np.int64), len(way) - 2)
    share = (places - row)[:, None]
    between: np.ndarray = way[row] * (1 - share) + way[row + 1] * share
    return between


def _hashes(survey: Survey) -> np.ndarray | None:
    """uint64 [N] of all continuous columns, or of the cameras' points where there are none."""
    parts = [low.raw for low in survey.low.values() if low.motion.any()]
    parts = parts or [camera.points for camera in survey.cameras.values()]
    if not parts:
        return None
    random = np.random.default_rng(0)
    total = np.zeros(survey.n_rows, np.uint64)
    for part in parts:
        words = np.ascontiguousarray(part).view(np.uint8).reshape(survey.n_rows, -1).astype(np.uint64)
        factors = random.integers(1, 1 << 63, words.shape[1], dtype=np.uint64) | np.uint64(1)
        total += words @ factors  # modulo 2^64
    return total
