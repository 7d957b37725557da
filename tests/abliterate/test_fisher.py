"""The natural gradient: scores against central differences of the model itself, and the solution against the dense normal equations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import tiny_module

from trailmed.abliterate.factors import attached
from trailmed.abliterate.fisher import first_token_scores, natural_gradient

PROMPTS = [(3, 4, 5), (6, 7, 8, 9, 10), (3,), (9, 9), (1, 2, 3, 4), (7, 3), (5, 5, 5), (2, 8), (4, 4, 4, 4), (6,)]


def module_and_rows() -> tuple[Any, dict[str, torch.Tensor]]:
    module = tiny_module("qwen2", layers=3, seed=2).float()
    names = ["model.layers.1.self_attn.o_proj.weight", "model.layers.2.mlp.down_proj.weight"]
    generator = torch.Generator().manual_seed(0)
    return module, {name: torch.randn(module.get_parameter(name).shape[1], generator=generator) for name in names}


def log_probs(module: Any, rows: dict[str, torch.Tensor], prompt: tuple[int, ...], added: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode(), attached(module, {name: (added[name][:, None], rows[name][None]) for name in rows}):
        logits: torch.Tensor = module(torch.tensor([prompt])).logits[0, -1]
        return logits.double().log_softmax(-1)


def test_scores_are_the_slopes_of_the_likeliest_first_tokens() -> None:
    module, rows = module_and_rows()
    scores = first_token_scores(module, rows, PROMPTS).double()
    sizes = [module.get_parameter(name).shape[0] for name in rows]
    assert scores.shape == (4 * len(PROMPTS), sum(sizes))
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = torch.randn(sum(sizes), generator=generator)
        parts = dict(zip(rows, torch.split(direction, sizes), strict=True))
        step, expected = 1e-3, 0.0
        for prompt in PROMPTS:
            up, down = (log_probs(module, rows, prompt, {name: sign * step * each for name, each in parts.items()}) for sign in (1, -1))
            at = log_probs(module, rows, prompt, {name: 0 * each for name, each in parts.items()})
            top = at.topk(4).indices
            expected += float((at[top].exp() * ((up - down)[top] / (2 * step)) ** 2).sum())
        assert float((scores @ direction.double()).square().sum()) == pytest.approx(expected, rel=1e-2)
    assert not any(each._forward_hooks for each in module.modules())


@given(st.integers(0, 2**32 - 1), st.floats(1e-2, 1e2), st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_the_natural_gradient_is_that_of_the_dense_equations(seed: int, damping: float, samples: int) -> None:
    generator = np.random.default_rng(seed)
    g, s = generator.normal(size=9), generator.normal(size=(samples, 9))
    fisher = s.T @ s / 5
    x = np.linalg.solve(fisher + damping * (g @ fisher @ g) / (g @ g) * np.eye(9), g)
    x /= x @ g
    parts = {"a": torch.from_numpy(g[:4]).float(), "b": torch.from_numpy(g[4:]).float()}
    found = natural_gradient(parts, torch.from_numpy(s).float(), 5, damping)
    assert [len(each) for each in found.values()] == [4, 5]
    np.testing.assert_allclose(torch.cat(list(found.values())), x, rtol=2e-3, atol=1e-4 * np.abs(x).max())


def test_with_nothing_to_spare_it_is_the_gradient() -> None:
    g = torch.tensor([3.0, 4.0])
    found = natural_gradient({"a": g}, torch.zeros(0, 2), 0, 0.4)
    torch.testing.assert_close(found["a"], g / 25)


@pytest.mark.parametrize("g", [[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_a_gradient_that_points_nowhere_is_told(g: list[float]) -> None:
    with pytest.raises(ValueError, match="gradient"):
        natural_gradient({"a": torch.tensor(g)}, torch.zeros(0, 2), 0, 0.4)
