"""Batched decoding against llama-cpp-python's own loop and against itself, on small random models in real GGUF files."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_reference import llama_reference
from small_models import VOCABULARY, tiny_gguf, tiny_module, write_gguf

from trailmed.device import llama_context, llama_runtime
from trailmed.device.llama_runtime import DecodeSettings, Generation, LlamaRuntime
from trailmed.errors import TrailmedError

END = VOCABULARY - 1
ENDS = {END, VOCABULARY - 3}
"""What llama.cpp takes for the end of an answer in these vocabularies: <|im_end|> and <|endoftext|>."""
TEXTS = (
    "How can I stop the bleeding?", "The boat lies", "What should I do if I am lost in the forest at night?", "Sure", "A long answer",
    "I am sorry, but", "open the window, then leave the room and call for help", "Stay", "keep warm", "Press on the wound with",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # its own output matrix: with the embedding tied to it a random model only repeats its last token
    return tiny_gguf(tmp_path_factory.mktemp("model"), "qwen2", seed=1, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def prompts(model: Path) -> list[list[int]]:
    with LlamaRuntime(model) as runtime:
        return [runtime.encode(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n") for text in TEXTS]


@pytest.fixture(scope="module")
def reference(model: Path) -> Iterator[llama_cpp.Llama]:
    llama = llama_cpp.Llama(str(model), n_ctx=512, n_threads=1, n_threads_batch=1, n_gpu_layers=0, verbose=False)
    yield llama
    llama.close()


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every context is made with, in order."""
    made: list[dict[str, Any]] = []
    make = llama_runtime.LlamaContext.__init__

    def noting(self: llama_context.LlamaContext, model: object, path: Path, **arguments: Any) -> None:
        made.append(arguments)
        make(self, model, path, **arguments)

    monkeypatch.setattr(llama_runtime.LlamaContext, "__init__", noting)
    return made


def settings(**changes: int | bool) -> DecodeSettings:
    values: dict[str, int | bool] = {"max_tokens": 12, "slots": 4, "threads": 1}
    return DecodeSettings(**(values | changes))  # type: ignore[arg-type]


def generate(model: Path, prompts: Sequence[Sequence[int]], **changes: int | bool) -> list[Generation]:
    with LlamaRuntime(model, settings(**changes)) as runtime:
        return runtime.generate(prompts)


def llama_tokens(llama: llama_cpp.Llama, prompt: Sequence[int], max_tokens: int) -> tuple[int, ...]:
    """llama-cpp-python's own greedy loop, from an empty cache."""
    llama.reset()
    tokens: list[int] = []
    for token in llama.generate(list(prompt), temp=0.0):
        if token in ENDS:
            break
        tokens.append(token)
        if len(tokens) == max_tokens:
            break
    return tuple(tokens)


@pytest.mark.parametrize("type_name", ["F32", "Q8_0"])
def test_exact_mode_is_llama_cpp_pythons_own_loop(tmp_path: Path, type_name: str, prompts: list[list[int]]) -> None:
    path = tiny_gguf(tmp_path, "llama", type=type_name, seed=1)
    llama = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, n_threads_batch=1, n_gpu_layers=0, verbose=False)
    try:
        expected = [llama_tokens(llama, prompt, 30) for prompt in prompts]
    finally:
        llama.close()
    assert {30} < set(map(len, expected))  # some end by themselves, some at the limit
    assert [answer.tokens for answer in generate(path, prompts, exact=True, max_tokens=30)] == expected


