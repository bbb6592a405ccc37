"""Values that are no numbers, and time stamps that do not advance as they should."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from action_diffusion.datasets.doctor.finding import Finding
from action_diffusion.datasets.doctor.runs import runs_in_episodes
from action_diffusion.datasets.doctor.survey import Survey
from action_diffusion.datasets.storage.times import is_time

GAP = 1.5
"""Periods between two rows from which on a row is missing."""
JITTER = 0.3
"""Share of a period by which one row in ten may come early or late."""


def not_finite(survey: Survey) -> Iterator[Finding]:
    for key, low in survey.low.items():
        for episode, first, last in runs_in_episodes(~low.finite, survey):
            bad = ~np.isfinite(low.raw[first : last + 1])
            dimensions = np.flatnonzero(bad.any(axis=0))
            n_nan, n = int(np.isnan(low.raw[first : last + 1]).sum()), int(bad.sum())
            what = "NaN" if n_nan == n else "infinite" if not n_nan else "NaN or infinite"
            words = f"{n} values {what} in dimensions {', '.join(map(str, dimensions[:6]))}"
            yield Finding("nan", key, episode, first, last, float(n), words, dimensions=tuple(map(int, dimensions)))
    for key, camera in survey.cameras.items():
        for episode, first, last in runs_in_episodes(~camera.finite, survey):
            words = f"{last - first + 1} frames hold NaN or infinite values"
            yield Finding("nan", key, episode, first, last, float(last - first + 1), words)


def times(survey: Survey, time: np.ndarray, key: str) -> Iterator[Finding]:
    """time: [N], in any unit, increasing within an episode. Looks for gaps, steps back, and jitter."""
    steps = np.diff(time, prepend=time[:1])
    inner = ~survey.first
    period = float(np.median(steps[inner])) if inner.any() else 0.0
    if not period > 0:
        yield Finding("timing", key, None, 0, len(time) - 1, 1.0, "the time does not advance from row to row")
        return
    wrong = inner & ((steps > GAP * period) | (steps <= 0))
    for row in map(int, np.flatnonzero(wrong)):
        missing = round(steps[row] / period) - 1
        words = f"{steps[row] / period:.1f} periods after the row before: about {missing} rows are missing"
        if steps[row] <= 0:
            words = "the time goes back" if steps[row] < 0 else "the same time as the row before"
        yield Finding("timing", key, int(survey.episode[row]), row, row, abs(steps[row]) / period / GAP, words)
    for episode, (start, end) in enumerate(zip(survey.starts, survey.ends, strict=True)):
        off = np.abs(steps[start + 1 : end][~wrong[start + 1 : end]] - period) / period
        jitter = float(np.quantile(off, 0.9)) if len(off) >= 10 else 0.0
        if jitter > JITTER:
            words = f"one row in ten is {jitter:.0%} of a period early or late"
            advice = "resample the episode to even times, or drop it"
            yield Finding("timing", key, episode, int(start), int(end - 1), jitter / JITTER, words, advice)


def time_column(survey: Survey) -> tuple[str, np.ndarray] | None:
    """The first key that holds a time for each row."""
    for key, low in survey.low.items():
        if low.raw.shape[1] == 1 and low.raw.dtype.kind in "iuf" and is_time(key):
            return key, low.values[:, 0]
    return None
