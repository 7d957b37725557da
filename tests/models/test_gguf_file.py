"""Reading GGUF: what gguf-py writes comes back, and nothing a hostile file says escapes as anything but TrailmedError."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFValueType as Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trailmed.errors import TrailmedError
from trailmed.models.gguf_file import GgufFile

TOKENS = ["a", "", "Ġmünchen", "日本", "x" * 300]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A file with every kind of metadata value and some tensor types, written by gguf-py."""
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_uint8("v.u8", 200)
    writer.add_int8("v.i8", -3)
    writer.add_uint16("v.u16", 60000)
    writer.add_int16("v.i16", -300)
    writer.add_uint32("v.u32", 1 << 31)
    writer.add_int32("v.i32", -70000)
    writer.add_uint64("v.u64", 1 << 63)
    writer.add_int64("v.i64", -(1 << 40))
    writer.add_float32("v.f32", 0.5)
    writer.add_float64("v.f64", 1e300)
    writer.add_bool("v.yes", True)
    writer.add_bool("v.no", False)
    writer.add_string("v.text", "grüß dich")
    writer.add_array("v.tokens", TOKENS)
    writer.add_array("v.numbers", [1, 2, 3])
    writer.add_array("v.floats", [0.25, -2.0])
    rng = np.random.default_rng(0)
    for name, shape, kind in (
        ("vector", (7,), Kind.F32), ("half", (3, 5), Kind.F16), ("brain", (2, 6), Kind.BF16), ("eight", (4, 64), Kind.Q8_0),
        ("five", (2, 3, 32), Kind.Q5_0),
    ):
        encoded = gguf.quantize(rng.normal(size=shape).astype(np.float32), kind)
        writer.add_tensor(name, encoded, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def text(content: str | bytes) -> bytes:
    encoded = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(encoded)) + encoded


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + u32(kind) + value


def tensor(name: str = "w", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(u64(size) for size in dims) + u32(kind) + u64(offset)


def build(
    path: Path, *, pairs: tuple[bytes, ...] = (), tensors: tuple[bytes, ...] = (), data: bytes = bytes(256),
    magic: bytes = b"GGUF", version: int = 3, counts: tuple[int, int] | None = None,
) -> Path:
    """A GGUF put together by hand, as right or wrong as the arguments say."""
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_pairs) + b"".join(pairs) + b"".join(tensors)
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return path


def test_metadata_as_gguf_py_wrote_it(written: Path) -> None:
    with GgufFile.open(written) as file:
        values = {key: value for key, value in file.metadata.items() if key.startswith("v.")}
    assert values == {
        "v.u8": 200, "v.i8": -3, "v.u16": 60000, "v.i16": -300, "v.u32": 1 << 31, "v.i32": -70000, "v.u64": 1 << 63, "v.i64": -(1 << 40),
        "v.f32": 0.5, "v.f64": 1e300, "v.yes": True, "v.no": False, "v.text": "grüß dich", "v.tokens": TOKENS, "v.numbers": [1, 2, 3],
        "v.floats": [0.25, -2.0],
    }
    assert values["v.yes"] is True
    assert values["v.no"] is False


def test_tensors_agree_with_gguf_pys_reader(written: Path) -> None:
    reader = gguf.GGUFReader(written)
    with GgufFile.open(written) as file:
        assert list(file.tensors) == [theirs.name for theirs in reader.tensors]
        for theirs in reader.tensors:
            ours = file.tensors[theirs.name]
            assert (ours.offset, ours.nbytes, ours.type) == (theirs.data_offset, theirs.n_bytes, theirs.tensor_type)
            assert ours.shape == tuple(int(size) for size in reversed(theirs.shape))
            assert file.raw(theirs.name).tobytes() == theirs.data.tobytes()
            expected = gguf.dequantize(theirs.data, theirs.tensor_type)
            decoded = file.dequantize(theirs.name)
            assert decoded.dtype == np.float32
            np.testing.assert_array_equal(decoded, expected.reshape(ours.shape))


def test_dequantize_gives_an_array_of_the_callers_own(written: Path) -> None:
    with GgufFile.open(written) as file:
        before = file.dequantize("vector").copy()
        file.dequantize("vector").fill(7)
        np.testing.assert_array_equal(file.dequantize("vector"), before)


