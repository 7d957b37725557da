"""The transformers engine against a plain loop over full forward passes, against itself in other batches, and against llama.cpp."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_folders import change_json, chat_directory
from small_models import CHAT_TEMPLATE, VOCABULARY, tiny_gguf, tiny_module, write_gguf

from trailmed.device.engine import Reply
from trailmed.device.llama_engine import LlamaEngine
from trailmed.device.llama_runtime import DecodeSettings
from trailmed.device.transformers_engine import TransformersEngine, TransformersSettings
from trailmed.errors import TrailmedError

END = VOCABULARY - 1
QUESTIONS = (
    "How can I stop the bleeding?", "The boat lies", "What should I do if I am lost in the forest at night?", "Sure", "A long answer",
    "I am sorry, but", "open the window, then leave the room and call for help", "Stay", "keep warm", "Press on the wound with",
)
TOKENS = 14


def gemma4() -> Any:
    """A small Gemma 4: multimodal wrapper, per-layer embeddings, sliding and global attention, the last layers sharing keys and values."""
    text = {
        "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size": 64, "hidden_size_per_layer_input": 16,
        "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
        "global_head_dim": 32, "sliding_window": 8, "num_kv_shared_layers": 2, "max_position_embeddings": 512,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2, "bos_token_id": VOCABULARY - 3,
        "eos_token_id": END, "pad_token_id": VOCABULARY - 3,
    }
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "head_dim": 16,
    }
    torch.manual_seed(0)
    config = transformers.Gemma4Config(text_config=text, vision_config=vision, audio_config=None, eos_token_id=END)
    module = transformers.Gemma4ForConditionalGeneration(config).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if name.endswith("norm.weight"):
            parameter.copy_(torch.randn_like(parameter) * 0.2 + 1)
        else:
            parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return module


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads are slower on matrices this small, and wait for each other where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def module_of(architecture: str) -> Any:
    # its own output matrix: with the embedding tied to it a random model only repeats its last token
    return gemma4() if architecture == "gemma4" else tiny_module(architecture, seed=1, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def directory(architecture: str) -> Path:
        return chat_directory(module_of(architecture), tmp_path_factory.mktemp("models") / architecture)

    return directory


@pytest.fixture
def copied(directories: Callable[[str], Path], tmp_path: Path) -> Path:
    """A directory of one's own to spoil."""
    return Path(shutil.copytree(directories("qwen2"), tmp_path / "model"))


def settings(**changes: Any) -> TransformersSettings:
    return TransformersSettings(**({"max_tokens": TOKENS, "slots": 4, "threads": 1, "dtype": "float32"} | changes))


def replies(path: Path, questions: Sequence[str] = QUESTIONS, **changes: Any) -> list[Reply]:
    given: dict[int, Reply] = {}

    def note(index: int, reply: Reply) -> None:
        assert index not in given
        given[index] = reply

    with TransformersEngine(path, settings(**changes)) as engine:
        engine.answer(questions, note)
    return [given[index] for index in range(len(questions))]


def ignore(_index: int, _reply: Reply) -> None:
    """A listener that does not care."""


@dataclass(frozen=True)
class Continuation:
    """`TOKENS` tokens, and by how much each was the most probable: the logit of the best less that of the second best."""

    tokens: list[int]
    margin: float

    def until(self, ends: Sequence[int]) -> tuple[list[int], str]:
        """What is left of it when any of `ends` ends it."""
        for place, token in enumerate(self.tokens):
            if token in ends:
                return self.tokens[:place], "eos"
        return self.tokens, "length"


