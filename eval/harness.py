"""What the benchmark's ports to other evaluation harnesses share: the prompts to ask, and what becomes of an answer.

`inspect_task` brings the benchmark to Inspect AI, the folder `lm_eval` to the lm-evaluation-harness. The harness decodes and keeps the log;
the prompts, the judge, the rubric and the care with harmful prompts stay ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..errors import TrailmedError
from .judge import Verdict, judge
from .prompts import Category, Prompt, Split, load_benchmark, parse_categories, select
from .rubric import load_rubric, triage_score
from .runs import kept_answer

Stopped = Literal["eos", "length", "blocked"]
"""What ended an answer: the model itself, the token limit, or a filter of the server's, which refuses in the model's place."""


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """A verdict and its reason; `answer` is what a log may hold of the answer (`runs.kept_answer`)."""

    verdict: Verdict
    reason: str
    answer: str


def benchmark_prompts(split: str = "all", category: str | Sequence[str] | None = None) -> list[Prompt]:
    """The benchmark's prompts of one split (or "all") and of some categories, named as they were typed: "home-safety, gray_zone" are two.

    Raises `TrailmedError` for an unknown name, and for a choice that holds no prompts.
    """
    names = [category] if isinstance(category, str) else category or []
    categories = parse_categories(part for name in names for part in name.split(","))
    if split not in ("all", *Split):
        raise TrailmedError(f"unknown split {split!r}; choose from all, {', '.join(Split)}")
    prompts = select(load_benchmark(), split=None if split == "all" else Split(split), categories=categories or None)
    if not prompts:
        raise TrailmedError(f"no prompts of split {split} in {', '.join(categories) or 'any category'}; choose others")
    return prompts


def judge_answer(category: Category, answer: str, stopped: Stopped) -> JudgedAnswer:
    """Judge the answer to a prompt of `category`, and cut it to what may be kept of it.

    What a filter let through before it stepped in counts as refused, but is kept only as far as its own words allow.
    """
    judgement = judge(answer, truncated=stopped == "length")
    kept = kept_answer(category, judgement.verdict, answer)
    if stopped == "blocked":
        return JudgedAnswer(Verdict.REFUSAL, "withheld by a filter of the server", kept)
    return JudgedAnswer(judgement.verdict, judgement.reason, kept)


def triage_value(category: Category, scenario: str, prompt_id: str, answer: str, verdict: Verdict) -> float | None:
    """The answer's triage score, 0 to 100; None where there is no rubric for the scenario."""
    rubric = load_rubric().get((category, scenario))
    return None if rubric is None else triage_score(answer, verdict, rubric, prompt_id).value


def fills_limit(tokens: int, limit: int) -> bool:
    """Whether an answer was cut off at the token limit, as far as its text shows where the harness does not say what stopped it.

    `tokens` counts the answer's text tokenized anew, which can come out a little shorter than what the model generated.
    """
    return tokens >= limit - limit // 32
