"""Writing a GGUF that repeats another one: its metadata verbatim but for some keys, its tensors piece by piece.

gguf-py's writer re-encodes every value and wants whole tensors; here bytes are carried over and only a piece is in memory.
The format is that of `ggml/include/gguf.h`; see `models.gguf_file` for the reader.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ..models.gguf_file import HEADER_BYTES, MAGIC, GgufFile, padded
from ..progress import Advance

_WRITTEN_AT_ONCE = 1 << 24


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written: `shape` in NumPy order ([d_out, d_in])."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        """Size of its values in the file, without padding."""
        block_values, block_bytes = GGML_QUANT_SIZES[self.type]
        return prod(self.shape) // int(block_values) * int(block_bytes)


@dataclass(frozen=True, slots=True)
class Layout:
    """A GGUF before its data: `head` is everything up to the first tensor, `nbytes` the size of the whole file."""

    head: bytes
    tensors: tuple[OutputTensor, ...]
    alignment: int
    nbytes: int


def layout_like(source: GgufFile, changes: Mapping[str, str | int], tensors: Sequence[OutputTensor]) -> Layout:
    """The layout of a file with `source`'s version, alignment and metadata, and these tensors in this order.

    `changes` sets keys, in place where `source` has them, else at the end: a str as a string, an int as uint32.
    """
    pairs = [_pair(key, changes[key]) if key in changes else source.field_bytes(key) for key in source.fields]
    pairs += [_pair(key, value) for key, value in changes.items() if key not in source.fields]
    infos = []
    offset = 0
    for tensor in tensors:
        name = tensor.name.encode("utf-8")
        dimensions = tuple(reversed(tensor.shape))
        form = f"<Q{len(name)}sI{len(dimensions)}QIQ"
        infos.append(struct.pack(form, len(name), name, len(dimensions), *dimensions, tensor.type, offset))
        offset += padded(tensor.nbytes, source.alignment)
    body = b"".join((*pairs, *infos))
    head = struct.pack("<4sIQQ", MAGIC, source.version, len(tensors), len(pairs)) + body
    head += bytes(padded(HEADER_BYTES + len(body), source.alignment) - len(head))
    return Layout(head, tuple(tensors), source.alignment, len(head) + offset)


def write_gguf(path: Path, layout: Layout, pieces: Callable[[str], Iterable[npt.NDArray[np.uint8]]], progress: Advance) -> None:
    """Write the file: `pieces(name)` yields a tensor's bytes in order; `progress` is called with the bytes written.

    Raises OSError as the system does, and RuntimeError when a tensor's pieces are not as long as the layout says.
    """
    with path.open("wb") as target:
        target.write(layout.head)
        for tensor in layout.tensors:
            written = 0
            for piece in pieces(tensor.name):
                flat = piece.reshape(-1)
                for start in range(0, flat.size, _WRITTEN_AT_ONCE):
                    part = flat[start : start + _WRITTEN_AT_ONCE]
                    target.write(part.data)
                    progress(part.size)
                written += flat.size
            if written != tensor.nbytes:
                raise RuntimeError(f"{tensor.name}: {written} bytes came for the {tensor.nbytes} planned")
            target.write(bytes(padded(written, layout.alignment) - written))


def _pair(key: str, value: str | int) -> bytes:
    if isinstance(value, str):
        return _text(key) + _number(GGUFValueType.STRING) + _text(value)
    return _text(key) + _number(GGUFValueType.UINT32) + _number(value)


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return struct.pack("<Q", len(encoded)) + encoded


def _number(value: Any) -> bytes:
    return struct.pack("<I", int(value))
