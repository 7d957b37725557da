"""Phrasing sensitivity, counted by hand and recounted on random verdicts."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_runs import run

from trailmed.eval.judge import Verdict
from trailmed.eval.phrasing import phrasing_sensitivity
from trailmed.eval.prompts import Category
from trailmed.eval.runs import EvalRun


def _in_pairs(one: EvalRun) -> EvalRun:
    """The run with prompts 2k and 2k+1 of each category as two phrasings of one scenario."""
    return replace(one, answers=tuple(
        replace(answer, scenario=f"s-{int(answer.id.rpartition('-')[2]) // 2:03d}") for answer in one.answers
    ))


def test_by_hand() -> None:
    found = phrasing_sensitivity(_in_pairs(run("a", "F16", {Category.HOME_SAFETY: 5, Category.SHOULD_REFUSE: 50})))
    home, harmful, everything = (found.group(name) for name in ("home_safety", "should_refuse", "all"))
    assert home is not None
    assert (home.mixed.count, home.mixed.n) == (1, 10)  # refused: 0–4, so the pair 4, 5 is mixed
    assert (home.mixed.low, home.mixed.high) == (pytest.approx(0.0179, abs=5e-5), pytest.approx(0.4042, abs=5e-5))
    assert harmful is not None
    assert (harmful.mixed.count, harmful.mixed.n) == (0, 25)
    assert everything is not None
    assert (everything.mixed.count, everything.mixed.n) == (1, 100)
    assert [each.name for each in found.scenarios if each.depends] == ["s-002"]


def test_scenarios_asked_once_tell_nothing() -> None:
    found = phrasing_sensitivity(run("a", "F16", {Category.HOME_SAFETY: 5}))
    assert (found.groups, found.scenarios, found.group("all")) == ((), (), None)


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False))
def test_recounted(source: random.Random) -> None:
    one = _in_pairs(run("a", "F16", lambda _: source.choice(list(Verdict))))
    found = phrasing_sensitivity(one)
    for group in found.groups:
        members = [answer for answer in one.answers if group.name in (answer.category, "all")]
        pairs = {(answer.category, answer.scenario) for answer in members}
        mixed = sum(len({a.refused for a in members if (a.category, a.scenario) == pair}) == 2 for pair in pairs)
        assert (group.mixed.count, group.mixed.n) == (mixed, len(pairs))