def test_dequantize_rows_is_a_slice_of_the_whole(written: Path) -> None:
    with GgufFile.open(written) as file:
        np.testing.assert_array_equal(file.dequantize_rows("eight", 1, 3), file.dequantize("eight")[1:3])
        np.testing.assert_array_equal(file.dequantize_rows("five", 2, 5), file.dequantize("five").reshape(6, 32)[2:5])


def test_large_tensors_decode_like_small_ones(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(size=(700, 288)).astype(np.float32)
    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(path, "x")
    writer.add_tensor("w", gguf.quantize(values, Kind.Q8_0), raw_dtype=Kind.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GgufFile.open(path) as file:
        np.testing.assert_array_equal(file.dequantize("w"), gguf.dequantize(gguf.quantize(values, Kind.Q8_0), Kind.Q8_0))


def test_metadata_bytes_are_the_section_verbatim(tmp_path: Path) -> None:
    pairs = (pair("a", Value.UINT32, u32(5)), pair("b", Value.STRING, text("hello")))
    with GgufFile.open(build(tmp_path / "f.gguf", pairs=pairs, tensors=(tensor(),))) as file:
        assert file.metadata_bytes() == b"".join(pairs)
        assert [file.field_bytes(key) for key in ("a", "b")] == list(pairs)


def test_forgotten_tensors_can_be_read_again(written: Path) -> None:
    with GgufFile.open(written) as file:
        before = file.raw("eight").tobytes()
        file.forget("eight")
        assert file.raw("eight").tobytes() == before


def test_tokens_that_are_no_utf8_stay_apart(tmp_path: Path) -> None:
    array = u32(Value.STRING) + u64(2) + text(b"\xff") + text(b"\xfe")
    with GgufFile.open(build(tmp_path / "f.gguf", pairs=(pair("t", Value.ARRAY, array),))) as file:
        first, second = file.metadata["t"]
    assert first.encode("utf-8", "surrogateescape") == b"\xff"
    assert first != second


def test_other_alignment(tmp_path: Path) -> None:
    pairs = (pair("general.alignment", Value.UINT32, u32(8)),)
    head = 24 + len(pairs[0]) + len(tensor())
    path = tmp_path / "f.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + pairs[0] + tensor() + bytes(-head % 8) + np.arange(8, dtype="<f4").tobytes())
    with GgufFile.open(path) as file:
        assert file.alignment == 8
        np.testing.assert_array_equal(file.dequantize("w"), np.arange(8))


GOOD = tensor("w", (8,), 0, 0)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "magic": ({"magic": b"GGML"}, "not a GGUF file"),
    "version 1": ({"version": 1}, "version 1"),
    "version 9": ({"version": 9}, "version 9"),
    "big endian": ({"version": 3 << 24}, "big-endian"),
    "tensor count": ({"tensors": (GOOD,), "counts": (1 << 60, 0)}, "claims"),
    "tensor count within limits": ({"tensors": (GOOD,), "counts": (9, 0), "data": b""}, "truncated"),
    "key count": ({"counts": (0, 1 << 60)}, "claims"),
    "key length": ({"pairs": (u64(1 << 62) + b"abc",)}, "at most"),
    "key of control characters": ({"pairs": (pair("a\nb", Value.UINT8, b"\1"),)}, "printable"),
    "tensor name of control characters": ({"tensors": (tensor("w\x1b[2J"),)}, "printable"),
    "key not UTF-8": ({"pairs": (text(b"\xff\xff") + u32(4) + u32(1),)}, "UTF-8"),
    "value type": ({"pairs": (pair("a", 99, u32(1)),)}, "unknown type 99"),
    "string length": ({"pairs": (pair("a", Value.STRING, u64(1 << 61)),)}, "at most"),
    "string behind the end": ({"pairs": (pair("a", Value.STRING, u64(1 << 20)),)}, "truncated"),
    "string not UTF-8": ({"pairs": (pair("a", Value.STRING, text(b"\xc3\x28")),)}, "UTF-8"),
    "array length": ({"pairs": (pair("a", Value.ARRAY, u32(Value.UINT8) + u64(1 << 50)),)}, "claims"),
    "array behind the end": ({"pairs": (pair("a", Value.ARRAY, u32(Value.UINT64) + u64(1 << 23)),)}, "truncated"),
    "array of strings behind the end": ({"pairs": (pair("a", Value.ARRAY, u32(Value.STRING) + u64(1 << 23)),)}, "truncated"),
    "array element length": ({"pairs": (pair("a", Value.ARRAY, u32(Value.STRING) + u64(1) + u64((1 << 64) - 1)),)}, "truncated"),
    "array of arrays": ({"pairs": (pair("a", Value.ARRAY, u32(Value.ARRAY) + u64(1) + u32(4) + u64(0)),)}, "array of arrays"),
    "array type": ({"pairs": (pair("a", Value.ARRAY, u32(77) + u64(1)),)}, "unknown type 77"),
    "key twice": ({"pairs": (pair("a", Value.UINT8, b"\1"), pair("a", Value.UINT8, b"\1"))}, "occurs twice"),
    "alignment 0": ({"pairs": (pair("general.alignment", Value.UINT32, u32(0)),)}, "power of two"),
    "alignment 24": ({"pairs": (pair("general.alignment", Value.UINT32, u32(24)),)}, "power of two"),
    "alignment as text": ({"pairs": (pair("general.alignment", Value.STRING, text("32")),)}, "power of two"),
    "alignment behind the end": ({"pairs": (pair("general.alignment", Value.UINT32, u32(1 << 31)),), "tensors": (GOOD,)}, "ends behind"),
    "tensor name length": ({"tensors": (tensor("n" * 64),)}, "at most 63"),
    "no dimensions": ({"tensors": (tensor(dims=()),)}, "0 dimensions"),
    "five dimensions": ({"tensors": (tensor(dims=(2, 2, 2, 2, 2)),)}, "5 dimensions"),
    "many dimensions": ({"tensors": (text("w") + u32((1 << 32) - 1),)}, "dimensions"),
    "empty": ({"tensors": (tensor(dims=(8, 0)),)}, "is empty"),
    "overflowing product": ({"tensors": (tensor(dims=(1 << 63, 1 << 63, 4)),)}, "ends behind"),
    "tensor type": ({"tensors": (tensor(kind=4),)}, "unknown type 4"),
    "row no multiple of the block": ({"tensors": (tensor(dims=(48,), kind=Kind.Q8_0),)}, "multiple"),
    "offset outside": ({"tensors": (tensor(offset=1 << 40),)}, "lies at offset"),
    "offset wraps": ({"tensors": (tensor(offset=(1 << 64) - 32),)}, "lies at offset"),
    "overlap": ({"tensors": (GOOD, tensor("v"))}, "lies at offset 0, expected 32"),
    "tensor twice": ({"tensors": (GOOD, tensor("w", offset=32))}, "occurs twice"),
    "data behind the end": ({"tensors": (tensor(dims=(65,)),)}, "ends behind"),
    "split": ({"pairs": (pair("split.count", Value.UINT16, struct.pack("<H", 3)),)}, "join them"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, case: str) -> None:
    arguments, expected = WRONG[case]
    path = build(tmp_path / "wrong.gguf", **arguments)
    with pytest.raises(TrailmedError, match=expected) as caught:
        GgufFile.open(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GG", b"GGUF", b"GGUF\3\0\0\0", b"GGUF\3\0\0\0" + bytes(15)])
def test_shorter_than_a_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(content)
    with pytest.raises(TrailmedError, match=r"truncated|not a GGUF"):
        GgufFile.open(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(TrailmedError, match="no such file"):
        GgufFile.open(tmp_path / "none.gguf")
    with pytest.raises(TrailmedError, match="not a file"):
        GgufFile.open(tmp_path)


def test_every_truncation_is_noticed(written: Path, tmp_path: Path) -> None:
    whole = written.read_bytes()
    with GgufFile.open(written) as file:
        needed = max(info.offset + info.nbytes for info in file.tensors.values())
    cut = tmp_path / "cut.gguf"
    for size in (*range(0, needed, 7), needed - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(TrailmedError):
            GgufFile.open(cut)
    cut.write_bytes(whole[:needed])
    GgufFile.open(cut).close()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_never_escape_as_another_exception(written: Path, tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    content = bytearray(written.read_bytes())
    for position, value in edits:
        content[position % len(content)] = value
    path = tmp_path / "mutated.gguf"
    path.write_bytes(content)
    message = ""
    try:
        with GgufFile.open(path) as file:
            for name in file.tensors:
                file.dequantize(name)
    except TrailmedError as error:
        message = str(error)
    assert "\n" not in message


def test_integers_are_not_decoded_to_floats(tmp_path: Path) -> None:
    with GgufFile.open(build(tmp_path / "f.gguf", tensors=(tensor(kind=Kind.I32),))) as file, pytest.raises(TrailmedError, match="I32"):
        file.dequantize("w")
