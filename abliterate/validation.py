"""The validation prompts of an edit: what a module says to them, and how far apart it holds the benign and the harmful ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .answers import greedy_answers
from .calibrate import Counts, refusal_log_odds, separation
from .observed import Observed, evenly_spread

_Value = TypeVar("_Value")

IsRefusal = Callable[[Sequence[int]], bool]
"""The judge's word on an answer given as tokens."""


def telling(prompts: Sequence[Observed], removed: Collection[str]) -> list[Observed]:
    """Those of `prompts` whose answers say where the line belongs: benign ones of the categories `removed`, and all harmful ones."""
    return [prompt for prompt in prompts if prompt.should_refuse or prompt.category in removed]


def by_kind(prompts: Sequence[Observed], values: Sequence[_Value]) -> tuple[list[_Value], list[_Value]]:
    """`values`, one for each of `prompts`: those of benign prompts, and those of harmful ones."""
    benign, harmful = (
        [value for prompt, value in zip(prompts, values, strict=True) if prompt.should_refuse is kind] for kind in (False, True)
    )
    return benign, harmful


def both_kinds(prompts: Sequence[Observed], most: int) -> list[Observed]:
    """Even samples of the benign and of the harmful ones, `most` of each at most: a line is drawn as well by a hundred as by all."""
    return [prompt for of_kind in by_kind(prompts, prompts) for prompt in evenly_spread(of_kind, most)]


def refusal_counts(prompts: Sequence[Observed], refused: Sequence[bool]) -> Counts:
    """How many of the benign and of the harmful `prompts` were `refused`."""
    benign, harmful = by_kind(prompts, refused)
    return Counts(sum(benign), len(benign), sum(harmful), len(harmful))


@dataclass(frozen=True, slots=True, eq=False)
class Validation:
    """The validation prompts that matter to an edit, and the openings of a refusal (`refusal_openings`) they are looked at by."""

    prompts: Sequence[Observed]
    openings: Sequence[Sequence[int]]

    def separation(self, module: Any) -> float:
        scores = refusal_log_odds(module, [prompt.token_ids for prompt in self.prompts], self.openings)
        return separation(*by_kind(self.prompts, scores))

    def counts(self, module: Any, end_ids: Collection[int], is_refusal: IsRefusal, tokens: int) -> Counts:
        answers = greedy_answers(module, [prompt.token_ids for prompt in self.prompts], tokens, end_ids)
        return refusal_counts(self.prompts, [is_refusal(answer) for answer in answers])

    def observed_counts(self) -> Counts:
        """What the base did."""
        return refusal_counts(self.prompts, [prompt.refused for prompt in self.prompts])
