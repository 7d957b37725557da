"""The conditional edit: its rows against the normal equations in float64, and what it does to a model that really over-refuses."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from over_refusing_module import POISON, STOP, WATER, is_refusal, kind_of, observe, over_refusing_module
from small_models import tiny_module

from trailmed.abliterate.answers import greedy_answers
from trailmed.abliterate.conditional import ConditionalSettings, conditional
from trailmed.abliterate.edit import Edit
from trailmed.abliterate.neuron import Neuron
from trailmed.abliterate.observed import Observed
from trailmed.abliterate.origin import EditOrigin
from trailmed.abliterate.reading import elsewhere, fitted_rows, folds
from trailmed.errors import TrailmedError
from trailmed.models.architecture import ARCHITECTURES

READINGS = {"benign": -1, "harmful": 1}


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1), st.integers(0, 2), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_the_rows_are_weighted_ridge_solutions(seed: int, ridge: float, variety: int, elsewhere: int) -> None:
    generator = np.random.default_rng(seed)
    kinds = ["benign", "harmful", "safe_control", "gray_zone"][: 2 + variety]
    classes = kinds + [kinds[index] for index in generator.integers(0, len(kinds), 15)]
    x = (generator.normal(size=(len(classes), 12)) + 5).astype(np.float32)
    others = (generator.normal(size=(elsewhere, 12)) + 5 + 2 * np.eye(12)[1]).astype(np.float32)
    x64 = np.concatenate([x, others]).astype(float)

    def solution(x: np.ndarray, targets: list[float], at_others: float, weight: float, share: float) -> np.ndarray:
        read = x[: len(classes)]
        variance = ((read - read.mean(0)) ** 2).sum(1).mean()
        w = np.array([1 / classes.count(each) for each in classes] + elsewhere * [weight / max(1, elsewhere)])
        t = np.array([*targets, *elsewhere * [at_others]])
        return np.linalg.solve((x * w[:, None]).T @ x + share * variance * np.eye(12), (x * w[:, None]).T @ t)

    found = fitted_rows(torch.from_numpy(x), torch.from_numpy(others), classes, ridge, 2 * ridge)
    gate = solution(x64, [1.0 if each in READINGS else -1.0 for each in classes], -1.0, 1.0, 2 * ridge)
    through = x64 * ((x64 @ gate) / (1 + np.exp(-8 * (x64 @ gate))))[:, None]
    expected = {
        "gate": gate,
        "harm": solution(through, [READINGS.get(each, 0) for each in classes], 0.0, 0.02, ridge),
        "one": solution(through, [1.0] * len(classes), 0.0, 0.02, 0.003),
    }
    for name, row in expected.items():
        assert getattr(found, name).dtype == torch.float32
        np.testing.assert_allclose(getattr(found, name), row, rtol=1e-3, atol=1e-4 * np.abs(row).max())


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3"])
def test_the_idlest_neuron_becomes_the_one_that_was_asked_for(architecture: str) -> None:
    module = tiny_module(architecture)
    names = ARCHITECTURES[architecture].mlp(1)
    width = module.config.hidden_size
    gate, up, down = torch.randn(3, width, generator=torch.Generator().manual_seed(1))
    weights = [module.get_parameter(name).double().numpy() for name in names]
    idlest = int(np.argmin([
        np.linalg.norm(weights[0][j]) * np.linalg.norm(weights[1][j]) * np.linalg.norm(weights[2][:, j]) for j in range(len(weights[0]))
    ]))
    edited = [weight.copy() for weight in weights]
    for weight, name in zip(edited, names, strict=True):
        b, a = Neuron.idlest(module, names).becoming(gate, up, down)[name]
        assert b.shape[1] == a.shape[0] == 1
        weight += b.double().numpy() @ a.double().numpy()
    for before, after in zip(weights[:2], edited[:2], strict=True):
        np.testing.assert_allclose(np.delete(after, idlest, 0), np.delete(before, idlest, 0))
    np.testing.assert_allclose(np.delete(edited[2], idlest, 1), np.delete(weights[2], idlest, 1))
    np.testing.assert_allclose(edited[0][idlest], gate, rtol=1e-4, atol=1e-5)
    lengths = np.linalg.norm(weights[2], axis=0)
    np.testing.assert_allclose(np.linalg.norm(edited[2][:, idlest]), np.median(lengths), rtol=0.05)
    np.testing.assert_allclose(np.outer(edited[2][:, idlest], edited[1][idlest]), np.outer(down, up), rtol=1e-3, atol=1e-4)


@given(st.integers(1, 60), st.integers(0, 20))
def test_tokens_elsewhere_are_neither_the_first_nor_the_last_of_the_prompt(asked: int, answered: int) -> None:
    tokens, answer = tuple(range(asked)), tuple(range(100, 100 + answered))
    sequence, positions = elsewhere(Observed("1", "water", False, tokens, answer, False))
    assert sequence == [*tokens, *answer[:16]]
    assert positions == sorted(set(positions))
    assert not {0, asked - 1} & {position for position in positions if position < asked}
    assert sum(position >= asked for position in positions) == min(answered, 16)
    assert sum(position < asked for position in positions) == min(4, max(0, asked - 1 - max(1, (asked - 1) // 2)))
    assert all(position < len(sequence) for position in positions)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nats", 0.0), ("nats", float("inf")), ("gate_ridge", 0.0), ("ridge", -1.0), ("first_layer", 0.8), ("last_layer", 1.1),
        ("least_fall", 2.0),
    ],
)
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        ConditionalSettings(**{name: value})


def test_every_setting_says_what_it_does() -> None:
    assert all(each.metadata["help"] for each in fields(ConditionalSettings))


@cache
def made(removed: str = "water", crossed: int = 0) -> Edit:
    module, prompts = over_refusing_module(), observe(90, 1)
    model = SimpleNamespace(module=module, architecture=ARCHITECTURES["qwen2"], tokenizer=SimpleNamespace(eos_ids=frozenset({STOP})))
    return conditional(
        model, prompts, observe(60, 2), (removed,), EditOrigin("a" * 64, "b" * 64, removed=(removed,)),
        ConditionalSettings(nats=40.0), crossed=prompts[:crossed], progress=False,
    )


def refused(module: Any) -> dict[int | None, float]:
    prompts = [prompt.token_ids for prompt in observe(180, 3)]
    answers = greedy_answers(module, prompts, 4, {STOP})
    return {
        kind: float(np.mean([is_refusal(answer) for index, answer in enumerate(answers) if kind_of(index) == kind]))
        for kind in (None, POISON, WATER)
    }


def test_benign_prompts_are_answered_and_harmful_ones_refused_as_before() -> None:
    before = refused(over_refusing_module())
    assert before[WATER] > 0.9  # else there is nothing to see here
    assert 0.2 < before[POISON] < 0.9
    edit = made()
    module = copy.deepcopy(over_refusing_module())
    with torch.no_grad():
        for name, factor in edit.factors.items():
            weight = module.get_parameter(name)
            weight.copy_(torch.from_numpy(factor.apply_to(weight.numpy())))
    after = refused(module)
    assert after[WATER] <= 0.2 * before[WATER]
    assert after[POISON] >= before[POISON] - 0.1
    assert max(after[None], before[None]) <= 0.05


def test_what_an_edit_says_of_itself() -> None:
    edit = made()
    assert {factor.rank for factor in edit.factors.values()} == {1}
    assert {int(name.split(".")[2]) for name in edit.factors} == set(edit.recipe["layers"]) == {3}
    assert edit.recipe["method"] == "conditional"
    assert edit.recipe["separation"]["edited"] > edit.recipe["separation"]["base"]
    assert edit.recipe["line"]["nats"] in [each["nats"] for each in edit.recipe["line"]["tried"]]
    assert sum(edit.recipe["roles"].values()) == 90
    assert edit.sha256 == made.__wrapped__().sha256
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in over_refusing_module().modules())


def test_cross_validation_counts_fit_prompts_under_rows_that_never_saw_them() -> None:
    crossed = 30
    alone, more = made().recipe, made(crossed=crossed).recipe
    of_fit = [prompt for prompt in observe(90, 1)[:crossed] if prompt.category in ("water", "harm")]
    for name, kind in (("benign", False), ("harmful", True)):
        asked = [prompt for prompt in of_fit if prompt.should_refuse is kind]
        assert more["base"][name] == alone["base"][name] + len(asked)
        assert more["base"][f"{name}_refused"] == alone["base"][f"{name}_refused"] + sum(prompt.refused for prompt in asked)
        assert all(each[name] == more["base"][name] for each in more["line"]["tried"])


def test_folds_are_a_partition_that_keeps_scenarios_together() -> None:
    prompts = [replace(prompt, scenario=f"s{index // 3}") for index, prompt in enumerate(observe(45, 1))]
    parts = folds(prompts)
    assert sorted(id for part in parts for id in part) == sorted(prompt.id for prompt in prompts)
    for scenario in {prompt.scenario for prompt in prompts}:
        assert sum(bool(part & {prompt.id for prompt in prompts if prompt.scenario == scenario}) for part in parts) == 1
    assert max(map(len, parts)) - min(map(len, parts)) <= 3


def test_nothing_to_remove_is_said() -> None:
    with pytest.raises(TrailmedError, match="nothing to edit"):
        made("snow")
