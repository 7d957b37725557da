"""Packed sequences against each one run by itself through the whole module, and the mask against its definition, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCABULARY, tiny_module

from trailmed.abliterate.packing import blocks_are_alike, pack, run_blocks, shared_prefix

LAYERS = 3


@cache
def module_of(architecture: str) -> Any:
    return tiny_module(architecture, layers=LAYERS, seed=4)


@given(st.integers(0, 5), st.lists(st.integers(1, 6), max_size=5), st.lists(st.integers(0, 3), max_size=3))
@settings(max_examples=60, deadline=None)
def test_every_token_sees_the_prefix_and_its_own_past(prefix: int, own_lengths: list[int], branches: list[int]) -> None:
    packing = pack(prefix, own_lengths, branches)
    where = [(0, 0, place) for place in range(prefix)]  # (sequence, branch, position); sequence 0 is the prefix, branch 0 the sequence
    for sequence, length in enumerate(own_lengths, start=1):
        where += [(sequence, 0, prefix + place) for place in range(length)]
        for branch, count in enumerate(branches, start=1):
            where += [(sequence, branch, prefix + length + place) for place in range(count)]
    assert packing.prefix == prefix
    assert packing.positions.tolist() == [[place for _, _, place in where]]
    assert packing.mask.shape == (1, 1, len(where), len(where))
    for query, (reader, reading, now) in enumerate(where):
        for key, (owner, part, then) in enumerate(where):
            seen = (owner == 0 or (owner == reader and part in (0, reading))) and then <= now
            assert bool(packing.mask[0, 0, query, key]) == seen
    found = [[where[index][0] for index in range(len(where))[own]] for own in packing.own]
    assert found == [[sequence] * (length + sum(branches)) for sequence, length in enumerate(own_lengths, start=1)]


@given(st.lists(st.integers(0, 1), max_size=4), st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), min_size=1, max_size=4))
@settings(deadline=None)
def test_the_shared_prefix_is_the_longest_that_leaves_a_token_of_each(opening: list[int], rest: list[list[int]]) -> None:
    sequences = [[*opening, *own] for own in rest]
    allowed = [
        length for length in range(min(map(len, sequences)))
        if all(sequence[:length] == sequences[0][:length] for sequence in sequences)
    ]
    assert shared_prefix(sequences) == max(allowed) >= len(opening)


@pytest.mark.parametrize(("architecture", "alike"), [("qwen2", True), ("qwen3", True), ("llama", True), ("gemma3", False)])
def test_which_models_blocks_are_alike(architecture: str, alike: bool) -> None:
    assert blocks_are_alike(tiny_module(architecture)) is alike


def test_a_qwen2_with_some_sliding_layers_is_mixed() -> None:
    module = tiny_module("qwen2", use_sliding_window=True, sliding_window=64, layer_types=["full_attention", "sliding_attention"])
    assert not blocks_are_alike(module)


@pytest.mark.parametrize("first", range(LAYERS))
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@torch.inference_mode()
def test_running_blocks_on_packed_streams_is_running_the_module_on_each_sequence(architecture: str, first: int) -> None:
    module, opening = module_of(architecture), [9, 8, 7, 6]
    sequences = [opening + np.random.default_rng(index).integers(0, VOCABULARY, length).tolist() for index, length in enumerate((5, 1, 8))]
    for prefix in (0, len(opening)):
        outputs = [module.model(torch.tensor([sequence]), use_cache=False, output_hidden_states=True) for sequence in sequences]
        packing = pack(prefix, [len(sequence) - prefix for sequence in sequences])
        streams = [output.hidden_states[first][0] for output in outputs]
        row = torch.cat([streams[0][:prefix], *(stream[prefix:] for stream in streams)])[None]
        final = module.model.norm(run_blocks(module, row, packing, first, LAYERS))
        for own, output in zip(packing.own, outputs, strict=True):
            torch.testing.assert_close(final[0, own], output.last_hidden_state[0, prefix:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [(), (3, 2)])
@torch.inference_mode()
def test_no_blocks_change_nothing(lengths: Sequence[int]) -> None:
    packing = pack(2, lengths)
    hidden = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 2 + sum(lengths), 64))).float()
    assert torch.equal(run_blocks(module_of("llama"), hidden, packing, 1, 1), hidden)
