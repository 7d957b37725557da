"""Loading GGUFs into transformers modules, held against llama.cpp on the same file and against the module it was written from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from llama_reference import llama_reference, mean_kl, module_logits
from small_models import VOCABULARY, tiny_gguf, tiny_module, write_gguf

from trailmed.errors import TrailmedError
from trailmed.models.load import load_model

ARCHITECTURES = ("qwen2", "qwen3", "llama", "gemma3")
# longer than gemma3's sliding window of 8 and long enough that rotary scaling matters
IDS = np.random.default_rng(7).integers(0, VOCABULARY - 3, 96).tolist()
# ggml computes Gemma's GELU through a float16 table
TOLERANCE = {"gemma3": 1e-2}
EXACT = 1e-4


def _assert_parity(path: Path, tolerance: float = EXACT) -> None:
    module = load_model(path).module
    ours = module_logits(module, IDS)
    with llama_reference(path) as reference:
        theirs = reference.logits(IDS)
    np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)
    assert mean_kl(theirs, ours) < tolerance**2
    assert theirs.std() > 0.5  # logits that hardly differ would prove nothing


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_agrees_with_llama_cpp(tmp_path: Path, architecture: str) -> None:
    _assert_parity(tiny_gguf(tmp_path, architecture), TOLERANCE.get(architecture, EXACT))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gives_back_the_module_it_was_written_from(tmp_path: Path, architecture: str) -> None:
    original = tiny_module(architecture)
    loaded = load_model(write_gguf(original, tmp_path / "m.gguf")).module
    assert type(loaded) is type(original)
    expected = original.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=3e-7, rtol=0)
    np.testing.assert_allclose(module_logits(loaded, IDS), module_logits(original, IDS), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "rope", [
        {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
        {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    ], ids=["linear", "yarn"],
)
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_rotary_scaling_agrees_with_llama_cpp(tmp_path: Path, architecture: str, rope: dict[str, object]) -> None:
    _assert_parity(tiny_gguf(tmp_path, architecture, rope_parameters=rope))


def test_gemma_linear_scaling_is_for_global_layers_only(tmp_path: Path) -> None:
    full = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    rope = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    _assert_parity(tiny_gguf(tmp_path, "gemma3", rope_parameters=rope), TOLERANCE["gemma3"])


def test_llama3_rotary_scaling_is_recognised_from_its_divisors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    module = tiny_module("llama", rope_parameters=rope)
    plain = 1 / 500_000.0 ** (torch.arange(0, 16, 2).double() / 16)
    divisors = (plain / module.model.rotary_emb.inv_freq.double()).float().numpy()
    path = write_gguf(module, tmp_path / "m.gguf", extra={"rope_freqs.weight": divisors})
    _assert_parity(path)
    assert load_model(path).module.config.rope_parameters == rope
    np.testing.assert_allclose(module_logits(load_model(path).module, IDS), module_logits(module, IDS), atol=EXACT)
    divisors[3] *= 1.5
    write_gguf(module, path, extra={"rope_freqs.weight": divisors})
    with pytest.raises(TrailmedError, match="not Llama 3's"):
        load_model(path)


@pytest.mark.parametrize(("architecture", "change"), [
    ("llama", {"attention_bias": False, "tie_word_embeddings": True}), ("qwen2", {"tie_word_embeddings": False}),
    ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}), ("gemma3", {"final_logit_softcapping": 2.0}),
])
def test_variants_agree_with_llama_cpp(tmp_path: Path, architecture: str, change: dict[str, object]) -> None:
    module = tiny_module(architecture, **change)
    softcap = {"gemma3.final_logit_softcapping": 2.0} if "final_logit_softcapping" in change else {}
    path = write_gguf(module, tmp_path / "m.gguf", metadata=softcap)
    _assert_parity(path, TOLERANCE.get(architecture, EXACT))
    loaded = load_model(path).module
    tied = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert tied == loaded.config.tie_word_embeddings == module.config.tie_word_embeddings


def test_what_is_loaded_is_ready_for_use(tmp_path: Path) -> None:
    steps: list[int] = []
    path = tiny_gguf(tmp_path, "qwen2")
    loaded = load_model(path, dtype=torch.bfloat16, progress=steps.append)
    module = loaded.module
    assert not module.training
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    assert module.config._attn_implementation == "sdpa"
    assert len(steps) == sum(1 for _ in tiny_module("qwen2").parameters())
    assert (loaded.path, loaded.architecture.name) == (path, "qwen2")
    prompt = loaded.template.prompt("How can I help?")
    ids = loaded.tokenizer.encode(prompt)
    assert loaded.tokenizer.decode(ids) == prompt
    assert module.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False).shape == (1, len(ids) + 2)


def test_a_model_without_chat_template_loads(tmp_path: Path) -> None:
    loaded = load_model(tiny_gguf(tmp_path, "llama", chat_template=False))
    assert module_logits(loaded.module, [1, 2, 3]).shape == (3, VOCABULARY)
    with pytest.raises(TrailmedError, match="has no chat template"):
        loaded.template.prompt("x")


@pytest.mark.parametrize(("metadata", "message"), [
    ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported; supported are qwen2, qwen3, llama, gemma3"),
    ({"general.architecture": 7}, "no architecture is not supported"),
    ({"llama.block_count": None}, "llama.block_count is missing"),
    ({"llama.block_count": 1_000_000}, "llama.block_count has the value '1000000'"),
    ({"llama.block_count": 1}, "has tensors no llama model has .blk.1"),
    ({"llama.block_count": 3}, r"tensors are missing .blk\.2.* and 5 more"),
    ({"llama.attention.head_count_kv": 3}, "head_count_kv has the value '3'"),
    ({"llama.attention.head_count": 0}, "head_count has the value '0'"),
    ({"llama.attention.head_count": 5}, "head_count_kv has the value '2'"),
    ({"llama.attention.head_count": 6, "llama.attention.key_length": 16}, "make no llama model"),
    ({"llama.embedding_length": 128}, r"has the shape \[.*\], its hyperparameters say"),
    ({"llama.embedding_length": 1 << 31}, "embedding_length has the value"),
    ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon has the value 'nan'"),
    ({"llama.attention.value_length": 8}, "value_length has the value '8'"),
    ({"llama.rope.dimension_count": 8}, "dimension_count has the value '8'"),
    ({"llama.rope.scaling.type": "longrope"}, "scaling.type has the value 'longrope'"),
    ({"llama.expert_count": 8}, "llama.expert_count is not supported"),
    ({"llama.context_length": "long"}, "context_length has the value 'long'"),
])
def test_what_cannot_be_is_one_line(tmp_path: Path, metadata: dict[str, object], message: str) -> None:
    path = write_gguf(tiny_module("llama"), tmp_path / "m.gguf", metadata=metadata)
    with pytest.raises(TrailmedError, match=message) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    module = tiny_module("qwen2")
    path = write_gguf(module, tmp_path / "m.gguf", drop=frozenset({"blk.1.attn_q.bias", "output_norm.weight"}))
    with pytest.raises(TrailmedError, match=r"missing \((blk\.1\.attn_q\.bias|output_norm\.weight), .*\); use"):
        load_model(path)
    write_gguf(module, path, extra={"blk.0.attn_sinks.weight": np.zeros(4, dtype=np.float32)})
    with pytest.raises(TrailmedError, match=r"no qwen2 model has \(blk\.0\.attn_sinks\.weight\)"):
        load_model(path)
    write_gguf(module, path, tokenizer=False)
    with pytest.raises(TrailmedError, match="tokenizer"):
        load_model(path)
