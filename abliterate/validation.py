"""The validation prompts of an edit: what a module says to them, and how far apart it holds the benign and the harmful ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from .answers import greedy_answers
from .calibrate import Counts, refusal_log_odds, separation
from .observed import Observed

IsRefusal = Callable[[Sequence[int]], bool]
"""The judge's word on an answer given as tokens."""


def telling(prompts: Sequence[Observed], removed: Collection[str]) -> list[Observed]:
    """Those of `prompts` whose answers say where the line belongs: benign ones of the categories `removed`, and all harmful ones."""
    return [prompt for prompt in prompts if prompt.should_refuse or prompt.category in removed]


@dataclass(frozen=True, slots=True, eq=False)
class Validation:
    """The validation prompts that matter to an edit, and the openings of a refusal (`refusal_openings`) they are looked at by."""

    prompts: Sequence[Observed]
    openings: Sequence[Sequence[int]]

    def separation(self, module: Any) -> float:
        scores = refusal_log_odds(module, [prompt.token_ids for prompt in self.prompts], self.openings)
        return separation(*(
            [score for prompt, score in zip(self.prompts, scores, strict=True) if prompt.should_refuse is kind] for kind in (False, True)
        ))

    def counts(self, module: Any, end_ids: Collection[int], is_refusal: IsRefusal, tokens: int) -> Counts:
        answers = greedy_answers(module, [prompt.token_ids for prompt in self.prompts], tokens, end_ids)
        return self._counts([is_refusal(answer) for answer in answers])

    def observed_counts(self) -> Counts:
        """What the base did."""
        return self._counts([prompt.refused for prompt in self.prompts])

    def _counts(self, refused: Sequence[bool]) -> Counts:
        harmful = [word for prompt, word in zip(self.prompts, refused, strict=True) if prompt.should_refuse]
        benign = [word for prompt, word in zip(self.prompts, refused, strict=True) if not prompt.should_refuse]
        return Counts(sum(benign), len(benign), sum(harmful), len(harmful))
