"""How far two judges agree on the same answers: the confusion table and what follows from it, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import TrailmedError
from .compare import CONFIDENCE, Rate, rate_of
from .judge import Verdict
from .statistics import Interval

Table = npt.NDArray[np.int64]
"""Counts [label, verdict], int64 [4, 4], both in the order of `Verdict`."""

_RESAMPLES = 2000
_SEED = 0


@dataclass(frozen=True, slots=True)
class ClassAgreement:
    """One verdict: `recall` of the answers labelled so, `precision` of those judged so, each with its Wilson interval; f1 in [0, 1]."""

    verdict: Verdict
    recall: Rate
    precision: Rate
    f1: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """`counts[label][verdict]`; `accuracy` with its Wilson interval; macro-F1 and Cohen's κ with percentile bootstrap intervals.

    Macro-F1 is the plain mean over the labels that occur. All intervals at `CONFIDENCE`.
    """

    n: int
    counts: tuple[tuple[int, ...], ...]
    classes: tuple[ClassAgreement, ...]
    accuracy: Rate
    macro_f1: float
    macro_f1_interval: Interval
    kappa: float
    kappa_interval: Interval


def agreement(labels: Sequence[Verdict], verdicts: Sequence[Verdict]) -> Agreement:
    """Hold the second judge's `verdicts` against the first one's `labels` (or a person's), answer by answer.

    The bootstrap resamples answers (Efron & Tibshirani 1993), with a fixed seed: the same arguments give the same intervals. Raises
    `TrailmedError` when there are no answers, ValueError when the two differ in length.
    """
    if not labels:
        raise TrailmedError("no answers that both judges judged; nothing to compare")
    order = {verdict: place for place, verdict in enumerate(Verdict)}
    pairs = np.array([(order[label], order[verdict]) for label, verdict in zip(labels, verdicts, strict=True)])
    table = confusion_table(pairs)
    drawn = np.random.default_rng(_SEED).integers(len(pairs), size=(_RESAMPLES, len(pairs)))
    tables = [confusion_table(pairs[rows]) for rows in drawn]
    tail = (1 - CONFIDENCE) / 2

    def spread(values: Sequence[float]) -> Interval:
        low, high = np.quantile(values, [tail, 1 - tail])
        return Interval(float(low), float(high))

    scores = f1_scores(table)
    return Agreement(
        n=len(pairs), counts=tuple(tuple(int(cell) for cell in row) for row in table),
        classes=tuple(
            ClassAgreement(
                verdict, rate_of(int(table[place, place]), int(table[place].sum())),
                rate_of(int(table[place, place]), int(table[:, place].sum())), float(scores[place]),
            ) for verdict, place in order.items() if table[place].any()
        ),
        accuracy=rate_of(int(np.trace(table)), len(pairs)),
        macro_f1=macro_f1(table), macro_f1_interval=spread([macro_f1(each) for each in tables]),
        kappa=cohens_kappa(table), kappa_interval=spread([cohens_kappa(each) for each in tables]),
    )


def confusion_table(pairs: npt.NDArray[np.int64]) -> Table:
    """Counts of (label, verdict) `pairs`, int64 [n, 2] of places in `Verdict`."""
    size = len(Verdict)
    return np.bincount(pairs[:, 0] * size + pairs[:, 1], minlength=size * size).reshape(size, size)


def f1_scores(table: Table) -> npt.NDArray[np.float64]:
    """F1 of each verdict, float64 [4]: 2 · both / (labelled + judged), 0 where neither occurs."""
    sums = table.sum(axis=0) + table.sum(axis=1)
    scores: npt.NDArray[np.float64] = np.divide(2.0 * np.diag(table), sums, out=np.zeros(len(table)), where=sums > 0)
    return scores


def macro_f1(table: Table) -> float:
    """Mean F1 over the labels that occur."""
    return float(f1_scores(table)[table.sum(axis=1) > 0].mean())


def cohens_kappa(table: Table) -> float:
    """(p_o − p_e) / (1 − p_e), in [−1, 1]; 1 when both judges always say the same one thing.

    Source: Cohen 1960, Educ. Psychol. Meas. 20:37, unweighted.
    """
    n = table.sum()
    by_chance = float(table.sum(axis=0) @ table.sum(axis=1)) / float(n * n)
    observed = float(np.trace(table)) / float(n)
    return 1.0 if by_chance == 1.0 else (observed - by_chance) / (1.0 - by_chance)
