"""The proxy of a search against whole passes: counts by how answers open, and the KL of the first token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_models import VOCABULARY, tiny_module

from trailmed.abliterate.factors import attached
from trailmed.abliterate.observed import Observed
from trailmed.abliterate.opening import OpeningProbe
from trailmed.abliterate.proxy import ASKED, Proxy, mean_kl

OPENINGS = [(11, 12, 13), (14, 5)]
NAME = "model.layers.2.mlp.down_proj.weight"


def prompts(count: int, *, should_refuse: bool = False) -> list[Observed]:
    generator = np.random.default_rng(count + should_refuse)
    made = [tuple(int(token) for token in generator.integers(0, VOCABULARY, 2 + index % 4)) for index in range(count)]
    return [Observed(f"{should_refuse}-{index}", "water", should_refuse, tokens, (), False) for index, tokens in enumerate(made)]


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_figures_are_those_of_whole_passes(architecture: str) -> None:
    module = tiny_module(architecture, layers=3 if architecture == "qwen2" else None, seed=4)
    benign, harmful, controls = prompts(7), prompts(5, should_refuse=True), prompts(6)
    d_out, d_in = module.get_parameter(NAME).shape
    generator = torch.Generator().manual_seed(1)
    factors = {NAME: (torch.randn(d_out, 2, generator=generator), torch.randn(2, d_in, generator=generator))}
    proxy = Proxy(module, [*harmful, *benign], controls, OPENINGS, 1)
    assert proxy.measure({}).kl == 0.0
    found = proxy.measure(factors)

    @torch.no_grad()
    def log_probs(tokens: tuple[int, ...]) -> torch.Tensor:
        return module(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)

    before = [log_probs(each.token_ids) for each in controls]
    with attached(module, factors):
        after = [log_probs(each.token_ids) for each in controls]
        margins = OpeningProbe(module, [each.token_ids for each in [*benign, *harmful]], OPENINGS, 1).margins()
    kl = np.mean([float((one.exp() * (one - two)).sum()) for one, two in zip(before, after, strict=True)])
    np.testing.assert_allclose(found.kl, kl, rtol=1e-4)
    assert found.kl > 0.01
    assert (found.counts.benign, found.counts.harmful) == (7, 5)
    assert found.counts.benign_refused == sum(margin > 0 for margin in margins[:7])
    assert found.counts.harmful_refused == sum(margin > 0 for margin in margins[7:])
    assert found.separation == np.mean([[(high > low) + (high == low) / 2 for low in margins[:7]] for high in margins[7:]])
    assert proxy.refusals(factors) == [margin > 0 for margin in margins]
    assert proxy.measure({}).kl == 0.0  # the module is as it was


def test_no_more_prompts_of_a_kind_are_asked_than_tell() -> None:
    proxy = Proxy(tiny_module("qwen2", seed=4), [*prompts(ASKED + 40), *prompts(3, should_refuse=True)], prompts(2), OPENINGS, 0)
    assert [prompt.should_refuse for prompt in proxy.prompts] == [False] * ASKED + [True] * 3


def test_the_kl_is_exact_where_float32_is_not() -> None:
    base = torch.randn(3, 50_000, generator=torch.Generator().manual_seed(0)) * 4
    assert mean_kl(base, base + 3.0) < 1e-10
    other = base.clone()
    other[:, 7] += 2.0
    p, q = (each.double().softmax(-1) for each in (base, other))
    assert mean_kl(base, other) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-6)
