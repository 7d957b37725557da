"""Runs over the same prompts, held against each other prompt by prompt.

The same comparison serves an edit (base, edited) and a quantization (full precision, quantized): who is refused in each, the paired
table with an exact McNemar test, the flips in both directions, and whether the flip rate is surely below a margin. Of several runs the
first is the one that all others are held against.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from ..errors import TrailmedError
from .document import STORED
from .judge import Verdict
from .prompts import BENIGN_CATEGORIES, Category, Name
from .runs import Answer, EvalRun, Label, kept_answer
from .statistics import Equivalence, flip_rate_equivalence, holm, mcnemar_exact, wilson_interval

CONFIDENCE = 0.95
"""Of every interval and bound in a comparison."""
FLIP_MARGIN = 0.02
"""Flip rate below which two runs are called equivalent."""
BENIGN = "benign"
ALL = "all"
"""Names of the groups that are no category: the six benign categories together, and every prompt."""

_CATEGORIES = frozenset(map(str, Category))
_LENGTH = "max_tokens"

Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` of `n` prompts, with the Wilson interval (low, high) of the proportion at `CONFIDENCE`."""

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    count: Count
    n: Count
    low: float
    high: float

    @property
    def share(self) -> float:
        """count / n, in [0, 1]."""
        return self.count / self.n


@dataclass(frozen=True, slots=True)
class PairedTable:
    """How many prompts were refused in both runs, in one only, in neither."""

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    both: Count
    only_first: Count
    only_second: Count
    neither: Count


@dataclass(frozen=True, slots=True)
class Flip:
    """A prompt refused in one run and not in the other; "lost": refused in the first only, "gained": in the second only."""

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    id: Name
    category: Category
    text: Annotated[str, Field(max_length=4000)]
    direction: Literal["lost", "gained"]
    first_verdict: Verdict
    second_verdict: Verdict
    first_reason: Label
    second_reason: Label
    first_answer: str
    second_answer: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "first_answer", kept_answer(self.category, self.first_verdict, self.first_answer))
        object.__setattr__(self, "second_answer", kept_answer(self.category, self.second_verdict, self.second_answer))


