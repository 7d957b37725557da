"""The probe of openings against one whole pass for every prompt and opening, and its gradient against differences."""

from __future__ import annotations

import itertools
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCABULARY, tiny_module

from trailmed.abliterate.answers import greedy_answers
from trailmed.abliterate.opening import OpeningProbe

PROMPTS = [[3, 4, 5], [3, 6, 7, 8, 9, 10], [3, 9], [3, 12, 3, 4, 4]]
OPENINGS = [[11, 12, 13], [14, 5], [15]]
NAMES = ["model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"]


@cache
def module_of(architecture: str) -> Any:
    return tiny_module(architecture, layers=3 if architecture == "qwen2" else None, seed=4)


@torch.inference_mode()
def predicted(module: Any, prompt: list[int], opening: list[int]) -> np.ndarray:
    """Log-probabilities float64 [len(opening), vocabulary] at the tokens of `opening` after `prompt`."""
    logits = module(torch.tensor([[*prompt, *opening]])).logits[0, len(prompt) - 1 : -1].double()
    return logits.log_softmax(-1).numpy()


def margin(module: Any, prompt: list[int], openings: list[list[int]]) -> float:
    found = []
    for opening in openings:
        rows = predicted(module, prompt, opening)
        found.append(min(row[token] - max(np.delete(row, token)) for row, token in zip(rows, opening, strict=True)))
    return max(found)


def mean_log_odds(module: Any, prompts: list[list[int]], openings: list[list[int]]) -> float:
    odds = []
    for prompt in prompts:
        p = sum(
            np.exp(sum(row[token] for row, token in zip(predicted(module, prompt, opening), opening, strict=True))) for opening in openings
        )
        odds.append(np.log(p) - np.log1p(-p))
    return float(np.mean(odds))


tokens = st.integers(0, VOCABULARY - 1)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
@given(st.lists(tokens, max_size=3), st.lists(st.lists(tokens, min_size=1, max_size=6), min_size=1, max_size=4), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_margins_are_those_of_whole_passes(architecture: str, shared: list[int], own: list[list[int]], first_block: int) -> None:
    module, prompts = module_of(architecture), [[*shared, *each] for each in own]
    found = OpeningProbe(module, prompts, OPENINGS, first_block).margins()
    np.testing.assert_allclose(found, [margin(module, prompt, OPENINGS) for prompt in prompts], atol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_a_positive_margin_is_a_greedy_answer_that_opens_so(architecture: str) -> None:
    module = module_of(architecture)
    said = [list(answer) for answer in greedy_answers(module, PROMPTS, 3, {VOCABULARY - 1})]
    assert len({tuple(each) for each in said}) > 1
    for opening, length in itertools.product(said, (1, 3)):
        found = OpeningProbe(module, PROMPTS, [opening[:length]], 2).margins()
        assert [each > 0 for each in found] == [each[:length] == opening[:length] for each in said]


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_the_gradient_is_that_of_the_odds_at_the_last_token(architecture: str) -> None:
    module = module_of(architecture)
    gradients = OpeningProbe(module, PROMPTS, OPENINGS, 1).odds_gradients(NAMES)
    assert not any(child._forward_hooks for child in module.modules())
    generator = torch.Generator().manual_seed(0)
    for name in NAMES:
        direction = torch.randn(gradients[name].shape, generator=generator)
        direction /= direction.norm()
        layer, step, odds = module.get_submodule(name.removesuffix(".weight")), 0.02, []
        for sign in (1, -1):
            total = 0.0
            for prompt in PROMPTS:
                handle = layer.register_forward_hook(partial(added_at, len(prompt) - 1, sign * step * direction))
                total += mean_log_odds(module, [prompt], OPENINGS) / len(PROMPTS)
                handle.remove()
            odds.append(total)
        assert float(gradients[name] @ direction) == pytest.approx((odds[0] - odds[1]) / (2 * step), rel=0.05, abs=2e-3)


def added_at(place: int, vector: torch.Tensor, _layer: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    changed = output.clone()
    changed[:, place] += vector
    return changed


def test_edits_of_later_blocks_are_seen() -> None:
    module = tiny_module("qwen2", layers=3, seed=4)
    probe = OpeningProbe(module, PROMPTS, OPENINGS, 1)
    before = probe.margins()
    module.get_parameter(NAMES[0]).mul_(3)
    np.testing.assert_allclose(probe.margins(), [margin(module, prompt, OPENINGS) for prompt in PROMPTS], atol=1e-4)
    assert probe.margins() != before


@pytest.mark.parametrize(("prompts", "openings"), [([], OPENINGS), (PROMPTS, [])])
def test_nothing_to_ask_is_said(prompts: list[list[int]], openings: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="no opening of a refusal, or no prompt"):
        OpeningProbe(module_of("qwen2"), prompts, openings, 1)
