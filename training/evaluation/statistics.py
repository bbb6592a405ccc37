"""How far a measured score can be trusted: intervals over starts, paired differences, and spread over seeds.

An evaluation draws N starts. Its intervals say where the mean over *all* starts lies for *this* trained
policy; they say nothing about what another training seed would give, which only several trainings show.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

from action_diffusion.errors import InputError

CONFIDENCE = 0.95
RESAMPLES = 10_000
_BLOCK = 2**21  # resampled values held at once (16 MB)


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a success rate: `successes` of `n` trials, both ends in [0, 1].

    Unlike the normal approximation it stays inside [0, 1] and keeps its coverage near 0 and 1.

    Raises `InputError` unless 0 <= successes <= n and n >= 1.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    if n < 1 or not 0 <= successes <= n:
        raise InputError(f"{successes} successes in {n} trials; need at least one trial and 0 <= successes <= n")
    z2 = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) ** 2
    centre = (successes + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (successes * (n - successes) / n + z2 / 4)) / (n + z2)
    # The ends are exact where nothing, or everything, succeeded; rounding alone would miss them.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def bootstrap_interval(values: Sequence[float] | np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap's 95 % interval of the mean of `values` [N], from 10,000 resamples.

    Values that are all equal (a single one, too) give an interval without width: the data then says nothing
    of its spread.

    Raises `InputError` where `values` is empty, has more than one axis, or holds NaN or infinity.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife" (1979).
    """
    data = _checked(values)
    if (data == data[0]).all():
        return float(data[0]), float(data[0])
    means = np.concatenate(list(_resampled_means(data, np.random.default_rng(seed))))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_interval(
    a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray, *, seed: int = 0
) -> tuple[float, float]:
    """The bootstrap's 95 % interval of mean(a - b), where `a[i]` and `b[i]`, [N] each, are of the same start.

    Pairing takes away how hard each start is, so the interval is narrower than that of two separate means.

    Raises `InputError` where the lengths differ, and as `bootstrap_interval` does.
    """
    first, second = _checked(a), _checked(b)
    if len(first) != len(second):
        raise InputError(f"a paired interval needs the same starts: {len(first)} values against {len(second)}")
    return bootstrap_interval(first - second, seed=seed)


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


def _resampled_means(data: np.ndarray, random: np.random.Generator) -> Iterator[np.ndarray]:
    rows = max(1, _BLOCK // len(data))
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        yield data[random.integers(len(data), size=(count, len(data)))].mean(axis=1)


def _checked(values: Sequence[float] | np.ndarray) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data) or not np.isfinite(data).all():
        raise InputError(
            f"statistics need a list of at least one finite number, got {list(data.shape)} values"
            f" of which {int(np.isfinite(data).sum())} are finite"
        )
    return data
