"""`validate`: how well the judge agrees with labelled answers, and whether the rubric ranks good above partial above dangerous."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from .agreement import Agreement, agreement
from .compare import Rate, rate_of
from .judge import Verdict, judge
from .labelled import Half, LabelledAnswer, load_labelled, load_triage_answers, question_of
from .prompts import Category
from .rubric import RUBRIC_CATEGORIES, load_rubric, triage_score


@dataclass(frozen=True, slots=True)
class JudgeValidation:
    """Agreement with the labels: over all answers of the half, by source and by language; and what the judge got wrong.

    `refusals_missed`: answers to harmful requests labelled refusal that the judge called compliance.
    """

    half: str
    overall: Agreement
    by_source: dict[str, Rate]
    by_language: dict[str, Rate]
    refusals_missed: int
    wrong: tuple[tuple[LabelledAnswer, Verdict], ...]


@dataclass(frozen=True, slots=True)
class RubricValidation:
    """One category's hand-written answers: mean score of each quality, and how many scenarios are ranked right.

    Right: the good answer scores above the partial one, and that above the dangerous one. `alarms`: good answers in which dangerous advice
    was found.
    """

    category: Category
    scenarios: int
    means: dict[str, float]
    ranked: Rate
    alarms: int


def validate_judge(half: Half | None = Half.HELD_OUT) -> JudgeValidation:
    """Judge the labelled answers of `half` (None: all) and hold the verdicts against the labels."""
    answers = load_labelled(half)
    verdicts = [judge(answer.text, truncated=answer.truncated, question=question_of(answer)).verdict for answer in answers]
    pairs = list(zip(answers, verdicts, strict=True))
    return JudgeValidation(
        half=str(half or "all"), overall=agreement([answer.label for answer in answers], verdicts),
        by_source=_accuracy([(answer.source, answer.label is verdict) for answer, verdict in pairs]),
        by_language=_accuracy([(answer.language, answer.label is verdict) for answer, verdict in pairs]),
        refusals_missed=sum(
            (answer.label, verdict, answer.category) == (Verdict.REFUSAL, Verdict.COMPLIANCE, Category.SHOULD_REFUSE)
            for answer, verdict in pairs
        ),
        wrong=tuple((answer, verdict) for answer, verdict in pairs if answer.label is not verdict),
    )


def validate_rubric() -> list[RubricValidation]:
    """Score the hand-written answers of every category that has a rubric."""
    rubric = load_rubric()
    found = []
    for category in RUBRIC_CATEGORIES:
        scores: dict[str, dict[str, float]] = defaultdict(dict)
        alarms = 0
        for answer in load_triage_answers(category):
            score = triage_score(answer.text, Verdict.COMPLIANCE, rubric[category, answer.scenario], answer.prompt)
            scores[answer.scenario][answer.quality] = score.value
            alarms += answer.quality == "good" and any(finding.span for finding in score.dangerous)
        means = {quality: fmean(each[quality] for each in scores.values()) for quality in ("good", "partial", "dangerous")}
        ranked = rate_of(sum(map(_ranked, scores.values())), len(scores))
        found.append(RubricValidation(category, len(scores), means, ranked, alarms))
    return found


def _ranked(scores: dict[str, float]) -> bool:
    return scores["good"] > scores["partial"] > scores["dangerous"]


def _accuracy(pairs: Sequence[tuple[str, bool]]) -> dict[str, Rate]:
    by_name: dict[str, list[bool]] = defaultdict(list)
    for name, right in pairs:
        by_name[name].append(right)
    return {name: rate_of(sum(rights), len(rights)) for name, rights in sorted(by_name.items())}
