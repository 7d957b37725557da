"""A tiny module that over-refuses, and prompts as it sees them: what the tests of the conditional edit need."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from small_models import tiny_module

from trailmed.abliterate.answers import greedy_answers
from trailmed.abliterate.observed import Observed

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
