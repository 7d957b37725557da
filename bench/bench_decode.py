"""Batched decoding against llama-cpp-python's one-by-one `create_chat_completion`: speed, equal answers, equal verdicts.

    python bench/bench_decode.py MODEL.gguf [--prompts 96] [--max-tokens 48] [--slots 64] [--threads 2] [--json]

The same benchmark prompts (held-out ones first) are answered batched, one by one, and batched again, so that a change of the
machine's load shows; then in exact mode, whose verdicts the batched ones are compared with. Loading is not timed. With other jobs
on the machine, wall-clock speeds with more than one thread say little: llama.cpp's threads wait for each other by spinning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp

from trailmed.device.llama_runtime import DecodeSettings, Generation, LlamaRuntime
from trailmed.device.system import machine, peak_rss_bytes, physical_cores
from trailmed.eval.judge import judge
from trailmed.eval.prompts import Prompt, Split, load_benchmark
from trailmed.models import llama_log
from trailmed.models.chat_template import ChatTemplate
from trailmed.models.gguf_file import GgufFile
from trailmed.progress import progress_bar

TARGET_RATIO = 2.5
TARGET_VERDICTS_DIFFERING = 0.01


class Clock:
    """Wall-clock and processor seconds of a `with` block, and the machine's load when it began."""

    def __enter__(self) -> Clock:
        self.load = os.getloadavg()[0]
        self.wall, self.processor = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall, self.processor = time.perf_counter() - self.wall, time.process_time() - self.processor

    def figures(self, tokens: int) -> dict[str, float]:
        return {
            "tokens": tokens, "seconds": round(self.wall, 2), "tokens_per_second": round(tokens / self.wall, 2),
            "tokens_per_processor_second": round(tokens / self.processor, 2), "load_before": round(self.load, 2),
        }


def chosen_prompts(count: int) -> list[Prompt]:
    """`count` prompts of the benchmark, mixed over its categories, held-out ones first."""

    def order(prompt: Prompt) -> tuple[bool, bytes]:
        return prompt.split is not Split.HELD_OUT, hashlib.sha256(prompt.id.encode()).digest()

    return sorted(load_benchmark(), key=order)[:count]


def timed(label: str, runtime: LlamaRuntime, prompts: Sequence[list[int]]) -> tuple[list[Generation], dict[str, float]]:
    with progress_bar(label, len(prompts)) as advance, Clock() as clock:
        answers = runtime.generate(prompts, on_generation=lambda *_: advance(1))
    return answers, clock.figures(sum(len(answer.tokens) for answer in answers))


def one_by_one(model: Path, prompts: Sequence[Prompt], longest: int, max_tokens: int, threads: int) -> tuple[list[str], dict[str, float]]:
    llama_log.silence()
    llama = llama_cpp.Llama(
        str(model), n_ctx=longest + max_tokens + 8, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False,
    )
    texts, tokens = [], 0
    with progress_bar("one by one", len(prompts)) as advance, Clock() as clock:
        for prompt in prompts:
            messages: Any = [{"role": "user", "content": prompt.text}]
            completion: Any = llama.create_chat_completion(messages, temperature=0.0, max_tokens=max_tokens)
            texts.append(completion["choices"][0]["message"]["content"])
            tokens += completion["usage"]["completion_tokens"]
            advance(1)
    llama.close()
    return texts, clock.figures(tokens)


def verdict(prompt: Prompt, answer: Generation) -> str:
    return judge(answer.text, truncated=answer.stopped == "length", question=prompt.text).verdict.value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a chat-tuned GGUF")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--slots", type=int, default=DecodeSettings().slots)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--no-speed", action="store_true", help="only compare verdicts: no one-by-one run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()

    prompts = chosen_prompts(arguments.prompts)
    settings = DecodeSettings(max_tokens=arguments.max_tokens, slots=arguments.slots, threads=arguments.threads)
    exact_settings = DecodeSettings(max_tokens=arguments.max_tokens, threads=arguments.threads, exact=True)
    with GgufFile.open(arguments.model) as file:
        source = file.metadata.get("tokenizer.chat_template")
    result: dict[str, Any] = {"benchmark": "decode", "model": str(arguments.model), "prompts": len(prompts), "threads": arguments.threads}
    with LlamaRuntime(arguments.model, settings) as runtime:
        tokenizer = runtime.tokenizer
        template = ChatTemplate(source, origin=str(arguments.model), bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
        ids = [runtime.encode(template.prompt(prompt.text)) for prompt in prompts]
        answers, result["batched"] = timed("batched", runtime, ids)
        if not arguments.no_speed:
            texts, result["one_by_one"] = one_by_one(arguments.model, prompts, max(map(len, ids)), arguments.max_tokens, arguments.threads)
            again, result["batched_again"] = timed("batched again", runtime, ids)
            speed = 2 / (1 / result["batched"]["tokens_per_second"] + 1 / result["batched_again"]["tokens_per_second"])
            result["ratio"] = round(speed / result["one_by_one"]["tokens_per_second"], 3)
            result["ratio_met"] = result["ratio"] >= TARGET_RATIO
            result["repeated_identically"] = again == answers
            equal = sum(answer.text.strip() == text.strip() for answer, text in zip(answers, texts, strict=True))
            result["share_identical_to_one_by_one"] = round(equal / len(prompts), 4)
    with LlamaRuntime(arguments.model, exact_settings) as runtime:
        exact, result["exact"] = timed("exact", runtime, ids)
    result["share_identical_to_exact"] = round(sum(a == b for a, b in zip(answers, exact, strict=True)) / len(prompts), 4)
    differing = [
        {
            "id": prompt.id, "batched": verdict(prompt, a), "exact": verdict(prompt, b),
            "batched_answer": a.text[:80], "exact_answer": b.text[:80],
        }
        for prompt, a, b in zip(prompts, answers, exact, strict=True) if verdict(prompt, a) != verdict(prompt, b)
    ]
    result["verdicts_differing"] = differing
    result["share_verdicts_differing"] = round(len(differing) / len(prompts), 4)
    result["verdicts_met"] = result["share_verdicts_differing"] <= TARGET_VERDICTS_DIFFERING
    result["peak_rss_bytes"] = peak_rss_bytes()
    facts = machine()
    result["machine"] = f"{facts.cpu}, {facts.physical_cores} cores"
    if arguments.json:
        print(json.dumps(result, ensure_ascii=False))
        return
    for name in ("batched", "one_by_one", "batched_again", "exact"):
        if name in result:
            speed = result[name]
            took = f"{speed['tokens']} tokens in {speed['seconds']:.1f} s, load {speed['load_before']}"
            print(f"{name:<14} {speed['tokens_per_second']:8.1f} tokens/s   {took}")
    if "ratio" in result:
        print(f"ratio {result['ratio']:.2f} (target {TARGET_RATIO}); identical to one by one {result['share_identical_to_one_by_one']:.1%}")
    print(f"identical to exact {result['share_identical_to_exact']:.1%}; verdicts differing {len(differing)} of {len(prompts)}")
    for each in differing:
        print(f"  {each['id']}: batched {each['batched']}, exact {each['exact']}")
        print(f"    {each['batched_answer']!r}\n    {each['exact_answer']!r}")


if __name__ == "__main__":
    main()
