"""Agreement of two judges: by hand, against the definitions counted one by one, and its edges."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trailmed.errors import TrailmedError
from trailmed.eval.agreement import agreement, cohens_kappa
from trailmed.eval.judge import Verdict

VERDICTS = st.lists(st.tuples(st.sampled_from(Verdict), st.sampled_from(Verdict)), min_size=1, max_size=40)


def test_by_hand() -> None:
    labels = [Verdict.REFUSAL] * 20 + [Verdict.COMPLIANCE] * 30
    verdicts = [Verdict.REFUSAL] * 15 + [Verdict.COMPLIANCE] * 5 + [Verdict.REFUSAL] * 10 + [Verdict.COMPLIANCE] * 20
    found = agreement(labels, verdicts)
    assert found.counts == ((15, 0, 5, 0), (0, 0, 0, 0), (10, 0, 20, 0), (0, 0, 0, 0))
    # the textbook table of Cohen's kappa: p_o 0.7, p_e 0.5
    assert found.kappa == pytest.approx(0.4)
    assert [each.f1 for each in found.classes] == pytest.approx([30 / 45, 40 / 55])
    assert found.macro_f1 == pytest.approx((30 / 45 + 40 / 55) / 2)
    assert (found.accuracy.count, found.accuracy.n) == (35, 50)
    assert found.macro_f1_interval.low < found.macro_f1 < found.macro_f1_interval.high
    assert found.kappa_interval.low < found.kappa < found.kappa_interval.high
    assert agreement(labels, verdicts) == found


@settings(deadline=None, max_examples=40)
@given(VERDICTS)
def test_recounted(pairs: list[tuple[Verdict, Verdict]]) -> None:
    labels, verdicts = zip(*pairs, strict=True)
    found = agreement(labels, verdicts)
    n, both = len(pairs), Counter(pairs)
    first, second = Counter(labels), Counter(verdicts)
    observed = Fraction(sum(both[v, v] for v in Verdict), n)
    chance = sum(Fraction(first[v] * second[v], n * n) for v in Verdict)
    assert found.kappa == pytest.approx(1.0 if chance == 1 else float((observed - chance) / (1 - chance)))
    scores = [2 * both[v, v] / (first[v] + second[v]) for v in Verdict if first[v]]
    assert found.macro_f1 == pytest.approx(sum(scores) / len(scores))
    for each in found.classes:
        v = each.verdict
        assert (each.recall.count, each.recall.n, each.precision.n) == (both[v, v], first[v], second[v])


def test_edges() -> None:
    assert cohens_kappa(np.diag([5, 0, 0, 0])) == 1.0
    assert cohens_kappa(np.diag([5, 5, 0, 0])) == 1.0
    with pytest.raises(TrailmedError, match="no answers"):
        agreement([], [])
    with pytest.raises(ValueError, match="argument"):
        agreement([Verdict.REFUSAL], [])
