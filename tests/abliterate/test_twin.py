"""The ablated twin against blocks followed by the projection matrix 1 − r rᵀ, and the choice of its layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_models import VOCABULARY, tiny_module

from trailmed.abliterate.answers import greedy_answers
from trailmed.abliterate.directions import Directions
from trailmed.abliterate.twin import ablated, choose_twin
from trailmed.errors import TrailmedError

HIDDEN, LAYERS = 64, 6
NEVER = VOCABULARY - 2
TOKENS = torch.from_numpy(np.random.default_rng(0).integers(0, VOCABULARY, (3, 12)))
PROMPTS = [np.random.default_rng(index).integers(0, VOCABULARY - 3, 4 + index % 3).tolist() for index in range(12)]


class Projected(torch.nn.Module):
    """A block and the matrix its output is multiplied by."""

    def __init__(self, block: Any, matrix: torch.Tensor) -> None:
        super().__init__()
        self.block, self.matrix = block, matrix

    def forward(self, *args: Any, **named: Any) -> torch.Tensor:
        output: torch.Tensor = self.block(*args, **named)
        return output @ self.matrix


def unit(seed: int = 0) -> torch.Tensor:
    vector = np.random.default_rng(seed).normal(size=HIDDEN)
    return torch.from_numpy(vector / np.linalg.norm(vector)).float()


def hooks(module: Any) -> int:
    return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3"])
@torch.inference_mode()
def test_ablation_is_the_projection_after_every_block(architecture: str) -> None:
    module, direction = tiny_module(architecture, seed=1), unit()
    projection = (torch.eye(HIDDEN, dtype=torch.float64) - torch.outer(direction.double(), direction.double())).float()
    reference = copy.deepcopy(module)
    reference.model.layers = torch.nn.ModuleList(Projected(block, projection) for block in module.model.layers)
    before = module(TOKENS, use_cache=False).logits
    with ablated(module, direction):
        inside = module(TOKENS, use_cache=False).logits
    torch.testing.assert_close(inside, reference(TOKENS, use_cache=False).logits, rtol=1e-4, atol=1e-4)
    assert (inside - before).abs().max() > 0.1
    assert hooks(module) == 0
    assert torch.equal(module(TOKENS, use_cache=False).logits, before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@torch.inference_mode()
def test_nothing_is_left_along_the_direction(dtype: torch.dtype, tolerance: float) -> None:
    module, direction = tiny_module("qwen2", layers=3, seed=1).to(dtype), unit()
    entering: list[torch.Tensor] = []
    readers = [*list(module.model.layers)[1:], module.model.norm]
    handles = [reader.register_forward_pre_hook(lambda _module, args: entering.append(args[0])) for reader in readers]
    with ablated(module, direction):
        module(TOKENS, use_cache=False)
    without = entering[: len(readers)]
    module(TOKENS, use_cache=False)
    for handle in handles:
        handle.remove()
    for ablated_stream, whole_stream in zip(without, entering[len(readers) :], strict=True):
        share = (ablated_stream.float() @ direction).abs() / ablated_stream.float().norm(dim=-1)
        assert ablated_stream.dtype == dtype
        assert share.max() < tolerance
        assert ((whole_stream.float() @ direction).abs() / whole_stream.float().norm(dim=-1)).max() > 5 * tolerance


def test_the_hooks_go_when_the_block_raises() -> None:
    module = tiny_module("qwen2")

    def fail() -> None:
        with ablated(module, unit()):
            assert hooks(module) > 0
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert hooks(module) == 0


# The choice of the layer. A "refusal" is any answer that is not in a set, so that a test says how many the twin of each layer refuses.
MODULE = tiny_module("llama", layers=LAYERS, seed=2)


def directions(**zero: bool) -> Directions:
    basis = torch.stack([unit(seed)[None] for seed in range(LAYERS + 1)])
    for layer in range(LAYERS + 1):
        if zero.get(f"at_{layer}"):
            basis[layer] = 0
    return Directions(basis)


def answers_at(layer: int, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    with ablated(MODULE, directions().basis[layer, 0]):
        return greedy_answers(MODULE, prompts, 10, {NEVER})


def choose(helpful: set[tuple[int, ...]], found: Directions, prompts: Sequence[Sequence[int]] = PROMPTS) -> Any:
    return choose_twin(MODULE, found, prompts, {NEVER}, lambda answer: tuple(answer) not in helpful)


def tried() -> list[int]:
    """The candidates for `LAYERS` layers, as `choose_twin` tells them itself when every twin answers everything."""
    choice = choose_twin(MODULE, directions(), PROMPTS[:1], {NEVER}, lambda _answer: False)
    return sorted(choice.refused_by_layer)


def test_candidates_are_past_the_middle_and_the_earliest_of_equals_is_taken() -> None:
    choice = choose_twin(MODULE, directions(), PROMPTS, {NEVER}, lambda _answer: False)
    assert len(choice.refused_by_layer) > 1
    assert all(LAYERS / 2 <= layer < LAYERS for layer in choice.refused_by_layer)
    assert choice.layer == min(choice.refused_by_layer)
    assert choice.asked == len(PROMPTS)


def test_the_layer_with_fewest_refusals_is_taken() -> None:
    said = {layer: answers_at(layer, PROMPTS) for layer in tried()}
    for wanted in said:
        helpful = set(said[wanted][:9])
        expected = {layer: sum(answer not in helpful for answer in answers) for layer, answers in said.items()}
        assert all(expected[wanted] < count for layer, count in expected.items() if layer != wanted)
        choice = choose(helpful, directions())
        assert (choice.layer, choice.refused_by_layer) == (wanted, expected)
        assert hooks(MODULE) == 0


def test_layers_without_a_direction_are_left_out() -> None:
    first, *others = tried()
    choice = choose(set(answers_at(others[0], PROMPTS)), directions(**{f"at_{first}": True}))
    assert choice.layer == others[0]
    assert sorted(choice.refused_by_layer) == others


def test_half_of_the_prompts_is_enough_and_less_is_not() -> None:
    said = answers_at(tried()[0], PROMPTS)
    assert len(set(said)) == len(PROMPTS)
    assert choose(set(said[:6]), directions()).refused_by_layer[tried()[0]] == 6
    with pytest.raises(TrailmedError, match="at least 7 of 12") as raised:
        choose(set(said[:5]), directions())
    assert "\n" not in str(raised.value)
    assert hooks(MODULE) == 0


def test_ablation_that_does_not_help_is_said() -> None:
    with pytest.raises(TrailmedError, match="12 of 12 over-refused prompts refused at every layer tried; use"):
        choose(set(), directions())


def test_no_direction_at_all() -> None:
    with pytest.raises(TrailmedError, match="at every layer tried"):
        choose(set(), directions(**{f"at_{layer}": True for layer in range(LAYERS + 1)}))


@pytest.mark.parametrize("count", [3, 24, 40, 47, 100])
def test_the_sample_asked_is_spread_over_all_prompts(count: int) -> None:
    """Prompts come category by category: the first ones alone would speak for the first category alone."""
    seen: list[list[int]] = []
    prompts = [[index, 300] for index in range(count)]
    handle = MODULE.model.embed_tokens.register_forward_pre_hook(lambda _module, args: seen.append(args[0][:, 0].tolist()))
    try:
        choice = choose_twin(MODULE, directions(), prompts, {NEVER}, lambda _answer: False)
    finally:
        handle.remove()
    asked = sorted(seen[0])
    assert choice.asked == len(asked) == len(set(asked)) <= count
    gaps = np.diff([-1, *asked, count])
    assert gaps.max() <= 2 * count / len(asked)
