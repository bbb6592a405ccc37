"""Delays from a slow sine of the arm: of the arm behind its setpoints, and of pictures behind the arm. Arrays only.

    setpoints  ╱╲  ╱╲  ╱╲       at the times at which they were sent
    states      ╱╲  ╱╲  ╱╲      at their own times: what all else is relative to
                ├┤ total = delay, in which nothing happens yet, + lag, in which the arm follows as its dynamics let it
    pictures      ╱╲  ╱╲  ╱╲    at the times of their stamps
                  ├┤ by which the stamps are late

Nothing is known of the pictures but that they depend on where the arm is: their leading principal components are
regressed on the arm's position at the stamp less a lag, and the lag is right with which least is left over: with
another, the same place looks different to and fro. Sign, scale and distortion do not matter.

Delay and lag are told apart by a model: the state is the setpoint as a linear system of second order with a dead time
has it. The total needs no model. All times in s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from einops import reduce
from numpy.polynomial.chebyshev import chebvander
from scipy.optimize import OptimizeResult, least_squares, minimize_scalar
from scipy.signal import lfilter

EARLIEST, LATEST = -0.1, 0.6
"""Between which lags are looked for."""
FINE = 0.001
"""Between two values of a simulated follower."""
SMOOTH = 0.02
"""As long as a setpoint holds, or longer: over which they are averaged where steps must be slopes."""
CELLS = 64
"""Pictures are made smaller, to at most so many pixels a side."""
N_COMPONENTS, DEGREE = 6, 8
"""Principal components of the pictures, and the degree of the polynomials of the arm's position that explain them."""
LEAST_DAMPED = 1.0
"""The largest a / b² of a follower 1 / (1 + b s + a s²): half the critical damping. 0.25: critical. 0: first order."""
_GRID = 0.005
_FLOOR = 1e-9


class Signal(NamedTuple):
    """values [n, …] at times t [n], ascending."""

    t: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A time: the median over the periods of the motion, the least and the most of them."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Actuation:
    """From when a setpoint [A] was sent until the arm is there.

    Attributes:
        delay: until the arm begins to follow: dead time, by the model.
        total: until it is there, for the slow motion that was measured; `lag` is the rest.
        follower: (b, a) of the model: 1 / (1 + b s + a s²).
        unexplained: what the model leaves over, as a share of the motion (both root mean square).
        predicted: the model's states, at the times of the measured ones; NaN where they were not looked at.
    """

    delay: Estimate
    total: Estimate
    follower: tuple[float, float]
    unexplained: float
    predicted: np.ndarray

    @property
    def lag(self) -> float:
        return self.total.median - self.delay.median


@dataclass(frozen=True, kw_only=True)
class Sight:
    """How late a camera's stamps are.

    Attributes:
        late: by how much, against the arm's own times.
        frames: 5 % and 95 % of single frames; their noise included, so that jitter is at most this.
        seen: share of the best component's variance that the arm's position explains, in [0, 1].
        lags, costs: what was tried, and what was left over (mean logarithm of variances).
        t, component, predicted: frames, by their stamps; the component that is explained best, and what explains it.
    """

    late: Estimate
    frames: tuple[float, float]
    seen: float
    lags: np.ndarray
    costs: np.ndarray
    t: np.ndarray
    component: np.ndarray
    predicted: np.ndarray


