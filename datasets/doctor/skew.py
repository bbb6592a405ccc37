"""Cameras that are early or late beside the states, whatever they show.

A linear model tells the states from the camera's 8 × 8 points; it is fitted on one half of the episodes and asked on
the other, and the other way round. Compared with the states of 5 rows before up to 5 rows after, its error is smallest
at the lag that the camera has:

    e[t, L] = Σ_d (model_d(points[t]) − s_d[t + L])² / σ_d²       σ_d: the model's median error where L is the usual lag

over the dimensions that tell lags best: of which the error grows most from the usual lag to 2 rows off. First for the
whole buffer, with a model for each lag: a camera that comes late in every episode. Then for each episode, for the rows
in which another lag than the usual one is better by far: a clock that was off, or frames that went missing on the way.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from action_diffusion.datasets.doctor.finding import Finding
from action_diffusion.datasets.doctor.survey import CameraColumn, Survey, is_action

LAGS = 5
"""Rows before and after that are compared."""
GAIN = 120.0
"""How much the sum of e over the rows must be smaller at the other lag."""
RATIO, RATIO_SHORT = 1.5, 2.0
"""And how many times, on average over the rows."""
USUAL = 1.6
"""Times e's usual mean that it may have at the other lag: the states fit there, and do not only fit less badly."""
GROWTH = 0.85
"""The least growth of the error over 2 rows (natural logarithm), below which the models know too little to tell."""
LEAST_ROWS = 30
"""With another lag by 2 or more; by 1 it must be all of an episode."""
LONG = 50
"""Rows from which on the error may be twice that, and must be less smaller, where all of an episode is off: of what the
camera shows in one episode the models may tell less."""
WHOLE = 0.7
"""Share of an episode's rows from which on all of it is said to be off."""
TOLD = 0.5
"""Share of a dimension's standard deviation that the model's median error must stay below."""
_CAP = 50.0
_RIDGES = (1e-8, 1e-6, 1e-4)
_KEPT = (0.9,)
"""Share of the rows, those told best, to which the models are fitted again."""
_BLOCK = 4096
_SOME = 10_000
"""Rows that the usual lag is found on."""


def skews(survey: Survey, sound: np.ndarray) -> Iterator[Finding]:
    """sound: [N], the rows to fit the models to."""
    # Actions run ahead of what is seen, and do not tell what a clock does.
    targets = [low.values[:, low.motion] for key, low in survey.observations.items() if not is_action(key)]
    if not targets or not survey.cameras:
        return
    states = np.concatenate(targets, axis=1)
    spread = states.std(axis=0)
    states = (states - states.mean(axis=0)) / np.where(spread > 0, spread, 1)
    inner = _inner_rows(survey)
    for key, camera in survey.cameras.items():
        if sound[inner].sum() > 4 * camera.points.shape[1]:
            yield from _of_camera(survey, key, camera, states, inner, sound)


def _inner_rows(survey: Survey) -> np.ndarray:
    """Rows whose episode goes on for `LAGS` rows before and after."""
    rows = np.arange(survey.n_rows)
    after = rows - survey.starts[survey.episode] >= LAGS
    chosen: np.ndarray = rows[after & (survey.ends[survey.episode] - rows > LAGS)]
    return chosen


