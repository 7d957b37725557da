"""The second judge: what it is asked, how its words are read, and the agreement, with a scripted and with a real engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from made_up_runs import run
from small_models import tiny_gguf

from trailmed.device.engine import EngineIdentity, OnReply, Reply
from trailmed.device.llama_engine import LlamaEngine
from trailmed.device.llama_runtime import DecodeSettings
from trailmed.errors import TrailmedError
from trailmed.eval.judge import Verdict
from trailmed.eval.prompts import Category
from trailmed.eval.second_judge import parse_verdict, question_for, second_judge


class Scripted:
    """Answers each question by a function of it."""

    identity = EngineIdentity("scripted", "oracle", None, None, "unknown", {"max_tokens": 8})

    def __init__(self, says: dict[str, str]) -> None:
        self.says = says

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answer(self, questions: Sequence[str], on_reply: OnReply) -> None:
        for index in reversed(range(len(questions))):
            said = next((word for part, word in self.says.items() if part in questions[index]), "compliance")
            on_reply(index, Reply(said, 1, "eos"))


def test_agreement_and_unreadable_verdicts() -> None:
    answered = run("a", "F16", {Category.HOME_SAFETY: 10, Category.SHOULD_REFUSE: 30})
    engine = Scripted({"home safety": "**Refusal.**", "number 7?": "I do not know", "can't assist": " refusal"})
    found = second_judge(answered, engine, progress=False)
    assert len(found.unreadable) == sum(answer.text.endswith("number 7?") and "home" not in answer.text for answer in answered.answers)
    assert found.agreement.n == len(answered.answers) - len(found.unreadable)
    refused, partial, complied, broken = found.agreement.counts
    # all 10 refused home answers agree, the 10 answered ones do not; the refused harmful ones agree but for number 7
    assert refused == (39, 0, 0, 0)
    assert (partial, broken) == ((0, 0, 0, 0), (0, 0, 0, 0))
    assert complied[0] == 10
    assert found.verdicts["home-safety-012"] is Verdict.REFUSAL


def test_what_it_is_asked_holds_question_and_kept_answer_only() -> None:
    harmful = next(answer for answer in run("a", "F16", {}).answers if answer.category is Category.SHOULD_REFUSE)
    asked = question_for(harmful)
    assert harmful.text in asked
    assert harmful.answer in asked
    assert len(harmful.answer) <= 80


@pytest.mark.parametrize(("reply", "verdict"), [
    ("refusal", Verdict.REFUSAL), ("Partial.", Verdict.PARTIAL), ("I'd say: COMPLIANCE, not refusal", Verdict.COMPLIANCE),
    ("", None), ("yes", None), ("degenerate", Verdict.DEGENERATE),
])
def test_reading_a_verdict(reply: str, verdict: Verdict | None) -> None:
    assert parse_verdict(reply) is verdict


def test_a_real_engine_that_says_nothing_readable_is_told(tmp_path: Path) -> None:
    answered = run("a", "F16", {})
    with LlamaEngine(tiny_gguf(tmp_path), DecodeSettings(max_tokens=4, slots=8, threads=1)) as engine, \
            pytest.raises(TrailmedError, match="no answers that both judges judged"):
        second_judge(answered, engine, progress=False)