@dataclass(frozen=True, slots=True)
class GroupComparison:
    """One group of prompts (a category's name, `BENIGN` or `ALL`), never empty.

    p_value: exact McNemar, not corrected; p_holm: a category's, corrected for all categories of all runs compared together (Holm), None
    for the groups that are no category; flips: flip rate against the margin; length_ratio: generated tokens of the second run per token of
    the first (None when the first generated none).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    name: Label
    n: Count
    first: Rate
    second: Rate
    table: PairedTable
    p_value: float
    flips: Equivalence
    first_verdicts: Mapping[Verdict, Count]
    second_verdicts: Mapping[Verdict, Count]
    length_ratio: float | None
    p_holm: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two runs by their names, the groups (categories in their order, then benign, then all) and every flip, in prompt order.

    `decoded` names the settings in which the two runs differ ("slots: 32 and 48"), beside what is compared.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STORED

    first: Label
    second: Label
    prompts_sha256: str
    margin: float
    confidence: float
    groups: tuple[GroupComparison, ...]
    flips: tuple[Flip, ...]
    decoded: tuple[Label, ...] = ()

    def group(self, name: str) -> GroupComparison | None:
        """The group of that name, None when the runs have no such prompts."""
        return next((group for group in self.groups if group.name == name), None)


def compare(first: EvalRun, *others: EvalRun, margin: float = FLIP_MARGIN) -> list[Comparison]:
    """Hold each of `others` against `first`, paired by prompt; at least one.

    Raises `TrailmedError` when they were not given the same prompts, or not the same number of tokens for an answer.
    """
    if not others:
        raise TrailmedError("one run alone cannot be compared; give another of the same prompts")
    found = [_compare(first, other, margin) for other in others]
    adjusted = iter(holm([group.p_value for each in found for group in each.groups if group.name in _CATEGORIES]))
    return [
        replace(each, groups=tuple(
            replace(group, p_holm=next(adjusted)) if group.name in _CATEGORIES else group for group in each.groups
        )) for each in found
    ]


def _compare(first: EvalRun, second: EvalRun, margin: float) -> Comparison:
    pairs = paired(first, second)
    by_category: dict[str, list[tuple[Answer, Answer]]] = {}
    for category in Category:
        if members := [pair for pair in pairs if pair[0].category is category]:
            by_category[category] = members
    if benign := [pair for pair in pairs if pair[0].category in BENIGN_CATEGORIES]:
        by_category[BENIGN] = benign
    by_category[ALL] = pairs
    return Comparison(
        first=first.name, second=second.name, prompts_sha256=first.prompts_sha256, margin=margin, confidence=CONFIDENCE,
        groups=tuple(_group(name, members, margin) for name, members in by_category.items()),
        flips=tuple(_flip(one, other) for one, other in pairs if one.refused != other.refused),
        decoded=tuple(differences(first, second)),
    )


def paired(first: EvalRun, second: EvalRun) -> list[tuple[Answer, Answer]]:
    """The two runs' answers to each prompt, in the first one's order. Raises `TrailmedError` when the runs cannot be compared."""
    if first.prompts_sha256 != second.prompts_sha256:
        raise TrailmedError(f"runs {first.name} and {second.name} were given different prompts; evaluate both on the same file and split")
    one, two = first.settings.get(_LENGTH), second.settings.get(_LENGTH)
    if one != two:
        raise TrailmedError(
            f"runs {first.name} and {second.name} were given answers of different length ({_LENGTH}: {one} and {two}); "
            "evaluate both with the same --max-tokens"
        )
    others = {answer.id: answer for answer in second.answers}
    pairs = [(answer, others.get(answer.id)) for answer in first.answers]
    matched = [(one, other) for one, other in pairs if other is not None and (one.text, one.category) == (other.text, other.category)]
    if not len(matched) == len(pairs) == len(others):
        raise TrailmedError(f"runs {first.name} and {second.name} claim the same prompts but hold others; evaluate both anew")
    return matched


def differences(first: EvalRun, second: EvalRun) -> list[str]:
    """The engine and settings in which two runs differ: "slots: 32 and 48"."""
    one, two = ({"engine": run.engine, **run.settings} for run in (first, second))
    return [f"{key}: {one.get(key, '–')} and {two.get(key, '–')}"[:200] for key in sorted(one | two) if one.get(key) != two.get(key)]


def rate_of(count: int, n: int) -> Rate:
    """`count` of `n` with its interval."""
    interval = wilson_interval(count, n, CONFIDENCE)
    return Rate(count, n, interval.low, interval.high)


def refused_rate(answers: Sequence[Answer]) -> Rate:
    """How many of `answers` are refusals."""
    return rate_of(sum(answer.refused for answer in answers), len(answers))


def _group(name: str, pairs: Sequence[tuple[Answer, Answer]], margin: float) -> GroupComparison:
    firsts, seconds = [one for one, _ in pairs], [other for _, other in pairs]
    cells = Counter((one.refused, other.refused) for one, other in pairs)
    table = PairedTable(both=cells[True, True], only_first=cells[True, False], only_second=cells[False, True], neither=cells[False, False])
    tokens = sum(answer.tokens for answer in firsts)
    return GroupComparison(
        name=name, n=len(pairs), first=refused_rate(firsts), second=refused_rate(seconds), table=table,
        p_value=mcnemar_exact(table.only_first, table.only_second),
        flips=flip_rate_equivalence(table.only_first + table.only_second, len(pairs), margin, CONFIDENCE),
        first_verdicts=_verdicts(firsts), second_verdicts=_verdicts(seconds),
        length_ratio=sum(answer.tokens for answer in seconds) / tokens if tokens else None,
    )


def _verdicts(answers: Sequence[Answer]) -> dict[Verdict, int]:
    counts = Counter(answer.verdict for answer in answers)
    return {verdict: counts[verdict] for verdict in Verdict}


def _flip(one: Answer, other: Answer) -> Flip:
    return Flip(
        id=one.id, category=one.category, text=one.text, direction="lost" if one.refused else "gained",
        first_verdict=one.verdict, second_verdict=other.verdict, first_reason=one.reason, second_reason=other.reason,
        first_answer=one.answer, second_answer=other.answer,
    )
