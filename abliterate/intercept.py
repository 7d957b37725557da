"""An intercept for the line between help and refusal: one rank more that moves every prompt's refusal odds alike.

Training decides what tells an emergency from a harmful request; where the line between them falls depends on the roles' weights in
the loss and on the last few steps. A linear layer of a transformer block has no intercept to correct that with, but what it reads
always has a large common part: ridge regression finds a row a with a·x ≈ 1 at every position that says the answer. The column is the
gradient of the refusal's log-odds, so that c·a moves them by a chosen number of nats with the smallest change of the residual stream:
activation addition (Turner et al. 2023, arXiv:2308.10248), written into the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TrailmedError
from .activations import inputs_at
from .calibrate import lead_log_odds
from .factors import Pairs, attached

_RIDGE = 1e-2
"""Of the inputs' mean square."""
_BATCH = 8


@dataclass(frozen=True, slots=True, eq=False)
class Intercept:
    """The tensor `name` gains t · `column` [d_out] ⊗ `row` [d_in] (float32), which moves the mean refusal log-odds by about t nats."""

    name: str
    column: torch.Tensor
    row: torch.Tensor

    def added_to(self, factors: Pairs, nats: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """`factors` with one rank more in the intercept's tensor."""
        b, a = factors[self.name]
        return {**factors, self.name: (torch.cat([b, nats * self.column[:, None]], dim=1), torch.cat([a, self.row[None]]))}


def find_intercept(
    module: Any, name: str, answered: Sequence[tuple[Sequence[int], int]], prompts: Sequence[Sequence[int]],
    openings: Sequence[Sequence[int]],
) -> Intercept:
    """The intercept of the linear layer whose weight is called `name`, of `module` as it stands (inside `attached`: of the edited one).

    `answered` are sequences of a prompt and its answer with the answer's length: the row is fitted at the positions that predict the
    answer. `prompts` (token ids) are those whose log-odds of beginning with one of `openings` (`refusal_openings`) the column moves. Raises
    `TrailmedError` when the log-odds do not depend on the layer's output.
    """
    sequences = [sequence for sequence, _ in answered]
    predicting = [range(len(sequence) - count - 1, len(sequence) - 1) for sequence, count in answered]
    row = _constant_row(inputs_at(module, sequences, predicting, [name])[name])
    gradient = refusal_gradients(module, {name: row}, prompts, openings)[name]
    square = gradient.square().sum()
    if not (torch.isfinite(square) and square > 0):
        raise TrailmedError(f"the odds of a refusal do not depend on what {name} puts out; use another method")
    return Intercept(name, gradient / square, row)


def _constant_row(inputs: torch.Tensor) -> torch.Tensor:
    """The ridge solution of a·x = 1 over the rows x of `inputs` [n, d_in], scaled so that a·x is 1 on average; float32 [d_in]."""
    x = inputs.double()
    moment = x.T @ x / len(x)
    moment.diagonal().add_(_RIDGE * moment.diagonal().mean())
    row: torch.Tensor = torch.linalg.solve(moment, x.mean(0))
    return (row / (x @ row).mean()).float()


def refusal_gradients(
    module: Any, rows: Mapping[str, torch.Tensor], prompts: Sequence[Sequence[int]], openings: Sequence[Sequence[int]],
) -> dict[str, torch.Tensor]:
    """By tensor name, the gradient float32 [d_out] of the mean `lead_log_odds` of `openings` over `prompts` (token ids).

    It is taken with respect to a vector that is added, a·x times, to what the layer of that name puts out; `rows` holds a, float32
    [d_in]. All tensors share one backward pass.
    """
    added = {name: torch.zeros(module.get_parameter(name).shape[0], requires_grad=True) for name in rows}
    with attached(module, {name: (added[name][:, None], row[None]) for name, row in rows.items()}):
        order = sorted(prompts, key=len)
        batch = max(1, _BATCH // max(1, len(openings)))
        for start in range(0, len(order), batch):
            total = lead_log_odds(module, order[start : start + batch], openings).sum() / len(order)
            total.backward()  # type: ignore[no-untyped-call]
    return {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in added.items()}
