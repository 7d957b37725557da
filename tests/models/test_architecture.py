"""The architecture map against transformers' own names, gguf-py's name map and an independent permutation."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import transformers
from small_models import interleaved, tiny_module

from trailmed.errors import TrailmedError
from trailmed.models.architecture import ARCHITECTURES, Heads

NAMES = list(ARCHITECTURES)


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_maps_there_and_back_as_ggufs_own_map_says(name: str) -> None:
    architecture = ARCHITECTURES[name]
    module = tiny_module(name)
    official = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), module.config.num_hidden_layers)
    assert type(module) is getattr(transformers, architecture.hf_class)
    for hf_name in module.state_dict():
        gguf_name = architecture.to_gguf(hf_name)
        assert gguf_name == official.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert architecture.to_hf(gguf_name) == hf_name


@pytest.mark.parametrize("name", NAMES)
def test_residual_writers_write_to_the_residual_stream(name: str) -> None:
    """With both of a block's writers at zero, the block passes its input through unchanged."""
    module = tiny_module(name)
    weights = module.state_dict()
    for layer in range(module.config.num_hidden_layers):
        for writer in ARCHITECTURES[name].residual_writers(layer):
            assert weights[writer].shape[0] == module.config.hidden_size
            weights[writer].zero_()
    with torch.inference_mode():
        states = module(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[-2])


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.ffn_gate_inp.weight", "blk.00.attn_q.weight", "blk.x.attn_q.weight",
                                  "blk.0.attn_q", "output", "blk.0.attn_q.weight.extra", "token_embd.scale", ""])
def test_unknown_gguf_names_have_no_counterpart(name: str) -> None:
    assert ARCHITECTURES["llama"].to_hf(name) is None


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_norm.weight", "lm_head.scale", "model.layers.0.mlp.weight", "x"])
def test_unknown_hf_names_are_refused(name: str) -> None:
    with pytest.raises(TrailmedError, match="no tensor of the llama architecture"):
        ARCHITECTURES["llama"].to_gguf(name)


@pytest.mark.parametrize(("gguf_name", "heads"), [("blk.3.attn_q.weight", 6), ("blk.3.attn_k.weight", 2), ("blk.3.attn_q.bias", 6)])
def test_llama_rows_are_put_back(gguf_name: str, heads: int) -> None:
    shape = (heads * 8,) if gguf_name.endswith("bias") else (heads * 8, 5)
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    restored = ARCHITECTURES["llama"].to_hf_values(gguf_name, interleaved(values, heads), Heads(query=6, key_value=2))
    np.testing.assert_array_equal(restored, values)


def test_gemma_norms_lose_their_one_and_matrices_do_not() -> None:
    values = np.array([0.5, 1.0, 3.0], dtype=np.float32)
    heads = Heads(query=2, key_value=1)
    for name in ("blk.0.attn_norm.weight", "blk.0.attn_q_norm.weight", "output_norm.weight"):
        np.testing.assert_array_equal(ARCHITECTURES["gemma3"].to_hf_values(name, values.copy(), heads), [-0.5, 0.0, 2.0])
        np.testing.assert_array_equal(ARCHITECTURES["qwen3"].to_hf_values(name, values.copy(), heads), values)
    np.testing.assert_array_equal(ARCHITECTURES["gemma3"].to_hf_values("blk.0.attn_q.weight", values.copy(), heads), values)
