"""Lessons against a plain forward pass of each sequence by itself, and the stream they keep against transformers' own hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from small_models import VOCABULARY, tiny_module

from trailmed.abliterate.observed import Observed, Role
from trailmed.abliterate.packing import blocks_are_alike
from trailmed.abliterate.teacher import (
    Lesson,
    lessons,
    output_logits,
    padded_forward,
    prefix_stream,
    refusal_openings,
    stock_refusal,
    word_for_word,
)
from trailmed.abliterate.twin import ablated

OPENING = (7, 300, 41)
LAYERS, FIRST_BLOCK = 4, 2
ROLES = (Role.COMPLIED, Role.HARMFUL_REFUSED, Role.OVER_REFUSED)


def observed(index: int, answer: Sequence[int] = (), *, refused: bool = False) -> Observed:
    own = np.random.default_rng(index).integers(0, VOCABULARY, 1 + (index * 5) % 9).tolist()
    return Observed(f"p{index}", "water", False, (*OPENING, *own), tuple(answer), refused)


def taught(count: int) -> list[tuple[Observed, Role, tuple[int, ...]]]:
    answers = [tuple(np.random.default_rng(99 + index).integers(0, VOCABULARY, 1 + index % 4).tolist()) for index in range(count)]
    return [(observed(index), ROLES[index % 3], answer) for index, answer in enumerate(answers)]


@torch.inference_mode()
def check_lessons(module: Any, prompts: Sequence[tuple[Observed, Role, tuple[int, ...]]], made: Sequence[Lesson], prefix: int) -> None:
    assert [lesson.id for lesson in made] == [prompt.id for prompt, _, _ in prompts]
    for (prompt, role, answer), lesson in zip(prompts, made, strict=True):
        whole = (*prompt.token_ids, *answer)
        output = module(torch.tensor([whole]), use_cache=False, output_hidden_states=True)
        expected = output.logits[0, len(prompt.token_ids) - 1 : len(whole) - 1].double().log_softmax(-1)
        assert (lesson.role, lesson.sequence) == (role, whole)
        assert lesson.log_probs.dtype == torch.float32
        assert lesson.tokens.shape == lesson.log_probs.shape == (len(answer), min(64, expected.shape[1]))
        assert all(len(set(row)) == len(row) for row in lesson.tokens.tolist())
        torch.testing.assert_close(lesson.log_probs, expected.gather(1, lesson.tokens).float(), rtol=1e-4, atol=1e-4)
        best = expected.topk(lesson.tokens.shape[1]).values.float()
        torch.testing.assert_close(lesson.log_probs, best, rtol=1e-4, atol=1e-4)
        if blocks_are_alike(module):
            torch.testing.assert_close(lesson.hidden, output.hidden_states[FIRST_BLOCK][0, prefix:], rtol=1e-4, atol=1e-4)
        else:
            assert lesson.hidden.numel() == 0


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_lessons_are_what_a_plain_forward_pass_says(architecture: str, prefix: int) -> None:
    module = tiny_module(architecture, layers=LAYERS, seed=5)
    prompts = taught(27)  # more than one batch
    units: list[int] = []
    check_lessons(module, prompts, lessons(module, prompts, FIRST_BLOCK, prefix, progress=units.append), prefix)
    assert sum(units) == len(prompts)


def test_lessons_of_a_model_with_sliding_windows() -> None:
    module = tiny_module("gemma3", seed=5, sliding_window=4)
    assert not blocks_are_alike(module)
    prompts = taught(9)
    check_lessons(module, prompts, lessons(module, prompts, FIRST_BLOCK, 0), 0)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_lessons_of_the_twin(architecture: str) -> None:
    module = tiny_module(architecture, layers=None if architecture == "gemma3" else LAYERS, seed=6)
    direction = torch.nn.functional.normalize(torch.from_numpy(np.random.default_rng(0).normal(size=64)).float(), dim=0)
    prompts, prefix = taught(6), 0 if architecture == "gemma3" else 3
    by_base = lessons(module, prompts, FIRST_BLOCK, prefix)
    with ablated(module, direction):
        by_twin = lessons(module, prompts, FIRST_BLOCK, prefix)
        check_lessons(module, prompts, by_twin, prefix)
    assert all((one.log_probs - two.log_probs).abs().max() > 0.01 for one, two in zip(by_base, by_twin, strict=True))


def test_a_vocabulary_smaller_than_the_number_kept() -> None:
    module = tiny_module("llama", layers=LAYERS, vocab_size=20, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    prompts = [(Observed("p", "water", False, (2, 3, 4), (), False), Role.COMPLIED, (5, 6))]
    made = lessons(module, prompts, FIRST_BLOCK, 2)
    check_lessons(module, prompts, made, 2)
    torch.testing.assert_close(made[0].log_probs.exp().sum(-1), torch.ones(2))


def test_no_lessons() -> None:
    assert lessons(tiny_module("qwen2"), [], 1, 0) == []


@pytest.mark.parametrize("length", [0, 1, 3])
@torch.inference_mode()
def test_the_stream_of_the_shared_opening(length: int) -> None:
    module = tiny_module("qwen2", layers=LAYERS, seed=5)
    whole = module.model(torch.tensor([[*OPENING, 1, 2]]), use_cache=False, output_hidden_states=True)
    expected = whole.hidden_states[FIRST_BLOCK][0, :length]
    torch.testing.assert_close(prefix_stream(module, OPENING[:length], FIRST_BLOCK), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
@torch.inference_mode()
def test_padding_on_the_right_is_never_looked_at(architecture: str) -> None:
    module = tiny_module(architecture, seed=5)
    sequences = [list(range(3, 3 + length)) for length in (4, 15, 9)]
    final = padded_forward(module, sequences)
    for row, sequence in enumerate(sequences):
        alone = module.model(torch.tensor([sequence]), use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(final[row, : len(sequence)], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cap", [None, 2.0])
@torch.inference_mode()
def test_output_logits_are_the_models_own(cap: float | None) -> None:
    module = tiny_module("gemma3", seed=5, final_logit_softcapping=cap)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    logits = output_logits(module, module.model(tokens, use_cache=False).last_hidden_state[0])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, module(tokens, use_cache=False).logits[0], rtol=1e-5, atol=1e-5)
    assert (logits.abs().max() <= 2.0) == (cap is not None)


def test_the_stock_refusal_is_the_most_frequent_one() -> None:
    refusals = [(4, 9), (4, 2), (4, 2), (5,), (4, 9), (3, 1)]
    prompts = [observed(index, answer, refused=True) for index, answer in enumerate(refusals)]
    helpful = [observed(50 + index, (8, 8, 8)) for index in range(9)]
    assert stock_refusal([*helpful, *prompts]) == (4, 2)  # as often as (4, 9), and lower
    assert stock_refusal([*helpful, *prompts, observed(90, (4, 9), refused=True)]) == (4, 9)
    assert stock_refusal(helpful) == ()


def test_the_openings_of_refusals_cover_them_in_order_of_frequency() -> None:
    spoken = [(1, 2, 3, 3, 3, 4)] * 150 + [(1, 2, 3, 3, 3, 9)] * 40 + [(7, 8, 3)] * 9 + [(7, 8, 2)] * 9 + [(5, 5, 5)] * 2
    prompts = [observed(index, answer, refused=True) for index, answer in enumerate(spoken)]
    helpful = [observed(500 + index, (6, 6), refused=False) for index in range(30)]
    assert refusal_openings([*helpful, *prompts]) == [(1, 2, 3, 3, 3), (7, 8, 2), (7, 8, 3)]  # 208 of 210 are 99 %
    many = [observed(index, (index, 1, 2), refused=True) for index in range(10, 20)]
    assert refusal_openings(many) == [(10, 1, 2), (11, 1, 2), (12, 1, 2), (13, 1, 2)]
    assert refusal_openings(helpful) == []


def test_no_opening_begins_with_another() -> None:
    spoken = [(4, 2)] * 3 + [(4, 2, 7)] * 2 + [(4, 3, 7)] * 1
    assert refusal_openings([observed(index, each, refused=True) for index, each in enumerate(spoken)]) == [(4, 2), (4, 3, 7)]


@pytest.mark.parametrize("vocabulary", [20, VOCABULARY])
def test_word_for_word_puts_the_mass_on_the_answers_tokens(vocabulary: int) -> None:
    module = tiny_module("llama", layers=LAYERS, vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, pad_token_id=0)
    answer = (5, 0, vocabulary - 1)
    said = lessons(module, [(Observed("p", "harm", True, (2, 3, 4), (), False), Role.HARMFUL_COMPLIED, answer)], FIRST_BLOCK, 0)[0]
    lesson = word_for_word(said, (*answer, 7, 7))  # the stock refusal goes on, the lesson does not
    assert (lesson.id, lesson.role, lesson.sequence) == (said.id, said.role, said.sequence)
    assert torch.equal(lesson.hidden, said.hidden)
    assert lesson.tokens.shape == lesson.log_probs.shape == said.tokens.shape
    assert all(len(set(row)) == len(row) and max(row) < vocabulary and min(row) >= 0 for row in lesson.tokens.tolist())
    probabilities = lesson.log_probs.double().exp()
    total = torch.zeros(len(answer), vocabulary, dtype=torch.float64).scatter_add_(1, lesson.tokens, probabilities)
    assert tuple(total.argmax(-1).tolist()) == answer
    assert (total.max(-1).values > 0.9).all()
    assert (total.sum(-1) < 1).all()