def test_exact_mode_gives_the_text_of_create_completion(reference: llama_cpp.Llama, model: Path, prompts: list[list[int]]) -> None:
    compared = 0
    for prompt, answer in zip(prompts, generate(model, prompts, exact=True), strict=True):
        if "�" in answer.text:
            continue  # create_completion does not count tokens that are half a character
        reference.reset()
        completion = reference.create_completion(prompt, temperature=0.0, max_tokens=12)["choices"][0]
        assert completion["text"] == answer.text
        assert completion["finish_reason"] == {"eos": "stop", "length": "length"}[answer.stopped]
        compared += 1
    assert compared >= 5


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3"])
@pytest.mark.parametrize("slots", [1, 3, 64])
@pytest.mark.parametrize("apart", [True, False])
def test_batched_answers_are_those_of_one_at_a_time(
    tmp_path: Path, architecture: str, slots: int, apart: bool, prompts: list[list[int]], contexts: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # float32 weights and wide-apart logits: nothing is near a tie, so batching must change nothing
    path = tiny_gguf(tmp_path, architecture, seed=2, tie_word_embeddings=False)
    expected = generate(path, prompts, exact=True)
    if not apart:
        monkeypatch.setattr(llama_runtime, "_MOST_CELLS", 255)
    assert generate(path, prompts, slots=slots) == expected
    assert [context["apart"] for context in contexts] == [False, apart and slots > 1]


def test_sequences_kept_apart_stand_side_by_side(tmp_path: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf(tmp_path, "llama", seed=3, tie_word_embeddings=False)
    expected = generate(path, prompts, exact=True, max_tokens=30)
    assert {30} < {len(answer.tokens) for answer in expected}  # some leave early
    batches: list[list[int]] = []
    moves: list[tuple[int, int]] = []
    decode, move = llama_cpp.llama_decode, llama_runtime.LlamaContext.move

    def noting_decode(context: Any, batch: Any) -> int:
        batches.append([batch.seq_id[index][0] for index in range(batch.n_tokens)])
        return int(decode(context, batch))

    def noting_move(self: llama_context.LlamaContext, source: int, target: int) -> None:
        moves.append((source, target))
        move(self, source, target)

    monkeypatch.setattr(llama_cpp, "llama_decode", noting_decode)
    monkeypatch.setattr(llama_runtime.LlamaContext, "move", noting_move)
    assert generate(path, prompts, max_tokens=30, slots=6) == expected
    assert moves
    assert all(source > target for source, target in moves)
    # a prompt's tokens by themselves, or one token each of the first so many sequences; else llama.cpp would take them in pieces
    assert all(len(set(batch)) == 1 or batch == list(range(len(batch))) for batch in batches)
    assert max(map(len, map(set, batches))) == 6


def test_sequences_are_kept_apart_as_far_as_memory_allows(
    model: Path, prompts: list[list[int]], contexts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_module("qwen2").config
    cell = 2 * 2 * config.hidden_size // config.num_attention_heads * config.num_key_value_heads * config.num_hidden_layers
    expected = generate(model, prompts, exact=True)
    for room in (0, -1):
        monkeypatch.setattr(llama_runtime, "_MOST_BYTES_APART", 4 * 256 * cell + room)
        assert generate(model, prompts) == expected
    assert [context["apart"] for context in contexts] == [False, True, False]


def test_models_that_cannot_be_cut_back_are_not_kept_apart(
    model: Path, prompts: list[list[int]], contexts: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(model, prompts)
    monkeypatch.setattr(llama_cpp, "llama_model_is_recurrent", lambda _: True)
    assert generate(model, prompts) == expected
    assert [context["apart"] for context in contexts] == [True, False]


def test_the_same_call_gives_the_same_answers_again(model: Path, prompts: list[list[int]]) -> None:
    with LlamaRuntime(model, settings()) as runtime:
        first = runtime.generate(prompts)
        runtime.generate(prompts[:3])  # leaves nothing behind
        assert runtime.generate(prompts) == first
    assert generate(model, prompts) == first


def test_prompts_of_very_different_length_share_the_cells(model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    long = [(prompts[0] * 40)[:450], *prompts, (prompts[2] * 40)[:470]]
    expected = generate(model, long, exact=True)
    monkeypatch.setattr(llama_runtime, "_MOST_CELLS", 40)  # room for the longest alone, or for some short ones
    assert generate(model, long, slots=8) == expected


def test_prompts_longer_than_a_batch_are_fed_in_pieces(model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(model, prompts)
    monkeypatch.setattr(llama_context, "_BATCH_TOKENS", 5)
    assert generate(model, prompts) == expected


def test_no_more_cells_are_asked_for_than_needed(model: Path, prompts: list[list[int]], contexts: list[dict[str, Any]]) -> None:
    with LlamaRuntime(model, settings(slots=3)) as runtime:
        runtime.generate(prompts)
        runtime.first_token_log_probs(prompts)
        stats = runtime.last_stats
    assert stats is not None
    own = sorted((len(prompt) - stats.prefix_tokens_shared for prompt in prompts), reverse=True)
    assert [(each["cells"], each["slots"], each["apart"]) for each in contexts] == [
        (3 * 256, 3, True), (stats.prefix_tokens_shared + sum(own[:3]), 3, False),
    ]
    generate(model, prompts, slots=10_000)
    assert contexts[2]["slots"] == len(prompts)
    generate(model, [(prompts[0] * 40)[:245], prompts[1]], slots=2)  # 245 + 12 - 1 cells
    generate(model, [(prompts[0] * 40)[:246], prompts[1]], slots=2)
    assert [context["cells"] for context in contexts[3:]] == [2 * 256, 2 * 512]
    generate(model, [[1, 2]] * 400, slots=10_000, max_tokens=1)
    assert contexts[5]["slots"] == llama_cpp.llama_max_parallel_sequences() - 1


def test_answers_end_at_every_end_of_generation_token(model: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    plain = generate(model, prompts, max_tokens=8)
    assert {answer.stopped for answer in plain} == {"length"}
    assert {len(answer.tokens) for answer in plain} == {8}
    # the same weights, in a vocabulary that declares the first answer's fourth token to be the end of a turn
    end = plain[0].tokens[3]
    module = tiny_module("qwen2", seed=1, tie_word_embeddings=False)
    path = write_gguf(module, tmp_path / "turn.gguf", metadata={"tokenizer.ggml.eot_token_id": end})
    for answer, whole in zip(generate(path, prompts, max_tokens=8), plain, strict=True):
        expected = whole.tokens[: whole.tokens.index(end)] if end in whole.tokens else whole.tokens
        assert answer.tokens == expected
        assert answer.stopped == ("eos" if end in whole.tokens else "length")


def test_stats_and_answers_as_they_finish(model: Path, prompts: list[list[int]]) -> None:
    finished: dict[int, Generation] = {}
    with LlamaRuntime(model, settings()) as runtime:
        answers = runtime.generate(prompts, on_generation=lambda index, answer: finished.update({index: answer}))
        stats = runtime.last_stats
    assert stats is not None
    assert [finished[index] for index in range(len(prompts))] == answers
    assert stats.prompt_tokens == sum(map(len, prompts))
    assert stats.generated_tokens == sum(len(answer.tokens) for answer in answers)
    assert stats.seconds > 0
    opening = [len({prompt[i] for prompt in prompts}) == 1 for i in range(min(map(len, prompts)))]
    assert stats.prefix_tokens_shared == opening.index(False) > 0


def test_no_prompts_and_equal_prompts(model: Path, prompts: list[list[int]]) -> None:
    assert generate(model, []) == []
    same = generate(model, [prompts[0]] * 5)
    assert same == [same[0]] * 5 == generate(model, [prompts[0]]) * 5


@pytest.mark.parametrize("exact", [False, True])
def test_first_token_log_probs(model: Path, prompts: list[list[int]], exact: bool) -> None:
    with LlamaRuntime(model, settings(exact=exact)) as runtime:
        measured = runtime.first_token_log_probs(prompts)
    with llama_reference(model) as plain:
        logits = np.stack([plain.logits(prompt)[-1] for prompt in prompts]).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert measured.dtype == np.float32
    assert measured.shape == (len(prompts), VOCABULARY)
    np.testing.assert_allclose(measured, expected, atol=5e-3)


def test_characters_over_several_tokens_and_broken_ones(model: Path) -> None:
    with LlamaRuntime(model) as runtime:
        tokens = runtime.encode("é 水 🏔")
        assert len(tokens) > len("é 水 🏔")
        assert runtime._text(tokens) == "é 水 🏔"
        assert runtime._text(tokens[:-1]) == "é 水 �"
        assert runtime._text([END]) == ""


def test_bad_prompts_are_named(model: Path, prompts: list[list[int]]) -> None:
    with LlamaRuntime(model, settings(max_tokens=12)) as runtime:
        with pytest.raises(TrailmedError, match=r"prompt 2 of 2 has 501 tokens; with 12 .* context of 512"):
            runtime.generate([prompts[0], [1] * 501])
        assert len(runtime.generate([[1] * 500])) == 1
        with pytest.raises(TrailmedError, match="prompt 2 of 3 is empty"):
            runtime.generate([prompts[0], [], prompts[1]])
        for token in (-1, VOCABULARY):
            with pytest.raises(TrailmedError, match="outside the vocabulary of 384"):
                runtime.generate([[token]])
        with pytest.raises(TrailmedError, match="outside the vocabulary"):
            runtime.first_token_log_probs([[VOCABULARY]])


@pytest.mark.parametrize("name", ["max_tokens", "slots", "threads"])
def test_settings_below_one_are_refused(name: str) -> None:
    with pytest.raises(TrailmedError, match=f"{name} is 0"):
        settings(**{name: 0})


def test_logits_that_are_not_numbers(tmp_path: Path, prompts: list[list[int]]) -> None:
    path = tiny_gguf(tmp_path, "qwen2")
    raw = bytearray(path.read_bytes())
    raw[-64:] = np.full(16, np.nan, np.float32).tobytes()
    path.write_bytes(raw)
    with LlamaRuntime(path, settings()) as runtime, pytest.raises(TrailmedError, match="not numbers"):
        runtime.generate(prompts)
    with LlamaRuntime(path, settings()) as runtime, pytest.raises(TrailmedError, match="not numbers"):
        runtime.first_token_log_probs(prompts)


def test_files_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(TrailmedError, match="missing"):
        LlamaRuntime(tmp_path / "missing.gguf")
    whole = tiny_gguf(tmp_path, "qwen2")
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(TrailmedError, match="truncated") as caught:
        LlamaRuntime(truncated)
    assert "\n" not in str(caught.value)


def test_the_native_loader_s_complaint_is_quoted(tmp_path: Path) -> None:
    path = write_gguf(tiny_module("qwen2"), tmp_path / "hole.gguf", drop=frozenset({"blk.1.ffn_down.weight"}))
    with pytest.raises(TrailmedError, match=r"cannot load it \(.*blk.1.ffn_down.weight") as caught:
        LlamaRuntime(path)
    assert "\n" not in str(caught.value)


def test_native_failures_are_one_line(model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    with LlamaRuntime(model, settings()) as runtime:
        with monkeypatch.context() as patch:
            patch.setattr(llama_cpp, "llama_init_from_model", lambda *_: None)
            with pytest.raises(TrailmedError, match="cannot make room"):
                runtime.generate(prompts)
        with monkeypatch.context() as patch:
            patch.setattr(llama_cpp, "llama_decode", lambda *_: -2)
            with pytest.raises(TrailmedError, match=r"failed to decode \(code -2: out of memory\)"):
                runtime.generate(prompts)
        assert len(runtime.generate(prompts)) == len(prompts)  # and it still works


def test_interrupt_between_steps_frees_the_context(model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[object] = []
    free = llama_cpp.llama_free
    monkeypatch.setattr(llama_cpp, "llama_free", lambda context: (freed.append(context), free(context)))
    with LlamaRuntime(model, settings(max_tokens=200)) as runtime:
        with pytest.raises(KeyboardInterrupt):
            runtime.generate(prompts, on_generation=lambda *_: signal.raise_signal(signal.SIGINT))
        assert len(freed) == 1
        assert len(runtime.generate(prompts[:1])) == 1


def test_closing(model: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[object] = []
    free = llama_cpp.llama_model_free
    monkeypatch.setattr(llama_cpp, "llama_model_free", lambda native: (freed.append(native), free(native)))
    with LlamaRuntime(model) as runtime:
        pass
    runtime.close()
    assert len(freed) == 1
    with pytest.raises(TrailmedError, match="closed"):
        runtime.generate(prompts)
    del runtime
    unclosed = LlamaRuntime(model)
    del unclosed
    assert len(freed) == 2
