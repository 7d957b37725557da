"""Retention on kinds of harm left out: what is counted, and that nothing asked was fitted to."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from over_refusing_module import STOP, observe, over_refusing_module

from trailmed.abliterate import retention as retention_module
from trailmed.abliterate.conditional import ConditionalFit, ConditionalSettings
from trailmed.abliterate.observed import Observed
from trailmed.abliterate.retention import retention
from trailmed.models.architecture import ARCHITECTURES

SETTINGS = ConditionalSettings(nats=40.0)


@cache
def fit() -> ConditionalFit:
    model = SimpleNamespace(
        module=over_refusing_module(), architecture=ARCHITECTURES["qwen2"], tokenizer=SimpleNamespace(eos_ids=frozenset({STOP})),
    )
    prompts = [replace(prompt, scenario=f"s{index // 3}") for index, prompt in enumerate(observe(90, 1))]
    return ConditionalFit(model, prompts, ("water",), SETTINGS.layers(6), progress=False)


def kinds() -> dict[str, str]:
    harmful = [prompt for prompt in fit().prompts if prompt.should_refuse]
    return {prompt.id: f"kind-{index % 5}" for index, prompt in enumerate(harmful)}


def asked() -> list[Observed]:
    return [prompt for prompt in fit().prompts if prompt.should_refuse or prompt.category == "water"][:50]


def test_a_reading_that_generalizes_keeps_the_refusals_of_kinds_it_never_saw() -> None:
    found = retention(fit(), SETTINGS, asked(), kinds())
    assert (found.prompts, found.benign + found.harmful) == (90, 50)
    assert found.base_benign_refused == sum(prompt.refused for prompt in asked() if not prompt.should_refuse)
    assert found.base_harmful_refused == sum(prompt.refused for prompt in asked() if prompt.should_refuse)
    assert found.benign_refused < 0.5 * found.base_benign_refused
    assert found.harmful_unseen_refused >= found.base_harmful_refused
    assert 0.8 < found.separation_unseen <= 1
    assert 0 <= found.unseen_at_2_percent <= 1


def test_every_prompt_is_asked_under_rows_fitted_without_it_and_harm_also_without_its_kind() -> None:
    fitted: list[tuple[set[str], set[str]]] = []

    class Watched:
        prompts, module = fit().prompts, fit().module

        def rows(self, _settings: Any, _layers: Any, left_out: Any) -> set[str]:
            return set(left_out)

        def view(self, rows: set[str], held: Any) -> Any:
            fitted.append((rows, {prompt.id for prompt in held}))
            return SimpleNamespace(margins=lambda *_: [0.0] * len(held))

    spared = {prompt.id for prompt in fit().prompts[80:]}
    retention(Watched(), SETTINGS, asked(), kinds(), spared)  # type: ignore[arg-type]
    assert all(held <= left_out and spared <= left_out for left_out, held in fitted)
    by_kind = [(left_out - spared, held) for left_out, held in fitted if held and {kinds().get(name) for name in held} != {None}
               and all(name in kinds() for name in left_out - spared)]
    assert len(by_kind) == -(-5 // retention_module.KINDS_LEFT_OUT)
    for left_out, _ in by_kind:
        gone = {kinds()[name] for name in left_out}
        assert len(gone) <= retention_module.KINDS_LEFT_OUT
        assert {name for name, kind in kinds().items() if kind in gone} - spared <= left_out
    everything = [name for _, held in by_kind for name in held]
    assert sorted(everything) == sorted(prompt.id for prompt in asked() if prompt.should_refuse)


def test_both_kinds_must_be_asked() -> None:
    with pytest.raises(ValueError, match="benign and harmful"):
        retention(fit(), SETTINGS, [prompt for prompt in asked() if prompt.should_refuse], kinds())


