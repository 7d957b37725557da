"""What one model answered: the judged answers of an evaluation run, as kept in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from ..device.engine import Stopped
from .document import STORED, load_document, save_document
from .judge import Verdict, judge
from .prompts import Category, Expected, Name

RUN_FORMAT = "trailmed.eval-run"
RUN_SCHEMA_VERSION = 1
HARMFUL_ANSWER_CHARACTERS = 80
"""All that is ever kept of an answer to a harmful prompt that is not a refusal."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Label = Annotated[str, Field(max_length=400)]


def kept_answer(category: Category, verdict: Verdict, answer: str) -> str:
    """What is kept of an answer: all of it, or its first `HARMFUL_ANSWER_CHARACTERS` characters if it should have been a refusal."""
    if category is Category.SHOULD_REFUSE and verdict is not Verdict.REFUSAL:
        return answer[:HARMFUL_ANSWER_CHARACTERS]
    return answer


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """A verdict and its reason; `answer` is what a log may hold of the answer (`kept_answer`)."""

    verdict: Verdict
    reason: str
    answer: str


def judge_answer(category: Category, question: str, answer: str, stopped: Stopped) -> JudgedAnswer:
    """Judge the answer to `question`, a prompt of `category`, and cut it to what may be kept of it.

    What a filter let through before it stepped in counts as refused, but is kept only as far as its own words allow.
    """
    judgement = judge(answer, truncated=stopped == "length", question=question)
    kept = kept_answer(category, judgement.verdict, answer)
    if stopped == "blocked":
        return JudgedAnswer(Verdict.REFUSAL, "withheld by a filter of the server", kept)
    return JudgedAnswer(judgement.verdict, judgement.reason, kept)


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt's judged answer.

    `text` is the prompt's text; `answer` the model's, of `tokens` generated tokens, which `stopped` at the end of the answer ("eos"),
    at the token limit ("length"), or was withheld by a server's filter ("blocked"). An answer to a harmful request that is not a
    refusal is cut here, when the value is made (`kept_answer`), and never stored longer.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    id: Name
    category: Category
    scenario: Name
    expected: Expected
    text: Annotated[str, Field(max_length=4000)]
    verdict: Verdict
    reason: Label
    answer: Annotated[str, Field(max_length=1 << 20)]
    tokens: Annotated[int, Field(ge=0)]
    stopped: Stopped

    def __post_init__(self) -> None:
        object.__setattr__(self, "answer", kept_answer(self.category, self.verdict, self.answer))
        if (self.category is Category.SHOULD_REFUSE) != (self.expected is Expected.REFUSE):
            raise ValueError(f"a prompt of category {self.category} cannot be expected to {self.expected}")

    @property
    def refused(self) -> bool:
        """Whether the verdict is refusal (a partial or degenerate answer is not)."""
        return self.verdict is Verdict.REFUSAL


@dataclass(frozen=True, slots=True)
class RunHeader:
    """Which run it is: what answered, under which settings, and what it was asked.

    `name` says which run it is (e.g. "edited-Q8_0"); `engine`, `model`, `model_sha256`, `edit_sha256`, `type` and `settings` are as in
    `EngineIdentity`; `prompts_sha256` hashes the prompts' whole records in order. Nothing in it depends on time, place or speed.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    name: Label
    model: Label
    model_sha256: Sha256 | None
    edit_sha256: Sha256 | None
    type: Annotated[str, Field(max_length=40)]
    prompts_sha256: Sha256
    settings: Mapping[str, bool | int | float | str]
    engine: Annotated[str, Field(max_length=40)] = field(default="llama.cpp", kw_only=True)


@dataclass(frozen=True, slots=True)
class EvalRun(RunHeader):
    """The judged answers of one model to one list of prompts."""

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    answers: tuple[Answer, ...]
    format: Literal["trailmed.eval-run"] = "trailmed.eval-run"
    schema_version: Literal[1] = 1

    def __post_init__(self) -> None:
        if not self.answers:
            raise ValueError("a run without answers")
        if len({answer.id for answer in self.answers}) != len(self.answers):
            raise ValueError("a prompt is answered twice")

    @classmethod
    def of(cls, header: RunHeader, answers: Iterable[Answer]) -> EvalRun:
        """The run of that header with those answers."""
        return cls(**{entry.name: getattr(header, entry.name) for entry in fields(RunHeader)}, answers=tuple(answers))

    def save(self, path: Path) -> None:
        """Write the run to `path` as JSON: the same run, the same bytes."""
        save_document(path, self, _SCHEMA)

    @classmethod
    def load(cls, path: Path) -> EvalRun:
        """Read a run from the file `path`; raises `TrailmedError` for anything that is not one."""
        return load_document(path, _SCHEMA, format=RUN_FORMAT, schema_version=RUN_SCHEMA_VERSION)


_SCHEMA: TypeAdapter[EvalRun] = TypeAdapter(EvalRun)
