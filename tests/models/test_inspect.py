"""What `trailmed models show` knows of a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from small_models import tiny_gguf, tiny_module, write_gguf

from trailmed.errors import TrailmedError
from trailmed.models.inspect import summarise_model


def test_the_facts_of_a_small_model(tmp_path: Path) -> None:
    module = tiny_module("qwen2")
    path = write_gguf(module, tmp_path / "m.gguf", type="Q8_0", metadata={"general.license": "mit"})
    summary = summarise_model(path)
    matrices = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)
    vectors = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 1)
    assert summary.quantization == {"Q8_0": matrices, "F32": vectors}
    assert summary.parameters == matrices + vectors
    assert (summary.architecture, summary.supported, summary.name) == ("qwen2", True, "tiny qwen2")
    assert (summary.layers, summary.hidden_size, summary.context_length) == (2, 64, 512)
    assert summary.has_chat_template
    assert summary.licence == "mit"
    assert summary.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert summary.size == path.stat().st_size
    printed = dict(summary.rows())
    assert printed["quantization"].startswith("Q8_0 9")
    assert printed["context"] == "512 tokens"
    assert printed["chat template"] == "yes"


def test_what_the_file_does_not_say_is_not_made_up(tmp_path: Path) -> None:
    metadata = {"general.architecture": "mamba", "general.name": "a\x1b[31m\nb"}
    path = write_gguf(tiny_module("llama"), tmp_path / "m.gguf", chat_template=False, metadata=metadata)
    summary = summarise_model(path)
    assert (summary.supported, summary.layers, summary.licence, summary.has_chat_template) == (False, None, None, False)
    assert summary.name == "a [31m b"  # nothing of a stranger's reaches the terminal as a command
    assert dict(summary.rows())["architecture"] == "mamba (can be evaluated, not edited)"
    assert dict(summary.rows())["licence"] == "not given"


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(TrailmedError, match="truncated or damaged"):
        summarise_model(path)
