"""What the benchmark's ports to other evaluation harnesses share: the prompts to ask, and what becomes of an answer.

`inspect_task` brings the benchmark to Inspect AI, the folder `lm_eval` to the lm-evaluation-harness. The harness decodes and keeps the log;
the prompts, the judge, the rubric and the care with harmful prompts stay ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import TrailmedError
from .judge import Verdict
from .prompts import Category, Prompt, Split, SplitChoice, choose, load_benchmark, parse_categories
from .rubric import load_rubric, triage_score


def benchmark_prompts(split: str = "all", category: str | Sequence[str] | None = None) -> list[Prompt]:
    """The benchmark's prompts of one split (or "all") and of some categories, named as they were typed: "home-safety, gray_zone" are two.

    Raises `TrailmedError` for an unknown name, and for a choice that holds no prompts.
    """
    names = [category] if isinstance(category, str) else category or []
    categories = parse_categories(part for name in names for part in name.split(","))
    if split not in tuple(SplitChoice):
        raise TrailmedError(f"unknown split {split!r}; choose from all, {', '.join(Split)}")
    return choose(load_benchmark(), split=SplitChoice(split).chosen, categories=categories)


def triage_value(category: Category, scenario: str, prompt_id: str, answer: str, verdict: Verdict) -> float | None:
    """The answer's triage score, 0 to 100; None where there is no rubric for the scenario."""
    rubric = load_rubric().get((category, scenario))
    return None if rubric is None else triage_score(answer, verdict, rubric, prompt_id).value


def fills_limit(tokens: int, limit: int) -> bool:
    """Whether an answer was cut off at the token limit, as far as its text shows where the harness does not say what stopped it.

    `tokens` counts the answer's text tokenized anew, which can come out a little shorter than what the model generated.
    """
    return tokens >= limit - limit // 32
