"""Several sequences in one row of tokens: what they all begin with is computed once, and nothing is padding.

A block-diagonal causal mask lets every token see the shared prefix and its own sequence up to itself (sequence packing without
cross-contamination: Krell et al. 2021, arXiv:2107.02027). A chat template's opening is a third of a short prompt's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Where everything is in the row: `prefix` shared tokens first, then each sequence's own part, `own[i]` a slice of the row.

    `positions` int64 [1, T] are the tokens' positions in their sequences, `mask` bool [1, 1, T, T] who sees whom.
    """

    prefix: int
    own: tuple[slice, ...]
    positions: torch.Tensor
    mask: torch.Tensor


def shared_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of what all `sequences` begin with, at least one token of each left over."""
    longest = min(map(len, sequences)) - 1
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*(each[:longest] for each in sequences), strict=True)))


def pack(prefix: int, own_lengths: Sequence[int], branches: Sequence[int] = ()) -> Packing:
    """The packing of sequences with `own_lengths` tokens behind a shared prefix of `prefix` tokens (perhaps none).

    Behind each sequence come `branches` of so many tokens, ways in which it may go on: each sees the sequence and itself, and not the
    others. They belong to the sequence's slice.
    """
    parts = [(0, 0, 0, prefix)]  # owner, branch (0: none), first position, length
    for owner, length in enumerate(own_lengths, start=1):
        parts.append((owner, 0, prefix, length))
        parts += [(owner, branch, prefix + length, count) for branch, count in enumerate(branches, start=1)]
    owners, branch = (torch.cat([torch.full((part[3],), part[column]) for part in parts]) for column in (0, 1))
    positions = torch.cat([torch.arange(first, first + length) for _, _, first, length in parts])
    order = torch.arange(len(owners))
    followed = (branch[None] == 0) | (branch[None] == branch[:, None])
    visible = (owners[None] == 0) | ((owners[None] == owners[:, None]) & followed)
    mask = visible & (order[None] <= order[:, None])
    own, start = [], prefix
    for length in own_lengths:
        own.append(slice(start, start + length + sum(branches)))
        start += length + sum(branches)
    return Packing(prefix, tuple(own), positions[None], mask[None, None])


def blocks_are_alike(module: Any) -> bool:
    """Whether the module's blocks can be run one by one: a single kind of attention and no per-layer inputs.

    Models with sliding and global attention or per-layer embeddings (Gemma) run as a whole only.
    """
    config = module.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return kinds == {"full_attention"} and not getattr(config, "hidden_size_per_layer_input", 0)


def run_blocks(module: Any, hidden: torch.Tensor, packing: Packing, first: int, last: int) -> torch.Tensor:
    """The residual stream [1, T, d] after blocks `first` … `last` − 1 of a module whose `blocks_are_alike`."""
    rotary = module.model.rotary_emb(hidden, packing.positions)
    for block in module.model.layers[first:last]:
        hidden = block(hidden, attention_mask=packing.mask, position_ids=packing.positions, position_embeddings=rotary)
    return hidden


def run_packed(module: Any, sequences: Sequence[Sequence[int]], packing: Packing, blocks: int) -> torch.Tensor:
    """The residual stream [1, T, d] after the first `blocks` blocks of `sequences` (token ids, the shared prefix and branches included)."""
    tokens = [*sequences[0][: packing.prefix], *(token for sequence in sequences for token in sequence[packing.prefix :])]
    return run_blocks(module, module.model.embed_tokens(torch.tensor([tokens], dtype=torch.long)), packing, 0, blocks)
