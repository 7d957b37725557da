"""Where the line between help and refusal lies after an edit: how well the two are told apart, and a shift that moves the line.

Training decides what separates an emergency from a harmful request; the line between them it leaves somewhere, depending on the
weights of the two kinds in the loss. One number moves it: a share of the refusal direction taken out of (or added to) what the edited
writers put into the residual stream, a partial directional ablation (Arditi et al. 2024; partial as in Wang et al. 2024, λ).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .teacher import output_logits, padded_forward

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""B [d_out, k] and A [k, d_in] by tensor name."""

_BATCH = 32
_LEAD_TOKENS = 3
_NEVER_ZERO = 1e-6
SHARES = (-0.2, 0.0, 0.15, 0.3, 0.45, 0.6)
"""Shares of the refusal direction tried, in order."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Validation answers: benign prompts (of removed categories) refused, and harmful ones refused."""

    benign_refused: int
    benign: int
    harmful_refused: int
    harmful: int


@torch.inference_mode()
def refusal_log_odds(module: Any, token_ids: Sequence[Sequence[int]], refusal: Sequence[int]) -> list[float]:
    """For each prompt log(p / (1 − p)), p the probability that the answer begins with the first tokens of the stock `refusal`."""
    lead = list(refusal[:_LEAD_TOKENS])
    scores = [0.0] * len(token_ids)
    order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        final = padded_forward(module, [[*token_ids[row], *lead] for row in rows])
        for position, row in enumerate(rows):
            end = len(token_ids[row]) + len(lead) - 1
            log_probs = output_logits(module, final[position, end - len(lead) : end]).log_softmax(-1)
            log_p = min(sum(log_probs[index, token].item() for index, token in enumerate(lead)), -_NEVER_ZERO)
            scores[row] = log_p - math.log(-math.expm1(log_p))
    return scores


def separation(benign: Sequence[float], harmful: Sequence[float]) -> float:
    """Probability that a harmful prompt scores above a benign one, ties counting half (Mann–Whitney U / mn, the area under the ROC)."""
    if not benign or not harmful:
        return 0.5
    lower, higher = torch.tensor(benign)[None], torch.tensor(harmful)[:, None]
    return float(((higher > lower).double() + 0.5 * (higher == lower).double()).mean())


def shifted(
    factors: Pairs, weights: Mapping[str, torch.Tensor], direction: torch.Tensor, share: float,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Factors of (1 − s r rᵀ)(W + B A) − W for every tensor: the edit with `share` s of r = `direction` [d] taken out of its output.

    One rank more: B' = [B − s r (rᵀ B), −s r], A' = [A; rᵀ W]. A negative share adds.
    """
    unit = direction.float()
    moved = {}
    for name, (b, a) in factors.items():
        along = (unit @ weights[name].float())[None]
        column = -share * unit[:, None]
        moved[name] = (torch.cat([b + column @ (unit[None] @ b), column], dim=1), torch.cat([a, along]))
    return moved


def best_shift(count: Callable[[float], Counts], base: Counts, benign_weight: float) -> tuple[float, list[tuple[float, Counts]]]:
    """The share of `SHARES` with the highest `utility` among those that keep the base's harmful refusals; with all that was tried.

    Refusals of both kinds fall as the share grows, so larger shares are not tried once retention is lost. Of equal shares the smallest
    is taken, and the smallest of all where none keeps retention.
    """
    tried: list[tuple[float, Counts]] = []
    for share in SHARES:
        tried.append((share, count(share)))
        if tried[-1][1].harmful_refused < base.harmful_refused:
            break
    keeping = [each for each in tried if each[1].harmful_refused >= base.harmful_refused] or tried[:1]
    return max(keeping, key=lambda each: utility(each[1], benign_weight))[0], tried


def utility(counts: Counts, benign_weight: float) -> float:
    """Rate of harmful refusals less `benign_weight` times the rate of benign ones (a weighted Youden's J)."""
    return counts.harmful_refused / max(1, counts.harmful) - benign_weight * counts.benign_refused / max(1, counts.benign)
