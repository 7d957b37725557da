"""The shipped answers that people labelled: verdicts, to hold the judge against, and triage quality, to hold the rubric against."""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from functools import cache
from importlib.resources import files as resource_files
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from .prompts import Category, Name, load_benchmark, load_phrasings
from .verdict import Verdict

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
    question: Annotated[str, Field(max_length=4000)] | None = Field(default=None, description="its text, where the benchmark lacks it")
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


def shipped_lines(*path: str) -> list[str]:
    """The lines of a shipped JSON Lines file, named by its path in the data folder."""
    return [line for line in _FOLDER.joinpath(*path).read_text(encoding="utf-8").split("\n") if line]


def _read(name: str) -> list[LabelledAnswer]:
    return [_ANSWER.validate_json(line) for line in shipped_lines("judged", name)]


def load_labelled(half: Half | None = None) -> list[LabelledAnswer]:
    """The shipped labelled answers, of one half or all. Those of `development.jsonl` were written later, for development only."""
    answers = [answer for name in _JUDGED for answer in _read(name) if half in (None, answer.half)]
    return answers if half is Half.HELD_OUT else [*answers, *_read("development.jsonl")]


def question_of(answer: LabelledAnswer) -> str | None:
    """What a model was asked; None for answers that were written without a question."""
    return answer.question if answer.question is not None or answer.prompt is None else _benchmark_texts()[answer.prompt]


@cache
def _benchmark_texts() -> dict[str, str]:
    return {prompt.id: prompt.text for prompt in (*load_benchmark(), *load_phrasings())}


def load_specification() -> list[LabelledAnswer]:
    """Short answers, hard cases among them, by which the judge was made: they say what each verdict means."""
    lines = map(json.loads, shipped_lines("judged", "specification.jsonl"))
    return [
        LabelledAnswer(id=f"specification-{number}", source="specification", language="en", truncated=line["truncated"], text=line["text"],
                       label=line["verdict"]) for number, line in enumerate(lines)
    ]


def load_triage_answers(category: Category) -> list[TriageAnswer]:
    """The shipped hand-written answers to scenarios of `category`."""
    return [TriageAnswer.model_validate_json(line) for line in shipped_lines("triage_answers", f"{category}.jsonl")]
