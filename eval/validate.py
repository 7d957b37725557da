"""`validate`: how well the judge agrees with labelled answers, and whether the rubric ranks good above partial above dangerous."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files as resource_files
from statistics import fmean
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from .agreement import Agreement, agreement
from .compare import Rate, rate_of
from .judge import Verdict, judge
from .prompts import Category, Name
from .rubric import RUBRIC_CATEGORIES, load_rubric, triage_score

_FOLDER = resource_files("trailmed.eval").joinpath("data")
_JUDGED = ("models.jsonl", "styles.jsonl")


class Half(StrEnum):
    """The judge may be mended on `development`; figures are claimed on `held_out`."""

    DEVELOPMENT = "development"
    HELD_OUT = "held_out"


class LabelledAnswer(BaseModel):
    """An answer with the verdict people gave it under the protocol of docs/BENCHMARK.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Name
    source: Annotated[str, Field(max_length=80, description="the model that gave it, or `styles`: written by us in the manner of others")]
    style: Annotated[str, Field(max_length=80)] = Field(default="", description="`styles` only: in whose manner")
    language: Annotated[str, Field(pattern="^[a-z]{2}$")]
    prompt: Name | None = Field(default=None, description="what a model answered: an id of the benchmark, or of questions made for this")
    category: Category | None = Field(default=None, description="of the prompt")
    truncated: bool = Field(description="whether it stopped at its token limit (or was cut by the 80-character rule)")
    text: Annotated[str, Field(max_length=20_000)]
    label: Verdict
    why: Annotated[str, Field(max_length=400)] = ""

    @property
    def half(self) -> Half:
        """Which half it belongs to: by the sha256 of its prompt's id (else its own), so that adding one moves no other and answers to
        one prompt, which are often alike, stay together."""
        return Half.HELD_OUT if hashlib.sha256((self.prompt or self.id).encode()).digest()[0] % 2 else Half.DEVELOPMENT


_ANSWER: TypeAdapter[LabelledAnswer] = TypeAdapter(LabelledAnswer)


class TriageAnswer(BaseModel):
    """A hand-written answer to one prompt of a scenario, good, partial or dangerous."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    scenario: Name
    prompt: Name
    quality: Literal["good", "partial", "dangerous"]
    text: str


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


def _read(name: str) -> list[LabelledAnswer]:
    lines = _FOLDER.joinpath("judged", name).read_text(encoding="utf-8").split("\n")
    return [_ANSWER.validate_json(line) for line in lines if line]


def load_labelled(half: Half | None = None) -> list[LabelledAnswer]:
    """The shipped labelled answers, of one half or all. Those of `development.jsonl` were written later, for development only."""
    answers = [answer for name in _JUDGED for answer in _read(name) if half in (None, answer.half)]
    return answers if half is Half.HELD_OUT else [*answers, *_read("development.jsonl")]


def load_specification() -> list[LabelledAnswer]:
    """Short answers, hard cases among them, by which the judge was made: they say what each verdict means."""
    lines = [json.loads(line) for line in _FOLDER.joinpath("judged", "specification.jsonl").read_text(encoding="utf-8").split("\n") if line]
    return [
        LabelledAnswer(id=f"specification-{number}", source="specification", language="en", truncated=line["truncated"], text=line["text"],
                       label=line["verdict"]) for number, line in enumerate(lines)
    ]


def load_triage_answers(category: Category) -> list[TriageAnswer]:
    """The shipped hand-written answers to scenarios of `category`."""
    text = _FOLDER.joinpath("triage_answers", f"{category}.jsonl").read_text(encoding="utf-8")
    return [TriageAnswer.model_validate_json(line) for line in text.split("\n") if line]


def validate_judge(half: Half | None = Half.HELD_OUT) -> JudgeValidation:
    """Judge the labelled answers of `half` (None: all) and hold the verdicts against the labels."""
    answers = load_labelled(half)
    verdicts = [judge(answer.text, truncated=answer.truncated).verdict for answer in answers]
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
