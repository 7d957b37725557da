"""Two runs against each other: counted by hand, recounted independently on random verdicts, and runs that do not belong together."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_runs import PER_CATEGORY, SAID, SETTINGS, run, with_verdicts
from scipy import stats

from trailmed.errors import TrailmedError
from trailmed.eval.compare import compare
from trailmed.eval.judge import Verdict
from trailmed.eval.prompts import BENIGN_CATEGORIES, Category


def test_by_hand() -> None:
    first = run("base", "F16", {Category.GRAY_ZONE: 6, Category.SHOULD_REFUSE: 10, Category.MENTAL_HEALTH: 1})
    second = with_verdicts(run("edited", "F16", {Category.GRAY_ZONE: 1, Category.SHOULD_REFUSE: 10}), {
        "should-refuse-000": Verdict.COMPLIANCE, "should-refuse-020": Verdict.REFUSAL, "should-refuse-021": Verdict.REFUSAL,
        "home-safety-003": Verdict.DEGENERATE, "mental-health-000": Verdict.PARTIAL,
    })
    found = compare(first, second)[0]
    assert [group.name for group in found.groups] == [*Category, "benign", "all"]
    assert [group.n for group in found.groups] == [*PER_CATEGORY.values(), 130, 200]

    gray = found.group("gray_zone")
    assert gray is not None
    assert (gray.first.count, gray.second.count, gray.n) == (6, 1, 30)
    assert (gray.table.both, gray.table.only_first, gray.table.only_second, gray.table.neither) == (1, 5, 0, 24)
    assert gray.p_value == pytest.approx(0.0625)  # 5 of 5 one way: 2 / 2^5
    assert gray.flips.rate == pytest.approx(5 / 30)
    assert not gray.flips.equivalent
    # Wilson 1/30 at z = 1.959964, worked by hand
    assert (gray.second.low, gray.second.high) == (pytest.approx(0.0059, abs=5e-5), pytest.approx(0.1667, abs=5e-5))

    harmful = found.group("should_refuse")
    assert harmful is not None
    assert (harmful.table.only_first, harmful.table.only_second, harmful.p_value) == (1, 2, pytest.approx(1.0))

    benign, everything = found.group("benign"), found.group("all")
    assert benign is not None
    assert everything is not None
    assert benign.second_verdicts == {Verdict.REFUSAL: 1, Verdict.PARTIAL: 1, Verdict.COMPLIANCE: 127, Verdict.DEGENERATE: 1}
    assert everything.table.only_first + everything.table.only_second == len(found.flips) == 9
    assert [(flip.id, flip.direction) for flip in found.flips][:2] == [("mental-health-000", "lost"), ("gray-zone-001", "lost")]
    assert [flip.id for flip in found.flips if flip.direction == "gained"] == ["should-refuse-020", "should-refuse-021"]
    lost = next(flip for flip in found.flips if flip.id == "should-refuse-000")
    assert (lost.first_verdict, lost.second_verdict) == (Verdict.REFUSAL, Verdict.COMPLIANCE)
    assert (lost.first_answer, lost.second_answer) == (SAID[Verdict.REFUSAL], SAID[Verdict.COMPLIANCE][:80])


@settings(deadline=None, max_examples=25)
@given(st.randoms(use_true_random=False))
def test_recounted(source: random.Random) -> None:
    verdicts = list(Verdict)
    first, second = (run(name, "F16", lambda _: source.choice(verdicts)) for name in ("first", "second"))
    found, reverse = compare(first, second)[0], compare(second, first)[0]
    for group, swapped in zip(found.groups, reverse.groups, strict=True):
        ids = {
            answer.id for answer in first.answers
            if group.name in (answer.category, "all") or (group.name == "benign" and answer.category in BENIGN_CATEGORIES)
        }
        refused = [{answer.id for answer in one.answers if answer.refused} & ids for one in (first, second)]
        assert group.n == len(ids)
        assert group.table.both == len(refused[0] & refused[1])
        assert group.table.only_first == swapped.table.only_second == len(refused[0] - refused[1])
        assert group.table.only_second == swapped.table.only_first == len(refused[1] - refused[0])
        assert group.table.neither == len(ids - refused[0] - refused[1])
        discordant = len(refused[0] ^ refused[1])
        p = min(1.0, 2 * stats.binom.cdf(min(group.table.only_first, group.table.only_second), discordant, 0.5)) if discordant else 1.0
        assert group.p_value == pytest.approx(p)
        assert group.flips.rate == pytest.approx(discordant / len(ids))
        tokens = [sum(answer.tokens for answer in one.answers if answer.id in ids) for one in (first, second)]
        assert group.length_ratio == pytest.approx(tokens[1] / tokens[0])
    changed = {one.id for one, two in zip(first.answers, second.answers, strict=True) if one.refused != two.refused}
    assert {flip.id for flip in found.flips} == changed


def test_a_run_against_itself_is_equivalent_only_with_enough_prompts() -> None:
    found = compare(one := run("base", "F16", {Category.GRAY_ZONE: 3}), one)[0]
    assert found.flips == ()
    everything, small = found.group("all"), found.group("home_safety")
    assert everything is not None
    assert small is not None
    assert everything.flips.upper == pytest.approx(1 - 0.05 ** (1 / 200))
    assert everything.flips.equivalent
    assert not small.flips.equivalent
    assert everything.length_ratio == 1.0


def test_groups_without_prompts_and_answers_without_tokens() -> None:
    one = run("base", "F16", {})
    one = replace(one, answers=tuple(replace(answer, tokens=0) for answer in one.answers if answer.category is Category.SAFE_CONTROL))
    found = compare(one, one)[0]
    assert [group.name for group in found.groups] == ["safe_control", "all"]
    assert found.group("benign") is None
    assert found.groups[0].length_ratio is None


def test_order_of_the_second_run_does_not_matter() -> None:
    first, second = run("base", "F16", {Category.GRAY_ZONE: 6}), run("edited", "F16", {Category.GRAY_ZONE: 2})
    assert compare(first, replace(second, answers=second.answers[::-1]))[0] == compare(first, second)[0]


def test_runs_that_cannot_be_compared() -> None:
    first = run("base", "F16", {})
    with pytest.raises(TrailmedError, match="different prompts"):
        compare(first, run("edited", "F16", {}, prompts_sha256="0" * 64))[0]
    with pytest.raises(TrailmedError, match=r"different length \(max_tokens: 48 and 96\)"):
        compare(first, run("edited", "F16", {}, settings=SETTINGS | {"max_tokens": 96}))
    with pytest.raises(TrailmedError, match="one run alone"):
        compare(first)
    other = run("edited", "F16", {})
    for answers in (other.answers[:-1], (replace(other.answers[0], text="something else"), *other.answers[1:])):
        with pytest.raises(TrailmedError, match="hold others"):
            compare(first, replace(other, answers=answers))[0]
        with pytest.raises(TrailmedError, match="hold others"):
            compare(replace(other, answers=answers), first)[0]


def test_other_settings_and_engines_are_named() -> None:
    first = run("a", "F16", {})
    other = run("b", "F16", {}, settings={key: value for key, value in SETTINGS.items() if key != "slots"} | {"threads": 4}, engine="onnx")
    assert compare(first, other)[0].decoded == ("engine: llama.cpp and onnx", "slots: 48 and –", "threads: 2 and 4")
    assert compare(first, first)[0].decoded == ()


def test_holm_over_the_categories_of_all_runs_compared() -> None:
    base = run("base", "F16", {Category.GRAY_ZONE: 20, Category.HOME_SAFETY: 10})
    one, two = run("one", "F16", {}), run("two", "F16", {Category.GRAY_ZONE: 14, Category.HOME_SAFETY: 10})
    found = compare(base, one, two)
    assert [(each.first, each.second) for each in found] == [("base", "one"), ("base", "two")]
    tests = [(each.second, group.name, group) for each in found for group in each.groups if group.name in [*map(str, Category)]]
    assert len(tests) == 16
    ordered = sorted(tests, key=lambda test: test[2].p_value)
    assert [test[:2] for test in ordered[:3]] == [("one", "gray_zone"), ("one", "home_safety"), ("two", "gray_zone")]
    expected = [16 * 2 / 2**20, 15 * 2 / 2**10, 14 * 2 / 2**6]
    assert [test[2].p_holm for test in ordered[:3]] == pytest.approx(expected)
    assert all(group.p_holm is None for each in found for group in each.groups if group.name in ("benign", "all"))
    # alone, a comparison is corrected for its own eight only
    alone = compare(base, one)[0].group("gray_zone")
    assert alone is not None
    assert alone.p_holm == pytest.approx(8 * 2 / 2**20)
