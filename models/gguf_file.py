"""Reading GGUF files, which come from strangers: everything is checked when the file is opened.

The format is llama.cpp's (`ggml/include/gguf.h`; versions 2 and 3, little endian): magic, version, two counts, the
key-value section, the tensor descriptions, padding, and the tensors' bytes one after the other. The checks are those of
llama.cpp's own reader plus limits on counts, so that no number in a file makes us allocate more than the file could fill.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize

from ..errors import TrailmedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
KEY_ALIGNMENT = "general.alignment"
KEY_SPLIT_COUNT = "split.count"
HEADER_BYTES = 24
"""Magic (4 bytes), version (4), tensor count (8), key count (8)."""

MAX_METADATA_BYTES = 1 << 27
MAX_ARRAY_ELEMENTS = 1 << 24
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_KEY_BYTES = (1 << 16) - 1
MAX_TENSOR_NAME_BYTES = 63
"""GGML_MAX_NAME less the terminating zero: llama.cpp refuses longer names."""
MAX_DIMENSIONS = 4
_DECODED_AT_ONCE = 1 << 16
"""Values decoded per call of gguf-py: its temporaries then stay in the processor's cache (5 times faster than whole tensors)."""

_SCALARS: dict[GGUFValueType, struct.Struct] = {
    GGUFValueType.UINT8: struct.Struct("<B"), GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"), GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"), GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.UINT64: struct.Struct("<Q"), GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT32: struct.Struct("<f"), GGUFValueType.FLOAT64: struct.Struct("<d"),
    GGUFValueType.BOOL: struct.Struct("<B"),
}
_U32 = _SCALARS[GGUFValueType.UINT32]
_U64 = _SCALARS[GGUFValueType.UINT64]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `shape` is in NumPy order ([d_out, d_in]); `offset` counts from the start of the file, in bytes."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Field:
    """Where one key-value pair lies: file[start:stop] is the key's length, the key, the type and the value, verbatim."""

    type: GGUFValueType
    start: int
    stop: int


class _DamageError(Exception):
    """What is wrong with the file, before its name is put in front."""


