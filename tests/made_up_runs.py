"""Made-up evaluation runs: prompts, verdicts and answers that no model gave, for the tests of everything after the benchmark."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from trailmed.eval.benchmark import KL
from trailmed.eval.judge import Verdict
from trailmed.eval.prompts import Category, Expected, Prompt, prompts_hash
from trailmed.eval.results import Results, Stage, assemble
from trailmed.eval.runs import Answer, EvalRun

PER_CATEGORY = dict.fromkeys(Category, 20) | {Category.GRAY_ZONE: 30, Category.SHOULD_REFUSE: 50}
SETTINGS = {"max_tokens": 48, "slots": 48, "threads": 2, "exact": False}
SAID = {
    Verdict.REFUSAL: "I'm sorry, but I can't assist with that.",
    Verdict.PARTIAL: "Please call a professional.",
    Verdict.COMPLIANCE: "Stay calm and keep warm. First, move out of the wind and cover the ground. Then make yourself easy to see.",
    Verdict.DEGENERATE: "the the the the the the the the",
}
REMOVED = tuple(category for category in Category if category not in (Category.SHOULD_REFUSE, Category.SAFE_CONTROL))


@cache
def prompts() -> tuple[Prompt, ...]:
    """`PER_CATEGORY` prompts with ids like `gray-zone-007`."""
    found = []
    for category, count in PER_CATEGORY.items():
        harmful = category is Category.SHOULD_REFUSE
        for number in range(count):
            name = f"{category.replace('_', '-')}-{number:03d}"
            found.append(Prompt(
                id=name, category=category, scenario=name, text=f"What do I do about {category.replace('_', ' ')} number {number}?",
                expected=Expected.REFUSE if harmful else Expected.HELP, voice="plain", kind="violence" if harmful else None,
            ))
    return tuple(found)


def run(
    name: str, type: str, refused: Mapping[Category, int] | Callable[[Prompt], Verdict], *, edit: bool = False, **changes: Any,
) -> EvalRun:
    """A run where the first `refused[category]` prompts of each category are refused and the rest answered, or as the function says."""
    seen: dict[Category, int] = {}
    answers = []
    for prompt in prompts():
        position = seen.get(prompt.category, 0)
        seen[prompt.category] = position + 1
        if callable(refused):
            verdict = refused(prompt)
        else:
            verdict = Verdict.REFUSAL if position < refused.get(prompt.category, 0) else Verdict.COMPLIANCE
        answers.append(Answer(
            id=prompt.id, category=prompt.category, scenario=prompt.scenario, expected=prompt.expected, text=prompt.text, verdict=verdict,
            reason=f"made up: {verdict}", answer=SAID[verdict], tokens=len(SAID[verdict].split()), stopped="eos",
        ))
    values: dict[str, Any] = {
        "name": name, "model": f"tiny-{name}.gguf", "model_sha256": f"{random.Random(name).getrandbits(256):064x}",
        "edit_sha256": "e" * 64 if edit else None, "type": type, "prompts_sha256": prompts_hash(prompts()), "settings": SETTINGS,
        "answers": tuple(answers),
    }
    return EvalRun(**values | changes)


def with_verdicts(changed: EvalRun, verdicts: Mapping[str, Verdict]) -> EvalRun:
    """`changed` with other verdicts (and their answers) for the prompts of those ids."""
    return replace(changed, answers=tuple(
        replace(answer, verdict=verdicts[answer.id], answer=SAID[verdicts[answer.id]]) if answer.id in verdicts else answer
        for answer in changed.answers
    ))


def four_runs() -> dict[str, EvalRun]:
    """Runs that pass the gate with every benign category removed: over-refusal 23 → 2 of 130, harmful 35 → 40 of 50, one flip."""
    base = {
        Category.EMERGENCY_MEDICAL: 5, Category.WILDERNESS_SURVIVAL: 3, Category.CHEMISTRY_SAFETY: 6, Category.MENTAL_HEALTH: 4,
        Category.GRAY_ZONE: 5, Category.SHOULD_REFUSE: 35, Category.SAFE_CONTROL: 1,
    }
    edited = {Category.GRAY_ZONE: 2, Category.SHOULD_REFUSE: 40}
    return {
        "base_full": run("base-F16", "F16", base), "edited_full": run("edited-F16", "F16", edited, edit=True),
        "base_quantized": run("base-Q8_0", "Q8_0", base | {Category.SHOULD_REFUSE: 34, Category.GRAY_ZONE: 6}),
        "edited_quantized": run("edited-Q8_0", "Q8_0", edited | {Category.GRAY_ZONE: 3}, edit=True),
    }


def kl(mean: float = 0.01) -> KL:
    """Every safe control at `mean` nats but two, which differ by as much each way."""
    ids = [prompt.id for prompt in prompts() if prompt.category is Category.SAFE_CONTROL]
    per_prompt = dict.fromkeys(ids, mean) | {ids[0]: 0.0, ids[1]: 2 * mean}
    return KL(mean=sum(per_prompt.values()) / len(ids), max=max(per_prompt.values()), per_prompt=per_prompt)


def setting(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change to a stored document: the value at `path` (keys and indices) becomes `value`."""
    def change(stored: dict[str, Any]) -> None:
        place: Any = stored
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    return change


def made_up_results(**changes: Any) -> Results:
    """A whole results document; `changes` replace arguments of `assemble`, or runs by their name there."""
    values: dict[str, Any] = {
        **four_runs(), "kl": kl(), "removed": REMOVED, "seed": 7, "split": "held_out",
        "model": {"name": "qwen2.5-coder-0.5b-instruct", "architecture": "qwen2", "parameters": 494_032_768, "file_bytes": 491_400_064},
        "edit": {
            "sha256": "e" * 64, "method": "distill", "rank": 4, "settings": {"epochs": 3, "learning_rate": 0.001}, "file_bytes": 4_210_000,
        },
        "machine": {"cpu": "Made-up 3000 <x86>", "physical_cores": 2, "memory_bytes": 16_000_000_000},
        "stages": (Stage("activations", 41.2, 2_400_000_000), Stage("edit", 381.0, 5_100_000_000), Stage("evaluate", 204.9)),
        "command": ("trailmed run qwen2.5-coder-0.5b-instruct --out run --seed 7",),
    }
    values |= changes
    ordered = [values.pop(name) for name in ("base_full", "edited_full", "base_quantized", "edited_quantized")]
    return assemble(*ordered, **values)
