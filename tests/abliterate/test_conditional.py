"""The conditional edit: its rows against the primal normal equations in float64, and what it does to a model that really over-refuses."""

from __future__ import annotations

import copy
import random
from dataclasses import fields, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import tiny_module

from trailmed.abliterate.answers import greedy_answers
from trailmed.abliterate.conditional import ConditionalSettings, PromptClass, condition_row, conditional, constant_row, elsewhere, folds
from trailmed.abliterate.edit import Edit
from trailmed.abliterate.observed import Observed, Role
from trailmed.abliterate.origin import EditOrigin
from trailmed.errors import TrailmedError
from trailmed.models.architecture import ARCHITECTURES

READINGS = {Role.OVER_REFUSED: -1, Role.HARMFUL_COMPLIED: 1, Role.COMPLIED: 0, Role.KEPT_REFUSED: 0, Role.HARMFUL_REFUSED: 0.7}


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1), st.integers(0, 2), st.integers(0, 6))
@settings(max_examples=40, deadline=None)
def test_the_rows_are_weighted_ridge_solutions_scaled_to_their_ends(seed: int, ridge: float, variety: int, elsewhere: int) -> None:
    generator = np.random.default_rng(seed)
    kinds = [Role.OVER_REFUSED, Role.COMPLIED, Role.HARMFUL_COMPLIED, Role.HARMFUL_REFUSED, Role.KEPT_REFUSED][: 3 + variety]
    roles = kinds + [kinds[index] for index in generator.integers(0, len(kinds), 15)]
    spared = [role is Role.KEPT_REFUSED or (role is Role.COMPLIED and bool(generator.integers(2))) for role in roles]
    classes = [PromptClass(*each) for each in zip(roles, spared, strict=True)]
    t = np.array([READINGS[role] for role in roles], dtype=float)
    x = (generator.normal(size=(len(roles), 12)) + 3 * t[:, None] * np.eye(12)[0] + 5).astype(np.float32)
    others = (generator.normal(size=(elsewhere, 12)) + 5 + 2 * np.eye(12)[1]).astype(np.float32)
    w = np.array([1 / classes.count(each) for each in classes] + elsewhere * [2 / max(1, elsewhere)])
    x64, n = np.concatenate([x, others]).astype(float), len(roles)
    variance = (w[:n] * ((x64[:n] - x64[:n].mean(0)) ** 2).sum(1)).mean()

    def solution(targets: np.ndarray, share: float) -> np.ndarray:
        targets = np.concatenate([targets, np.zeros(elsewhere)])
        return np.linalg.solve((x64 * w[:, None]).T @ x64 + share * variance * np.eye(12), (x64 * w[:, None]).T @ targets)

    row, constant = solution(t, ridge), solution(1.0 - np.array(spared), 0.01)
    row /= (x64[:n] @ row)[t > 0].mean() - (x64[:n] @ row)[t < 0].mean()
    constant /= (x64[:n] @ constant)[~np.array(spared)].mean()
    found = condition_row(torch.from_numpy(x), torch.from_numpy(others), classes, ridge)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, row, rtol=1e-3, atol=1e-4 * np.abs(row).max())
    np.testing.assert_allclose(
        constant_row(torch.from_numpy(x), torch.from_numpy(others), classes), constant, rtol=1e-3, atol=1e-4 * np.abs(constant).max(),
    )


def test_without_answered_harmful_prompts_over_refused_ones_read_minus_a_half() -> None:
    classes = [PromptClass(Role.OVER_REFUSED, False)] * 4 + [PromptClass(Role.COMPLIED, False)] * 4
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 20)).astype(np.float32))
    assert float((x @ condition_row(x, x[:0], classes, 0.1))[:4].mean()) == pytest.approx(-0.5, abs=1e-5)


def test_prompts_that_look_alike_are_told() -> None:
    with pytest.raises(TrailmedError, match="look alike"):
        condition_row(
            torch.ones(6, 5), torch.ones(2, 5),
            [PromptClass(role, False) for role in (Role.OVER_REFUSED, Role.HARMFUL_COMPLIED) for _ in range(3)], 0.1,
        )


