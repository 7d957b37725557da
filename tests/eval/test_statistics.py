"""The statistics against published tables, exact enumeration with fractions, mpmath and properties."""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import NormalDist

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trailmed.errors import TrailmedError
from trailmed.eval.statistics import (
    Interval,
    clopper_pearson_upper,
    cluster_bootstrap_mean,
    flip_rate_equivalence,
    holm,
    mcnemar_exact,
    wilson_interval,
)

COUNTS = st.integers(1, 150).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
CONFIDENCES = st.sampled_from([0.5, 0.8, 0.9, 0.95, 0.99, 0.999])


def binomial_cdf(k: int, n: int, p: Fraction) -> Fraction:
    return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)), Fraction(0))


# Newcombe 1998, Table I: four proportions under method 3 (Wilson) and method 5 (Clopper-Pearson), 95 %, four decimals.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high", "exact_high"),
    [(81, 263, 0.2553, 0.3662, 0.3676), (15, 148, 0.0624, 0.1605, 0.1617), (0, 20, 0.0, 0.1611, 0.1684), (1, 29, 0.0061, 0.1718, 0.1776)],
)
def test_published_intervals(successes: int, n: int, low: float, high: float, exact_high: float) -> None:
    interval = wilson_interval(successes, n)
    assert interval.low == pytest.approx(low, abs=5.1e-5)
    assert interval.high == pytest.approx(high, abs=5.1e-5)
    assert clopper_pearson_upper(successes, n, 0.975) == pytest.approx(exact_high, abs=5.1e-5)


@settings(deadline=None)
@given(COUNTS, CONFIDENCES)
def test_wilson_ends_solve_the_score_equation_and_hold_the_point_estimate(counts: tuple[int, int], confidence: float) -> None:
    successes, n = counts
    interval = wilson_interval(successes, n, confidence)
    rate, z = successes / n, NormalDist().inv_cdf((1 + confidence) / 2)
    assert 0.0 <= interval.low <= rate <= interval.high <= 1.0
    for end in (interval.low, interval.high):
        assert (rate - end) ** 2 == pytest.approx(z * z * end * (1 - end) / n, abs=1e-12)
    assert interval.high - interval.low > 0.0


@settings(deadline=None)
@given(COUNTS, CONFIDENCES)
def test_wilson_mirrors_and_grows_with_successes(counts: tuple[int, int], confidence: float) -> None:
    successes, n = counts
    interval, mirrored = wilson_interval(successes, n, confidence), wilson_interval(n - successes, n, confidence)
    assert interval.low == pytest.approx(1 - mirrored.high, abs=1e-12)
    if successes < n:
        more = wilson_interval(successes + 1, n, confidence)
        assert more.low > interval.low
        assert more.high > interval.high


def test_wilson_narrows_with_data_and_widens_with_confidence() -> None:
    widths = [(found := wilson_interval(n // 4, n)).high - found.low for n in (4, 40, 400, 4000)]
    assert widths == sorted(widths, reverse=True)
    assert wilson_interval(3, 10, 0.99).high > wilson_interval(3, 10, 0.9).high
    assert wilson_interval(3, 10, 0.99).low < wilson_interval(3, 10, 0.9).low


def test_no_trials_tell_nothing() -> None:
    nothing = wilson_interval(0, 0)
    assert (nothing.low, nothing.high) == (0.0, 1.0)
    assert clopper_pearson_upper(0, 0) == 1.0


@pytest.mark.parametrize("first", range(7))
@pytest.mark.parametrize("second", range(7))
def test_mcnemar_against_every_way_the_pairs_can_fall(first: int, second: int) -> None:
    """All 2^n assignments of the discordant pairs: p is the share at least as lopsided as the observed one."""
    n = first + second
    lopsided = sum(abs(2 * assignment.bit_count() - n) >= abs(first - second) for assignment in range(1 << n))
    assert mcnemar_exact(first, second) == pytest.approx(lopsided / (1 << n), rel=1e-12)


def test_mcnemar_hand_cases() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(5, 5) == pytest.approx(1.0)
    assert mcnemar_exact(0, 6) == pytest.approx(2 / 64)
    assert mcnemar_exact(1, 9) == pytest.approx(22 / 1024)
    assert mcnemar_exact(0, 18) == pytest.approx(2.0**-17)


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_a_probability_symmetric_and_falls_as_the_table_tilts(first: int, second: int) -> None:
    p = mcnemar_exact(first, second)
    assert 0.0 < p <= 1.0
    assert p == pytest.approx(mcnemar_exact(second, first), rel=1e-12)
    assert p == pytest.approx(min(1.0, 2 * float(binomial_cdf(min(first, second), first + second, Fraction(1, 2)))), rel=1e-9)
    smaller, larger = sorted((first, second))
    assert mcnemar_exact(smaller, larger + 2) <= p * (1 + 1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 1), (0, 59), (1, 93), (3, 40), (10, 20), (19, 131), (130, 131)])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_clopper_pearson_leaves_exactly_the_promised_tail(successes: int, n: int, confidence: float) -> None:
    """The definition, evaluated at 40 digits: at the bound, so few successes have probability 1 - confidence."""
    with mpmath.workdps(40):
        p = mpmath.mpf(clopper_pearson_upper(successes, n, confidence))
        tail = mpmath.fsum(mpmath.binomial(n, i) * p**i * (1 - p) ** (n - i) for i in range(successes + 1))
        assert float(tail) == pytest.approx(1 - confidence, rel=1e-9)


@settings(deadline=None)
@given(st.integers(1, 500), CONFIDENCES)
def test_clopper_pearson_of_no_success_has_a_closed_form(n: int, confidence: float) -> None:
    assert clopper_pearson_upper(0, n, confidence) == pytest.approx(1 - (1 - confidence) ** (1 / n), rel=1e-9)


@settings(deadline=None)
@given(COUNTS, CONFIDENCES)
def test_clopper_pearson_is_above_the_estimate_and_monotone(counts: tuple[int, int], confidence: float) -> None:
    successes, n = counts
    upper = clopper_pearson_upper(successes, n, confidence)
    assert upper <= 1.0
    if confidence >= 0.8:
        assert upper >= successes / n
    if successes < n:
        assert clopper_pearson_upper(successes + 1, n, confidence) > upper
        assert clopper_pearson_upper(successes, n + 1, confidence) < upper
        assert clopper_pearson_upper(successes, n, (1 + confidence) / 2) > upper


@pytest.mark.parametrize("n", [1, 7, 30])
def test_clopper_pearson_covers_at_least_as_often_as_it_says(n: int) -> None:
    """Exact coverage, by enumeration of all outcomes, at many true rates."""
    uppers = [clopper_pearson_upper(k, n, 0.9) for k in range(n + 1)]
    for step in range(1, 100):
        p = step / 100
        covered = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k, upper in enumerate(uppers) if upper >= p)
        assert covered >= 0.9 - 1e-12


