"""Steps that are too large: jumps, which stay, and outliers, which come back.

A step is too large beyond `LIMIT` times what all but one in a thousand steps of that dimension are (`usual_steps`). On
the human PushT file the largest step of any dimension is 2.3 times that, and a jump of 3 times that must be found.
Two such steps against each other within three rows are an outlier: the rows between them are off. So is a row as far
from the mean of its neighbours.

Of cameras the same is asked of their 8 × 8 points: a frame far from both neighbours, which are close to each other.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from action_diffusion.datasets.doctor.finding import Finding
from action_diffusion.datasets.doctor.runs import named, usual_steps
from action_diffusion.datasets.doctor.survey import Survey, Values

LIMIT = 2.5
USUAL = 0.999
SPIKE_ROWS = 3
FRAME_LIMIT = 2.0
SUDDEN = ("force", "torque", "wrench", "effort")
"""In names of columns that rise at once when something is touched, so that no step is too large."""


def jumps_and_outliers(survey: Survey) -> Iterator[Finding]:
    for key, low in survey.low.items():
        if low.motion.any() and survey.n_rows > 10 and not any(word in key for word in SUDDEN):
            yield from _of_key(survey, key, low)
    for key, camera in survey.cameras.items():
        yield from _frames(survey, key, camera.points, camera.steps)


def too_large(survey: Survey, low: Values) -> np.ndarray:
    """[N, D] whether the step to a row is."""
    return _large(survey, low, _ratio(survey, low))


def _ratio(survey: Survey, low: Values) -> np.ndarray:
    """[N, D]: steps, beside what all but one in a thousand are; 0 for dimensions without motion."""
    inner = ~survey.first
    usual = usual_steps(low.steps[inner], USUAL) if inner.any() else np.zeros(low.steps.shape[1])
    return np.where(low.motion & (usual > 0), low.steps / np.where(usual > 0, usual, 1), 0)


def _large(survey: Survey, low: Values, ratio: np.ndarray) -> np.ndarray:
    large = ratio > LIMIT
    # to and fro by nearly as much: the row is that far from the mean of its neighbours, though they are apart
    to, fro = ratio[1:-1], ratio[2:]
    back = np.sign(np.diff(low.values[:-1], axis=0)) != np.sign(np.diff(low.values[1:], axis=0))
    spikes = back & ((to + fro) / 2 > LIMIT) & (np.minimum(to, fro) > LIMIT / 2) & ~survey.first[2:, None]
    large[1:-1] |= spikes
    large[2:] |= spikes
    return large


def _of_key(survey: Survey, key: str, low: Values) -> Iterator[Finding]:
    ratio = _ratio(survey, low)
    large = _large(survey, low, ratio)
    found: dict[tuple[str, int, int], list[int]] = {}
    for d in np.flatnonzero(large.any(axis=0)):
        for kind, first, last in _sorted_out(survey, low.values[:, d], np.flatnonzero(large[:, d])):
            found.setdefault((kind, first, last), []).append(int(d))
    for (kind, first, last), dimensions in found.items():
        rows = slice(first, last + 2)
        worst = dimensions[int(np.argmax(ratio[rows, dimensions].max(axis=0)))]
        step, times = float(low.steps[rows, worst].max()), float(ratio[rows, worst].max())
        where = named(dimensions, low.raw.shape[1])
        words = f"{where}a step of {step:.4g}, {times:.3g} times what 99.9 % stay below"
        yield Finding(
            kind, key, int(survey.episode[first]), first, last, times / LIMIT, words, dimensions=tuple(dimensions)
        )


def _sorted_out(survey: Survey, values: np.ndarray, rows: np.ndarray) -> Iterator[tuple[str, int, int]]:
    """(kind, first, last) for the `rows` of one dimension before which a step is too large."""
    rest = list(map(int, rows))
    while rest:
        row = rest.pop(0)
        episode = survey.episode[row]
        start, end = int(survey.starts[episode]), int(survey.ends[episode])
        back = rest[0] if rest and rest[0] < end and rest[0] - row <= SPIKE_ROWS else None
        step = values[row] - values[row - 1]
        if back is not None and abs(values[back] - values[row - 1]) < abs(step) / 2:
            rest.pop(0)
            yield "outlier", row, back - 1
        elif end - row <= SPIKE_ROWS:  # the episode ends before it could come back
            yield "outlier", row, end - 1
        elif row - start <= SPIKE_ROWS:
            yield "outlier", start, row - 1
        else:
            yield "jump", row, row


def _frames(survey: Survey, key: str, points: np.ndarray, steps: np.ndarray) -> Iterator[Finding]:
    inner = np.flatnonzero(~survey.first[1:-1] & ~survey.first[2:]) + 1  # rows with neighbours on both sides
    if len(inner) < 10:
        return
    usual = float(usual_steps(steps[~survey.first][:, None], USUAL)[0])
    candidates = inner[np.minimum(steps[inner], steps[inner + 1]) > usual]
    for row in candidates:
        across = float(np.linalg.norm(points[row + 1] - points[row - 1]))
        off = min(steps[row], steps[row + 1]) - across
        if usual > 0 and off > FRAME_LIMIT * usual:
            words = f"a frame {off / usual:.1f} times farther from its neighbours than 99.9 % are from theirs"
            severity = off / usual / FRAME_LIMIT
            yield Finding("outlier", key, int(survey.episode[row]), int(row), int(row), severity, words)
