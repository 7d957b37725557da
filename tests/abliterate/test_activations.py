"""Captured activations against transformers' own hidden states, one prompt at a time; their file against hostile bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from small_models import VOCABULARY, tiny_module

from trailmed.abliterate.activations import Activations, capture, capture_inputs, inputs_at, length_batches
from trailmed.errors import TrailmedError

ARCHITECTURES = ("qwen2", "qwen3", "llama", "gemma3")
# below and above gemma3's sliding window of 8, equal ones among them, not in order
LENGTHS = (12, 3, 30, 3, 17, 1, 25)
SHA = "c" * 64


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, VOCABULARY - 3, length).tolist() for length in lengths]


def model(architecture: str, **config: Any) -> SimpleNamespace:
    return SimpleNamespace(module=tiny_module(architecture, **config))


def tiny_gemma4() -> Any:
    """Gemma 4's text model with per-layer embeddings, shared keys and values and both kinds of attention, inside its multimodal wrapper."""
    text = transformers.Gemma4TextConfig(
        vocab_size=VOCABULARY, vocab_size_per_layer_input=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, global_head_dim=16, hidden_size_per_layer_input=8,
        num_kv_shared_layers=2, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )
    torch.manual_seed(0)
    config = transformers.Gemma4Config(text_config=text, vision_config=None, audio_config=None)
    return transformers.Gemma4ForConditionalGeneration(config).eval()


