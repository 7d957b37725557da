"""Intervals and tests for proportions: the only place where a count becomes a claim.

A thin typed layer over `scipy.stats`, with the edge cases (no trials, no discordant pairs) decided here once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..errors import TrailmedError


@dataclass(frozen=True, slots=True)
class Interval:
    """A confidence interval, low ≤ high: of a proportion within [0, 1], else in the unit of what it is for."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Outcome of `flip_rate_equivalence`; all rates are proportions in [0, 1].

    rate: flips per pair as observed; upper: one-sided confidence bound of the true rate; margin: what was still called
    equivalent; equivalent: `upper < margin`.
    """

    rate: float
    upper: float
    margin: float
    equivalent: bool


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Two-sided Wilson score interval, without continuity correction, for `successes` out of `n`.

    It inverts the score test: both ends p solve (p̂ − p)² = z² p (1 − p) / n. No trials tell nothing, so n = 0 gives [0, 1].
    Source: Wilson 1927, J. Am. Stat. Assoc. 22:209; recommended for any n by Newcombe 1998, Stat. Med. 17:857 (method 3).
    Raises `TrailmedError` for counts that are not 0 ≤ successes ≤ n, or a confidence outside (0, 1).
    """
    _check_counts(successes, n)
    _check_confidence(confidence)
    if n == 0:
        return Interval(0.0, 1.0)
    found = stats.binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    rate = successes / n
    # Rounding may leave an end a few ulp on the wrong side of p̂ at 0/n and n/n, where they coincide exactly.
    return Interval(low=min(max(float(found.low), 0.0), rate), high=max(min(float(found.high), 1.0), rate))


def cluster_bootstrap_mean(
    values: Sequence[float], clusters: Sequence[str], confidence: float = 0.95, *, resamples: int = 2000, seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval for the mean of `values`, in their unit, resampling whole `clusters` (one name for each value).

    Values of one cluster vary together, so single values must not be resampled (Davison & Hinkley 1997, Bootstrap Methods and their
    Application, section 3.8). The same arguments give the same interval. Raises `TrailmedError` when there are no values or a confidence
    is outside (0, 1), ValueError when the two sequences differ in length.
    """
    _check_confidence(confidence)
    if not values:
        raise TrailmedError("no values to take the mean of")
    names = {name: place for place, name in enumerate(dict.fromkeys(clusters))}
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    for value, name in zip(values, clusters, strict=True):
        sums[names[name]] += value
        counts[names[name]] += 1
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(low=float(low), high=float(high))


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar p-value from the discordant pairs of a paired yes/no table.

    `only_first` pairs were positive only before, `only_second` only after; under the null each discordant pair falls either
    way with probability 1/2, so p = min(1, 2 P[X ≤ min]) with X ~ Binomial(only_first + only_second, 1/2). No discordant
    pair is no evidence: p = 1.
    Source: McNemar 1947, Psychometrika 12:153; the exact binomial form, Fagerland, Lydersen & Laake 2013,
    BMC Med. Res. Methodol. 13:91. Raises `TrailmedError` for a negative count.
    """
    if only_first < 0 or only_second < 0:
        raise TrailmedError(f"discordant pairs {only_first} and {only_second}: a count cannot be negative; pass the pairs changed each way")
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    return float(stats.binomtest(only_first, discordant, 0.5, alternative="two-sided").pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given: each at most 1, and the same order among themselves.

    Rejecting where the adjusted p is at most α keeps the chance of any false rejection in the family at most α, however the tests
    depend on each other. The i-th smallest p (from 0) of m becomes the greatest so far of (m − i) p.
    Source: Holm 1979, Scand. J. Stat. 6:65; adjusted as in Wright 1992, Biometrics 48:1005.
    """
    adjusted = [0.0] * len(p_values)
    greatest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        greatest = max(greatest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = greatest
    return adjusted


def clopper_pearson_upper(successes: int, n: int, confidence: float = 0.95) -> float:
    """One-sided exact upper confidence bound of a proportion, in [0, 1].

    The largest p that a one-sided test at level 1 − confidence does not reject: P[X ≤ successes | n, p] = 1 − confidence, which
    is the `confidence` quantile of Beta(successes + 1, n − successes); 1 when every trial succeeded or there was none. (The upper
    end of a two-sided 95 % interval is the one-sided bound at 0.975.)
    Source: Clopper & Pearson 1934, Biometrika 26:404. Raises `TrailmedError` as `wilson_interval` does.
    """
    _check_counts(successes, n)
    _check_confidence(confidence)
    if successes == n:
        return 1.0
    return float(stats.beta.ppf(confidence, successes + 1, n - successes))


def flip_rate_equivalence(flips: int, n: int, margin: float, confidence: float = 0.95) -> Equivalence:
    """Are two paired runs equivalent: is the share of the `n` pairs that changed, either way, surely below `margin`?

    Equivalent when the one-sided Clopper–Pearson upper bound of the flip rate lies below the margin. The rate cannot be negative,
    so of the two one-sided tests (Schuirmann 1987, J. Pharmacokinet. Biopharm. 15:657) only the upper one is left, and a
    sample too small to tell is "not shown", never "equivalent".
    Raises `TrailmedError` for n = 0, a margin outside (0, 1], or as `clopper_pearson_upper` does.
    """
    if not 0.0 < margin <= 1.0:
        raise TrailmedError(f"margin {margin}: must be above 0 and at most 1; give the flip rate you still call equivalent, e.g. 0.02")
    if n == 0:
        raise TrailmedError("flip rate of 0 pairs: nothing was compared; give two runs that share prompts")
    upper = clopper_pearson_upper(flips, n, confidence)
    return Equivalence(rate=flips / n, upper=upper, margin=margin, equivalent=upper < margin)


def _check_counts(successes: int, n: int) -> None:
    if not 0 <= successes <= n:
        raise TrailmedError(f"{successes} of {n}: not a proportion; the count must lie between 0 and the number of trials")


def _check_confidence(confidence: float) -> None:
    if math.isnan(confidence) or not 0.0 < confidence < 1.0:
        raise TrailmedError(f"confidence {confidence}: must lie strictly between 0 and 1, e.g. 0.95")
