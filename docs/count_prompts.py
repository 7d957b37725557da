"""Count the shipped prompts: `python docs/count_prompts.py` prints the tables of BENCHMARK.md, `--write` puts them there."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from trailmed.eval.prompts import (
    BENCHMARK_VERSION,
    Category,
    Prompt,
    Split,
    load_benchmark,
    load_challenge,
    load_phrasings,
    load_retain,
    prompts_hash,
)

CARD = Path(__file__).with_name("BENCHMARK.md")
_SETS = ("benchmark", "further phrasings", "challenge set", "retain set")
BEGIN, END = "<!-- counts: begin -->\n", "<!-- counts: end -->\n"


def tables() -> str:
    """Everything BENCHMARK.md says in numbers about the sets, as Markdown."""
    sets = benchmark, phrasings, challenge, retain = load_benchmark(), load_phrasings(), load_challenge(), load_retain()
    asked = [*benchmark, *phrasings]
    splits: dict[str, set[Split | None]] = {}
    for prompt in asked:
        splits.setdefault(prompt.scenario, set()).add(prompt.split)
    ways = Counter(Counter((prompt.category, prompt.scenario) for prompt in asked).values())
    fitted, measured = {p.text for p in retain}, {p.text for p in [*asked, *challenge]}
    outside = [{prompt.scenario for prompt in [*asked, *challenge]} & {prompt.scenario for prompt in retain}, measured & fitted]
    facts = [
        ("version", *(BENCHMARK_VERSION for _ in sets)),
        ("prompts", *map(len, sets)),
        ("scenarios", *(len({prompt.scenario for prompt in each}) for each in sets)),
        ("prompts with a twin", *(sum(prompt.twin is not None for prompt in each) for each in sets)),
        ("sha256 (`prompts_hash`)", *(f"`{prompts_hash(each)}`" for each in sets)),
    ]
    checks = [
        *((f"scenarios of a category asked in {number} ways, further phrasings included", ways[number]) for number in sorted(ways)),
        ("scenarios that also occur in the retain set", len(outside[0])),
        ("texts that also occur in the retain set", len(outside[1])),
        ("scenarios in more than one split", sum(len(found) > 1 for found in splits.values())),
    ]
    by_category = Counter((prompt.category, prompt.split) for prompt in benchmark)
    others = [Counter(prompt.category for prompt in each) for each in sets[1:]]
    category_rows: list[tuple[object, ...]] = [
        (f"`{category}`", *(by_category[category, split] for split in Split), sum(by_category[category, split] for split in Split),
         *(each[category] for each in others))
        for category in Category
    ]
    total = ("all", *(sum(by_category[category, split] for category in Category) for split in Split), *map(len, sets))
    return "\n".join([
        _table(("", *_SETS), facts),
        _table(("", "count"), checks),
        _table(("category", *(f"`{split}`" for split in Split), *_SETS), [*category_rows, total]),
        _table(("kind of `should_refuse`", "held out", *_SETS), _by("kind", sets)),
        _table(("voice", "held out", *_SETS), _by("voice", sets)),
    ])


def _by(field: str, sets: Sequence[Sequence[Prompt]]) -> list[tuple[object, ...]]:
    """A row for each value of `field`, the most frequent in the first of `sets`, the benchmark, first."""
    counts = [Counter(getattr(prompt, field) for prompt in prompts) for prompts in sets]
    held_out = Counter(getattr(prompt, field) for prompt in sets[0] if prompt.split is Split.HELD_OUT)
    names = sorted({name for each in counts for name in each} - {None}, key=lambda name: (-counts[0][name], name))
    return [(f"`{name}`", held_out[name], *(each[name] for each in counts)) for name in names]


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        before, _, rest = CARD.read_text(encoding="utf-8").partition(BEGIN)
        CARD.write_text(before + BEGIN + tables() + END + rest.partition(END)[2], encoding="utf-8")
    else:
        print(tables(), end="")
