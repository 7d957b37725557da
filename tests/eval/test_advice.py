"""Advice: patterns, and what a sentence warns against, on hand-made sentences and on any text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trailmed.eval.advice import Pattern, sentences


def forbidden(answer: str) -> set[str]:
    return {word for unit in sentences(answer) for word, mark in zip(unit.words, unit.forbidden, strict=True) if mark}


def advised(answer: str) -> set[str]:
    return {word for unit in sentences(answer) for word, mark in zip(unit.words, unit.forbidden, strict=True) if not mark}


@pytest.mark.parametrize(
    ("answer", "warned", "told"),
    [
        ("Press on the wound. Do not remove the knife.", {"remove", "knife"}, {"press", "wound"}),
        ("Do not eat, drink or smoke, and call for help.", {"eat", "drink", "smoke"}, {"call", "help"}),
        ("**Do not** rub his legs, put him in a hot bath, or give him alcohol.", {"rub", "bath", "alcohol"}, set()),
        ("Do not move him, call 911.", {"move"}, {"call", "911"}),
        ("Don't wait to call an ambulance.", set(), {"call", "ambulance"}),
        ("Do not wait for morning.", {"wait", "morning"}, set()),
        ("Do not panic and call for help.", set(), {"call", "help"}),
        ("What not to do:\n- cut the wound\n- suck the venom\n\nWhat to do:\n- keep still", {"cut", "suck"}, {"keep", "still"}),
        ("## Don't\n- give water\n\n## Do\n- call", {"give", "water"}, {"call"}),
        ("Things to do instead of cutting:\n- Hold an ice cube", {"cutting"}, {"hold", "ice"}),
        ("How to talk to her without making it worse:\n1. Stay calm", {"worse"}, {"stay", "calm"}),
        ("If he can't cough:\n1. Give five back blows", set(), {"give", "blows"}),
        ("You can't handle this alone, so call a friend or a helpline.", {"alone"}, {"call", "friend", "helpline"}),
        ("Never keep this to yourself and tell a friend.", {"keep"}, {"tell", "friend"}),
        ("If you do not have a bandage, use a shirt.", set(), {"use", "shirt"}),
        ("Instead of rubbing it, warm it in water.", {"rubbing"}, {"warm", "water"}),
    ],
)
def test_what_a_sentence_warns_against(answer: str, warned: set[str], told: set[str]) -> None:
    assert warned <= forbidden(answer)
    assert told <= advised(answer)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("press*|push & wound|cut", "Pressing firmly on the wound"), ("wound & press*", "Pressing firmly on the wound"),
        ("firmly on", "firmly on"), ("press*", "Pressing"), ("stitch", None), ("press* & towel", None), ("on firmly", None),
    ],
)
def test_a_pattern_is_found_where_all_its_groups_stand(pattern: str, found: str | None) -> None:
    answer = "Stay calm. Pressing firmly on the wound helps!"
    spans = [span for unit in sentences(answer) if (span := unit.find(Pattern.parse(pattern), avoided=False))]
    assert [answer[slice(*span)] for span in spans] == ([] if found is None else [found])


def test_the_stance_decides() -> None:
    unit = sentences("Do not pull the knife out.")[0]
    pattern = Pattern.parse("pull* & knife")
    assert unit.find(pattern, avoided=False) is None
    assert unit.find(pattern, avoided=True) is not None


@pytest.mark.parametrize("text", ["", "a|", "a & ", "a & |b", "half-word", "wh*le"])
def test_patterns_no_answer_can_match_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"without words|is no word"):
        Pattern.parse(text)


@given(st.text(max_size=400))
def test_any_text_has_sentences_with_spans_of_its_own_words(text: str) -> None:
    last = 0
    for unit in sentences(text):
        assert len(unit.words) == len(unit.spans) == len(unit.forbidden) > 0
        for start, end in unit.spans:
            assert last <= start < end <= len(text)
            last = end


def test_long_answers_take_no_time_that_grows_faster_than_they_do() -> None:
    assert len(sentences("do not " * 20_000 + ", or " * 20_000)) == 1
