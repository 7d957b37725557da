"""What a folder of ONNX Runtime GenAI's says, and whether it may be run: nothing of it is believed before it is checked.

Such a folder is a stranger's, and its configuration is powerful: it can have a shared library loaded (`custom_ops_library`), files
written (`enable_profiling`), and files read from anywhere. So genai_config.json is let through only if it says no more than GenAI's
model builder writes for a text model on the CPU; the model's own references to files are checked as well.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import ModuleType
from typing import Any

from ..errors import TrailmedError

_CONFIG = "genai_config.json"
_LARGEST_CONFIG = 1 << 20
_INSTALL = "run `pip install trailmed[onnx]`"
BUILD = "build the folder with `python -m onnxruntime_genai.models.builder -e cpu`"
_SECTIONS = ("model", "search")
_DECODER_SECTIONS = ("inputs", "outputs", "session_options", "sliding_window")
_EXTERNAL = 1  # onnx.TensorProto.EXTERNAL
_SESSION_OPTIONS = (
    "log_id", "log_severity_level", "log_verbosity_level", "intra_op_num_threads", "inter_op_num_threads", "enable_cpu_mem_arena",
    "enable_mem_pattern", "graph_optimization_level", "provider_options",
)
"""Those that neither read nor write a file nor load a library; what they say of threads and logs is overridden."""
_ATTENTION_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "past_key_names", "past_value_names"})
_FILE_LIKE = re.compile(r"file|path|folder|director|librar")
_WEIGHT_INPUT = {"MatMul": 1, "Gemm": 1, "FusedMatMul": 1, "MatMulInteger": 1, "DynamicQuantizeMatMul": 1, "DequantizeLinear": 0}
"""Operators that multiply by a weight, or spell one out, and which of their inputs it is."""
_TYPES = {
    "FLOAT": "F32", "FLOAT16": "F16", "BFLOAT16": "BF16", "INT8": "int8", "UINT8": "int8", "INT4": "int4", "UINT4": "int4",
}


@dataclass(frozen=True, slots=True)
class GenaiConfig:
    """What genai_config.json says. `padded`: several prompts of unlike length may be answered together."""

    model_file: Path
    context_length: int
    vocabulary_size: int
    end_ids: frozenset[int]
    padded: bool


def genai_config(folder: Path) -> GenaiConfig:
    """What genai_config.json in `folder` says; raises `TrailmedError` if it says more than a text model on the CPU needs."""
    path = folder / _CONFIG
    whole = _read_config(path)
    for name in whole:
        if name not in _SECTIONS:
            raise TrailmedError(f"{path}: has a section {name[:80]!r}, which a text model on the CPU does not need; {BUILD}")
    model = _section(whole, "model", path)
    decoder = _section(model, "decoder", path)
    _check_entries(model, "model", ("decoder",), path)
    _check_entries({name: value for name, value in decoder.items() if name != "filename"}, "decoder", _DECODER_SECTIONS, path)
    for name in _DECODER_SECTIONS:
        if name != "session_options" and name in decoder:
            _check_entries(_section(decoder, name, path), name, (), path)
    _check_entries(_section(whole, "search", path) if "search" in whole else {}, "search", (), path)
    _check_session_options(_section(decoder, "session_options", path) if "session_options" in decoder else {}, path)
    file = folder / _local_name(decoder.get("filename"), path)
    if not file.is_file():
        raise TrailmedError(f"{file}: no such file, though {_CONFIG} names it; {BUILD}")
    ends = model.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    if not all(type(token) is int for token in ends):
        raise TrailmedError(f"{path}: model.eos_token_id is no whole number nor a list of them; {BUILD}")
    inputs = decoder.get("inputs", {})
    return GenaiConfig(
        model_file=file, context_length=_positive(model, "context_length", path), vocabulary_size=_positive(model, "vocab_size", path),
        end_ids=frozenset(ends), padded=_ATTENTION_INPUTS.issuperset(inputs) and "sliding_window" not in decoder,
    )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise TrailmedError(f"{path.parent}: no such folder; name one made by ONNX Runtime GenAI's model builder")
    if not path.is_file():
        raise TrailmedError(f"{path.parent}: has no {_CONFIG}; {BUILD}")
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise TrailmedError(f"{path}: too large for a configuration ({path.stat().st_size} bytes); {BUILD}")
        value = json.loads(path.read_bytes(), object_pairs_hook=_unambiguous)
    except (ValueError, RecursionError) as error:
        raise TrailmedError(f"{path}: not valid JSON ({one_line(error)}); {BUILD}") from error
    except OSError as error:
        raise TrailmedError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not isinstance(value, dict):
        raise TrailmedError(f"{path}: not a JSON object; {BUILD}")
    return value


def _unambiguous(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated names: of two, GenAI heeds both, and we should see only the last."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"a name occurs twice in one object, of {', '.join(sorted(result))}")
    return result


def _section(parent: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    section = parent.get(name)
    if not isinstance(section, dict):
        raise TrailmedError(f"{path}: its section {name!r} is missing or no object; {BUILD}")
    return section


def _check_entries(section: Mapping[str, Any], where: str, nested: Sequence[str], path: Path) -> None:
    """Numbers, texts and lists of them only, but for the sections `nested`, and nothing that could name a file."""
    for name, value in section.items():
        if name in nested:
            continue
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict | list) for item in value)):
            raise TrailmedError(f"{path}: has {where}.{name[:80]!r}, which is no part of a plain text model; build it as text only")
        if _FILE_LIKE.search(name.lower()):
            raise TrailmedError(f"{path}: {where}.{name[:80]!r} names a file that a text model on the CPU does not need; {BUILD}")


def _check_session_options(options: Mapping[str, Any], path: Path) -> None:
    for name in options:
        if name not in _SESSION_OPTIONS:
            raise TrailmedError(f"{path}: sets the session option {name[:80]!r}, which trailmed does not let a model set; {BUILD}")
    providers = options.get("provider_options", [])
    if providers:
        names = [name for entry in providers if isinstance(entry, dict) for name in entry] if isinstance(providers, list) else []
        raise TrailmedError(f"{path}: was built for {', '.join(names)[:80] or 'another device'}, not for the CPU; {BUILD}")


def _positive(model: Mapping[str, Any], name: str, path: Path) -> int:
    value = model.get(name)
    if type(value) is not int or value < 1:
        raise TrailmedError(f"{path}: model.{name} is {str(value)[:80]}, not a whole number above 0; {BUILD}")
    return value


def _local_name(name: Any, path: Path) -> str:
    """`name` if it is that of a file in the folder of `path` or below, without looking at the disk."""
    good = isinstance(name, str) and name not in ("", ".") and "\0" not in name
    if good:
        windows = PureWindowsPath(name)
        good = not windows.anchor and not PurePosixPath(name).is_absolute() and ".." not in windows.parts
    if not good:
        raise TrailmedError(f"{path}: names the file {str(name)[:200]!r}, which is not in its own folder; {BUILD}")
    return str(name)


def parsed_model(path: Path) -> Any:
    """The `onnx.ModelProto` in `path`, external data left where it is."""
    onnx = imported("onnx")
    try:
        return onnx.load_model(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors share no base but this
        raise TrailmedError(f"{path}: not an ONNX model ({one_line(error)}); {BUILD}") from error


def data_files(model: Any, path: Path) -> list[Path]:
    """The files with the weights of `model`, which was read from `path`, by name; each lies beside it and is long enough."""
    ends: dict[str, int] = {}
    for tensor in _tensors(model):
        if tensor.data_location != _EXTERNAL and not tensor.external_data:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if len(entries) < len(tensor.external_data):
            raise TrailmedError(f"{path}: says twice where the data of {tensor.name[:80]!r} is; {BUILD}")
        location = _local_name(entries.get("location"), path)
        extent = [entries.get(name, "0") for name in ("offset", "length")]
        if not all(re.fullmatch(r"[0-9]{1,18}", number) for number in extent):
            raise TrailmedError(f"{path}: says no number where the data of {tensor.name[:80]!r} is; {BUILD}")
        ends[location] = max(sum(map(int, extent)), ends.get(location, 0))
    files = []
    for name, end in sorted(ends.items()):
        file = path.parent / name
        if not file.is_file():
            raise TrailmedError(f"{file}: no such file, though {path.name} has its weights there; copy the whole folder")
        if file.stat().st_size < end:
            raise TrailmedError(f"{file}: cut short ({file.stat().st_size} of {end} bytes); copy the whole folder again")
        files.append(file)
    return files


def _tensors(message: Any) -> Iterator[Any]:
    """Every `onnx.TensorProto` anywhere in a protobuf message: initializers, constants, those of subgraphs and functions."""
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        for child in (value,) if hasattr(value, "ListFields") else value:
            if descriptor.message_type.name == "TensorProto":
                yield child
            else:
                yield from _tensors(child)


def weight_type(model: Any) -> str:
    """The type of most of the elements that the model's own graph multiplies by; mixtures of experts are not counted."""
    data_type = imported("onnx").TensorProto.DataType
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    elements: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":  # com.microsoft; B is packed into bytes
            sizes = {attribute.name: attribute.i for attribute in node.attribute}
            elements[f"int{sizes.get('bits', 4)}"] += sizes.get("K", 0) * sizes.get("N", 0)
            continue
        place = _WEIGHT_INPUT.get(node.op_type)
        weight = weights.get(node.input[place]) if place is not None and place < len(node.input) else None
        if weight is not None:
            name = data_type.Name(weight.data_type) if weight.data_type in data_type.values() else ""
            elements[_TYPES.get(name, "unknown")] += prod(weight.dims)
    return max(elements, key=lambda name: elements[name], default="unknown")


def imported(name: str) -> ModuleType:
    """A module of the extra `onnx`; raises `TrailmedError` when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TrailmedError(f"the ONNX engine needs {name.replace('_', '-')} ({one_line(error)}); {_INSTALL}") from error


def one_line(error: BaseException) -> str:
    """What `error` says, on one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
