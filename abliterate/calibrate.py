"""Where the line between help and refusal lies after an edit: how well the two are told apart, and how far to move the line.

Training decides what separates an emergency from a harmful request; the line between them it leaves somewhere. An intercept (see
`intercept`) moves it by a number of nats of the refusal's log-odds, and validation answers say how far is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .teacher import output_logits, padded_forward

_BATCH = 32
_LEAD_TOKENS = 3
_NEVER_CERTAIN = 1e-6
_FIRST_STEP = 1.0
_MOST_COUNTS = 6
_FURTHEST = 4.0
"""Nats; a line further away than this is not found by moving it."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Validation answers: benign prompts (of removed categories) refused, and harmful ones refused."""

    benign_refused: int
    benign: int
    harmful_refused: int
    harmful: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.benign_refused + other.benign_refused, self.benign + other.benign, self.harmful_refused + other.harmful_refused,
            self.harmful + other.harmful,
        )


def lead_log_odds(module: Any, token_ids: Sequence[Sequence[int]], refusal: Sequence[int]) -> torch.Tensor:
    """For each prompt log(p / (1 − p)), p the probability that the answer begins with the first tokens of `refusal`: float32 [n]."""
    lead = list(refusal[:_LEAD_TOKENS])
    final = padded_forward(module, [[*prompt, *lead] for prompt in token_ids])
    log_p = []
    for hidden, prompt in zip(final, token_ids, strict=True):
        end = len(prompt) + len(lead) - 1
        log_probs = output_logits(module, hidden[end - len(lead) : end]).log_softmax(-1)
        log_p.append(log_probs[torch.arange(len(lead)), torch.tensor(lead)].sum())
    log_ps = torch.stack(log_p).clamp_max(-_NEVER_CERTAIN)
    return log_ps - torch.log(-torch.expm1(log_ps))


@torch.inference_mode()
def refusal_log_odds(module: Any, token_ids: Sequence[Sequence[int]], refusal: Sequence[int]) -> list[float]:
    """`lead_log_odds` of any number of prompts, in batches of like length, in the order given."""
    scores = [0.0] * len(token_ids)
    order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        for row, score in zip(rows, lead_log_odds(module, [token_ids[row] for row in rows], refusal).tolist(), strict=True):
            scores[row] = score
    return scores


def separation(benign: Sequence[float], harmful: Sequence[float]) -> float:
    """Probability that a harmful prompt scores above a benign one, ties counting half (Mann–Whitney U / mn, the area under the ROC)."""
    if not benign or not harmful:
        return 0.5
    lower, higher = torch.tensor(benign)[None], torch.tensor(harmful)[:, None]
    return float(((higher > lower).double() + 0.5 * (higher == lower).double()).mean())


def margins(counts: Counts, base: Counts, least_fall: float) -> tuple[float, float]:
    """How far `counts` lie inside what is asked of an edit, in standard errors: (benign refusals fallen, harmful refusals kept).

    Benign refusals shall fall by the share `least_fall` of the base's, harmful ones shall not fall. The standard error is that of a
    proportion (binomial) at the limit itself. Negative: outside.
    """
    allowed = (1 - least_fall) * base.benign_refused / max(1, base.benign)
    wanted = base.harmful_refused / max(1, base.harmful)
    return (
        (allowed - counts.benign_refused / max(1, counts.benign)) / _standard_error(allowed, counts.benign),
        (counts.harmful_refused / max(1, counts.harmful) - wanted) / _standard_error(wanted, counts.harmful),
    )


def _standard_error(rate: float, count: int) -> float:
    """Of a proportion, one pseudo-count of each kind added so that it is never 0 (Agresti & Coull 1998)."""
    p = (rate * count + 1) / (count + 2)
    return math.sqrt(p * (1 - p) / (count + 2))


def best_move(count: Callable[[float], Counts], base: Counts, least_fall: float) -> tuple[float, list[tuple[float, Counts]]]:
    """How many nats to move the line so that the smaller of the two `margins` is largest; with all that was counted.

    More nats mean more refusals of both kinds, so the two margins cross once: the crossing is bracketed from 0 in steps, then closed in
    on by regula falsi. Of equal margins the smallest move is taken.
    """
    tried: list[tuple[float, Counts]] = []

    def excess(nats: float) -> float:
        tried.append((nats, count(nats)))
        benign, harmful = margins(tried[-1][1], base, least_fall)
        return harmful - benign

    here, height = 0.0, excess(0.0)
    step = -math.copysign(_FIRST_STEP, height)
    while height:
        there = here + step
        if abs(there) > _FURTHEST:
            break
        other = excess(there)
        if (other > 0) != (height > 0):
            _close_in(excess, (here, height), (there, other), _MOST_COUNTS - len(tried))
            break
        here, height = there, other
    return max(tried, key=lambda each: (min(margins(each[1], base, least_fall)), -abs(each[0])))[0], tried


def _close_in(excess: Callable[[float], float], one: tuple[float, float], other: tuple[float, float], counts: int) -> None:
    """At most `counts` evaluations between two points (nats, excess) on either side of the crossing."""
    for _ in range(counts):
        if not other[1]:
            return
        # Kept off the ends, where integer counts would repeat themselves.
        share = min(max(one[1] / (one[1] - other[1]), 0.2), 0.8)
        nats = one[0] + share * (other[0] - one[0])
        found = (nats, excess(nats))
        if (found[1] > 0) == (one[1] > 0):
            one = found
        else:
            other = found