def one_at_a_time(module: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """hidden_states [layers + 1, d] at the last token by transformers; the last entry is after the final norm."""
    with torch.no_grad():
        states = module(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([state[0, -1] for state in states[:-1]]), states[-1][0, -1]


def assert_same_as_one_at_a_time(module: Any, atol: float = 2e-5) -> None:
    residual = capture(SimpleNamespace(module=module), prompts(), batch_tokens=64).residual
    assert residual.dtype == torch.float32
    for ids, ours in zip(prompts(), residual, strict=True):
        theirs, after_norm = one_at_a_time(module, ids)
        torch.testing.assert_close(ours[:-1], theirs, atol=atol, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(module.get_decoder().norm(ours[-1][None])[0], after_norm, atol=atol, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_agrees_with_output_hidden_states(architecture: str) -> None:
    assert_same_as_one_at_a_time(tiny_module(architecture))


def test_agrees_with_output_hidden_states_on_gemma_4() -> None:
    assert_same_as_one_at_a_time(tiny_gemma4())


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_capture_of_a_bfloat16_module_is_float32_of_its_own_stream(architecture: str) -> None:
    module = tiny_module(architecture).to(torch.bfloat16)
    residual = capture(SimpleNamespace(module=module), prompts((9,)), batch_tokens=64).residual
    theirs, _ = one_at_a_time(module, prompts((9,))[0])
    assert residual.dtype == torch.float32
    torch.testing.assert_close(residual[0, :-1], theirs.float(), atol=0, rtol=0)


def test_batching_does_not_change_what_is_captured() -> None:
    small = model("gemma3")
    one_each = capture(small, prompts(), batch_tokens=1).residual
    torch.testing.assert_close(capture(small, prompts(), batch_tokens=10_000).residual, one_each, atol=2e-5, rtol=1e-4)


def test_no_logits_are_computed_and_no_hook_stays() -> None:
    small = model("qwen2")
    small.module.lm_head.register_forward_hook(lambda *_: pytest.fail("the output matrix ran"))
    units: list[int] = []
    captured = capture(small, prompts(), prompts_sha256=SHA, progress=units.append)
    capture_inputs(small, prompts(), ["model.layers.0.mlp.down_proj"])
    assert sum(units) == len(LENGTHS)
    assert captured.prompts_sha256 == SHA
    hooks = [module for module in small.module.model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooks


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
@pytest.mark.parametrize("positions", [1, 3])
def test_inputs_of_linear_layers(architecture: str, positions: int) -> None:
    small = model(architecture)
    ids = prompts((12, 3, 20, 9))
    names = ["model.layers.1.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj"]
    inputs = capture_inputs(small, ids, names, positions=positions, batch_tokens=50)
    assert list(inputs) == names
    for name in names:
        linear = small.module.get_submodule(name.removesuffix(".weight"))
        for index, prompt in enumerate(ids):
            seen: list[torch.Tensor] = []
            with linear.register_forward_hook(lambda _m, args, _o, seen=seen: seen.append(args[0][0].clone())), torch.no_grad():
                small.module(input_ids=torch.tensor([prompt]))
            expected = seen[0][-positions:] if positions > 1 else seen[0][-1]
            torch.testing.assert_close(inputs[name][index], expected, atol=2e-5, rtol=1e-4)


def test_inputs_at_positions_of_each_prompt() -> None:
    module, ids, name = tiny_module("gemma3"), prompts((12, 3, 20, 9)), "model.layers.1.mlp.down_proj"
    positions: list[list[int]] = [[11, 0], [], [5, 19, 6], [8]]
    found = inputs_at(module, ids, positions, [name], batch_tokens=50)[name]
    expected: list[torch.Tensor] = []
    for prompt, wanted in zip(ids, positions, strict=True):
        with (
            module.get_submodule(name).register_forward_hook(
                lambda _m, args, _o, wanted=wanted: expected.extend(args[0][0, wanted].clone()),
            ),
            torch.no_grad(),
        ):
            module(input_ids=torch.tensor([prompt]))
    torch.testing.assert_close(found, torch.stack(expected), atol=2e-5, rtol=1e-4)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(1, 200))
def test_batches_hold_every_prompt_once_and_not_too_many_tokens(lengths: list[int], batch_tokens: int) -> None:
    batches = length_batches(lengths, batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= batch_tokens
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(in_order)


@pytest.mark.parametrize(
    ("call", "message"), [
        (lambda small: capture(small, []), "no prompts"),
        (lambda small: capture(small, [[1], []]), "0 tokens"),
        (lambda small: capture(small, [[1]], batch_tokens=0), "batch of 0"),
        (lambda small: capture_inputs(small, [[1, 2]], ["model.layers.0.mlp.down_proj"], positions=3), "2 tokens"),
        (lambda small: capture_inputs(small, [[1, 2]], ["model.layers.0.mlp.down_proj"], positions=0), "last 0"),
        (lambda small: inputs_at(small.module, [[1, 2]], [[0, -1]], ["model.layers.0.mlp.down_proj"]), "none at -1 to 0"),
        (lambda small: capture_inputs(small, [[1, 2]], ["model.layers.9.mlp.down_proj"]), "no module"),
        (lambda small: capture_inputs(small, [[1, 2]], ["model.norm"]), "not a linear layer"),
    ],
)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model("qwen2"))


def test_a_model_that_overflows_is_reported() -> None:
    small = model("qwen2")
    with torch.no_grad():
        small.module.model.layers[0].mlp.down_proj.weight.fill_(1e38)
    with pytest.raises(TrailmedError, match="no finite numbers"):
        capture(small, prompts())


def activations(seed: int = 0) -> Activations:
    return Activations(torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed)), SHA)


def test_saved_and_loaded(tmp_path: Path) -> None:
    original = activations()
    original.save(tmp_path / "a.safetensors")
    original.save(tmp_path / "b.safetensors")
    loaded = Activations.load(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert torch.equal(loaded.residual, original.residual)
    assert loaded.prompts_sha256 == SHA
    assert loaded.layers == 2


@pytest.mark.parametrize(
    "broken", [
        {"residual": torch.zeros(4, 5)}, {"residual": torch.zeros(0, 3, 5)}, {"residual": torch.zeros(4, 1, 5)},
        {"residual": torch.zeros(4, 3, 5, dtype=torch.float64)}, {"residual": torch.full((4, 3, 5), torch.nan)}, {"prompts_sha256": "x"},
    ],
)
def test_malformed_values(broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"activations|prompts_sha256"):
        Activations(**{"residual": torch.zeros(4, 3, 5), **broken})


def saved(tensors: dict[str, torch.Tensor], header: Any, kind: str = "activations") -> bytes:
    return safetensors.torch.save(tensors, metadata={f"trailmed.{kind}": header if isinstance(header, str) else json.dumps(header)})


GOOD_HEADER = {"format": 1, "prompts_sha256": SHA}
GOOD_TENSORS = {"activations": torch.zeros(4, 3, 5)}
HOSTILE = {
    "empty": b"",
    "huge header": struct.pack("<Q", 1 << 62) + b"{}",
    "garbage": b"\x08" + b"\x00" * 7 + b"notjson!" * 9,
    "truncated": saved(GOOD_TENSORS, GOOD_HEADER)[:-1],
    "no header": safetensors.torch.save(GOOD_TENSORS),
    "other kind": saved(GOOD_TENSORS, GOOD_HEADER, "directions"),
    "long header": saved(GOOD_TENSORS, {**GOOD_HEADER, "prompts_sha256": "c" * (1 << 20)}),
    "deep header": saved(GOOD_TENSORS, "[" * 100_000),
    "unknown field": saved(GOOD_TENSORS, {**GOOD_HEADER, "more": 1}),
    "other format": saved(GOOD_TENSORS, {**GOOD_HEADER, "format": 2}),
    "bad hash": saved(GOOD_TENSORS, {**GOOD_HEADER, "prompts_sha256": "../x"}),
    "other tensor": saved({**GOOD_TENSORS, "more": torch.zeros(1)}, GOOD_HEADER),
    "no tensor": saved({}, GOOD_HEADER),
    "other dtype": saved({"activations": torch.zeros(4, 3, 5, dtype=torch.float16)}, GOOD_HEADER),
    "other shape": saved({"activations": torch.zeros(4, 5)}, GOOD_HEADER),
    "no elements": saved({"activations": torch.zeros(4, 0, 5)}, GOOD_HEADER),
    "infinite": saved({"activations": torch.full((4, 3, 5), torch.inf)}, GOOD_HEADER),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(TrailmedError) as caught:
        Activations.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_in_its_place(tmp_path: Path) -> None:
    with pytest.raises(TrailmedError, match="no such file"):
        Activations.load(tmp_path / "none")
    with pytest.raises(TrailmedError, match="no such file"):
        Activations.load(tmp_path)
    blocked = tmp_path / "taken"
    blocked.write_text("")
    with pytest.raises(TrailmedError, match="taken"):
        activations().save(blocked / "a.safetensors")
