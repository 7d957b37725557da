"""What a neuron of the conditional edit reads: ridge regressions over prompts, every class of which weighs the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from .observed import Observed, evenly_spread

BENIGN = "benign"
HARMFUL = "harmful"
"""Classes of prompts that an edit is about; every category it leaves alone is a class of its own, under its name."""
_READINGS = {BENIGN: -1.0, HARMFUL: 1.0}
_ELSEWHERE_TOKENS = 4
"""Of the second half of each answered prompt."""
_ANSWER_TOKENS = 16
_ELSEWHERE_WEIGHT = 0.02
"""Of the other tokens in the regression of what is read, where the gate has been shut already; each class of prompts weighs 1."""
_CONSTANT_RIDGE = 0.003
_FOLDS = 4
STEEPNESS = 8.0
"""How far the gate opens: act(8) is 8 and act(−8) is 0 for every activation function gated MLPs have, within a thousandth of 8."""


class Rows(NamedTuple):
    """The rows of one block's neuron, float32 [d]: `gate` reads 1 where it shall open and −1 elsewhere, `harm` −1 to 1, `one` always 1."""

    gate: torch.Tensor
    harm: torch.Tensor
    one: torch.Tensor


class Wanted(NamedTuple):
    """What a row shall read: `targets` float32 [n] at the prompts' last tokens, `elsewhere` at other tokens; and its regularization."""

    targets: torch.Tensor
    elsewhere: float
    ridge: float


def class_of(prompt: Observed, removed: Collection[str]) -> str:
    """`HARMFUL`, `BENIGN` for the categories `removed`, else the prompt's category."""
    if prompt.should_refuse:
        return HARMFUL
    return BENIGN if prompt.category in removed else prompt.category


def fitted_rows(inputs: torch.Tensor, others: torch.Tensor, classes: Sequence[str], ridge: float, gate_ridge: float) -> Rows:
    """The rows of a neuron from what its block reads at the prompts' last tokens, float32 [n, d], and elsewhere [m, d] (m may be 0).

    Ridge regressions in which every class of `classes` [n] weighs the same, however many prompts it has. The gate's targets are 1 for
    `BENIGN` and `HARMFUL` and −1 for other classes and elsewhere; those of harm are −1, 1 and 0; one's are 1, and 0 elsewhere. What the
    latter two read is fitted as the gate lets it through (`opened`): a gate that is half open counts half.
    """
    harm = torch.tensor([_READINGS.get(each, 0.0) for each in classes])
    [gate] = ridge_rows(inputs, others, classes, 1.0, [Wanted(2.0 * harm.abs() - 1.0, -1.0, gate_ridge)])
    through, through_elsewhere = (opened(x @ gate)[:, None] * x for x in (inputs, others))
    return Rows(gate, *ridge_rows(
        through, through_elsewhere, classes, _ELSEWHERE_WEIGHT,
        [Wanted(harm, 0.0, ridge), Wanted(torch.ones(len(classes)), 0.0, _CONSTANT_RIDGE)],
    ))


def opened(gate: torch.Tensor) -> torch.Tensor:
    """What a gate that reads `gate` lets through, act(s · gate) / s for the steepness s: 0 to 1 (SiLU; GELU is a thousandth off)."""
    return functional.silu(STEEPNESS * gate) / STEEPNESS


def ridge_rows(
    inputs: torch.Tensor, others: torch.Tensor, classes: Sequence[str], weight: float, wanted: Sequence[Wanted],
) -> list[torch.Tensor]:
    """For each of `wanted` the row a, float32 [d], with a·x near its targets for x of `inputs` [n, d] and of `others` [m, d].

    Minimizes Σ w (a·x − target)² + ridge · v · |a|²: the weights w of each class's prompts sum to 1, those of the others to `weight`, and v
    is the mean square distance of `inputs` from their mean.
    """
    counts = Counter(classes)
    weights = torch.cat([
        torch.tensor([1 / counts[each] for each in classes], dtype=torch.float64),
        torch.full((len(others),), weight / max(1, len(others)), dtype=torch.float64),
    ])
    x = torch.cat([inputs, others]).double()
    moment = (x * weights[:, None]).mT @ x
    variance = float((inputs.double() - inputs.double().mean(0)).square().sum(1).mean())
    rows = []
    for each in wanted:
        targets = torch.cat([each.targets.double(), torch.full((len(others),), each.elsewhere, dtype=torch.float64)])
        penalized = moment.clone()
        penalized.diagonal().add_(each.ridge * variance or 1.0)
        rows.append(torch.linalg.solve(penalized, x.mT @ (weights * targets)).float())
    return rows


def folds(prompts: Sequence[Observed]) -> list[set[str]]:
    """The ids of `prompts` in four parts of about equal size; prompts of one scenario stay together."""
    parts: list[set[str]] = [set() for _ in range(_FOLDS)]
    place = {scenario: index % _FOLDS for index, scenario in enumerate(dict.fromkeys(prompt.scenario or prompt.id for prompt in prompts))}
    for prompt in prompts:
        parts[place[prompt.scenario or prompt.id]].add(prompt.id)
    return parts


def elsewhere(prompt: Observed) -> tuple[list[int], list[int]]:
    """The prompt with the beginning of its answer (token ids), and tokens of it (indices) at which nothing is decided any more or yet.

    They are evenly spread over the second half of the prompt, without its last token, and all of the answer's beginning.
    """
    end = len(prompt.token_ids) - 1
    sequence = [*prompt.token_ids, *prompt.answer[:_ANSWER_TOKENS]]
    return sequence, [*evenly_spread(range(max(1, end // 2), end), _ELSEWHERE_TOKENS), *range(end + 1, len(sequence))]
