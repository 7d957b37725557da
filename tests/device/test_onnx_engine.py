"""The ONNX engine against the transformers engine on the same weights, and folders that it must not run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_folders import change_json, chat_directory, onnx_folder
from small_models import CHAT_TEMPLATE, VOCABULARY, tiny_module

from trailmed.device.engine import Engine, Reply
from trailmed.device.onnx_engine import OnnxEngine, OnnxSettings
from trailmed.device.transformers_engine import TransformersEngine, TransformersSettings
from trailmed.errors import TrailmedError

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
pytest.importorskip("onnxruntime_genai")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

END = VOCABULARY - 1
QUESTIONS = (
    "How can I stop the bleeding?", "The boat lies", "What should I do if I am lost in the forest at night?", "Sure", "A long answer",
    "I am sorry, but", "open the window, then leave the room and call for help", "Stay", "keep warm", "Press on the wound with",
)
TOKENS = 14


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads are slower on matrices this small, and wait for each other where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Hugging Face directories whose answers run into several ends, by architecture."""

    @cache
    def directory(architecture: str) -> Path:
        module = tiny_module(architecture, seed=1, tie_word_embeddings=False)
        made = chat_directory(module, tmp_path_factory.mktemp("models") / architecture)
        change_json(made / "generation_config.json", eos_token_id=[END, *range(0, VOCABULARY, 9)])
        return made

    return directory


