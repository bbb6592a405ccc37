"""Rows that are missing: the next state is where one would expect it a step later.

Two linear models of the next state are fitted on the buffer itself, from the same numbers:

    r0 = s[t+1] − model0(s[t−1], s[t], a[t−1], a[t], a[t+1])     of rows as they are
    r1 = s[t+2] − model1(s[t−1], s[t], a[t−1], a[t], a[t+2])     of rows with one left out, everywhere

For every two neighbours both are asked. Where one row is missing, model1 is right and model0 is not. Each dimension
says how much likelier the second is: with errors of Cauchy's distribution around the models' own median errors σ0, σ1

    log (1 + (r0/σ0)²) / (1 + (r1/σ1)²) + log σ0/σ1

and those that tell the two apart best are added up. A jump fits neither. Rows that go missing while nothing moves
change nothing, and are not found. Rows count in the fit by 1 / (1 + (r/σ)²)² (Geman and McClure), again and again, so
that faults do not bend the models.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from action_diffusion.datasets.doctor.finding import Finding
from action_diffusion.datasets.doctor.survey import Survey, Values, is_action

EVIDENCE = 7.0
"""The sum from which on a row is missing; natural logarithm."""
TELLS = np.log(2.0)
"""A dimension counts where its error over two steps is at least twice that over one."""
FITS = 15.0
"""A missing row explains what model1 errs by no more than so many median errors on, at the median over dimensions."""
_LEAST_ROWS = 5
"""Rows for each coefficient, below which nothing is fitted."""
_ROUNDS = 15
"""Of weighing rows and fitting again."""
_FIT_ROWS = 8_000
_MOST_STATES = 32
_RESTLESS = 0.2
_RARE = 6.0
"""σ0 is at least the error that one row in a hundred exceeds, divided by this: some things do move unexpectedly."""
_NOISE = 0.02
"""Of the error over two steps: model0 need not be better."""


class _Table(NamedTuple):
    """What the models see. states: [N, S], standardised. actions: [N, A]."""

    states: np.ndarray
    actions: np.ndarray

    def inputs(self, rows: np.ndarray, after: np.ndarray) -> np.ndarray:
        s, a = self.states, self.actions
        now = s[rows]
        parts = (now - s[rows - 1], now, a[rows] - a[rows - 1], a[rows], a[after] - a[rows], np.ones((len(rows), 1)))
        return np.concatenate(parts, axis=1)

    def moves(self, rows: np.ndarray, after: np.ndarray) -> np.ndarray:
        return np.asarray(self.states[after] - self.states[rows])


def missing_rows(survey: Survey, sound: np.ndarray) -> Iterator[Finding]:
    """Findings at the row after the gap. sound: [N], the rows to fit the models to."""
    table = _table(survey)
    first = survey.first
    after = np.flatnonzero(~first[1:-1] & ~first[2:]) + 1  # rows with one before and one after
    twice = after[:-1][np.diff(after) == 1]  # and another one after that
    if not table.states.shape[1] or sound[twice].sum() < _LEAST_ROWS * table.inputs(after[:1], after[:1]).shape[1]:
        return
    model0, model1 = _fit(table, after[sound[after]], 1), _fit(table, twice[sound[twice]], 2)
    error1 = np.abs(table.moves(twice, twice + 2) - table.inputs(twice, twice + 2) @ model1)
    inputs, moves = table.inputs(after, after + 1), table.moves(after, after + 1)
    r0, r1 = np.abs(moves - inputs @ model0), np.abs(moves - inputs @ model1)
    s1 = np.median(error1, axis=0)
    usual, rare = np.quantile(r0[sound[after]], (0.5, 0.99), axis=0)
    s0 = np.maximum(np.maximum(usual, rare / _RARE), _NOISE * s1)
    tells = np.where(s0 > 0, np.log(s1 / np.where(s0 > 0, s0, 1)), 0)
    used = tells >= max(TELLS, tells.max() / 2)
    if not used.any():
        return
    r0, r1, s0, s1 = r0[:, used], r1[:, used], s0[used], s1[used]
    evidence = (np.log1p((r0 / s0) ** 2) - np.log1p((r1 / s1) ** 2) + np.log(s0 / s1)).sum(axis=1)
    fits = np.median(r1 / s1, axis=1) < FITS
    for row, score in zip(after[(evidence > EVIDENCE) & fits] + 1, evidence[(evidence > EVIDENCE) & fits], strict=True):
        words = f"the states went on by two steps: a row is missing before this one (evidence {score:.0f} nats)"
        yield Finding("dropped", "all", int(survey.episode[row]), int(row), int(row), score / EVIDENCE, words)


def _table(survey: Survey) -> _Table:
    none = [np.zeros((survey.n_rows, 0))]
    states = [low.values[:, low.motion & (_rests(survey, low) < _RESTLESS)] for low in survey.observations.values()]
    actions = [low.values for key, low in survey.low.items() if is_action(key) and key not in survey.observations]
    joined = [np.concatenate(none + parts, axis=1)[:, :_MOST_STATES] for parts in (states, actions)]
    return _Table(*map(_standardised, joined))


def _rests(survey: Survey, low: Values) -> np.ndarray:
    """[D]: share of the rows in which a dimension stays where it was. What mostly rests tells no time."""
    steps = low.steps[~survey.first]
    return np.asarray(np.mean(steps == 0, axis=0)) if len(steps) else np.ones(low.steps.shape[1])


def _standardised(values: np.ndarray) -> np.ndarray:
    spread = values.std(axis=0)
    return np.asarray((values - values.mean(axis=0)) / np.where(spread > 0, spread, 1))


def _fit(table: _Table, rows: np.ndarray, ahead: int) -> np.ndarray:
    """Coefficients [inputs, S] of the move over `ahead` rows."""
    rows = rows[:: 1 + len(rows) // _FIT_ROWS]
    inputs, moves = table.inputs(rows, rows + ahead), table.moves(rows, rows + ahead)
    models = np.zeros((inputs.shape[1], moves.shape[1]))
    for d in range(moves.shape[1]):
        weights = np.ones(len(rows))
        for _ in range(_ROUNDS):
            weighed = inputs * weights[:, None]
            gram = weighed.T @ inputs
            gram[np.diag_indices(len(gram))] += 1e-9 * weights.sum()
            models[:, d] = np.linalg.solve(gram, weighed.T @ moves[:, d])
            error = np.abs(moves[:, d] - inputs @ models[:, d])
            scale = max(float(np.median(error)), 1e-9)
            weights = 1 / (1 + (error / scale) ** 2) ** 2
    return models
