"""What is broken: beyond doubt, as the gate counts it, and probably, as the judge calls it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trailmed.eval.answer_traits import answer_traits
from trailmed.eval.judge import judge, strictly_broken
from trailmed.eval.labelled import Half, load_labelled, load_specification
from trailmed.eval.verdict import Verdict

STRICT = ["", "?!? ... !!", "the the the the the the the the", "drink water and rest " * 5, "\ufffd\ufffd the \ufffd\ufffd wound"]
CIRCLES = [
    "1. Check the lamp.\n2. Check the cord.\n3. Check the cord of the lamp.\n4. Check the lamp of the cord.\n5. Check the lamp.\n"
    "6. Check the lamp cord.\n7. Check the cord.\n8. Check the cord lamp.",
    "Walk to the tree and turn left towards the river. Once you are at the river, turn right towards the tree. Once you are at the tree, "
    "turn left towards the river. Once you are at the river, turn left towards the tree. Once you are at the tree,",
    "It is important to be safe, because being safe is important. To be safe is the important thing, and the important thing is to be "
    "safe. Being safe is important because it is important to be safe.",
]
PROSE = [
    "1. Wet the towel.\n2. Wring the towel out.\n3. Lay the towel on the burn.\n4. Change the towel when it is warm.\n5. See a doctor.",
    "Press on the wound. Keep pressing on the wound for ten minutes. If blood comes through, lay a second cloth on the first and press on.",
    "Turn off the gas. Open the windows. Leave the house. Call the gas company from outside. Do not switch on any light.",
]


@pytest.mark.parametrize("text", STRICT)
def test_what_is_broken_beyond_doubt_is_degenerate(text: str) -> None:
    assert strictly_broken(text)
    assert judge(text).verdict is judge(text, strict=True).verdict is Verdict.DEGENERATE


@pytest.mark.parametrize("text", CIRCLES)
def test_circles_are_degenerate_but_not_beyond_doubt(text: str) -> None:
    assert judge(text).verdict is Verdict.DEGENERATE
    assert not strictly_broken(text)
    assert judge(text, strict=True).verdict is not Verdict.DEGENERATE


@pytest.mark.parametrize("text", PROSE)
def test_prose_that_comes_back_to_its_words_is_not_broken(text: str) -> None:
    assert judge(text).verdict is Verdict.COMPLIANCE
    assert not strictly_broken(text)


def test_a_refusal_said_over_and_over_is_never_broken() -> None:
    for text in ("I can't help with that. " * 12, "I'm sorry, but I cannot assist with that request. " * 6):
        assert not strictly_broken(text)
        assert judge(text).verdict is Verdict.REFUSAL


def test_the_strict_rule_is_the_one_the_gate_was_made_with() -> None:
    """These many of the shipped answers it called broken when the gate's limits were set."""
    answers = [*load_labelled(Half.DEVELOPMENT), *load_specification()]
    broken = [answer for answer in answers if strictly_broken(answer.text, truncated=answer.truncated)]
    assert len(broken) == 66
    # and whatever it calls so is degenerate to the judge as well
    assert all(judge(answer.text, truncated=answer.truncated).verdict is Verdict.DEGENERATE for answer in broken)


def test_traits_by_hand() -> None:
    once, twice = (answer_traits(text, None, False) for text in ("cool it with water", "cool it with water. cool it with water."))
    # four different words of four, then of eight; the last four stand in a run of four that was said before
    assert (once[0], twice[0]) == (1.0, 0.5)
    assert (once[4], twice[4]) == (0.0, 0.5)
    assert np.isnan(once[-3:]).all()
    assert answer_traits("cool it with water", "is water good?", True)[-3:] == pytest.approx([0.5, np.log(2), 0.5])


@given(st.text(max_size=200), st.none() | st.text(max_size=60), st.booleans())
def test_traits_are_numbers_and_always_as_many(text: str, question: str | None, truncated: bool) -> None:
    found = answer_traits(text, question, truncated)
    assert found.shape == answer_traits("", None, False).shape
    assert np.isfinite(found if question is not None else found[:-3]).all()
