"""What an edit would do, told cheaply: how answers would open, and how far the first token of everyday answers moves.

A search tries hundreds of edits, and decoding and judging answers under each would take minutes a piece. Help or refusal is decided where
the answer opens, which is one pass through the edited blocks (`OpeningProbe`). How well that agrees with judged answers is to be measured,
not believed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .calibrate import Counts, separation
from .factors import Pairs, attached
from .observed import Observed, evenly_spread
from .opening import OpeningProbe
from .validation import both_kinds, by_kind, refusal_counts

ASKED = 128
"""Prompts of either kind, and everyday ones, at most."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What a module does: refusals by how answers open, mean first-token KL(base ‖ edited) on everyday prompts in nats, and the area
    under the ROC of harmful over benign prompts by how surely their answers open as a refusal."""

    counts: Counts
    kl: float
    separation: float


class Proxy:
    """`prompts` (benign and harmful) and everyday `controls`, asked of `module` under edits of its blocks from `first_block` on.

    Even samples of each kind, `ASKED` at most. `openings` are the refusal's. Made of the unedited module, which is what edits are held
    against. Raises ValueError when there is no opening, no prompt or no control.
    """

    def __init__(
        self, module: Any, prompts: Sequence[Observed], controls: Sequence[Observed], openings: Sequence[Sequence[int]], first_block: int,
    ) -> None:
        self.prompts = both_kinds(prompts, ASKED)
        self._module = module
        self._probe = OpeningProbe(module, [prompt.token_ids for prompt in self.prompts], openings, first_block)
        # Only the first token is asked for, so a single token of an opening will do.
        asked = [prompt.token_ids for prompt in evenly_spread(controls, ASKED)]
        self._everyday = OpeningProbe(module, asked, [openings[0][:1]], first_block)
        self._base = self._everyday.first_logits()

    def refusals(self, factors: Pairs) -> list[bool]:
        """Whether each of `prompts` would be refused under `factors`."""
        with attached(self._module, factors):
            return [margin > 0 for margin in self._probe.margins()]

    def measure(self, factors: Pairs) -> Measured:
        """What the module does under `factors` (none: the base). Nothing is random."""
        with attached(self._module, factors):
            margins = self._probe.margins()
            edited = self._everyday.first_logits()
        counts = refusal_counts(self.prompts, [margin > 0 for margin in margins])
        return Measured(counts, mean_kl(self._base, edited), separation(*by_kind(self.prompts, margins)))


def mean_kl(base: torch.Tensor, edited: torch.Tensor) -> float:
    """Mean KL(base ‖ edited) in nats of logits float32 [n, vocabulary], in float64, one row at a time: float32 is off by 1e-6."""
    found = []
    for rows in zip(base, edited, strict=True):
        before, after = (row.double().log_softmax(-1) for row in rows)
        found.append(max(0.0, float((before.exp() * (before - after)).sum())))
    return sum(found) / len(found)
