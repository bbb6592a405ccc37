"""Columns that tell the action of their own row: a policy that sees one has a perfect error, and nothing to see on the
arm.

A linear model tells every dimension of the action from the column, fitted on every second episode and asked on the
others. What the action of the row before tells as well is no leak: errors are compared with the action's spread, and
with its step from row to row, and a column that repeats the action of the row before is known by that.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from action_diffusion.datasets.doctor.finding import Finding
from action_diffusion.datasets.doctor.survey import Survey

TOLD = 1e-4
"""Of the mean square of the action's spread, and of its step, that the error may be: R² above 0.9999."""
_SAME = 1 - 1e-7
"""Correlation of what is the same but for unit and offset, in float32."""
_LEAST_ROWS = 5
"""For each coefficient."""
_FIT_ROWS = 20_000
_MOST = 512
"""Dimensions of a column that are looked at."""


def leaks(survey: Survey, action: str = "action") -> Iterator[Finding]:
    """A finding for each column that foretells dimensions of `action`."""
    if action not in survey.low:
        return
    commands = survey.low[action].values
    moving = np.flatnonzero(np.ptp(commands, axis=0) > 0)
    for key, low in survey.low.items():
        values = low.values[:, np.ptp(low.values, axis=0) > 0][:, :_MOST]
        if key == action or not values.shape[1] or not len(moving):
            continue
        told = moving[_told(values, commands[:, moving], survey)]
        if len(told):
            all_of_it = "all dimensions" if len(told) == len(moving) else f"dimension {', '.join(map(str, told[:6]))}"
            words = f"tells {all_of_it} of {action} in the same row"
            rows = 0, survey.n_rows - 1
            yield Finding("leak", key, None, *rows, 1.0, words, dimensions=tuple(map(int, told)))


def _told(values: np.ndarray, commands: np.ndarray, survey: Survey) -> np.ndarray:
    """[A]: which dimensions of the action `values` [N, D] tell."""
    inner = np.flatnonzero(~survey.first)
    inner = inner[:: 1 + len(inner) // _FIT_ROWS]
    if not len(inner):
        return np.zeros(commands.shape[1], bool)
    same: np.ndarray = _correlation(values[inner], commands[inner]).max(axis=0) > _SAME
    before = _correlation(values[inner], commands[inner - 1])
    if (before.max(axis=1) > _SAME).all():  # every dimension is one of the action before: the same now, or still
        repeated: np.ndarray = same & (before.max(axis=0) <= _SAME)
        return repeated
    # Episodes in turns; parts of rows where there is one.
    fold = survey.episode[inner] % 2 if len(survey.ends) > 1 else np.arange(len(inner)) * 10 // len(inner) % 2
    if min(np.sum(fold == 0), np.sum(fold == 1)) < _LEAST_ROWS * (1 + max(values.shape[1], commands.shape[1])):
        return same
    step = np.mean((commands[inner] - commands[inner - 1]) ** 2, axis=0)
    least = TOLD * np.minimum(commands[inner].var(axis=0), step)
    error, before_error = (
        _error(rows, commands[inner], fold)
        for rows in (_standardised(values)[inner], _standardised(commands)[inner - 1])
    )
    told: np.ndarray = same | ((error < least) & ~(before_error < least))
    return told


def _error(rows: np.ndarray, commands: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Mean squares [A] of what a linear model of `rows` [n, D] errs by, fitted on one part and asked on the other."""
    inputs = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    wrong = np.zeros_like(commands)
    for part in (0, 1):
        model = np.linalg.lstsq(inputs[fold != part], commands[fold != part], rcond=None)[0]
        wrong[fold == part] = commands[fold == part] - inputs[fold == part] @ model
    return np.asarray(np.mean(wrong**2, axis=0))


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[D, A], absolute; 0 for what does not change."""
    return np.asarray(np.abs(_standardised(one).T @ _standardised(other)) / len(one))


def _standardised(values: np.ndarray) -> np.ndarray:
    spread = values.std(axis=0)
    return np.asarray((values - values.mean(axis=0)) / np.where(spread > 0, spread, 1))
