"""The ablated twin: the same module with one direction taken out of its residual stream, which answers what the base refuses.

Directional ablation after every block (Arditi et al. 2024, arXiv:2406.11717, §2.4). The twin forgets harmful refusals too; it is
therefore asked benign prompts only, and lives in hooks that end with the `with` block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import TrailmedError
from .answers import greedy_answers
from .directions import Directions
from .observed import evenly_spread

_PROBE_PROMPTS = 24
_PROBE_TOKENS = 10
_CANDIDATE_SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75)
"""Depths, as shares of the layers, whose directions are tried: past the middle, where refusal is already decided but not yet said."""


@dataclass(frozen=True, slots=True)
class TwinChoice:
    """`layer` of the direction, and how many of the `asked` probe prompts the twin still refused at each layer tried."""

    layer: int
    asked: int
    refused_by_layer: dict[int, int]


@contextmanager
def ablated(module: Any, direction: torch.Tensor) -> Iterator[None]:
    """While open, h ← h − r rᵀ h after every block of `module`, with r = `direction` [d] of length 1."""
    unit = direction.to(module.dtype)

    def ablate(_block: Any, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden - (hidden @ unit)[..., None] * unit
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handles = [block.register_forward_hook(ablate) for block in module.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def choose_twin(
    module: Any, directions: Directions, over_refused: Sequence[Sequence[int]], end_ids: Collection[int],
    is_refusal: Callable[[Sequence[int]], bool],
) -> TwinChoice:
    """The layer whose direction, ablated, lets the module answer most of the `over_refused` prompts (token ids).

    Asks an even sample of them at each candidate layer; the earliest of equally good ones is taken. Raises `TrailmedError` when no
    candidate makes the module answer at least half: then these directions are not what refusal hangs on.
    """
    probes = evenly_spread(over_refused, _PROBE_PROMPTS)
    refused = {}
    for layer in sorted({round(share * directions.layers) for share in _CANDIDATE_SHARES}):
        rows = directions.at(layer)
        if not len(rows):
            continue
        with ablated(module, rows[0]):
            answers = greedy_answers(module, probes, _PROBE_TOKENS, end_ids)
        refused[layer] = sum(map(is_refusal, answers))
    best = min(refused, key=lambda layer: (refused[layer], layer), default=None)
    if best is None or refused[best] * 2 > len(probes):
        raise TrailmedError(
            f"taking out one direction leaves at least {min(refused.values(), default=len(probes))} of {len(probes)} over-refused prompts "
            "refused at every layer tried; use more prompts, or another method than distill"
        )
    return TwinChoice(best, len(probes), refused)