def test_equivalence_needs_enough_pairs() -> None:
    """With no flip at all, a 2 % margin at 95 % takes ln 0.05 / ln 0.98 = 148.3 pairs."""
    assert not flip_rate_equivalence(0, 148, margin=0.02).equivalent
    assert flip_rate_equivalence(0, 149, margin=0.02).equivalent
    shown = flip_rate_equivalence(2, 400, margin=0.02)
    assert shown.equivalent
    assert shown.rate == 0.005
    assert shown.margin == 0.02
    assert shown.upper == clopper_pearson_upper(2, 400, 0.95)
    assert not flip_rate_equivalence(8, 400, margin=0.02).equivalent


@settings(deadline=None)
@given(COUNTS, st.integers(1, 1000), CONFIDENCES)
def test_equivalence_is_the_one_sided_test(counts: tuple[int, int], per_mille: int, confidence: float) -> None:
    """Equivalent exactly when so few flips would be rarer than 1 − confidence at a true rate of `margin`."""
    flips, n = counts
    margin = per_mille / 1000
    tail = float(binomial_cdf(flips, n, Fraction(per_mille, 1000)))
    if abs(tail - (1 - confidence)) > 1e-9:
        assert flip_rate_equivalence(flips, n, margin, confidence).equivalent == (tail < 1 - confidence)


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson_interval(3, 2),
        lambda: wilson_interval(-1, 2),
        lambda: wilson_interval(1, 2, 1.0),
        lambda: wilson_interval(1, 2, math.nan),
        lambda: clopper_pearson_upper(5, 4),
        lambda: clopper_pearson_upper(1, 4, 0.0),
        lambda: mcnemar_exact(-1, 3),
        lambda: flip_rate_equivalence(0, 0, 0.02),
        lambda: flip_rate_equivalence(0, 10, 0.0),
        lambda: flip_rate_equivalence(0, 10, 1.5),
        lambda: flip_rate_equivalence(11, 10, 0.02),
    ],
)
def test_bad_input_is_one_line(call: object) -> None:
    assert callable(call)
    with pytest.raises(TrailmedError) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_bootstrap_resamples_whole_clusters() -> None:
    values = [float(value) for value in np.random.default_rng(3).normal(50, 10, 400)]
    alone = cluster_bootstrap_mean(values, [str(index) for index in range(400)])
    error = 1.96 * np.std(values, ddof=1) / 20
    assert alone.low == pytest.approx(np.mean(values) - error, abs=0.2)
    assert alone.high == pytest.approx(np.mean(values) + error, abs=0.2)
    fourfold = cluster_bootstrap_mean(values * 4, [str(index) for index in range(400)] * 4)
    assert (fourfold.low, fourfold.high) == pytest.approx((alone.low, alone.high))  # copies are no evidence
    assert cluster_bootstrap_mean(values, ["one"] * 400) == Interval(*[pytest.approx(np.mean(values))] * 2)
    assert alone == cluster_bootstrap_mean(values, [str(index) for index in range(400)])


def test_the_bootstrap_needs_values_and_a_cluster_for_each() -> None:
    with pytest.raises(TrailmedError, match="no values"):
        cluster_bootstrap_mean([], [])
    with pytest.raises(TrailmedError, match="confidence"):
        cluster_bootstrap_mean([1.0], ["a"], 1.0)
    with pytest.raises(ValueError, match="zip"):
        cluster_bootstrap_mean([1.0], [])


def test_holm_by_hand() -> None:
    # m = 4: 4 · 0.01, 3 · 0.02, 2 · 0.03 (not below the one before), 0.5
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_rejects_as_the_step_down_procedure(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    for level in (0.001, 0.01, 0.05, 0.2, 0.5):
        rejected: set[int] = set()
        for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
            if p_values[index] * (len(p_values) - place) > level:
                break
            rejected.add(index)
        assert rejected == {index for index, value in enumerate(adjusted) if value <= level}
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))
