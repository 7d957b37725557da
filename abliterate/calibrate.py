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
_NEVER_CERTAIN = 1e-6
_STEP = 1.0
_FINEST = 0.25
_FURTHEST = 4.0
"""Nats; a line further away than this is not found by moving it."""
_CLEARANCE = 0.5
"""Standard errors inside the limits: prompts that the line was not drawn by fall a little worse than those it was."""
MOST_COUNTS = 7
"""How often `least_move` counts: five times to reach `_FURTHEST`, twice to halve the last step to `_FINEST`."""


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


def lead_log_odds(module: Any, token_ids: Sequence[Sequence[int]], openings: Sequence[Sequence[int]]) -> torch.Tensor:
    """For each prompt log(p / (1 − p)), p the probability that the answer begins with one of `openings` (token ids): float32 [n].

    No opening may begin with another one; else p would count answers twice. Raises ValueError when there is none.
    """
    if not openings:
        raise ValueError("no opening of a refusal is given")
    asked = [[*prompt, *opening] for prompt in token_ids for opening in openings]
    final = iter(padded_forward(module, asked))
    log_p = []
    for prompt in token_ids:
        each = []
        for opening in openings:
            log_probs = output_logits(module, next(final)[len(prompt) - 1 : len(prompt) - 1 + len(opening)]).log_softmax(-1)
            each.append(log_probs[torch.arange(len(opening)), torch.tensor(opening)].sum())
        log_p.append(torch.stack(each).logsumexp(0))
    return log_odds(torch.stack(log_p))


def log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log(p / (1 − p)) from log p, finite also where p rounds to 1."""
    log_p = log_p.clamp_max(-_NEVER_CERTAIN)
    return log_p - torch.log(-torch.expm1(log_p))


@torch.inference_mode()
def refusal_log_odds(module: Any, token_ids: Sequence[Sequence[int]], openings: Sequence[Sequence[int]]) -> list[float]:
    """`lead_log_odds` of any number of prompts, in batches of like length, in the order given."""
    scores = [0.0] * len(token_ids)
    order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
    batch = max(1, _BATCH // max(1, len(openings)))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        for row, score in zip(rows, lead_log_odds(module, [token_ids[row] for row in rows], openings).tolist(), strict=True):
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


def least_move(count: Callable[[float], Counts], base: Counts, least_fall: float) -> tuple[float, list[tuple[float, Counts]]]:
    """The smallest move of the line, in nats, after which both `margins` are clear; with all that was counted (`MOST_COUNTS` at most).

    Every nat disturbs what has nothing to do with refusals, so the line is moved no further than the limits ask. More nats mean more
    refusals of both kinds: only the direction of the worse margin can help, and only until the other one is the worse. The move is
    bracketed from 0 in steps and then bisected. Where nothing is clear, the move with the largest smaller margin is taken.
    """
    tried: list[tuple[float, Counts, tuple[float, float]]] = []

    def lacking(nats: float) -> float:
        """The sign of the move that is still needed; 0 where both margins are clear."""
        found = count(nats)
        benign, harmful = margins(found, base, least_fall)
        tried.append((nats, found, (benign, harmful)))
        return 0.0 if min(benign, harmful) >= _CLEARANCE else math.copysign(1.0, benign - harmful)

    near, sign = 0.0, lacking(0.0)
    while sign and abs(near) < _FURTHEST:
        far = near + sign * _STEP
        if lacking(far) == sign:
            near = far
            continue
        while abs(far - near) > _FINEST:
            middle = (near + far) / 2
            if lacking(middle) == sign:
                near = middle
            else:
                far = middle
        break
    chosen = max(tried, key=lambda each: (min(*each[2], _CLEARANCE), -abs(each[0])))
    return chosen[0], [(nats, found) for nats, found, _ in tried]
