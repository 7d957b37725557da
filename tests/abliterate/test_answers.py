"""Batched greedy decoding against the plainest possible one: the whole sequence anew for every token, one prompt at a time, no cache."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from small_models import VOCABULARY, tiny_module

from trailmed.abliterate.answers import greedy_answers

ARCHITECTURES = ("qwen2", "llama", "gemma3")
LENGTHS = (5, 1, 17, 11, 5, 7)  # gemma3's window is 8: shorter and longer ones, and ones that grow past it
TOKENS = 8
PROMPTS = [np.random.default_rng(index).integers(0, VOCABULARY, length).tolist() for index, length in enumerate(LENGTHS)]


@cache
def module_of(architecture: str) -> Any:
    return tiny_module(architecture, seed=3)


@torch.inference_mode()
def plain_greedy(module: Any, prompt: Sequence[int], count: int) -> tuple[int, ...]:
    sequence = list(prompt)
    for _ in range(count):
        sequence.append(int(module(torch.tensor([sequence]), use_cache=False).logits[0, -1].argmax()))
    return tuple(sequence[len(prompt) :])


@cache
def endless(architecture: str) -> tuple[tuple[int, ...], ...]:
    return tuple(plain_greedy(module_of(architecture), prompt, TOKENS) for prompt in PROMPTS)


def until_end(answer: Sequence[int], ends: Collection[int]) -> tuple[int, ...]:
    lengths = [index + 1 for index, token in enumerate(answer) if token in ends]
    return tuple(answer[: min(lengths, default=len(answer))])


def some_ends(architecture: str) -> frozenset[int]:
    """Two tokens that end some answers early and leave others to run to the limit."""
    answers = endless(architecture)
    tokens = sorted({token for answer in answers for token in answer})
    for first in tokens:
        for second in tokens:
            lengths = [len(until_end(answer, {first, second})) for answer in answers]
            if first < second and len(set(lengths)) > 2 and 0 < lengths.count(TOKENS) < len(answers) - 1:
                return frozenset({first, second})
    raise AssertionError("no tokens of these answers end some of them early and others not")


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_are_those_of_one_by_one_decoding(architecture: str, batch: int) -> None:
    expected = endless(architecture)
    assert len(set(expected)) == len(PROMPTS)  # else mixed-up rows would not show
    never = next(token for token in range(VOCABULARY) if all(token not in answer for answer in expected))
    assert greedy_answers(module_of(architecture), PROMPTS, TOKENS, {never}, batch=batch) == list(expected)


@pytest.mark.parametrize("batch", [2, 64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prompts_that_begin_alike(architecture: str, batch: int) -> None:
    """As a chat template makes them; one of them is nothing but the opening and a token."""
    opening = np.random.default_rng(50).integers(0, VOCABULARY, 6).tolist()
    prompts = [opening + prompt for prompt in PROMPTS[:4]]
    expected = [plain_greedy(module_of(architecture), prompt, 4) for prompt in prompts]
    never = next(token for token in range(VOCABULARY) if all(token not in answer for answer in expected))
    assert greedy_answers(module_of(architecture), prompts, 4, {never}, batch=batch) == expected


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_same_prompt_twice(architecture: str) -> None:
    expected = plain_greedy(module_of(architecture), PROMPTS[3], 3)
    assert greedy_answers(module_of(architecture), [PROMPTS[3], PROMPTS[3]], 3, {expected[2]}) == [until_end(expected, {expected[2]})] * 2


@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_answer_stops_after_its_first_end_token(architecture: str, batch: int) -> None:
    ends = some_ends(architecture)
    expected = [until_end(answer, ends) for answer in endless(architecture)]
    assert greedy_answers(module_of(architecture), PROMPTS, TOKENS, ends, batch=batch) == expected


def test_decoding_stops_when_every_answer_has_ended() -> None:
    expected = endless("qwen2")
    calls: list[int] = []
    module = module_of("qwen2")
    handle = module.model.register_forward_hook(lambda *_: calls.append(1))
    try:
        answers = greedy_answers(module, PROMPTS, TOKENS, {answer[0] for answer in expected})
    finally:
        handle.remove()
    assert answers == [answer[:1] for answer in expected]
    assert len(calls) == 1


def test_at_most_max_tokens() -> None:
    ends = some_ends("llama")
    for count in (1, 4):
        expected = [until_end(answer[:count], ends) for answer in endless("llama")]
        assert greedy_answers(module_of("llama"), PROMPTS, count, ends) == expected


def test_progress_counts_prompts() -> None:
    units: list[int] = []
    greedy_answers(module_of("qwen2"), PROMPTS, 1, {0}, batch=3, progress=units.append)
    assert sum(units) == len(PROMPTS)
    assert len(units) == 2


def test_no_prompts_no_answers() -> None:
    assert greedy_answers(module_of("qwen2"), [], 4, {0}) == []


def test_bfloat16_decodes_in_a_batch_what_it_decodes_alone() -> None:
    """Rounding may break a near tie another way, so not all first tokens are asked for; padding that leaks would spoil most."""
    module = tiny_module("qwen2", seed=3).bfloat16()
    alone = [greedy_answers(module, [prompt], 1, {0})[0] for prompt in PROMPTS]
    together = greedy_answers(module, PROMPTS, 3, {0})
    assert sum(first[0] == second[0] for first, second in zip(alone, together, strict=True)) >= len(PROMPTS) - 1