@pytest.fixture(scope="module")
def continuations(directories: Callable[[str], Path]) -> Callable[[str], list[Continuation]]:
    """Of the questions, by an architecture's module: one token after the other, the whole text computed anew for each."""

    @cache
    @torch.inference_mode()
    def continued(architecture: str) -> list[Continuation]:
        module = module_of(architecture)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directories(architecture))
        found = []
        for question in QUESTIONS:
            turn = [{"role": "user", "content": question}]
            prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
            ids, margin = list(prompt), float("inf")
            for _ in range(TOKENS):
                best = module(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
                ids.append(int(best.indices[0]))
                margin = min(margin, float(best.values[0] - best.values[1]))
            found.append(Continuation(ids[len(prompt) :], margin))
        return found

    return continued


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3", "gemma4"])
def test_answers_are_those_of_a_loop_over_full_forward_passes(
    directories: Callable[[str], Path], continuations: Callable[[str], list[Continuation]], tmp_path: Path, architecture: str,
) -> None:
    directory = Path(shutil.copytree(directories(architecture), tmp_path / "model"))
    free = continuations(architecture)
    # ends that the answers run into, at different steps
    ends = [END, free[0].tokens[4], free[1].tokens[2], free[2].tokens[9]]
    change_json(directory / "generation_config.json", eos_token_id=ends)
    expected = [each.until(ends) for each in free]
    assert {stopped for _, stopped in expected} == {"eos", "length"}
    assert len({len(tokens) for tokens, _ in expected}) > 3
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    assert replies(directory) == [
        Reply(tokenizer.decode(tokens, skip_special_tokens=True), len(tokens), stopped) for tokens, stopped in expected
    ]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gemma4"])
def test_company_in_the_batch_changes_nothing(directories: Callable[[str], Path], architecture: str) -> None:
    alone = replies(directories(architecture), slots=1)
    assert replies(directories(architecture), slots=3) == alone
    assert replies(directories(architecture), slots=64) == alone
    assert replies(directories(architecture), QUESTIONS[::-1], slots=4) == alone[::-1]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_agrees_with_llama_cpp_on_the_same_weights(
    directories: Callable[[str], Path], continuations: Callable[[str], list[Continuation]], tmp_path: Path, architecture: str,
) -> None:
    # llama.cpp keeps keys and values in 16 bits: it may choose otherwise where two tokens are as good as tied
    clear = [question for question, each in zip(QUESTIONS, continuations(architecture), strict=True) if each.margin > 0.02]
    assert len(clear) >= 3
    directory = Path(shutil.copytree(directories(architecture), tmp_path / "model"))
    change_json(directory / "generation_config.json", eos_token_id=[VOCABULARY - 3, END])  # what llama.cpp takes for ends
    given: dict[int, Reply] = {}
    path = write_gguf(module_of(architecture), tmp_path / "model.gguf")
    with LlamaEngine(path, DecodeSettings(max_tokens=TOKENS, threads=1, exact=True)) as engine:
        engine.answer(clear, given.__setitem__)
    llama = [given[index] for index in range(len(clear))]
    assert replies(directory, clear) == llama
    assert replies(path, clear) == llama
    assert replies(path) == replies(directory)
    assert len({reply.text for reply in llama}) > 1


def test_tokenizer_eos_ends_an_answer_too(copied: Path, continuations: Callable[[str], list[Continuation]]) -> None:
    ends = [continuations("qwen2")[0].tokens[3], continuations("qwen2")[1].tokens[5]]
    with TransformersEngine(copied, settings()) as engine:
        before = engine.encode(QUESTIONS)
    change_json(copied / "generation_config.json", eos_token_id=ends[0])
    spelled = transformers.PreTrainedTokenizerFast.from_pretrained(copied).convert_ids_to_tokens(ends[1])
    change_json(copied / "tokenizer_config.json", eos_token=spelled)
    with TransformersEngine(copied, settings()) as engine:
        # a token made special is taken out of the text first, which may make other tokens of a question
        same = [index for index, tokens in enumerate(engine.encode(QUESTIONS)) if tokens == before[index]]
    got = replies(copied, [QUESTIONS[index] for index in same])
    expected = [continuations("qwen2")[index].until(ends) for index in same]
    assert [(reply.tokens, reply.stopped) for reply in got] == [(len(tokens), stopped) for tokens, stopped in expected]
    assert expected != [continuations("qwen2")[index].until(ends[:1]) for index in same]


def test_ends_come_from_the_config_where_there_is_no_generation_config(
    copied: Path, continuations: Callable[[str], list[Continuation]],
) -> None:
    first = continuations("qwen2")[0]
    (copied / "generation_config.json").unlink()
    change_json(copied / "config.json", eos_token_id=[END, first.tokens[2]])
    assert replies(copied)[0].tokens == len(first.until([first.tokens[2]])[0])


def test_sampling_habits_of_the_checkpoint_are_ignored(directories: Callable[[str], Path], copied: Path) -> None:
    change_json(copied / "generation_config.json", do_sample=True, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=2)
    assert replies(copied) == replies(directories("qwen2"))


def test_a_reply_is_given_when_its_answer_ends_and_its_row_leaves_the_batch(
    copied: Path, continuations: Callable[[str], list[Continuation]],
) -> None:
    change_json(copied / "generation_config.json", eos_token_id=[continuations("qwen2")[0].tokens[3]])
    rows: list[int] = []
    given: list[tuple[int, int]] = []
    with TransformersEngine(copied, settings(slots=len(QUESTIONS))) as engine:
        engine._opened.module.register_forward_pre_hook(lambda _, __, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
        engine.answer(QUESTIONS, lambda _, reply: given.append((reply.tokens + (reply.stopped == "eos"), len(rows))))
    assert all(steps == forwards for steps, forwards in given)
    assert len({steps for steps, _ in given}) > 1
    assert rows == [sum(steps > step for steps, _ in given) for step in range(TOKENS)]


def test_identity_of_a_directory(directories: Callable[[str], Path], tmp_path: Path) -> None:
    directory = directories("qwen2")
    identity = TransformersEngine(directory, settings()).identity
    assert (identity.engine, identity.model, identity.edit_sha256, identity.type) == ("transformers", "qwen2", None, "F32")
    assert identity.sha256 == hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads(json.dumps(identity.settings)) == {"max_tokens": TOKENS, "slots": 4, "threads": 1, "dtype": "float32"}
    sharded = chat_directory(module_of("qwen2"), tmp_path / "sharded", max_shard_size="200KB")
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    assert TransformersEngine(sharded, settings()).identity.sha256 == hashlib.sha256(b"".join(map(Path.read_bytes, shards))).hexdigest()
    assert replies(sharded) == replies(directory)


@pytest.mark.parametrize(
    ("stored", "computed", "type_"), [
        (torch.float16, "float32", "F16"), (torch.bfloat16, "float32", "BF16"), (torch.float16, "bfloat16", "BF16"),
        (torch.float32, "bfloat16", "BF16"),
    ],
)
def test_type_is_what_the_weights_were_rounded_to(copied: Path, stored: torch.dtype, computed: str, type_: str) -> None:
    weights = load_file(copied / "model.safetensors")
    save_file({name: tensor.to(stored) for name, tensor in weights.items()}, copied / "model.safetensors", {"format": "pt"})
    with TransformersEngine(copied, settings(dtype=computed)) as engine:
        assert engine.identity.type == type_
        assert {str(parameter.dtype) for parameter in engine._opened.module.parameters()} == {f"torch.{computed}"}
        engine.answer(QUESTIONS[:2], ignore)


@pytest.mark.parametrize(
    ("stored", "computed", "type_"), [
        ("F32", "float32", "F32"), ("F16", "float32", "F16"), ("F16", "bfloat16", "BF16"), ("Q8_0", "float32", "dequantized Q8_0"),
        ("Q8_0", "bfloat16", "dequantized Q8_0"),
    ],
)
def test_type_of_a_gguf(tmp_path: Path, stored: str, computed: str, type_: str) -> None:
    path = tiny_gguf(tmp_path, type=stored)
    identity = TransformersEngine(path, settings(dtype=computed)).identity
    assert (identity.type, identity.model) == (type_, path.name)
    assert identity.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_edit_in_a_gguf_is_named(tmp_path: Path) -> None:
    path = write_gguf(tiny_module(), tmp_path / "edited.gguf", metadata={"trailmed.edit.sha256": "ab" * 32})
    assert TransformersEngine(path, settings()).identity.edit_sha256 == "ab" * 32


def test_thread_count_of_the_process_is_given_back(directories: Callable[[str], Path]) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    with TransformersEngine(directories("qwen2"), settings(threads=before + 1)) as engine:
        engine.answer(QUESTIONS[:1], lambda *_: seen.append(torch.get_num_threads()))
    assert (seen, torch.get_num_threads()) == ([before + 1], before)


def test_nothing_is_printed(directories: Callable[[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    replies(directories("gemma4"), QUESTIONS[:2])
    assert capfd.readouterr() == ("", "")


def test_no_questions_no_replies(directories: Callable[[str], Path]) -> None:
    assert replies(directories("qwen2"), []) == []


def _without_tensor(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _with_other_shape(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros(3)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})


def _index(directory: Path, shard: str) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    change_json(directory / "model.safetensors.index.json", metadata={}, weight_map={"model.norm.weight": shard})


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    "pickled": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pickled weights"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no *.safetensors"),
    "weights under another name": (lambda d: (d / "model.safetensors").rename(d / "other.safetensors"), "neither model.safetensors nor"),
    "cut weights": (lambda d: _cut(d / "model.safetensors"), "not a whole safetensors file"),
    "tensor missing": (_without_tensor, "model.layers.1.mlp.up_proj.weight is missing"),
    "tensor of another shape": (_with_other_shape, "cannot load it"),
    "shard missing": (lambda d: _index(d, "model-00002-of-00002.safetensors"), "is missing"),
    "shard outside": (lambda d: _index(d, "../model/model-00001-of-00001.safetensors"), "no *.safetensors in this folder"),
    "own code": (lambda d: change_json(d / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}), "code of its own"),
    "own tokenizer code": (
        lambda d: change_json(d / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}), "code of its own",
    ),
    "unknown architecture": (lambda d: change_json(d / "config.json", model_type="nobody_knows"), "cannot load it"),
    "adapter": (lambda d: change_json(d / "adapter_config.json", base_model_name_or_path="x/y"), "holds an adapter"),
    "quantized": (lambda d: change_json(d / "config.json", quantization_config={"quant_method": "gptq"}), "are quantized"),
    "quantized text part": (lambda d: change_json(d / "config.json", text_config={"quantization_config": {"bits": 4}}), "are quantized"),
    "other weights": (lambda d: change_json(d / "config.json", transformers_weights="adapter_model.bin"), "names other weights"),
    "encoder": (lambda d: change_json(d / "config.json", is_encoder_decoder=True), "has an encoder"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "cannot read its tokenizer"),
    "no tokenizer": (lambda d: [(d / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "has no tokenizer"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_refuses_what_it_cannot_run_in_one_line(copied: Path, case: str) -> None:
    spoil, message = SPOILED[case]
    evil = copied / "evil.py"
    evil.write_text(f"open({str(copied / 'ran')!r}, 'w')\n")
    spoil(copied)
    with pytest.raises(TrailmedError) as caught:
        TransformersEngine(copied, settings())
    line = str(caught.value)
    assert message in line
    assert str(copied) in line
    assert "\n" not in line
    assert len(line) < 500
    assert not (copied / "ran").exists()


def test_refuses_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(TrailmedError, match=r"nowhere.*no such file"):
        TransformersEngine(tmp_path / "nowhere", settings())


def test_refuses_a_model_without_chat_template_when_asked(tmp_path: Path) -> None:
    directory = chat_directory(module_of("qwen2"), tmp_path / "model", chat_template=None)
    with TransformersEngine(directory, settings()) as engine, pytest.raises(TrailmedError, match="has no chat template"):
        engine.answer(["?"], ignore)


def test_refuses_a_question_that_cannot_be_asked(directories: Callable[[str], Path]) -> None:
    given: list[Reply] = []
    with TransformersEngine(directories("qwen2"), settings()) as engine:
        with pytest.raises(TrailmedError, match=r"question 2 of 2 cannot be tokenized .*surrogates"):
            engine.answer(["fine", "half a \ud83d"], lambda _, reply: given.append(reply))
        with pytest.raises(TrailmedError, match=r"question 1 of 2 has \d+ tokens; with 14 .* context of 512; shorten it"):
            engine.answer(["very " * 300, "fine"], lambda _, reply: given.append(reply))
        assert not given
    with pytest.raises(TrailmedError, match="was closed"):
        engine.answer(["?"], lambda _, reply: given.append(reply))


def test_refuses_a_template_that_renders_nothing_and_a_foreign_tokenizer(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text("{{ '' }}")
    with TransformersEngine(copied, settings()) as engine, pytest.raises(TrailmedError, match="becomes no token at all"):
        engine.answer(["?"], ignore)
    small = chat_directory(tiny_module("qwen2", vocab_size=VOCABULARY - 3, pad_token_id=0), copied.parent / "small")
    with TransformersEngine(small, settings()) as engine, pytest.raises(TrailmedError, match="its tokenizer is another model's"):
        engine.answer(["?"], ignore)


def test_refuses_weights_that_are_not_numbers(copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"][5] = float("nan")
    save_file(weights, copied / "model.safetensors", {"format": "pt"})
    with TransformersEngine(copied, settings()) as engine, pytest.raises(TrailmedError, match="logits are not numbers"):
        engine.answer(["?"], ignore)


def test_what_the_listener_raises_passes_through(directories: Callable[[str], Path]) -> None:
    def broken(_index: int, _reply: Reply) -> None:
        raise RuntimeError("of the listener")

    with TransformersEngine(directories("qwen2"), settings()) as engine, pytest.raises(RuntimeError, match="of the listener"):
        engine.answer(["?"], broken)


@pytest.mark.parametrize(
    ("changes", "message"), [
        ({"max_tokens": 0}, "max_tokens is 0"), ({"slots": 0}, "slots is 0"), ({"threads": -1}, "threads is -1"),
        ({"dtype": "float16"}, "choose from bfloat16, float32"),
    ],
)
def test_refuses_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrailmedError, match=message):
        settings(**changes)


def _named_templates(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": CHAT_TEMPLATE}]
    change_json(directory / "tokenizer_config.json", chat_template=named)


def _template_in_tokenizer_config(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    change_json(directory / "tokenizer_config.json", chat_template=CHAT_TEMPLATE)


def _template_of_processor(directory: Path) -> None:
    (directory / "chat_template.jinja").rename(directory / "template")
    change_json(directory / "chat_template.json", chat_template=(directory / "template").read_text())
    change_json(directory / "tokenizer_config.json", chat_template="{{ raise_exception('not this one') }}")


@pytest.mark.parametrize("move", [_named_templates, _template_in_tokenizer_config, _template_of_processor])
def test_chat_template_is_found_wherever_it_may_be(
    directories: Callable[[str], Path], copied: Path, move: Callable[[Path], None],
) -> None:
    move(copied)
    assert replies(copied, QUESTIONS[:2]) == replies(directories("qwen2"), QUESTIONS[:2])


@pytest.mark.parametrize(("content", "message"), [(b"\xff\xfe", "not UTF-8"), (b" " * (5 << 20), "too large for a chat template")])
def test_refuses_a_chat_template_that_is_no_text(copied: Path, content: bytes, message: str) -> None:
    (copied / "chat_template.jinja").write_bytes(content)
    with pytest.raises(TrailmedError, match=message):
        TransformersEngine(copied, settings())


def test_bos_and_eos_are_spelled_for_the_template(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text("{{ bos_token }}|{{ eos_token }}|{{ messages[0].content }}")
    change_json(copied / "tokenizer_config.json", bos_token={"__type": "AddedToken", "content": "<|endoftext|>"})
    with TransformersEngine(copied, settings()) as engine:
        tokens = engine.encode(["?"])[0]
    assert (tokens[0], tokens[2]) == (VOCABULARY - 3, END)
