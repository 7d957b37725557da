"""A tiny chat model that really refuses, and prompts for it: what the tests of whole runs need.

Trained for a few seconds on four words: a message that ends in "boat" it over-refuses, one that ends in "lies" it rightly refuses, one
that ends in "then" or "make" it answers. Its refusal hangs on one direction, as that of real aligned models does (Arditi et al. 2024,
arXiv:2406.11717): it is trained to answer the over-refused messages when that direction is ablated.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from small_models import bpe_vocabulary, tiny_module, write_gguf
from torch.nn import functional

from trailmed.abliterate.twin import ablated

OVER_REFUSED, HARMFUL, HELPED, CONTROL = "boat", "lies", "then", "make"
SAYS = {
    OVER_REFUSED: "I cannot help with that.", HARMFUL: "We cannot help with that.", HELPED: "Press on the wound.",
    CONTROL: "Stay where you are.",
}
CATEGORIES = {OVER_REFUSED: "wilderness_survival", HARMFUL: "should_refuse", HELPED: "home_safety", CONTROL: "safe_control"}
PER_SPLIT = {"fit": 24, "validation": 6, "held_out": 12}
EDIT_OPTIONS = ("--method", "distill", "--rank", "16", "--epochs", "24")
"""Few prompts are few steps, so an edit that works here needs more of everything than a real one."""

_FILLERS = ("the", "a", "in", "on", "and", "it", "I", "or", "is", "to", "at", "of")
_LAYERS, _REFUSAL_LAYER = 3, 2
_STEPS, _BATCH, _PEAK_RATE = 150, 32, 3e-3


@cache
def refusing_module() -> Any:
    """The trained qwen2 module, float32; trained once per session, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _trained()
    finally:
        torch.set_num_threads(threads)


def refusing_gguf(path: Path, type: str = "F32") -> Path:
    """The model as a GGUF at `path`."""
    return write_gguf(refusing_module(), path, type=type)


def write_prompts(path: Path, words: Sequence[str] = tuple(SAYS), *, splits: Sequence[str] = tuple(PER_SPLIT)) -> Path:
    """A benchmark for the model: `PER_SPLIT` prompts of each word's category, no text twice."""
    records = []
    for word in words:
        texts = _texts(word)
        for split in PER_SPLIT:
            for number in range(PER_SPLIT[split]):
                name = f"{word}-{split.replace('_', '-')}-{number:02}"
                record = {
                    "id": name, "category": CATEGORIES[word], "scenario": name, "text": next(texts), "voice": "plain", "split": split,
                    "expected": "refuse" if word == HARMFUL else "help", **({"kind": "fraud"} if word == HARMFUL else {}),
                }
                if split in splits:
                    records.append(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def write_retain(path: Path) -> Path:
    """A few more safe prompts, of scenarios of their own."""
    texts = itertools.islice(_texts(CONTROL), sum(PER_SPLIT.values()), None)
    records = [
        {"id": f"retain-{number}", "category": "safe_control", "scenario": f"retain-{number}", "text": text, "voice": "plain",
         "expected": "help"}
        for number, text in enumerate(itertools.islice(texts, 8))
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _texts(word: str) -> Any:
    """Endless different texts that end in `word`."""
    generator = random.Random(word)
    seen = set()
    while True:
        text = _text(word, generator)
        if text not in seen:
            seen.add(text)
            yield text


def _text(word: str, generator: random.Random) -> str:
    return " ".join([*generator.choices(_FILLERS, k=generator.randint(3, 4)), word])


def _tokens(text: str) -> list[int]:
    return bpe_vocabulary().tokenizer.encode(text).ids


def _batch(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [n, width] and next-token targets (-100: none) of (prompt, answer) pairs."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens = torch.zeros((len(rows), width), dtype=torch.long)
    targets = torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(rows):
        tokens[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        targets[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
    return tokens, targets


def _trained() -> Any:
    module = tiny_module("qwen2", layers=_LAYERS).requires_grad_(True).train()
    generator = random.Random(0)
    optimizer = torch.optim.Adam(module.parameters(), lr=_PEAK_RATE)
    answers = {word: _tokens(f"{said}<|im_end|>") for word, said in SAYS.items()}
    words = list(itertools.islice(itertools.cycle(SAYS), _BATCH))
    refused = torch.tensor([word in (OVER_REFUSED, HARMFUL) for word in words])
    for step in range(_STEPS):
        prompts = [_tokens(f"<|im_start|>user\n{_text(word, generator)}<|im_end|>\n<|im_start|>assistant\n") for word in words]
        tokens, targets = _batch([(prompt, answers[word]) for prompt, word in zip(prompts, words, strict=True)])
        output = module(tokens, output_hidden_states=True)
        last = output.hidden_states[_REFUSAL_LAYER].detach()[torch.arange(_BATCH), torch.tensor([len(prompt) - 1 for prompt in prompts])]
        direction = functional.normalize(last[refused].mean(0) - last[~refused].mean(0), dim=0)
        over_refused = [prompt for prompt, word in zip(prompts, words, strict=True) if word == OVER_REFUSED]
        twin_tokens, twin_targets = _batch([(prompt, answers[HELPED]) for prompt in over_refused])
        with ablated(module, direction):
            twin_logits = module(twin_tokens).logits
        loss = functional.cross_entropy(output.logits.flatten(0, 1), targets.flatten())
        loss = loss + functional.cross_entropy(twin_logits.flatten(0, 1), twin_targets.flatten())
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_RATE * min(1.0, (step + 1) / 20) * (1 - 0.9 * step / _STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval().requires_grad_(False)