class _Cursor:
    """Reads forward through the mapped file; every read is checked against its end first."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data = data
        self.size = len(data)
        self.position = position

    def take(self, size: int, what: str) -> int:
        """Step over `size` bytes; returns where they start."""
        start = self.position
        if size > self.size - start:
            raise _DamageError(f"truncated or damaged ({what} would end behind the end of the file)")
        self.position = start + size
        return start

    def scalar(self, kind: struct.Struct, what: str) -> Any:
        return kind.unpack_from(self.data, self.take(kind.size, what))[0]

    def text(self, limit: int, what: str) -> str:
        length = self.scalar(_U64, what)
        if length > limit:
            raise _DamageError(f"damaged ({what} is {length} bytes long; at most {limit} are possible)")
        start = self.take(length, what)
        try:
            return self.data[start : self.position].decode("utf-8")
        except UnicodeDecodeError:
            raise _DamageError(f"damaged ({what} is not UTF-8)") from None

    def name(self, limit: int, what: str) -> str:
        """A string that will be shown to people, so it must not move their cursor."""
        name = self.text(limit, what)
        if not name.isprintable():
            raise _DamageError(f"damaged ({what} is not printable)")
        return name

    def texts(self, count: int, what: str) -> list[str]:
        """`count` strings. Tokens of byte-level vocabularies may be no UTF-8: their stray bytes become surrogate escapes."""
        data, position, size, unpack = self.data, self.position, self.size, _U64.unpack_from
        result = []
        for _ in range(count):
            if size - position < 8:
                raise _DamageError(f"truncated or damaged ({what} would end behind the end of the file)")
            start = position + 8
            position = start + unpack(data, position)[0]
            if position > size:
                raise _DamageError(f"truncated or damaged ({what} would end behind the end of the file)")
            result.append(data[start:position].decode("utf-8", "surrogateescape"))
        self.position = position
        return result

    def value(self, kind: GGUFValueType, what: str) -> Any:
        if kind is GGUFValueType.STRING:
            return self.text(MAX_METADATA_BYTES, what)
        if kind is GGUFValueType.ARRAY:
            return self.array(what)
        value = self.scalar(_SCALARS[kind], what)
        return bool(value) if kind is GGUFValueType.BOOL else value

    def array(self, what: str) -> list[Any]:
        kind = self.value_type(what)
        count = self.scalar(_U64, what)
        if kind is GGUFValueType.ARRAY:
            raise _DamageError(f"damaged ({what} is an array of arrays, which GGUF readers do not allow)")
        if count > MAX_ARRAY_ELEMENTS:
            raise _DamageError(f"damaged ({what} claims {count} elements)")
        if kind is GGUFValueType.STRING:
            return self.texts(count, what)
        form = _SCALARS[kind]
        start = self.take(count * form.size, what)
        values = np.frombuffer(self.data[start : self.position], dtype=np.dtype(form.format))
        return cast(list[Any], (values != 0 if kind is GGUFValueType.BOOL else values).tolist())

    def value_type(self, what: str) -> GGUFValueType:
        code = self.scalar(_U32, what)
        try:
            return GGUFValueType(code)
        except ValueError:
            raise _DamageError(f"damaged ({what} has the unknown type {code})") from None


class GgufFile:
    """A GGUF file, opened read-only through a memory map and wholly validated. Use it as a context manager.

    `metadata` maps keys to str, int, float, bool or lists of them; `fields` says where each pair lies, so that a writer can
    carry it over verbatim; `tensors` is in file order.
    """

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self._map = data
        cursor = _Cursor(data, HEADER_BYTES)
        self.version, tensor_count, key_count = _header(data)
        self.metadata, self.fields = _read_metadata(cursor, key_count)
        self._metadata_stop = cursor.position
        self.alignment = _alignment(self.metadata, self.fields)
        self.tensors = _read_tensors(cursor, tensor_count, self.alignment)
        self._bytes: npt.NDArray[np.uint8] = np.frombuffer(data, dtype=np.uint8)

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Open and validate `path`.

        Raises `TrailmedError` when the file is missing, no GGUF, truncated, one part of a split model, or carries impossible
        counts, offsets, alignment, types, or the same name twice.
        """
        path = Path(path)
        if not path.exists():
            raise TrailmedError(f"{path}: no such file")
        if not path.is_file():
            raise TrailmedError(f"{path}: not a file; name a GGUF file")
        try:
            with path.open("rb") as source:
                if source.read(len(MAGIC)) != MAGIC:
                    raise TrailmedError(f"{path}: not a GGUF file; name a GGUF file, a Hugging Face directory or a catalogue model")
                data = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise TrailmedError(f"{path}: cannot be read ({error.strerror or error})") from error
        try:
            opened = cls(path, data)
        except _DamageError as error:
            data.close()
            raise TrailmedError(f"{path}: {error}; fetch or make the file again") from None
        parts = opened.metadata.get(KEY_SPLIT_COUNT, 1)
        if isinstance(parts, int) and parts > 1:
            opened.close()
            raise TrailmedError(f"{path}: one of {parts} parts of a split model; join them with `llama-gguf-split --merge` first")
        return opened

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of tensor `name`, uint8 [nbytes]: a view of the map, not a copy. KeyError for an unknown name."""
        info = self.tensors[name]
        return self._bytes[info.offset : info.offset + info.nbytes]

    def dequantize(self, name: str) -> npt.NDArray[np.float32]:
        """Tensor `name` as float32 in its `shape`, by gguf-py's decoders. KeyError for an unknown name.

        Raises `TrailmedError` for a type that has no float values (the integer types) or no decoder.
        """
        shape = self.tensors[name].shape
        return self.dequantize_rows(name, 0, prod(shape[:-1])).reshape(shape)

    def dequantize_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows `start` to `stop` of tensor `name`, all leading axes taken as one: float32 [stop − start, d_in]. Raises as `dequantize`."""
        info = self.tensors[name]
        width = info.shape[-1]
        block_values, block_bytes = GGML_QUANT_SIZES[info.type]
        row_bytes = width // block_values * block_bytes
        raw = self.raw(name)[start * row_bytes : stop * row_bytes]
        values = np.empty((stop - start) * width, dtype=np.float32)
        step = _DECODED_AT_ONCE // block_values
        try:
            for block in range(0, raw.size // block_bytes, step):
                # Blocks know nothing of rows, so one long row decodes to the same values in the fewest calls.
                row = raw[block * block_bytes : (block + step) * block_bytes].reshape(1, -1)
                values[block * block_values : (block + step) * block_values] = dequantize(row, info.type)[0]
        except NotImplementedError:
            raise TrailmedError(f"{self.path}: {name} is stored as {info.type.name}, which cannot be decoded to float") from None
        return values.reshape(stop - start, width)

    def metadata_bytes(self) -> bytes:
        """The key-value section, verbatim."""
        return self._map[HEADER_BYTES : self._metadata_stop]

    def field_bytes(self, key: str) -> bytes:
        """One key-value pair, verbatim. KeyError for an unknown key."""
        field = self.fields[key]
        return self._map[field.start : field.stop]

    def forget(self, name: str) -> None:
        """Let the system drop the pages of tensor `name` from our resident memory (they are read again when needed)."""
        info = self.tensors[name]
        start = info.offset - info.offset % mmap.PAGESIZE
        if info.nbytes and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, info.offset + info.nbytes - start)

    def close(self) -> None:
        """Unmap the file; with views of it still in use, the system unmaps it when the last one goes."""
        self._bytes = np.empty(0, dtype=np.uint8)
        with suppress(BufferError):
            self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _header(data: mmap.mmap) -> tuple[int, int, int]:
    """Version, tensor count, key count."""
    if len(data) < HEADER_BYTES:
        raise _DamageError("truncated (shorter than a GGUF header)")
    version, tensors, keys = struct.unpack_from("<IQQ", data, len(MAGIC))
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "a big-endian GGUF" if swapped in VERSIONS else f"GGUF version {version}"
        raise _DamageError(f"{what} cannot be read here; versions {' and '.join(map(str, VERSIONS))}, little endian, can")
    if keys > MAX_KEYS or tensors > MAX_TENSORS:
        raise _DamageError(f"damaged (claims {keys} metadata keys and {tensors} tensors)")
    return version, tensors, keys


