"""Cameras that are early or late beside the states, whatever they show.

A linear model tells the states from the camera's 8 × 8 points; it is fitted on one half of the episodes and asked on
the other, and the other way round. Compared with the states of 5 rows before up to 5 rows after, its error is smallest
at the lag that the camera has:

    e[t, L] = Σ_d (model_d(points[t]) − s_d[t + L])² / σ_d²       σ_d: the model's median error where L is the usual lag

over the dimensions that the points tell well. First for the whole buffer, with a model for each lag: a camera that
comes late in every episode. Then for each episode, for the rows in which another lag than the usual one is better by
far: a clock that was off, or frames that went missing on the way.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from action_diffusion.datasets.doctor.finding import Finding
from action_diffusion.datasets.doctor.survey import Camera, Survey

LAGS = 5
"""Rows before and after that are compared."""
GAIN = 60.0
"""How much the sum of e over the rows must be smaller at the other lag."""
RATIO = 2.0
"""And how many times, on average over the rows."""
LEAST_ROWS = 20
WHOLE = 0.7
"""Share of an episode's rows from which on all of it is said to be off."""
TOLD = 0.5
"""Share of a dimension's standard deviation that the model's median error must stay below."""
_CAP = 50.0
_RIDGES = (1e-7, 1e-5, 1e-3)
_BLOCK = 4096


def skews(survey: Survey) -> Iterator[Finding]:
    targets = [low.values[:, low.motion] for low in survey.observations.values()]
    if not targets or not survey.cameras:
        return
    states = np.concatenate(targets, axis=1)
    spread = states.std(axis=0)
    states = (states - states.mean(axis=0)) / np.where(spread > 0, spread, 1)
    inner = _inner_rows(survey)
    for key, camera in survey.cameras.items():
        if len(inner) > 4 * camera.points.shape[1]:
            yield from _of_camera(survey, key, camera, states, inner)


def _inner_rows(survey: Survey) -> np.ndarray:
    """Rows whose episode goes on for `LAGS` rows before and after."""
    rows = np.arange(survey.n_rows)
    after = rows - survey.starts[survey.episode] >= LAGS
    return rows[after & (survey.ends[survey.episode] - rows > LAGS)]


def _of_camera(survey: Survey, key: str, camera: Camera, states: np.ndarray, rows: np.ndarray) -> Iterator[Finding]:
    # Episodes in turns; parts of 50 rows where there are few of them.
    folds = survey.episode % 2 if len(survey.ends) >= 4 else np.arange(survey.n_rows) // 50 % 2
    told = _Told(camera.points, states, rows, folds)
    usual = told.best_lag()
    if usual:
        words = f"in all episodes the camera fits the states {abs(usual)} rows {'later' if usual > 0 else 'earlier'}"
        words += f" best: it is {'early' if usual > 0 else 'late'} by {abs(usual)}"
        yield Finding("skew", key, None, 0, survey.n_rows - 1, float(abs(usual)), words, lag=usual)
    errors = told.errors(usual)  # [rows, lags]
    for episode in range(len(survey.ends)):
        of_episode = np.flatnonzero(survey.episode[rows] == episode)
        found = _other_lag(errors[of_episode], usual) if len(of_episode) >= LEAST_ROWS else None
        if found is None:
            continue
        lag, first, last, gain = found
        span = int(rows[of_episode[first]]), int(rows[of_episode[last]])
        if last - first + 1 >= WHOLE * len(of_episode):
            span = int(survey.starts[episode]), int(survey.ends[episode] - 1)
        words = f"the camera is {abs(lag)} rows {'early' if lag > 0 else 'late'} beside the states"
        yield Finding("skew", key, episode, *span, gain / GAIN, words, lag=lag)


