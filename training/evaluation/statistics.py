"""How far a measured score can be trusted: intervals over starts, paired differences, and spread over seeds.

An evaluation draws N starts. Its intervals say where the mean over *all* starts lies for *this* trained
policy; they say nothing about what another training seed would give, which only several trainings show.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from action_diffusion.errors import InputError

CONFIDENCE = 0.95
RESAMPLES = 10_000
_BLOCK = 2**21
"""Resampled values held at once (16 MB)."""


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a success rate: `successes` of `n` trials, both ends in [0, 1].

    Unlike the normal approximation it stays inside [0, 1] and keeps its coverage near 0 and 1.

    Raises `InputError` unless 0 <= successes <= n and n >= 1.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"{successes} successes in {n} trials; need at least one trial and 0 <= successes <= n")
    found = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(found.low), float(found.high)


def bootstrap_interval(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap's 95 % interval of the mean of `values` [N], from 10,000 resamples.

    Values that are all equal (a single one, too) give an interval without width: the data then says nothing
    of its spread.

    Raises `InputError` where `values` is empty, has more than one axis, or holds NaN or infinity.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife" (1979).
    """
    data = _checked(values)
    return paired_interval(data, np.zeros_like(data), seed=seed)


def paired_interval(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    weights: Sequence[float] | np.ndarray | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap's 95 % interval of mean(a - b), where `a[i]` and `b[i]`, [N] each, are of one start or
    episode.

    Pairing takes away how hard each start is, so the interval is narrower than that of two separate means. weights:
    [N], above 0, of a weighted mean.

    Raises `InputError` where the lengths differ, and as `bootstrap_interval` does.
    """
    first, second = _checked(a), _checked(b)
    weight = np.ones_like(first) if weights is None else _checked(weights)
    if not len(first) == len(second) == len(weight):
        raise InputError(f"a paired interval needs the same starts: {len(first)} values against {len(second)}")
    difference = first - second
    if (difference == difference[0]).all():
        return float(difference[0]), float(difference[0])

    def mean(difference: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray:
        whole = (difference * weight).sum(axis=axis) / weight.sum(axis=axis)
        return np.asarray(whole)

    found = stats.bootstrap(
        (difference, weight),
        mean,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _BLOCK // len(difference)),
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """Summary of one number per training seed: `mean`, `sd`, `min` and `max`.

    `sd` is the sample standard deviation (n - 1), None for a single value. With the handful of trainings that
    one can afford, the range stands beside it, not an interval that pretends to more.

    Raises `InputError` as `bootstrap_interval` does.
    """
    data = _checked(values)
    return {
        "mean": float(data.mean()),
        "sd": float(data.std(ddof=1)) if len(data) > 1 else None,
        "min": float(data.min()),
        "max": float(data.max()),
    }


def _checked(values: Sequence[float] | np.ndarray) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data) or not np.isfinite(data).all():
        raise InputError(
            f"statistics need a list of at least one finite number, got {list(data.shape)} values"
            f" of which {int(np.isfinite(data).sum())} are finite"
        )
    return data
