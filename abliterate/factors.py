"""Low-rank factors beside a module's linear layers: where training starts, and how a module wears them while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from .directions import Directions
from .project import written_names
from .teacher import padded_forward

Pairs = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""B [d_out, k] and A [k, d_in] by tensor name."""

_COLUMN_SHARE = 0.1
"""Length of B's columns at the start, as a share of the residual stream's."""


@contextmanager
def attached(module: Any, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Iterator[None]:
    """While open, every linear layer named in `factors` (tensor name → B [d_out, k], A [k, d_in]) adds B A x to its output."""
    handles = []

    def adding(b: torch.Tensor, a: torch.Tensor) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
        def add(_layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0]
            return output + functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype))
        return add

    for name, (b, a) in factors.items():
        handles.append(module.get_submodule(name.removesuffix(".weight")).register_forward_hook(adding(b, a)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def starting_factors(
    model: Any, first_block: int, rank: int, directions: Directions, probes: Sequence[Sequence[int]],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For every residual writer from `first_block` on, A zero (training starts at the base) and B the refusal directions after its block.

    A factor that writes along refusal from the first step learns faster, and disturbs what has nothing to do with refusal less, than
    one that first has to find out where to write. Columns for which there is no direction are random. They are scaled with the stream,
    whose norm over `probes` (token ids) grows from block to block, so that one learning rate fits all.
    """
    weights, norms = model.module.state_dict(), _stream_norms(model.module, probes)
    factors = {}
    for block in range(first_block, len(model.module.model.layers)):
        rows = directions.at(block + 1)[:rank]
        rest = torch.randn(rank - len(rows), rows.shape[1])
        columns = torch.cat([rows, rest / rest.norm(dim=1, keepdim=True)]).T * (_COLUMN_SHARE * norms[block])
        for name in written_names(model.architecture, block):
            a = torch.zeros(rank, weights[name].shape[1])
            factors[name] = (columns.clone().requires_grad_(), a.requires_grad_())
    return factors


@torch.inference_mode()
def _stream_norms(module: Any, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Mean length of the residual stream at the last token of `prompts` after every block."""
    norms: list[float] = []

    def measure(_block: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        norms.append(float(torch.stack([row[len(prompt) - 1].float().norm() for row, prompt in zip(hidden, prompts, strict=True)]).mean()))

    handles = [block.register_forward_hook(measure) for block in module.model.layers]
    try:
        padded_forward(module, prompts)
    finally:
        for handle in handles:
            handle.remove()
    return norms
