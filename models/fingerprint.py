"""Which model is in a GGUF, whatever its quantization."""

from __future__ import annotations

import hashlib
from typing import Any

from .gguf_file import GgufFile

_HYPERPARAMETERS = (
    "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
    "attention.key_length", "attention.value_length", "expert_count",
)
"""The keys that give the tensors their shapes; the others (context length, rope settings, …) depend on the converter's age."""


def fingerprint(file: GgufFile) -> str:
    """Hex sha256 over the architecture, the hyperparameters that shape the tensors, the token list, and all norm and bias vectors.

    llama.cpp stores vectors as float32 under every quantization, and training moves them, so the Q4_K_M, F16 and Q8_0 files
    of one model share a fingerprint and separately trained models do not. Raises `TrailmedError` if a vector cannot be decoded.
    """
    digest = hashlib.sha256()

    def add(label: str, content: bytes) -> None:
        for part in (label.encode("utf-8", "surrogateescape"), content):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)

    architecture = str(file.metadata.get("general.architecture", ""))
    add("architecture", architecture.encode())
    for key in _HYPERPARAMETERS:
        value = file.metadata.get(f"{architecture}.{key}")
        if value is not None:
            add(key, repr(value).encode())
    add("tokens", _length_prefixed(file.metadata.get("tokenizer.ggml.tokens")))
    for name in sorted(file.tensors):
        if len(file.tensors[name].shape) == 1 and ("norm" in name or name.endswith(".bias")):
            add(name, file.dequantize(name).astype("<f4").tobytes())
    return digest.hexdigest()


def _length_prefixed(tokens: Any) -> bytes:
    if not isinstance(tokens, list):
        return b""
    encoded = [str(token).encode("utf-8", "surrogateescape") for token in tokens]
    return b"".join(len(token).to_bytes(4, "little") + token for token in encoded)