@given(st.integers(1, 60), st.integers(0, 20))
def test_tokens_elsewhere_are_neither_the_first_nor_the_last_of_the_prompt(asked: int, answered: int) -> None:
    tokens, answer = tuple(range(asked)), tuple(range(100, 100 + answered))
    sequence, positions = elsewhere(Observed("1", "water", False, tokens, answer, False))
    assert sequence == [*tokens, *answer[:8]]
    assert positions == sorted(set(positions))
    assert not {0, asked - 1} & {position for position in positions if position < asked}
    assert sum(position >= asked for position in positions) == min(answered, 4)
    assert sum(position < asked for position in positions) == min(4, max(0, asked - 1 - max(1, (asked - 1) // 2)))
    assert all(position < len(sequence) for position in positions)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("nats", 0.0), ("nats", float("inf")), ("damping", 0.0), ("ridge", -1.0), ("first_layer", 0.8), ("last_layer", 1.1),
        ("validation_tokens", 0), ("least_fall", 2.0),
    ],
)
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        ConditionalSettings(**{name: value})


def test_every_setting_says_what_it_does() -> None:
    assert all(each.metadata["help"] for each in fields(ConditionalSettings))


# A model trained to refuse where a word of alarm stands, and to answer all else; a harmful one it refuses or not by the first word.

BOS, ASSISTANT, STOP, SORRY, CANNOT, SURE, POISON, WATER, FIRST, SMALL, WORDS = 0, 1, 2, 3, 4, 5, 6, 7, 8, 24, 40
REFUSAL, HELP = (SORRY, CANNOT, STOP), (SURE, FIRST, STOP)


def ask(generator: random.Random, kind: int | None) -> tuple[int, ...]:
    words = [generator.randrange(FIRST, WORDS) for _ in range(generator.randint(3, 7))]
    if kind is not None:
        words.insert(generator.randint(0, len(words)), kind)
    return (BOS, *words, ASSISTANT)


def kind_of(index: int) -> int | None:
    return (None, POISON, WATER)[index % 3]


@cache
def over_refusing_module() -> Any:
    """Refuses prompts with WATER in them, and those with POISON whose first word is small, and answers the others."""
    module = tiny_module(
        "qwen2", layers=6, seed=5, vocab_size=WORDS, intermediate_size=64, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=STOP,
        pad_token_id=BOS,
    ).requires_grad_(True)
    generator, optimizer = random.Random(1), torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        tokens, targets = torch.zeros(32, 14, dtype=torch.long), torch.full((32, 14), -100)
        for row in range(32):
            prompt = ask(generator, kind_of(generator.randrange(3)))
            answer = REFUSAL if WATER in prompt or (POISON in prompt and prompt[1] < SMALL) else HELP
            tokens[row, : len(prompt) + 3] = torch.tensor([*prompt, *answer])
            targets[row, len(prompt) - 1 : len(prompt) + 2] = torch.tensor(answer)
        torch.nn.functional.cross_entropy(module(tokens, use_cache=False).logits.flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
    optimizer.zero_grad()
    return module.requires_grad_(False)


def is_refusal(answer: Any) -> bool:
    return bool(answer[0] == SORRY)


def observe(count: int, seed: int) -> list[Observed]:
    generator = random.Random(seed)
    prompts = [ask(generator, kind_of(index)) for index in range(count)]
    answers = greedy_answers(over_refusing_module(), prompts, 4, {STOP})
    return [
        Observed(str(index), "harm" if kind_of(index) == POISON else "water", kind_of(index) == POISON, prompt, answer, is_refusal(answer))
        for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


@cache
def made(removed: str = "water", crossed: int = 0) -> Edit:
    module, prompts = over_refusing_module(), observe(90, 1)
    model = SimpleNamespace(module=module, architecture=ARCHITECTURES["qwen2"], tokenizer=SimpleNamespace(eos_ids=frozenset({STOP})))
    return conditional(
        model, prompts, observe(60, 2), (removed,), is_refusal, EditOrigin("a" * 64, "b" * 64, removed=(removed,)),
        ConditionalSettings(nats=12.0, damping=100.0, validation_tokens=3), crossed=prompts[:crossed], progress=False,
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
