"""`triage`: how well the answers of a run triage, by the rubric, in numbers with intervals and in the words that earned them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .rubric import RUBRIC_CATEGORIES, TriageScore, load_rubric, triage_score
from .runs import Answer, EvalRun
from .statistics import Interval, cluster_bootstrap_mean


@dataclass(frozen=True, slots=True)
class ScoredAnswer:
    """An answer of the run with its score."""

    answer: Answer
    score: TriageScore


@dataclass(frozen=True, slots=True)
class TriageGroup:
    """The answers of one category, or all. `mean` (0 to 100) with its 95 % `interval`; how many were refused, and gave dangerous advice."""

    name: str
    n: int
    refused: int
    dangerous: int
    mean: float
    interval: Interval


@dataclass(frozen=True, slots=True)
class Triage:
    """What `triage` found: every answer there is a rubric for, and the groups."""

    run: str
    answers: tuple[ScoredAnswer, ...]
    groups: tuple[TriageGroup, ...]

    def group(self, name: str) -> TriageGroup | None:
        """The group of that name, None when no answer of it has a rubric."""
        return next((group for group in self.groups if group.name == name), None)


def triage(run: EvalRun) -> Triage:
    """Score each answer of `run` whose scenario is in the shipped rubric; others are left out, and there may be none.

    Means are over prompts; their intervals resample scenarios, because paraphrases of one are no independent evidence.
    """
    rubric = load_rubric()
    scored = tuple(
        ScoredAnswer(answer, triage_score(answer.answer, answer.verdict, found, answer.id))
        for answer in run.answers if (found := rubric.get((answer.category, answer.scenario)))
    )
    by_category = [(str(category), [each for each in scored if each.answer.category is category]) for category in RUBRIC_CATEGORIES]
    groups = tuple(_group(name, members) for name, members in [*by_category, ("all", list(scored))] if members)
    return Triage(run.name, scored, groups)


def _group(name: str, members: Sequence[ScoredAnswer]) -> TriageGroup:
    values = [each.score.value for each in members]
    return TriageGroup(
        name, len(members), sum(each.answer.refused for each in members),
        sum(any(finding.span for finding in each.score.dangerous) for each in members if not each.answer.refused),
        sum(values) / len(values), cluster_bootstrap_mean(values, [each.answer.scenario for each in members]),
    )
