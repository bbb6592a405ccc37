"""Intervals against known values, and against what must hold for any data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from action_diffusion.errors import InputError
from action_diffusion.statistics import (
    bootstrap_interval,
    needed_pairs,
    paired_interval,
    paired_scores,
    sign_flip_test,
    spread,
    t_interval,
    wilson_interval,
)

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
        (15, 50, 0.1910355350, 0.4375035046),
        (8, 10, 0.4901624715, 0.9433178485),
        (1, 3, 0.0614919447, 0.7923403992),
        (0, 50, 0.0, 0.0713475991),
        (50, 50, 0.9286524009, 1.0),
    ],
)
def test_wilson_known_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-9)


@given(n=st.integers(1, 500), data=st.data())
def test_wilson_solves_its_equation(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    rate = successes / n
    for end in wilson_interval(successes, n):
        assert 0 <= end <= 1
        # Each end p satisfies |rate - p| = z sqrt(p (1 - p) / n).
        assert abs(rate - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n), abs=1e-6)
    mirrored = wilson_interval(n - successes, n)
    assert wilson_interval(successes, n) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))


def test_t_interval_known_values() -> None:
    """scipy.stats.t.interval(0.95, n - 1, mean, scipy.stats.sem(values))"""
    assert t_interval([0.9, 0.8]) == pytest.approx((0.2146897632, 1.4853102368))
    assert t_interval([0.98, 0.94, 0.96]) == pytest.approx((0.9103172246, 1.0096827754))
    assert t_interval([0.5, 0.5]) == (0.5, 0.5)
    assert t_interval([0.5]) is None
    with pytest.raises(InputError):
        t_interval([])


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses(successes: int, n: int) -> None:
    with pytest.raises(InputError):
        wilson_interval(successes, n)


def test_bootstrap_approaches_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, size=400)
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert bootstrap_interval(values) == pytest.approx((values.mean() - half, values.mean() + half), abs=3e-4)


def test_bootstrap_known_value() -> None:
    # Means of four resampled coins are 0, 1/4, ..., 1 with weights 1, 4, 6, 4, 1 of 16: 2.5 % and 97.5 % are the ends.
    assert bootstrap_interval([0, 0, 1, 1]) == (0, 1)


@pytest.mark.slow
@given(values=SCORES, seed=st.integers(0, 9))
def test_bootstrap_is_ordered_inside_the_data_and_repeatable(values: list[float], seed: int) -> None:
    low, high = bootstrap_interval(values, seed=seed)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    assert bootstrap_interval(values, seed=seed) == (low, high)


@pytest.mark.slow
def test_bootstrap_of_many_values_goes_in_blocks() -> None:
    values = np.random.default_rng(1).uniform(size=5_000)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high


def test_pairing_takes_away_the_difficulty_of_starts() -> None:
    random = np.random.default_rng(2)
    difficulty = random.uniform(0.1, 0.9, size=50)
    a, b = difficulty + 0.05 + random.normal(0, 0.01, 50), difficulty
    low, high = paired_interval(a, b)
    assert 0.04 < low < high < 0.06
    alone = bootstrap_interval(a)
    assert alone[1] - alone[0] > 10 * (high - low)


@given(values=SCORES)
def test_a_policy_equals_itself(values: list[float]) -> None:
    assert paired_interval(values, values) == (0, 0)


def test_paired_values_must_pair() -> None:
    with pytest.raises(InputError, match="2 values against 3"):
        paired_interval([1, 2], [1, 2, 3])


def test_spread() -> None:
    assert spread([0.90, 0.92, 0.97]) == pytest.approx(
        {"mean": 0.93, "sd": math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2), "min": 0.90, "max": 0.97}
    )
    assert spread([0.9])["sd"] is None


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf], [[1.0]]])
def test_values_that_have_no_mean(values: list[float]) -> None:
    for statistic in (bootstrap_interval, spread):
        with pytest.raises(InputError, match="at least one finite number"):
            statistic(values)


def power(effect: float, n: int) -> float:
    """Of the paired t test at 5 %, two-sided: exact, by the noncentral t distribution."""
    most = stats.t.ppf(0.975, n - 1)
    shift = effect * math.sqrt(n)
    return float(stats.nct.sf(most, n - 1, shift) + stats.nct.cdf(-most, n - 1, shift))


@pytest.mark.parametrize(("effect", "n"), [(0.2, 199), (0.3, 90), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_needed_pairs_known_values(effect: float, n: int) -> None:
    """As G*Power and statsmodels' TTestPower say; one less has too little power."""
    differences = np.array([-1.0, 1.0]) / math.sqrt(2) + effect  # of standard deviation 1
    assert needed_pairs(differences) == needed_pairs(-differences) == n
    assert power(effect, n - 1) < 0.8 <= power(effect, n)


@pytest.mark.parametrize("differences", [[0.4], [0.0, 0.0], [1.0, 1.0, 1.0], [-1.0, 1.0]])
def test_needed_pairs_says_nothing_without_a_difference_or_a_spread(differences: list[float]) -> None:
    assert needed_pairs(differences) is None


@pytest.mark.parametrize(
    ("better", "worse", "equal"),
    [(3, 0, 0), (3, 0, 7), (6, 0, 0), (6, 1, 3), (2, 2, 1), (0, 0, 4), (0, 9, 0), (1, 0, 0)],
)
def test_the_sign_flip_test_is_mcnemars_of_successes(better: int, worse: int, equal: int) -> None:
    differences = [1.0] * better + [-1.0] * worse + [0.0] * equal
    known = stats.binomtest(better, better + worse, 0.5).pvalue if better + worse else 1.0
    assert sign_flip_test(differences) == pytest.approx(known, abs=1e-9)


def test_the_sign_flip_test_of_many_pairs_is_the_t_test_s() -> None:
    differences = np.random.default_rng(0).normal(0.25, 1, size=60)
    assert sign_flip_test(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.01)


def test_paired_scores() -> None:
    found = paired_scores([1.0, 1.0, 0.5, 0.0], [1.0, 0.0, 0.25, 0.5])
    assert found["mean_difference"] == pytest.approx(0.1875)
    assert found["success_difference"] == pytest.approx(0.25)
    assert (found["higher"], found["equal"], found["lower"]) == (2, 1, 1)
    assert found["mean_interval"] == paired_interval([1.0, 1.0, 0.5, 0.0], [1.0, 0.0, 0.25, 0.5])
