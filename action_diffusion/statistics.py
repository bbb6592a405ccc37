"""How far a measured score can be trusted: intervals over starts, paired differences, and spread over seeds; and how
many starts a difference needs.

An evaluation draws N starts. Its intervals say where the mean over *all* starts lies for *this* trained
policy; they say nothing about what another training seed would give, which only several trainings show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from action_diffusion.errors import InputError

CONFIDENCE = 0.95
POWER = 0.8
"""Of a test that is planned: how often it finds a difference that is there."""
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


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean of `values` [N], one for each training seed; None for a single one.

        mean ± t₀.₉₇₅,ₙ₋₁ s / √N        s: their standard deviation (N - 1)

    Of two or three values the bootstrap would be far too narrow; this is as wide as they deserve, if they are about
    normal.

    Raises `InputError` as `bootstrap_interval` does.

    Source: Student, "The probable error of a mean" (1908).
    """
    data = _checked(values)
    if len(data) == 1:
        return None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(data) - 1) * data.std(ddof=1) / math.sqrt(len(data))
    return float(data.mean() - half), float(data.mean() + half)


def paired_scores(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Scores `a` minus scores `b`, [N] each and in [0, 1], of which 1 is a success, pair by pair.

    Returns `mean_difference`, `success_difference`, and their paired 95 % intervals `mean_interval` and
    `success_interval`; and on how many pairs a is `higher`, `equal` and `lower`. Raises as `paired_interval` does.
    """
    first, second = _checked(a), _checked(b)
    interval = paired_interval(first, second)
    won, other = (first >= 1).astype(float), (second >= 1).astype(float)
    return {
        "mean_difference": float((first - second).mean()),
        "mean_interval": interval,
        "success_difference": float((won - other).mean()),
        "success_interval": paired_interval(won, other),
        **counts(first, second),
    }


def counts(first: np.ndarray, second: np.ndarray) -> dict[str, int]:
    """On how many pairs the first is `higher`, `equal`, `lower`."""
    pairs = {"higher": first > second, "equal": first == second, "lower": first < second}
    return {name: int(where.sum()) for name, where in pairs.items()}


def sign_of(interval: Sequence[float]) -> float:
    """Of a difference with this `interval`; 0 where that holds 0."""
    return 0.0 if interval[0] <= 0 <= interval[1] else interval[0]


def signed(value: float, digits: int) -> str:
    """A number as differences are written, with its sign; 0 and what rounds to it as +0."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def verdict(
    names: Sequence[str], difference: str, sure: str | None, sign: float, *, words: tuple[str, str], pairs: str
) -> str:
    """Which minus which, and what it says, in a sentence.

    sure: how sure that is ("95 % interval …"); None of a single pair. sign: of the difference, 0 where it may be
    chance. words: for a positive and a negative one. pairs: what they are.
    """
    begin = f"{names[0]} minus {names[1]}: {difference}"
    if sure is None:
        return f"{begin}; one of the {pairs} alone does not say what others would give."
    begin += f", {sure}. On these {pairs} "
    if sign == 0:
        return f"{begin}the two cannot be told apart."
    return f"{begin}{names[0]} {words[sign < 0]}."


def interval_words(interval: Sequence[float], digits: int) -> str:
    """How sure a difference is, for `verdict`."""
    return f"95 % interval {signed(interval[0], digits)} to {signed(interval[1], digits)}"


def sign_flip_test(differences: Sequence[float] | np.ndarray, *, seed: int = 0) -> float:
    """p of paired `differences` [N] where neither is better: how often chance gives a mean as far from 0.

    Each pair could then as well have come out the other way round, with the other sign. All 2^N cases are counted up
    to 13 pairs, 10,000 random ones beyond. Of successes and failures this is McNemar's exact test. Unlike the
    bootstrap, it does not take a few equal differences for certain: three of three have p = 0.25.

    Raises `InputError` as `bootstrap_interval` does.

    Source: R. A. Fisher, "The Design of Experiments" (1935), section 21.
    """
    data = _checked(differences)
    if len(data) == 1 or not data.any():
        return 1.0
    found = stats.permutation_test(
        (data,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _BLOCK // len(data)),
        random_state=np.random.default_rng(seed),
    )
    return min(1.0, float(found.pvalue))


def needed_pairs(differences: Sequence[float] | np.ndarray) -> int | None:
    """How many pairs tell a difference as large as the mean of `differences` [N] from 0, by a test at 5 % that is to
    find it in four of five cases; None where they do not say: one pair, no difference, or no spread.

        n = ((z₀.₉₇₅ + z₀.₈) s / d)² + z₀.₉₇₅² / 2        d: their mean, s: their standard deviation (N - 1)

    The last term is what the t distribution asks for beyond the normal one. d is itself uncertain, and n with it.

    Raises `InputError` as `bootstrap_interval` does.

    Source: W. C. Guenther, "Sample size formulas for normal theory t tests", The American Statistician 35 (1981).
    """
    data = _checked(differences)
    if len(data) == 1 or (data == data[0]).all() or data.mean() == 0:
        return None
    sure, strong = stats.norm.ppf((1 + CONFIDENCE) / 2), stats.norm.ppf(POWER)
    effect = float(abs(data.mean()) / data.std(ddof=1))
    return math.ceil(float(((sure + strong) / effect) ** 2 + sure**2 / 2))


def _checked(values: Sequence[float] | np.ndarray) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data) or not np.isfinite(data).all():
        raise InputError(
            f"statistics need a list of at least one finite number, got {list(data.shape)} values"
            f" of which {int(np.isfinite(data).sum())} are finite"
        )
    return data