def small(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] → float32 [at most CELLS²]: grey, by the means of square blocks."""
    height, width = image.shape[:2]
    block = -(-max(height, width) // CELLS)
    rows, columns = height // block, width // block
    cut = image[: rows * block, : columns * block].astype(np.float32)
    means: np.ndarray = reduce(cut, "(r b) (c d) k -> (r c)", "mean", b=block, d=block)
    return means


def actuation(sent: Signal, state: Signal, periods: Sequence[float]) -> Actuation:
    """Delay and lag of `state` [n] behind the setpoints `sent` [m], each of which holds until the next.

    Before the first of them the arm was at rest there. periods: the times at which the sine's periods begin, and the
    last one's end, without those in which it fades in or out.
    """
    grid = np.arange(sent.t[0] - LATEST, state.t[-1] + FINE, FINE)
    held, smooth = _held(sent, grid, FINE), _held(sent, grid, SMOOTH)
    inside = (state.t >= sent.t[0]) & (state.t <= periods[-1])
    t, measured = state.t[inside], state.values[inside]

    def scaled(lag: float, path: np.ndarray) -> np.ndarray:
        """The states that `path`, later by `lag`, leaves to be expected: but for gain and offset, which are fitted."""
        follows = np.interp(t - lag, grid, path)
        design = np.stack([follows, np.ones_like(follows)], axis=1)
        return np.asarray(design @ np.linalg.lstsq(design, measured, rcond=None)[0])

    def left(lag: float) -> float:
        return float(np.log(np.mean((measured - scaled(lag, smooth)) ** 2) + _FLOOR * np.var(measured)))

    def residual(x: np.ndarray) -> np.ndarray:
        result: np.ndarray = scaled(x[0], _followed(held, x[1], x[2] * x[1] ** 2)) - measured
        return result

    total, _, _ = _least(left)
    bounds = ([0.0, 0.0, 0.0], [LATEST, LATEST, LEAST_DAMPED])
    some = max(total, 0.01)
    starts = [[share * some, (1 - share) * some, LEAST_DAMPED / 4] for share in (0.02, 0.1, 0.3, 0.5, 0.7, 0.9)]
    best = min((least_squares(residual, x, x_scale=[0.01, 0.01, 0.1], bounds=bounds) for x in starts), key=_cost)
    delay, b, a = float(best.x[0]), float(best.x[1]), float(best.x[2] * best.x[1] ** 2)
    path = _followed(smooth, b, a)
    return Actuation(
        delay=_by_period(t, measured, lambda lag: scaled(lag, path), delay, periods),
        total=_by_period(t, measured, lambda lag: scaled(lag, smooth), total, periods),
        follower=(b, a),
        unexplained=float(np.sqrt(np.mean(best.fun**2)) / np.std(measured)),
        predicted=np.interp(state.t, t, scaled(delay, path), left=np.nan, right=np.nan),
    )


def _cost(fit: OptimizeResult) -> float:
    return float(fit.cost)


def _held(sent: Signal, grid: np.ndarray, width: float) -> np.ndarray:
    """What was sent last, at the times of `grid`: the mean of `width` seconds around each, so that no time shifts."""
    t = np.concatenate([[grid[0] - width], sent.t, [grid[-1] + width]])
    values = np.concatenate([sent.values[:1], sent.values])
    area = np.concatenate([[0.0], np.cumsum(values * np.diff(t))])
    return np.asarray((np.interp(grid + width / 2, t, area) - np.interp(grid - width / 2, t, area)) / width)


def _followed(path: np.ndarray, b: float, a: float) -> np.ndarray:
    """`path`, every FINE seconds, as 1 / (1 + b s + a s²) follows it from rest (Tustin)."""
    first, second = 2 * b / FINE, 4 * a / FINE**2
    below = [1 + first + second, 2 - 2 * second, 1 - first + second]
    result: np.ndarray = path[0] + lfilter([1.0, 2.0, 1.0], below, path - path[0])
    return result


def camera(frames: Signal, state: Signal, periods: Sequence[float]) -> Sight:
    """How late the stamps of `frames` [n, pixels] are, against `state` [m]. periods: as for `actuation`.

    Raises `ValueError` for fewer than 3 frames for each number that is fitted, and where they are all alike.
    """
    inside = (frames.t >= periods[0]) & (frames.t <= periods[-1])
    t = frames.t[inside]
    if len(t) < 3 * (DEGREE + 1):
        raise ValueError(f"{len(t)} frames during the motion: at least {3 * (DEGREE + 1)} are needed")
    components = _components(frames.values[inside])
    ends = float(state.values.min()), float(state.values.max())

    def basis(lag: float) -> np.ndarray:
        at = np.interp(t - lag, state.t, state.values)
        return chebvander(2 * (at - ends[0]) / max(ends[1] - ends[0], 1e-12) - 1, DEGREE)

    def fitted(lag: float) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients [DEGREE + 1, K], and what they leave over: variances [K]."""
        design = basis(lag)
        coefficients = np.linalg.lstsq(design, components, rcond=None)[0]
        return coefficients, np.mean((components - design @ coefficients) ** 2, axis=0)

    late, lags, costs = _least(lambda lag: float(np.log(fitted(lag)[1] + _FLOOR).mean()))
    coefficients, variances = fitted(late)
    scale = 1 / np.sqrt(variances + _FLOOR)
    single, weight = _shifts(components * scale, lambda lag: basis(lag) @ coefficients * scale, late)
    best = int(variances.argmin())
    return Sight(
        late=_by_period(t, components * scale, lambda lag: basis(lag) @ coefficients * scale, late, periods),
        frames=_ends(single[weight >= np.median(weight)]),
        seen=float(1 - variances[best]),
        lags=lags,
        costs=costs,
        t=t,
        component=components[:, best],
        predicted=(basis(late) @ coefficients)[:, best],
    )


def _components(pictures: np.ndarray) -> np.ndarray:
    """The leading principal components of `pictures` [n, pixels], with variance 1: [n, K]."""
    left, strength, _ = np.linalg.svd(pictures - pictures.mean(axis=0), full_matrices=False)
    if not strength[0] > 0:
        raise ValueError("all frames are alike")
    kept = left[:, :N_COMPONENTS][:, strength[:N_COMPONENTS] > 1e-6 * strength[0]]
    return np.asarray(kept * np.sqrt(len(pictures)), dtype=np.float64)


def _least(cost: Callable[[float], float]) -> tuple[float, np.ndarray, np.ndarray]:
    """The lag with the least cost: by a grid, then between its neighbours. Also returns the grid and its costs."""
    lags = np.arange(EARLIEST, LATEST + _GRID / 2, _GRID)
    costs = np.array([cost(lag) for lag in lags])
    best = float(lags[costs.argmin()])
    found = minimize_scalar(cost, bounds=(best - _GRID, best + _GRID), method="bounded", options={"xatol": 1e-5})
    return float(found.x), lags, costs


def _shifts(measured: np.ndarray, predict: Callable[[float], np.ndarray], lag: float) -> tuple[np.ndarray, np.ndarray]:
    """The lag that each sample [n, …] has by itself, in first order, and the weight of what it says."""
    n = len(measured)
    slope = ((predict(lag + FINE) - predict(lag - FINE)) / (2 * FINE)).reshape(n, -1)
    says = (slope * (measured - predict(lag)).reshape(n, -1)).sum(axis=1)
    weight = (slope**2).sum(axis=1)
    return lag + says / np.maximum(weight, 1e-300), weight


def _by_period(
    t: np.ndarray, measured: np.ndarray, predict: Callable[[float], np.ndarray], lag: float, periods: Sequence[float]
) -> Estimate:
    """`lag` once more, from each period by itself: the median is that of a motion in which one was disturbed."""
    single, weight = _shifts(measured, predict, lag)
    found = []
    for start, end in pairwise(periods):
        inside = (t >= start) & (t < end)
        if weight[inside].sum() > 0:
            found.append(float(np.average(single[inside], weights=weight[inside])))
    return Estimate(float(np.median(found)), min(found), max(found)) if found else Estimate(lag, lag, lag)


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [5, 95])
    return float(low), float(high)
