"""A GGUF's hyperparameters as the transformers config of the same model.

Keys and defaults are llama.cpp's (`llama-model.cpp`, `load_hparams`), so that an absent key means here what it means there.
What transformers' class cannot compute is refused, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import transformers
from huggingface_hub.errors import StrictDataclassError

from ..errors import TrailmedError
from .architecture import Architecture, Heads
from .gguf_file import GgufFile

_LARGEST_DIMENSION = 1 << 24
_NOT_COMPUTED = (
    "expert_count", "logit_scale", "embedding_scale", "residual_scale", "attention.scale", "attention.clamp_kqv",
    "attention.max_alibi_bias", "attn_logit_softcapping", "attention.temperature_scale", "embedding_length_per_layer_input",
)
"""Keys whose presence (with another value than 0) changes the computation in a way the supported classes do not know."""
_GEMMA_SLIDING_PERIOD = 6
_GEMMA_LOCAL_THETA = 10_000.0
_GEMMA_27B_LAYERS = 62
_ROPE_FREQUENCIES = "rope_freqs.weight"


class Hyperparameters:
    """Typed, checked access to the `ARCHITECTURE.*` keys of one file."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file = file
        self._prefix = architecture

    def value(self, key: str) -> Any:
        """The raw value, or None."""
        return self.file.metadata.get(f"{self._prefix}.{key}")

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; a list of equal ones (one per layer) counts as one."""
        value = self.value(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _LARGEST_DIMENSION:
            raise self.problem(key, value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number, float32 in the file; given back as the shortest decimal that means the same float32."""
        value = self.value(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
            raise self.problem(key, value)
        return float(str(np.float32(value)))

    def problem(self, key: str, value: object) -> TrailmedError:
        """The error for a key that is missing or has a value that cannot be."""
        what = "is missing" if value is None else f"has the value {str(value)[:40]!r}, which cannot be used"
        return TrailmedError(f"{self.file.path}: {self._prefix}.{key} {what}; use another GGUF of this model")


def heads_of(file: GgufFile, architecture: Architecture) -> Heads:
    """Query and key-value heads per layer. Raises `TrailmedError` when they are missing or do not divide."""
    hyperparameters = Hyperparameters(file, architecture.name)
    query = hyperparameters.count("attention.head_count")
    key_value = hyperparameters.count("attention.head_count_kv", default=query)
    if query % key_value:
        raise hyperparameters.problem("attention.head_count_kv", key_value)
    return Heads(query, key_value)


def hf_config(file: GgufFile, architecture: Architecture) -> Any:
    """The transformers config (a `PreTrainedConfig`) of the model in `file`.

    Raises `TrailmedError` for missing or impossible hyperparameters, and for features the transformers class does not have.
    """
    read = Hyperparameters(file, architecture.name)
    for key in _NOT_COMPUTED:
        if read.value(key):
            raise TrailmedError(f"{file.path}: {architecture.name}.{key} is not supported; use a model without it")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise TrailmedError(f"{file.path}: has no token_embd.weight matrix; use a GGUF of a whole model")
    heads = heads_of(file, architecture)
    hidden = read.count("embedding_length")
    head_dim = read.count("attention.key_length", default=max(hidden // heads.query, 1))
    if head_dim % 2 or read.count("attention.value_length", default=head_dim) != head_dim:
        raise read.problem("attention.value_length", read.value("attention.value_length"))
    if read.count("rope.dimension_count", default=head_dim) != head_dim:
        raise read.problem("rope.dimension_count", read.value("rope.dimension_count"))
    layers = read.count("block_count")
    if layers > len(file.tensors):
        raise read.problem("block_count", layers)
    values = {
        "vocab_size": embedding.shape[0], "hidden_size": hidden, "num_hidden_layers": layers,
        "intermediate_size": read.count("feed_forward_length"),
        "num_attention_heads": heads.query, "num_key_value_heads": heads.key_value, "head_dim": head_dim,
        "max_position_embeddings": read.count("context_length"),
        "rms_norm_eps": read.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_parameters": _rope(read, head_dim),
        **_special_tokens(file.metadata, embedding.shape[0]),
    }
    try:
        return _BUILDERS[architecture.name](read, values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TrailmedError(f"{file.path}: its hyperparameters make no {architecture.name} model ({reason}); use another GGUF") from error


def _qwen2(_: Hyperparameters, values: dict[str, Any]) -> Any:
    if values["head_dim"] * values["num_attention_heads"] == values["hidden_size"]:
        del values["head_dim"]  # transformers derives it, and its own Qwen2 configs do not carry it
    return transformers.Qwen2Config(**values, use_sliding_window=False)


def _qwen3(read: Hyperparameters, values: dict[str, Any]) -> Any:
    return transformers.Qwen3Config(**values, use_sliding_window=False, attention_bias="blk.0.attn_q.bias" in read.file.tensors)


def _llama(read: Hyperparameters, values: dict[str, Any]) -> Any:
    tensors = read.file.tensors
    return transformers.LlamaConfig(**values, attention_bias="blk.0.attn_q.bias" in tensors, mlp_bias="blk.0.ffn_down.bias" in tensors)


def _gemma3(read: Hyperparameters, values: dict[str, Any]) -> Any:
    layers, head_dim = values["num_hidden_layers"], values["head_dim"]
    sliding = _sliding_layers(read, layers)
    local_theta = read.number("rope.freq_base_swa", default=_GEMMA_LOCAL_THETA)
    values["rope_parameters"] = {
        "full_attention": values["rope_parameters"], "sliding_attention": {"rope_type": "default", "rope_theta": local_theta},
    }
    softcap = read.value("final_logit_softcapping")
    return transformers.Gemma3TextConfig(
        **values,
        layer_types=["sliding_attention" if is_sliding else "full_attention" for is_sliding in sliding],
        sliding_window=read.count("attention.sliding_window") if any(sliding) else None,
        # llama.cpp scales by the width of a head, except in the 27B model, which it knows by its depth
        query_pre_attn_scalar=values["hidden_size"] // values["num_attention_heads"] if layers == _GEMMA_27B_LAYERS else head_dim,
        final_logit_softcapping=read.number("final_logit_softcapping") if softcap else None,
    )


_BUILDERS: Mapping[str, Callable[[Hyperparameters, dict[str, Any]], Any]] = {
    "qwen2": _qwen2, "qwen3": _qwen3, "llama": _llama, "gemma3": _gemma3,
}


def _sliding_layers(read: Hyperparameters, layers: int) -> list[bool]:
    """Per layer, whether it attends to a sliding window only."""
    if not read.value("attention.sliding_window"):
        return [False] * layers
    pattern = read.value("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) < layers:
            raise read.problem("attention.sliding_window_pattern", pattern)
        return [bool(is_sliding) for is_sliding in pattern[:layers]]
    period = read.count("attention.sliding_window_pattern", default=_GEMMA_SLIDING_PERIOD)
    return [index % period < period - 1 for index in range(layers)]


def _rope(read: Hyperparameters, head_dim: int) -> dict[str, Any]:
    """Rotary embedding: θ and scaling (linear, YaRN, or Llama 3's, which GGUF stores as a tensor of divisors)."""
    theta = read.number("rope.freq_base", default=10_000.0)
    plain = {"rope_type": "default", "rope_theta": theta}
    kind = read.value("rope.scaling.type") or "linear"
    factor_key = "rope.scaling.factor" if read.value("rope.scaling.factor") is not None else "rope.scale_linear"
    factor = read.number(factor_key, default=1.0)
    if _ROPE_FREQUENCIES in read.file.tensors:
        return _llama3_rope(read, theta, head_dim)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return plain
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        return {
            "rope_type": "yarn", "rope_theta": theta, "factor": factor,
            "original_max_position_embeddings": read.count("rope.scaling.original_context_length", default=read.count("context_length")),
        }
    raise read.problem("rope.scaling.type", kind)


def _llama3_rope(read: Hyperparameters, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's rotary scaling, recognised from its divisors, float32 [head_dim / 2].

    The converter writes only the divisors; the four numbers they came from are the published ones (low 1, high 4, original context
    8192) with the factor being the largest divisor. If those do not give the same divisors, the file is refused.
    """
    file = read.file
    info = file.tensors[_ROPE_FREQUENCIES]
    if info.shape != (head_dim // 2,):
        raise TrailmedError(f"{file.path}: {_ROPE_FREQUENCIES} has the shape {list(info.shape)}; use another GGUF of this model")
    divisors = file.dequantize(_ROPE_FREQUENCIES).astype(np.float64)
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    if not np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise TrailmedError(f"{file.path}: {_ROPE_FREQUENCIES} holds a rotary scaling that is not Llama 3's; use another model")
    return {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _special_tokens(metadata: Mapping[str, Any], vocabulary: int) -> dict[str, int | None]:
    """BOS, EOS and padding ids, None where the file names none inside its vocabulary."""
    ids: dict[str, int | None] = {}
    for name, key in (("bos_token_id", "bos_token_id"), ("eos_token_id", "eos_token_id"), ("pad_token_id", "padding_token_id")):
        value = metadata.get(f"tokenizer.ggml.{key}")
        ids[name] = value if isinstance(value, int) and 0 <= value < vocabulary else None
    return ids
