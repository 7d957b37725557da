"""How much capturing the residual stream costs beside the bare transformer forward on the same batches, as a ratio of one run.

    python bench/bench_activations.py [--model GGUF] [--prompts 64] [--repeats 5] [--json]

Without a model, random weights in the shape of Qwen2.5-0.5B (with a small vocabulary, which no forward here reads much of).
Each repeat times both in turn, alternating which goes first; the figure is the median of the repeats' ratios.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from trailmed.abliterate.activations import capture, length_batches, padded, run_decoder, text_decoder
from trailmed.models.load import load_model

TARGET = 1.15
BATCH_TOKENS = 2048
PROMPT_LENGTHS = (25, 80)
"""Tokens of a chat-templated question, shortest and longest."""


def random_model(layers: int) -> Any:
    config = transformers.Qwen2Config(
        vocab_size=4096, hidden_size=896, intermediate_size=4864, num_hidden_layers=layers, num_attention_heads=14, num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return SimpleNamespace(module=transformers.Qwen2ForCausalLM(config).requires_grad_(False).eval())


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF; without it random weights")
    parser.add_argument("--layers", type=int, default=24, help="layers of the random model")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()

    model = load_model(arguments.model) if arguments.model else random_model(arguments.layers)
    decoder = text_decoder(model.module)
    generator = random.Random(0)
    vocabulary = decoder.config.vocab_size
    ids = [[generator.randrange(vocabulary) for _ in range(generator.randint(*PROMPT_LENGTHS))] for _ in range(arguments.prompts)]
    batches = length_batches([len(prompt) for prompt in ids], BATCH_TOKENS)

    def bare() -> None:
        for batch in batches:
            run_decoder(decoder, padded(ids, batch))

    def captured() -> None:
        capture(model, ids, batch_tokens=BATCH_TOKENS)

    bare()
    captured()
    times: dict[str, list[float]] = {"bare": [], "captured": []}
    for repeat in range(arguments.repeats):
        order = [("bare", bare), ("captured", captured)]
        for name, work in order if repeat % 2 == 0 else reversed(order):
            times[name].append(seconds(work))
    ratio = statistics.median(capturing / alone for alone, capturing in zip(times["bare"], times["captured"], strict=True))
    result = {
        "benchmark": "activations", "ratio": round(ratio, 4), "target": TARGET, "met": ratio <= TARGET,
        "bare_seconds": round(statistics.median(times["bare"]), 4), "captured_seconds": round(statistics.median(times["captured"]), 4),
        "prompts": len(ids), "tokens": sum(map(len, ids)), "batches": len(batches), "layers": decoder.config.num_hidden_layers,
        "hidden": decoder.config.hidden_size, "repeats": arguments.repeats, "threads": torch.get_num_threads(),
        "model": arguments.model.name if arguments.model else "random",
    }
    if arguments.json:
        print(json.dumps(result, sort_keys=True))
    else:
        print(f"capture / bare forward = {ratio:.3f} (target ≤ {TARGET}): " + ("met" if result["met"] else "MISSED"))
        print(", ".join(f"{key} {value}" for key, value in result.items() if key not in ("benchmark", "ratio", "target", "met")))


if __name__ == "__main__":
    main()