def _read_metadata(cursor: _Cursor, count: int) -> tuple[Mapping[str, Any], Mapping[str, Field]]:
    values: dict[str, Any] = {}
    fields: dict[str, Field] = {}
    for index in range(count):
        start = cursor.position
        key = cursor.name(MAX_KEY_BYTES, f"metadata key {index}")
        if key in values:
            raise _DamageError(f"damaged (metadata key {key!r} occurs twice)")
        what = f"metadata {key!r}"
        kind = cursor.value_type(what)
        values[key] = cursor.value(kind, what)
        fields[key] = Field(kind, start, cursor.position)
        if cursor.position > MAX_METADATA_BYTES:
            raise _DamageError(f"damaged (more than {MAX_METADATA_BYTES >> 20} MiB of metadata)")
    return MappingProxyType(values), MappingProxyType(fields)


def _alignment(metadata: Mapping[str, Any], fields: Mapping[str, Field]) -> int:
    if KEY_ALIGNMENT not in metadata:
        return int(GGUF_DEFAULT_ALIGNMENT)
    alignment = metadata[KEY_ALIGNMENT]
    if fields[KEY_ALIGNMENT].type is not GGUFValueType.UINT32 or alignment == 0 or alignment & (alignment - 1):
        raise _DamageError(f"damaged ({KEY_ALIGNMENT} is no power of two)")
    return int(alignment)


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> Mapping[str, TensorInfo]:
    infos = [_tensor_info(cursor, index) for index in range(count)]
    data_start = padded(cursor.position, alignment)
    expected = 0
    tensors: dict[str, TensorInfo] = {}
    for info in infos:
        if info.name in tensors:
            raise _DamageError(f"damaged (tensor {info.name!r} occurs twice)")
        # llama.cpp demands that tensors lie back to back in the order of their descriptions, so none overlap.
        if info.offset != expected:
            raise _DamageError(f"damaged (tensor {info.name!r} lies at offset {info.offset}, expected {expected})")
        start = data_start + info.offset
        if start + info.nbytes > cursor.size:
            raise _DamageError(f"truncated or damaged (tensor {info.name!r} ends behind the end of the file)")
        tensors[info.name] = TensorInfo(info.name, info.shape, info.type, start, info.nbytes)
        expected += padded(info.nbytes, alignment)
    return MappingProxyType(tensors)


def _tensor_info(cursor: _Cursor, index: int) -> TensorInfo:
    """One tensor's description, its offset still relative to the data section."""
    name = cursor.name(MAX_TENSOR_NAME_BYTES, f"the name of tensor {index}")
    what = f"the description of tensor {name!r}"
    dimensions = cursor.scalar(_U32, what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise _DamageError(f"damaged (tensor {name!r} has {dimensions} dimensions)")
    shape = tuple(reversed([cursor.scalar(_U64, what) for _ in range(dimensions)]))
    code = cursor.scalar(_U32, what)
    try:
        kind = GGMLQuantizationType(code)
    except ValueError:
        raise _DamageError(f"damaged, or newer than this program (tensor {name!r} has the unknown type {code})") from None
    if 0 in shape:
        raise _DamageError(f"damaged (tensor {name!r} is empty)")
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block_values:
        raise _DamageError(f"damaged (the rows of tensor {name!r} are no multiple of {kind.name}'s block of {block_values})")
    nbytes: int = prod(shape) // block_values * block_bytes
    return TensorInfo(name, shape, kind, cursor.scalar(_U64, what), nbytes)


def padded(size: int, alignment: int) -> int:
    """`size` rounded up to a multiple of `alignment`."""
    return size + (-size) % alignment
