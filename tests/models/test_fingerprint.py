"""One model, one fingerprint, whatever the container's type; another model, another fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import tiny_gguf, tiny_module, write_gguf

from trailmed.models.fingerprint import fingerprint
from trailmed.models.gguf_file import GgufFile


def fingerprint_of(path: Path) -> str:
    with GgufFile.open(path) as file:
        return fingerprint(file)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3"])
def test_every_type_of_one_model_shares_it(tmp_path: Path, architecture: str) -> None:
    prints = {fingerprint_of(tiny_gguf(tmp_path, architecture, type=kind)) for kind in ("F32", "F16", "BF16", "Q8_0")}
    assert len(prints) == 1


def test_models_differ(tmp_path: Path) -> None:
    prints = [
        fingerprint_of(tiny_gguf(tmp_path, architecture, seed=seed, layers=layers))
        for architecture in ("qwen2", "llama") for seed in (0, 1) for layers in (2, 3)
    ]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize(
    "metadata", [{"tokenizer.ggml.tokens": ["x"] * 384}, {"qwen2.attention.head_count": 8}, {"general.architecture": "qwen3"}],
)
def test_what_it_covers(tmp_path: Path, metadata: dict[str, Any]) -> None:
    module = tiny_module()
    plain = fingerprint_of(write_gguf(module, tmp_path / "plain.gguf"))
    assert fingerprint_of(write_gguf(module, tmp_path / "changed.gguf", metadata=metadata)) != plain


def test_a_moved_norm_shows_and_a_new_chat_template_does_not(tmp_path: Path) -> None:
    module = tiny_module()
    plain = fingerprint_of(write_gguf(module, tmp_path / "plain.gguf"))
    assert fingerprint_of(write_gguf(module, tmp_path / "template.gguf", chat_template="{{ messages }}")) == plain
    module.model.norm.weight[3] += 1e-3
    assert fingerprint_of(write_gguf(module, tmp_path / "moved.gguf")) != plain
