"""One float32 tensor and a JSON header in a safetensors file: the same content, the same bytes; nothing trusted on reading."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ValidationError

from ..errors import TrailmedError
from ..files import write_atomically

_MAX_HEADER_CHARACTERS = 1 << 20

Header = TypeVar("Header", bound=BaseModel)
Value = TypeVar("Value")


def write_tensor(path: Path, kind: str, tensor: torch.Tensor, header: BaseModel) -> None:
    """Write `tensor` (float32) under the name `kind`, with `header` as the one metadata entry `trailmed.KIND`.

    Raises `TrailmedError` when `path` cannot be written.
    """
    # A single metadata entry, because safetensors writes several in random order.
    text = json.dumps(header.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    content = safetensors.torch.save({kind: tensor.detach().cpu().contiguous()}, metadata={f"trailmed.{kind}": text})
    # Written by us and not by safetensors, whose error for a full disk is no OSError.
    with write_atomically(path) as scratch:
        scratch.write_bytes(content)


def read_tensor(path: Path, kind: str, header: type[Header], build: Callable[[torch.Tensor, Header], Value]) -> Value:
    """`build(tensor, header)` of what `write_tensor` wrote as `kind`.

    Raises `TrailmedError` when the file is missing, is no such safetensors file, or `build` raises ValueError.
    """
    if not path.is_file():
        raise TrailmedError(f"{path}: no such file; name a file of {kind}")
    try:
        return build(*_read(path, kind, header))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "header"
        raise TrailmedError(f"{path}: not a trailmed file of {kind} ({where}: {first['msg']}); make it anew") from None
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise TrailmedError(f"{path}: not a trailmed file of {kind}, or damaged ({reason}); make it anew") from None
    except OSError as error:
        raise TrailmedError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read(path: Path, kind: str, header: type[Header]) -> tuple[torch.Tensor, Header]:
    # safetensors allocates its header before it looks at the file's size, so that is compared here first.
    with path.open("rb") as source:
        prefix = source.read(8)
    if len(prefix) < 8 or struct.unpack("<Q", prefix)[0] > path.stat().st_size - 8:
        raise ValueError("truncated")
    with safetensors.safe_open(path, framework="pt") as opened:
        text = (opened.metadata() or {}).get(f"trailmed.{kind}")
        if text is None:
            raise ValueError("it has no header of that kind")
        if len(text) > _MAX_HEADER_CHARACTERS:
            raise ValueError(f"its header has {len(text)} characters")
        values = header.model_validate_json(text)
        if list(opened.keys()) != [kind]:
            raise ValueError(f"it holds other tensors than {kind!r}")
        stored = opened.get_slice(kind)
        if stored.get_dtype() != "F32" or 0 in stored.get_shape():
            raise ValueError(f"its tensor is {stored.get_dtype()} of shape {stored.get_shape()}")
        tensor: torch.Tensor = opened.get_tensor(kind)
    return tensor, values