def _of_camera(
    survey: Survey, key: str, camera: CameraColumn, states: np.ndarray, rows: np.ndarray, sound: np.ndarray
) -> Iterator[Finding]:
    # Episodes in turns; parts of 50 rows where there are few of them.
    folds = survey.episode % 2 if len(survey.ends) >= 4 else np.arange(survey.n_rows) // 50 % 2
    told = _Told(camera.points, states, rows, folds, sound)
    usual = told.best_lag()
    if usual:
        words = f"in all episodes the camera is {abs(usual)} rows {'early' if usual > 0 else 'late'} beside the states"
        yield Finding("skew", key, None, 0, survey.n_rows - 1, float(abs(usual)), words, lag=usual)
    errors, _ = told.errors(rows, usual)
    usually = errors[sound[rows]].mean(axis=0)
    if _growth(usually[:, None], usual)[0] < GROWTH:
        return
    level = USUAL * float(usually[usual + LAGS])
    for episode in range(len(survey.ends)):
        of_episode = np.flatnonzero(survey.episode[rows] == episode)
        found = _other_lag(errors[of_episode], usual, level) if len(of_episode) >= LEAST_ROWS else None
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

    def __init__(
        self, points: np.ndarray, states: np.ndarray, rows: np.ndarray, folds: np.ndarray, sound: np.ndarray
    ) -> None:
        self._points, self._states, self._rows, self._folds = points, states, rows, folds
        self._ridge = _RIDGES[0]
        kept = rows[sound[rows]]
        self._fit(kept)
        growths = []
        for self._ridge in _RIDGES:
            growths.append(self.errors(kept[:: 1 + len(kept) // _SOME], 0)[1])
        self._ridge = _RIDGES[int(np.argmax(growths))]
        for share in _KEPT:
            lag = self.best_lag()
            error = np.abs(self._told(kept, lag) - states[kept + lag])
            off = np.log1p((error / np.maximum(np.median(error, axis=0), 1e-9)) ** 2).sum(axis=1)
            self._fit(kept[off <= np.quantile(off, share)])

    def _fit(self, rows: np.ndarray) -> None:
        """Sums for the models of both folds and every lag, over `rows`."""
        size = self._points.shape[1] + 1
        self._grams = np.zeros((2, size, size))
        self._products = np.zeros((2, 2 * LAGS + 1, size, self._states.shape[1]))
        for part in (rows[i : i + _BLOCK] for i in range(0, len(rows), _BLOCK)):
            for fold in (0, 1):
                chosen = part[self._folds[part] == fold]
                inputs = self._inputs(chosen)
                self._grams[fold] += inputs.T @ inputs
                for lag in range(-LAGS, LAGS + 1):
                    self._products[fold, lag + LAGS] += inputs.T @ self._states[chosen + lag]

    def best_lag(self) -> int:
        """The lag at which the models err least; 0 unless another is clearly better."""
        some = self._rows[:: 1 + len(self._rows) // _SOME]
        lags = range(-LAGS, LAGS + 1)
        median = {lag: np.median(np.abs(self._told(some, lag) - self._states[some + lag]), axis=0) for lag in lags}
        told = np.min(list(median.values()), axis=0) < TOLD
        if not told.any():
            return 0
        score = {lag: float(np.log(np.maximum(error[told], 1e-9)).mean()) for lag, error in median.items()}
        best = min(score, key=lambda lag: score[lag])
        return best if score[0] - score[best] > np.log(1.1) else 0

    def errors(self, rows: np.ndarray, usual: int) -> tuple[np.ndarray, float]:
        """e [rows, lags], capped, and by how much the logarithm of its mean grows over 2 rows off the usual lag."""
        model = self._told(rows, usual)
        size = np.median(np.abs(model - self._states[rows + usual]), axis=0)
        told = np.flatnonzero(size < TOLD)
        errors = np.zeros((len(rows), 2 * LAGS + 1, len(told)))
        for lag in range(-LAGS, LAGS + 1) if len(told) else ():
            error = (model[:, told] - self._states[rows + lag][:, told]) / np.maximum(size[told], 1e-9)
            errors[:, lag + LAGS] = np.minimum(error**2, _CAP)
        growth = _growth(errors.mean(axis=0), usual)
        best = growth >= max(0.05, growth.max(initial=0) / 2)
        joined = np.asarray(errors[:, :, best].sum(axis=2) / max(1, best.sum()) ** 0.5)
        return joined, float(_growth(joined.mean(axis=0)[:, None], usual)[0])

    def _told(self, rows: np.ndarray, lag: int, ridge: float | None = None) -> np.ndarray:
        """States at `rows` + `lag` [rows, S] as the other fold's model tells them."""
        models = self._models(lag, ridge or self._ridge)
        told = np.empty((len(rows), self._states.shape[1]))
        for first in range(0, len(rows), _BLOCK):
            part = rows[first : first + _BLOCK]
            for fold in (0, 1):
                chosen = np.flatnonzero(self._folds[part] == fold)
                told[first + chosen] = self._inputs(part[chosen]) @ models[1 - fold]
        return told

    def _models(self, lag: int, ridge: float) -> np.ndarray:
        """[2, points + 1, S]: of each fold."""
        models = []
        for fold in (0, 1):
            gram = self._grams[fold].copy()
            gram[np.diag_indices(len(gram))] += ridge * np.trace(gram) / len(gram)
            models.append(np.linalg.solve(gram, self._products[fold, lag + LAGS]))
        return np.stack(models)

    def _inputs(self, rows: np.ndarray) -> np.ndarray:
        points = np.asarray(self._points[rows], np.float64)
        return np.concatenate([points, np.ones((len(rows), 1))], axis=1)


def _growth(mean: np.ndarray, usual: int) -> np.ndarray:
    """mean: [lags, D], errors. → [D]: log of those 2 rows off the usual lag, over those at it."""
    place = usual + LAGS
    beside = (mean[max(0, place - 2)] + mean[min(2 * LAGS, place + 2)]) / 2
    return np.asarray(np.log(np.maximum(beside, 1e-9) / np.maximum(mean[place], 1e-9)))


def _other_lag(errors: np.ndarray, usual: int, level: float) -> tuple[int, int, int, float] | None:
    """(lag, first, last, gain) of the stretch of `errors` [T, lags] where another lag than `usual` is best by far, with
    errors of `level` at most."""
    best = None
    for lag in range(-LAGS, LAGS + 1):
        if lag == usual:
            continue
        gains = errors[:, usual + LAGS] - errors[:, lag + LAGS]
        first, last, gain = _best_stretch(gains)
        here, there = errors[first : last + 1, usual + LAGS], errors[first : last + 1, lag + LAGS]
        n = last - first + 1
        most, ratio = (level, RATIO_SHORT) if n < max(LONG, WHOLE * len(errors)) else (2 * level, RATIO)
        least = LEAST_ROWS if abs(lag - usual) > 1 else WHOLE * len(errors)
        enough = (
            n >= max(LEAST_ROWS, least) and gain > GAIN and here.sum() > ratio * there.sum() and there.mean() < most
        )
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