class _Told:
    """States as the points tell them, for each lag; from models of the other fold."""

    def __init__(self, points: np.ndarray, states: np.ndarray, rows: np.ndarray, folds: np.ndarray) -> None:
        self._points, self._states, self._rows, self._folds = points, states, rows, folds
        size = points.shape[1] + 1
        self._grams = np.zeros((2, size, size))
        self._products = np.zeros((2, 2 * LAGS + 1, size, states.shape[1]))
        for part in self._parts():
            for fold in (0, 1):
                chosen = part[folds[part] == fold]
                inputs = self._inputs(chosen)
                self._grams[fold] += inputs.T @ inputs
                for lag in range(-LAGS, LAGS + 1):
                    self._products[fold, lag + LAGS] += inputs.T @ states[chosen + lag]
        scores = [float(np.median(np.abs(self._residuals(0, 0, ridge)))) for ridge in _RIDGES]
        self._ridge = _RIDGES[int(np.argmin(scores))]

    def best_lag(self) -> int:
        """The lag at which the models err least; 0 unless another is clearly better."""
        median = {lag: np.median(np.abs(self._residuals(lag, lag)), axis=0) for lag in range(-LAGS, LAGS + 1)}
        told = np.min(list(median.values()), axis=0) < TOLD
        if not told.any():
            return 0
        score = {lag: float(np.log(np.maximum(error[told], 1e-9)).mean()) for lag, error in median.items()}
        best = min(score, key=lambda lag: score[lag])
        return best if score[0] - score[best] > np.log(1.1) else 0

    def errors(self, usual: int) -> np.ndarray:
        """e [rows, lags], capped; zeros where the points tell nothing."""
        size = np.median(np.abs(self._residuals(usual, usual)), axis=0)
        told = size < TOLD
        errors = np.zeros((len(self._rows), 2 * LAGS + 1))
        for lag in range(-LAGS, LAGS + 1) if told.any() else ():
            error = (self._residuals(usual, lag)[:, told] / np.maximum(size[told], 1e-9)) ** 2
            errors[:, lag + LAGS] = np.minimum(error, _CAP).sum(axis=1) / max(1, told.sum()) ** 0.5
        return errors

    def _residuals(self, fitted: int, compared: int, ridge: float | None = None) -> np.ndarray:
        """[rows, S]: the models fitted at one lag, compared with the states at another."""
        models = self._models(fitted, ridge or self._ridge)
        residuals = np.empty((len(self._rows), self._states.shape[1]))
        done = 0
        for part in self._parts():
            inputs = self._inputs(part)
            told = np.where((self._folds[part] == 0)[:, None], inputs @ models[1], inputs @ models[0])
            residuals[done : done + len(part)] = told - self._states[part + compared]
            done += len(part)
        return residuals

    def _models(self, lag: int, ridge: float) -> np.ndarray:
        """[2, points + 1, S]: of each fold."""
        models = []
        for fold in (0, 1):
            gram = self._grams[fold].copy()
            gram[np.diag_indices(len(gram))] += ridge * np.trace(gram) / len(gram)
            models.append(np.linalg.solve(gram, self._products[fold, lag + LAGS]))
        return np.stack(models)

    def _parts(self) -> Iterator[np.ndarray]:
        for i in range(0, len(self._rows), _BLOCK):
            yield self._rows[i : i + _BLOCK]

    def _inputs(self, rows: np.ndarray) -> np.ndarray:
        points = np.asarray(self._points[rows], np.float64)
        return np.concatenate([points, np.ones((len(rows), 1))], axis=1)


def _other_lag(errors: np.ndarray, usual: int) -> tuple[int, int, int, float] | None:
    """(lag, first, last, gain) of the stretch of `errors` [T, lags] where another lag than `usual` is best by far."""
    best = None
    for lag in range(-LAGS, LAGS + 1):
        if lag == usual:
            continue
        gains = errors[:, usual + LAGS] - errors[:, lag + LAGS]
        first, last, gain = _best_stretch(gains)
        here, there = errors[first : last + 1, usual + LAGS], errors[first : last + 1, lag + LAGS]
        enough = last - first + 1 >= LEAST_ROWS and gain > GAIN and here.sum() > RATIO * there.sum()
        if enough and (best is None or gain > best[3]):
            best = lag, first, last, gain
    return best


def _best_stretch(gains: np.ndarray) -> tuple[int, int, float]:
    """First and last index of the consecutive `gains` [T] with the largest sum, and that sum."""
    sums = np.concatenate([[0.0], np.cumsum(gains)])
    lowest = np.minimum.accumulate(sums)
    last = int(np.argmax(sums[1:] - lowest[:-1]))
    first = int(np.argmin(sums[: last + 1]))
    return first, last, float(sums[last + 1] - sums[first])