@pytest.fixture(scope="module")
def folders(directories: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The same models as ONNX Runtime GenAI's folders, by architecture and precision."""

    @cache
    def folder(architecture: str = "llama", precision: str = "fp32") -> Path:
        return onnx_folder(directories(architecture), tmp_path_factory.mktemp("onnx") / f"{architecture}-{precision}", precision)

    return folder


@pytest.fixture
def copied(folders: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of one's own to spoil."""
    return Path(shutil.copytree(folders(), tmp_path / "model"))


def settings(**changes: int) -> OnnxSettings:
    return OnnxSettings(**({"max_tokens": TOKENS, "slots": 4, "threads": 1} | changes))


def answers(engine: Engine, questions: Sequence[str] = QUESTIONS) -> list[Reply]:
    given: dict[int, Reply] = {}

    def note(index: int, reply: Reply) -> None:
        assert index not in given
        given[index] = reply

    with engine:
        engine.answer(questions, note)
    return [given[index] for index in range(len(questions))]


def ignore(_index: int, _reply: Reply) -> None:
    """A listener that does not care."""


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_agrees_with_transformers_on_the_same_weights(
    directories: Callable[[str], Path], folders: Callable[..., Path], architecture: str,
) -> None:
    expected = answers(TransformersEngine(
        directories(architecture), TransformersSettings(max_tokens=TOKENS, slots=4, threads=1, dtype="float32"),
    ))
    assert answers(OnnxEngine(folders(architecture), settings())) == expected
    assert len({(reply.tokens, reply.stopped) for reply in expected}) > (3 if architecture == "llama" else 1)


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_company_in_the_batch_changes_nothing(folders: Callable[..., Path], architecture: str) -> None:
    alone = answers(OnnxEngine(folders(architecture), settings(slots=1)))
    assert answers(OnnxEngine(folders(architecture), settings(slots=3))) == alone
    assert answers(OnnxEngine(folders(architecture), settings(slots=64))) == alone
    assert answers(OnnxEngine(folders(architecture), settings()), QUESTIONS[::-1]) == alone[::-1]


def test_one_at_a_time_where_padding_would_spoil_a_state(
    folders: Callable[..., Path], copied: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = json.loads((copied / "genai_config.json").read_text())
    config["model"]["decoder"]["sliding_window"] = {
        "window_size": 512, "slide_key_value_cache": False, "slide_inputs": False, "layers": [0, 1],
    }
    (copied / "genai_config.json").write_text(json.dumps(config))
    together: list[int] = []
    decode = OnnxEngine._decode
    monkeypatch.setattr(OnnxEngine, "_decode", lambda self, prompts, done: (together.append(len(prompts)), decode(self, prompts, done)))
    assert answers(OnnxEngine(copied, settings())) == answers(OnnxEngine(folders(), settings()))
    assert together == [1] * len(QUESTIONS) + [4, 4, 2]


def test_sampling_habits_of_the_folder_are_ignored(folders: Callable[..., Path], copied: Path) -> None:
    habits = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "no_repeat_ngram_size": 2, "min_length": 40, "num_beams": 2}
    change_json(copied / "genai_config.json", search=habits)
    assert answers(OnnxEngine(copied, settings())) == answers(OnnxEngine(folders(), settings()))


def test_identity(folders: Callable[..., Path]) -> None:
    identity = OnnxEngine(folders(), settings()).identity
    weights = (folders() / "model.onnx").read_bytes() + (folders() / "model.onnx.data").read_bytes()
    assert (identity.engine, identity.model, identity.edit_sha256, identity.type) == ("onnxruntime-genai", "llama-fp32", None, "F32")
    assert identity.sha256 == hashlib.sha256(weights).hexdigest()
    assert json.loads(json.dumps(identity.settings)) == {"max_tokens": TOKENS, "slots": 4, "threads": 1}


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_quantized_folders_answer_and_say_so(folders: Callable[..., Path], precision: str) -> None:
    engine = OnnxEngine(folders("llama", precision), settings())
    assert engine.identity.type == precision
    assert answers(engine) == answers(OnnxEngine(folders("llama", precision), settings(slots=1)))


def test_an_answer_goes_on_after_half_a_character(folders: Callable[..., Path]) -> None:
    texts = [reply.text for reply in answers(OnnxEngine(folders(), settings()))]
    assert any("�" in text.rstrip("�") for text in texts)


def test_nothing_is_printed_and_nothing_reported(folders: Callable[..., Path], copied: Path) -> None:
    (copied / "model.onnx").write_bytes((copied / "model.onnx").read_bytes().replace(b"GroupQueryAttention", b"GroupQueryAttentiox"))
    program = (
        "import os, sys; from pathlib import Path\n"
        "from trailmed.device.onnx_engine import OnnxEngine, OnnxSettings\n"
        "from trailmed.errors import TrailmedError\n"
        "with OnnxEngine(Path(sys.argv[1]), OnnxSettings(max_tokens=3, threads=1)) as engine:\n"
        "    engine.answer(['?', 'What?'], lambda *_: None)\n"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'\n"
        "try:\n    OnnxEngine(Path(sys.argv[2]))\n    raise SystemExit('loaded')\n"
        "except TrailmedError as error:\n    assert 'cannot load it' in str(error), error\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(folders()), str(copied)], capture_output=True, text=True, check=False, env=environment,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def _change(folder: Path, *where: str, **changes: Any) -> None:
    """Set names in the object at `where` in genai_config.json."""
    config = json.loads((folder / "genai_config.json").read_text())
    section = config
    for name in where:
        section = section.setdefault(name, {})
    section.update(changes)
    (folder / "genai_config.json").write_text(json.dumps(config))


def _session(folder: Path, **options: Any) -> None:
    _change(folder, "model", "decoder", "session_options", **options)


def _text(folder: Path, old: str, new: str) -> None:
    text = (folder / "genai_config.json").read_text()
    assert old in text
    (folder / "genai_config.json").write_text(text.replace(old, new, 1))


def _data_at(folder: Path, key: str, value: str, twice: bool = False) -> None:
    """Have model.onnx say something else of where one tensor's data is."""
    model = onnx.load_model(str(folder / "model.onnx"), load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    entry = tensor.external_data.add() if twice else next(entry for entry in tensor.external_data if entry.key == key)
    entry.key, entry.value = key, value
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def _constant_outside(folder: Path) -> None:
    """A constant inside a node's attribute, with its data elsewhere."""
    model = onnx.load_model(str(folder / "model.onnx"), load_external_data=False)
    node = model.graph.node.add(op_type="Constant", output=["unused"])
    tensor = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR).t
    tensor.data_type, tensor.data_location = onnx.TensorProto.FLOAT, onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/hostname")
    (folder / "model.onnx").write_bytes(model.SerializeToString())


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "genai_config.json").unlink(), "has no genai_config.json"),
    "broken config": (lambda d: (d / "genai_config.json").write_text("{"), "not valid JSON"),
    "config no UTF-8": (lambda d: (d / "genai_config.json").write_bytes(b'{"a": "\xff"}'), "not valid JSON"),
    "config too deep": (lambda d: (d / "genai_config.json").write_text("[" * 100_000), "not valid JSON"),
    "config a list": (lambda d: (d / "genai_config.json").write_text("[]"), "not a JSON object"),
    "config too large": (lambda d: (d / "genai_config.json").write_text(" " * (2 << 20)), "too large"),
    "a name twice": (lambda d: _text(d, '"decoder"', '"decoder": {}, "decoder"'), "occurs twice"),
    "no model section": (lambda d: change_json(d / "genai_config.json", model=None), "section 'model' is missing"),
    "decoder a text": (lambda d: _change(d, "model", decoder="x"), "section 'decoder' is missing or no object"),
    "engine section": (lambda d: _change(d, "engine", dynamic_batching={"block_size": 16}), "section 'engine'"),
    "a picture model": (lambda d: _change(d, "model", "vision", filename="vision.onnx"), "has model.'vision'"),
    "a pipeline": (lambda d: _change(d, "model", "decoder", pipeline=[{"stage": {"filename": "/x.onnx"}}]), "has decoder.'pipeline'"),
    "run options": (lambda d: _change(d, "model", "decoder", "run_options", x="y"), "has decoder.'run_options'"),
    "nested search": (lambda d: _change(d, "search", "deeper", x="y"), "has search.'deeper'"),
    "another file": (lambda d: _change(d, "model", "decoder", config_filename="x"), "decoder.'config_filename' names a file"),
    "library": (lambda d: _session(d, custom_ops_library="evil.so"), "session option 'custom_ops_library'"),
    "profiling": (lambda d: _session(d, enable_profiling="/tmp/profile"), "session option 'enable_profiling'"),
    "config entry": (lambda d: _session(d, **{"session.optimized_model_filepath": "/tmp/x"}), "session option 'session.optimized"),
    "for another device": (lambda d: _session(d, provider_options=[{"cuda": {}}]), "was built for cuda"),
    "providers no list": (lambda d: _session(d, provider_options="cuda"), "was built for another device"),
    "model outside": (lambda d: _change(d, "model", "decoder", filename="../model/model.onnx"), "not in its own folder"),
    "model absolute": (lambda d: _change(d, "model", "decoder", filename="/etc/hostname"), "not in its own folder"),
    "model on a drive": (lambda d: _change(d, "model", "decoder", filename="C:\\x.onnx"), "not in its own folder"),
    "model outside, the Windows way": (lambda d: _change(d, "model", "decoder", filename="..\\x.onnx"), "not in its own folder"),
    "model no text": (lambda d: _change(d, "model", "decoder", filename=7), "not in its own folder"),
    "model missing": (lambda d: (d / "model.onnx").unlink(), "model.onnx: no such file"),
    "no context": (lambda d: _change(d, "model", context_length=0), "context_length is 0"),
    "vocabulary a truth": (lambda d: _change(d, "model", vocab_size=True), "vocab_size is True"),
    "end a text": (lambda d: _change(d, "model", eos_token_id=["x"]), "eos_token_id is no whole number"),
    "unknown architecture": (lambda d: _change(d, "model", type="nobody-knows"), "cannot load it"),
    "no ONNX": (lambda d: (d / "model.onnx").write_bytes(b"\xff" * 99), "not an ONNX model"),
    "empty ONNX": (lambda d: (d / "model.onnx").write_bytes(b""), "cannot load it"),
    "data missing": (lambda d: (d / "model.onnx.data").unlink(), "model.onnx.data: no such file"),
    "data cut": (lambda d: os.truncate(d / "model.onnx.data", 1000), "cut short (1000 of"),
    "data outside": (lambda d: _data_at(d, "location", "../model/model.onnx.data"), "not in its own folder"),
    "data an address": (lambda d: _data_at(d, "location", "*/_ORT_MEM_ADDR_/*"), "no such file"),
    "data nowhere": (lambda d: _data_at(d, "offset", "x"), "says no number"),
    "data before the file": (lambda d: _data_at(d, "offset", "-64"), "says no number"),
    "data twice": (lambda d: _data_at(d, "location", "x", twice=True), "says twice"),
    "constant outside": (_constant_outside, "not in its own folder"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{}"), "not a tokenizer"),
    "no tokenizer config": (lambda d: (d / "tokenizer_config.json").unlink(), "cannot load it"),
    "no chat template": (lambda d: (d / "chat_template.jinja").unlink(), "has no chat template"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_refuses_what_it_must_not_run_in_one_line(copied: Path, case: str, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, message = SPOILED[case]
    spoil(copied)
    with pytest.raises(TrailmedError) as caught:
        OnnxEngine(copied, settings())
    line = str(caught.value)
    assert message in line
    assert str(copied) in line
    assert "\n" not in line
    assert len(line) < 600
    assert capfd.readouterr().out == ""


def test_refuses_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(TrailmedError, match=r"nowhere: no such folder"):
        OnnxEngine(tmp_path / "nowhere", settings())


def test_refuses_to_work_without_its_library(folders: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(TrailmedError, match=r"needs onnxruntime-genai .*; run `pip install trailmed\[onnx\]`"):
        OnnxEngine(folders(), settings())


def test_refuses_a_question_that_cannot_be_asked(folders: Callable[..., Path]) -> None:
    given: list[Reply] = []
    with OnnxEngine(folders(), settings()) as engine:
        for text in ("half a \ud83d", "a\0b"):
            with pytest.raises(TrailmedError, match="question 2 of 2 holds a NUL or half a character"):
                engine.answer(["fine", text], lambda _, reply: given.append(reply))
        with pytest.raises(TrailmedError, match=r"question 1 of 2 has \d+ tokens; with 14 .* context of 512; shorten it"):
            engine.answer(["very " * 300, "fine"], lambda _, reply: given.append(reply))
        assert not given
    with pytest.raises(TrailmedError, match="was closed"):
        engine.answer(["?"], ignore)


def test_refuses_a_prompt_that_ends_in_padding(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with OnnxEngine(copied, settings()) as engine, pytest.raises(TrailmedError, match="question 2 of 2 ends in the token for padding"):
        engine.answer(["Stay", "Stay!"], ignore)  # "!" is token 0


def test_refuses_a_template_that_renders_nothing_and_a_foreign_tokenizer(copied: Path) -> None:
    (copied / "chat_template.jinja").write_text("{{ '' }}")
    with OnnxEngine(copied, settings()) as engine, pytest.raises(TrailmedError, match="becomes no token at all"):
        engine.answer(["?"], ignore)
    (copied / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    _change(copied, "model", vocab_size=300)
    with OnnxEngine(copied, settings()) as engine, pytest.raises(TrailmedError, match="its tokenizer is another model's"):
        engine.answer(["?"], ignore)


def test_refuses_weights_that_are_not_numbers(copied: Path) -> None:
    size = (copied / "model.onnx.data").stat().st_size
    (copied / "model.onnx.data").write_bytes(b"\xff" * size)  # a float32 NaN, over and over
    with OnnxEngine(copied, settings()) as engine, pytest.raises(TrailmedError, match="logits are not numbers"):
        engine.answer(["?"], ignore)


def test_what_the_listener_raises_passes_through(folders: Callable[..., Path]) -> None:
    def broken(_index: int, _reply: Reply) -> None:
        raise RuntimeError("of the listener")

    with OnnxEngine(folders(), settings()) as engine, pytest.raises(RuntimeError, match="of the listener"):
        engine.answer(["?"], broken)


@pytest.mark.parametrize("name", ["max_tokens", "slots", "threads"])
def test_refuses_settings_out_of_range(name: str) -> None:
    with pytest.raises(TrailmedError, match=f"{name} is 0; it must be at least 1"):
        settings(**{name: 0})
