"""A GGUF as a PyTorch module of the right transformers class, with the tokenizer and chat template of the same file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging as transformers_logging

from ..errors import TrailmedError
from ..progress import Advance, no_progress
from .architecture import Architecture, architecture_of
from .chat_template import ChatTemplate
from .gguf_file import GgufFile
from .hf_config import heads_of, hf_config
from .tokenizer import Tokenizer

_DEQUANTIZING_THREADS = 2
_WITHOUT_COUNTERPART = frozenset({"rope_freqs.weight"})
"""GGUF tensors that have no place in the module because the config says the same."""
_NAMED_AT_MOST = 4


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run in PyTorch: `module` is a `PreTrainedModel` in eval mode whose parameters want no gradient."""

    module: Any
    tokenizer: Tokenizer
    template: ChatTemplate
    architecture: Architecture
    path: Path


def load_model(path: Path, *, dtype: torch.dtype = torch.float32, progress: Advance = no_progress) -> LoadedModel:
    """Load the GGUF at `path` with every weight dequantized to `dtype`; `progress` is called once per tensor.

    Nothing is allocated before every tensor's name and shape has been checked against the transformers class. Peak memory is one
    model in `dtype` plus the two largest tensors in float32.

    Raises `TrailmedError` when the file is missing or broken, its architecture is not supported, or its tensors are not exactly the
    architecture's. A missing chat template raises only when a prompt is asked of `template`.
    """
    path = Path(path)
    with GgufFile.open(path) as file:
        architecture = architecture_of(file)
        config = hf_config(file, architecture)
        module_class = getattr(transformers, architecture.hf_class)
        _check_tensors(file, architecture, _expected_shapes(module_class, config))
        tokenizer = Tokenizer(path)
        weights = _weights(file, architecture, dtype, progress)
        template_source = file.metadata.get("tokenizer.chat_template")
    with _no_transformers_progress():
        # Given tensors of the final dtype, from_pretrained adopts them without a copy and builds the buffers (rotary frequencies).
        module = module_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, attn_implementation="sdpa")
    module.requires_grad_(False).eval()
    template = ChatTemplate(
        template_source if isinstance(template_source, str) else None,
        origin=str(path), bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
    )
    return LoadedModel(module, tokenizer, template, architecture, path)


def _expected_shapes(module_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor the module needs, a tied output matrix left out."""
    with torch.device("meta"):
        skeleton = module_class(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _check_tensors(file: GgufFile, architecture: Architecture, expected: Mapping[str, tuple[int, ...]]) -> None:
    unexpected = []
    found: dict[str, tuple[int, ...]] = {}
    for name, info in file.tensors.items():
        hf_name = architecture.to_hf(name)
        if hf_name is not None and hf_name in expected:
            found[hf_name] = info.shape
        elif name not in _WITHOUT_COUNTERPART:
            unexpected.append(name)
    missing = [architecture.to_gguf(name) for name in expected if name not in found]
    if missing:
        raise TrailmedError(f"{file.path}: tensors are missing ({_some(missing)}); use a GGUF of a whole {architecture.name} model")
    if unexpected:
        raise TrailmedError(f"{file.path}: has tensors no {architecture.name} model has ({_some(unexpected)}); use another GGUF")
    for hf_name, shape in expected.items():
        if found[hf_name] != shape:
            raise TrailmedError(
                f"{file.path}: {architecture.to_gguf(hf_name)} has the shape {list(found[hf_name])}, its hyperparameters say "
                f"{list(shape)}; use another GGUF"
            )


def _weights(file: GgufFile, architecture: Architecture, dtype: torch.dtype, progress: Advance) -> dict[str, torch.Tensor]:
    """Every tensor of the module under its `state_dict()` name."""
    heads = heads_of(file, architecture)

    def read(name: str) -> torch.Tensor:
        values = architecture.to_hf_values(name, file.dequantize(name), heads)
        file.forget(name)
        return torch.from_numpy(values).to(dtype)

    names = [name for name in file.tensors if name not in _WITHOUT_COUNTERPART]
    weights = {}
    # NumPy lets go of the interpreter lock while it decodes
    with ThreadPoolExecutor(_DEQUANTIZING_THREADS) as threads:
        for name, tensor in zip(names, threads.map(read, names), strict=True):
            weights[str(architecture.to_hf(name))] = tensor
            progress(1)
    return weights


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    rest = len(listed) - _NAMED_AT_MOST
    return ", ".join(listed[:_NAMED_AT_MOST]) + (f" and {rest} more" if rest > 0 else "")


@contextmanager
def _no_transformers_progress() -> Iterator[None]:
    """transformers draws its own bar; we have ours."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()
