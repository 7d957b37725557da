"""Count the shipped prompts: `python docs/count_prompts.py` prints the tables of BENCHMARK.md, `--write` puts them there."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from trailmed.eval.prompts import Category, Prompt, Split, load_benchmark, load_retain

CARD = Path(__file__).with_name("BENCHMARK.md")
BEGIN, END = "<!-- counts: begin -->\n", "<!-- counts: end -->\n"


def tables() -> str:
    """Everything BENCHMARK.md says in numbers about the two sets, as Markdown."""
    benchmark, retain = load_benchmark(), load_retain()
    splits: dict[str, set[Split | None]] = {}
    for prompt in benchmark:
        splits.setdefault(prompt.scenario, set()).add(prompt.split)
    facts = [
        ("prompts", len(benchmark), len(retain)),
        ("scenarios", len(splits), len({prompt.scenario for prompt in retain})),
        ("prompts with a twin", _with_twin(benchmark), _with_twin(retain)),
        ("scenarios that also occur in the other set", *[len(splits.keys() & {prompt.scenario for prompt in retain})] * 2),
        ("texts that also occur in the other set", *[len({p.text for p in benchmark} & {p.text for p in retain})] * 2),
        ("scenarios in more than one split", sum(len(found) > 1 for found in splits.values()), "–"),
    ]
    by_category = Counter((prompt.category, prompt.split) for prompt in benchmark)
    in_retain = Counter(prompt.category for prompt in retain)
    category_rows: list[tuple[object, ...]] = [
        (f"`{category}`", *(by_category[category, split] for split in Split), sum(by_category[category, split] for split in Split),
         in_retain[category])
        for category in Category
    ]
    total = ("all", *(sum(by_category[category, split] for category in Category) for split in Split), len(benchmark), len(retain))
    return "\n".join([
        _table(("", "benchmark", "retain set"), facts),
        _table(("category", *(f"`{split}`" for split in Split), "benchmark", "retain set"), [*category_rows, total]),
        _table(("kind of `should_refuse`", "benchmark", "held out", "retain set"), _by("kind", benchmark, retain)),
        _table(("voice", "benchmark", "held out", "retain set"), _by("voice", benchmark, retain)),
    ])


def _with_twin(prompts: Sequence[Prompt]) -> int:
    return sum(prompt.twin is not None for prompt in prompts)


def _by(field: str, benchmark: Sequence[Prompt], retain: Sequence[Prompt]) -> list[tuple[object, ...]]:
    """A row for each value of `field`, the most frequent in the benchmark first."""
    counts, retained = (Counter(getattr(prompt, field) for prompt in prompts) for prompts in (benchmark, retain))
    held_out = Counter(getattr(prompt, field) for prompt in benchmark if prompt.split is Split.HELD_OUT)
    names = sorted({*counts, *retained} - {None}, key=lambda name: (-counts[name], name))
    return [(f"`{name}`", counts[name], held_out[name], retained[name]) for name in names]


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        before, _, rest = CARD.read_text(encoding="utf-8").partition(BEGIN)
        CARD.write_text(before + BEGIN + tables() + END + rest.partition(END)[2], encoding="utf-8")
    else:
        print(tables(), end="")
