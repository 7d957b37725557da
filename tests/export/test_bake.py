"""Baking: the maths against NumPy, everything untouched byte for byte, and nothing left behind when it fails."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from llama_reference import llama_reference
from small_models import tiny_gguf, tiny_module, write_gguf

import trailmed.export.bake as bake_module
from trailmed.abliterate.edit import Edit, Factor
from trailmed.errors import TrailmedError
from trailmed.export.bake import bake
from trailmed.export.ggml_quantize import FILE_TYPES, quantize_rows
from trailmed.files import sha256_of_file
from trailmed.models.fingerprint import fingerprint
from trailmed.models.gguf_file import GgufFile

O_PROJ, DOWN_PROJ = "model.layers.0.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"
EDITED = {"blk.0.attn_output.weight": O_PROJ, "blk.1.ffn_down.weight": DOWN_PROJ}
PROVENANCE = ("trailmed.version", "trailmed.base.sha256", "trailmed.edit.sha256", "trailmed.edit.recipe")


def dyadic(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    """Multiples of 1/64 below 1/4: products and sums of a few of them are exact in float32."""
    return (np.random.default_rng(seed).integers(-16, 17, size=shape) / 64).astype(np.float32)


def edit_for(base: Path, *, scaled: bool = False, hf_names: dict[str, str] | None = None, **changes: Any) -> Edit:
    with GgufFile.open(base) as file:
        factors = {}
        for seed, (name, hf_name) in enumerate((hf_names or EDITED).items()):
            rows, columns = file.tensors[name].shape
            scale = (np.float32(1) + dyadic(90 + seed, rows)) if scaled else None
            factors[hf_name] = Factor(dyadic(10 + seed, rows, 2), dyadic(20 + seed, 2, columns), scale)
        values = {"fingerprint": fingerprint(file), "base_sha256": sha256_of_file(base), "recipe": {"method": "gated", "Schärfe": 0.5}}
    return Edit(factors, **{**values, **changes})


def expected(base: GgufFile, edit: Edit, name: str) -> npt.NDArray[np.float64]:
    """diag(r) (W + B A) in float64 from the base's decoded values."""
    factor = edit.factors[EDITED[name]]
    edited = base.dequantize(name).astype(np.float64) + factor.b.astype(np.float64) @ factor.a.astype(np.float64)
    return edited if factor.row_scale is None else factor.row_scale.astype(np.float64)[:, None] * edited


def run(edit: Edit | None, base: Path, out: Path, kind: str, threads: int = 1) -> Path:
    bake(edit, base, out, kind, threads=threads, progress=False)
    return out


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3"])
def test_f16_is_exactly_float16_of_the_sum(tmp_path: Path, architecture: str) -> None:
    base = tiny_gguf(tmp_path, architecture, type="F16")
    edit = edit_for(base)
    with GgufFile.open(base) as before, GgufFile.open(run(edit, base, tmp_path / "out.gguf", "F16")) as after:
        for name in EDITED:
            decoded = after.raw(name).view(np.float16).reshape(after.tensors[name].shape)
            np.testing.assert_array_equal(decoded, expected(before, edit, name).astype(np.float16))
            assert (decoded != before.dequantize(name)).mean() > 0.5


def test_row_scale_is_baked(tmp_path: Path) -> None:
    base = tiny_gguf(tmp_path)
    edit = edit_for(base, scaled=True)
    with GgufFile.open(base) as before, GgufFile.open(run(edit, base, tmp_path / "out.gguf", "F32")) as after:
        for name in EDITED:
            np.testing.assert_allclose(after.dequantize(name), expected(before, edit, name), rtol=1e-6, atol=1e-7)


def test_q8_0_stays_q8_0_and_is_within_one_step_of_numpys(tmp_path: Path) -> None:
    base = tiny_gguf(tmp_path, type="Q8_0")
    edit = edit_for(base)
    with GgufFile.open(base) as before, GgufFile.open(run(edit, base, tmp_path / "out.gguf", "Q8_0")) as after:
        for name in EDITED:
            assert after.tensors[name].type is Kind.Q8_0
            exact = expected(before, edit, name)
            step = np.abs(exact.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
            reference = gguf.quantize(exact.astype(np.float32), Kind.Q8_0).view(np.int8).reshape(-1, 34)
            ours = after.raw(name).view(np.int8).reshape(-1, 34)
            np.testing.assert_array_equal(ours[:, :2], reference[:, :2])
            assert np.abs(ours[:, 2:].astype(int) - reference[:, 2:]).max() <= 1
            # half a step of rounding, and the scale's own rounding to float16 (127 · 2⁻¹¹)
            assert (np.abs(after.dequantize(name).reshape(-1, 32) - exact.reshape(-1, 32)) <= 0.57 * step).all()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3"])
def test_everything_untouched_is_carried_over(tmp_path: Path, architecture: str, kind: str) -> None:
    base = tiny_gguf(tmp_path, architecture, type=kind)
    edit = edit_for(base)
    with GgufFile.open(base) as before, GgufFile.open(run(edit, base, tmp_path / "out.gguf", kind)) as after:
        assert list(after.tensors) == list(before.tensors)
        assert [key for key in after.fields if key not in PROVENANCE] == list(before.fields)
        assert all(after.field_bytes(key) == before.field_bytes(key) for key in before.fields)
        for name, info in before.tensors.items():
            assert after.tensors[name].type is info.type
            assert (after.raw(name).tobytes() == before.raw(name).tobytes()) is (name not in EDITED), name
            assert after.tensors[name].offset % after.alignment == 0


def test_without_an_edit_the_data_stays(tmp_path: Path) -> None:
    base = tiny_gguf(tmp_path, type="Q8_0")
    with GgufFile.open(base) as before, GgufFile.open(run(None, base, tmp_path / "out.gguf", "q8_0")) as after:
        assert all(after.raw(name).tobytes() == before.raw(name).tobytes() for name in before.tensors)
        assert after.metadata["trailmed.base.sha256"] == sha256_of_file(base)
        assert "trailmed.edit.sha256" not in after.metadata


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("base_kind", ["F32", "Q8_0"])
def test_conversion_to_a_float_type(tmp_path: Path, base_kind: str, kind: str) -> None:
    base = tiny_gguf(tmp_path, type=base_kind)
    edit = edit_for(base)
    with GgufFile.open(base) as before, GgufFile.open(run(edit, base, tmp_path / "out.gguf", kind)) as after:
        assert after.metadata["general.file_type"] == FILE_TYPES[kind]
        for name, info in before.tensors.items():
            values = expected(before, edit, name).astype(np.float32) if name in EDITED else before.dequantize(name)
            wanted = Kind[kind] if len(info.shape) == 2 else Kind.F32
            assert after.tensors[name].type is wanted
            assert after.raw(name).tobytes() == gguf.quantize(values, wanted).tobytes(), name


@pytest.mark.parametrize("base_kind", ["F32", "F16", "BF16"])
def test_q8_0_from_a_float_base_is_the_quantized_sum(tmp_path: Path, base_kind: str) -> None:
    base = tiny_gguf(tmp_path, type=base_kind)
    edit = edit_for(base)
    with (
        GgufFile.open(run(edit, base, tmp_path / "float.gguf", base_kind)) as precise,
        GgufFile.open(run(edit, base, tmp_path / "out.gguf", "Q8_0")) as after,
    ):
        assert set(after.tensors) == set(precise.tensors)
        for name, info in precise.tensors.items():
            wanted = Kind.Q8_0 if len(info.shape) == 2 else Kind.F32
            assert after.tensors[name].type is wanted
            values = precise.dequantize(name)
            assert after.raw(name).tobytes() == (quantize_rows(values, wanted, 1) if wanted is Kind.Q8_0 else values).tobytes(), name


@pytest.mark.parametrize(("kind", "bits"), [("Q6_K", 6), ("Q5_K_M", 5), ("Q4_K_M", 4), ("Q4_0", 4)])
def test_other_quantizations_from_and_to_themselves(tmp_path: Path, kind: str, bits: int) -> None:
    precise = tiny_gguf(tmp_path, k_quants=True)
    base = run(None, precise, tmp_path / "base.gguf", kind)
    edit = edit_for(base)
    with (
        GgufFile.open(base) as before,
        GgufFile.open(run(edit, base, tmp_path / "same.gguf", kind)) as same,
        GgufFile.open(run(edit_for(precise), precise, tmp_path / "from-f32.gguf", kind)) as fresh,
    ):
        assert same.metadata["general.file_type"] == fresh.metadata["general.file_type"] == FILE_TYPES[kind]
        for name, info in before.tensors.items():
            assert same.tensors[name].type is fresh.tensors[name].type is info.type
            if name in EDITED:
                exact = expected(before, edit, name)
                error = np.sqrt(np.mean((same.dequantize(name) - exact) ** 2) / np.mean(exact**2))
                assert 0 < error < 2.0 ** (1 - bits)
            else:
                assert same.raw(name).tobytes() == before.raw(name).tobytes()


def test_provenance_survives_both_ways_of_baking_and_later_conversion(tmp_path: Path) -> None:
    base = tiny_gguf(tmp_path)
    edit = edit_for(base)
    outputs = [run(edit, base, tmp_path / f"{kind}.gguf", kind) for kind in ("F32", "F16", "Q8_0")]
    outputs.append(run(None, outputs[1], tmp_path / "later.gguf", "Q8_0"))
    for path in outputs:
        with GgufFile.open(path) as file:
            assert file.metadata["trailmed.base.sha256"] == sha256_of_file(base)
            assert file.metadata["trailmed.edit.sha256"] == edit.sha256
            assert json.loads(file.metadata["trailmed.edit.recipe"]) == dict(edit.recipe)
            assert file.metadata["trailmed.version"]
            assert fingerprint(file) == edit.fingerprint
    with GgufFile.open(outputs[2]) as straight, GgufFile.open(outputs[3]) as later:
        assert later.metadata["general.file_type"] == straight.metadata["general.file_type"] == FILE_TYPES["Q8_0"]


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_same_inputs_same_bytes_for_any_number_of_threads(tmp_path: Path, kind: str) -> None:
    base = tiny_gguf(tmp_path)
    edit = edit_for(base)
    one, two = run(edit, base, tmp_path / "one.gguf", kind, threads=1), run(edit, base, tmp_path / "two.gguf", kind, threads=3)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3"])
def test_llama_cpp_runs_the_edited_model_as_pytorch_does(tmp_path: Path, architecture: str) -> None:
    module = tiny_module(architecture)
    base = write_gguf(module, tmp_path / "base.gguf")
    edit = edit_for(base)
    ids = list(range(5, 37))
    with torch.no_grad():
        unedited = module(torch.tensor([ids])).logits[0].numpy()
        parameters = dict(module.named_parameters())
        for name, factor in edit.factors.items():
            parameters[name] += torch.from_numpy(factor.b.astype(np.float64) @ factor.a.astype(np.float64)).float()
        edited = module(torch.tensor([ids])).logits[0].numpy()
    with llama_reference(run(edit, base, tmp_path / "out.gguf", "F32")) as llama:
        np.testing.assert_allclose(llama.logits(ids), edited, rtol=5e-3, atol=5e-3)
    assert np.abs(edited - unedited).max() > 0.1


def test_no_float_copy_of_a_quantized_model(tmp_path: Path) -> None:
    base = tiny_gguf(tmp_path, "llama", k_quants=True, type="Q8_0", layers=12)
    edit = edit_for(base)
    with GgufFile.open(base) as file:
        as_floats = 4 * sum(int(np.prod(info.shape)) for info in file.tensors.values())
        largest = 4 * max(int(np.prod(info.shape)) for info in file.tensors.values())
    tracemalloc.start()
    try:
        run(edit, base, tmp_path / "out.gguf", "Q8_0")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 6 * largest < as_floats / 5


def refused(tmp_path: Path, edit: Edit | None, base: Path, kind: str, match: str, out: str = "out.gguf") -> None:
    before = leftovers(tmp_path)
    with pytest.raises(TrailmedError, match=match) as caught:
        run(edit, base, tmp_path / out, kind)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == before


def test_an_edit_for_another_model(tmp_path: Path) -> None:
    base, other = tiny_gguf(tmp_path), tiny_gguf(tmp_path, seed=1)
    refused(tmp_path, edit_for(other), base, "F16", "made for another model")


def test_an_edit_fitted_on_another_type_of_the_same_model_is_welcome(tmp_path: Path) -> None:
    edit = edit_for(tiny_gguf(tmp_path, type="Q8_0"))
    assert run(edit, tiny_gguf(tmp_path, type="F16"), tmp_path / "out.gguf", "F16").exists()


def test_a_base_that_is_edited_already(tmp_path: Path) -> None:
    base = tiny_gguf(tmp_path)
    edit = edit_for(base)
    refused(tmp_path, edit, run(edit, base, tmp_path / "edited.gguf", "F16"), "F16", "carries an edit already")


def test_edits_that_do_not_fit(tmp_path: Path) -> None:
    base = tiny_gguf(tmp_path, "llama")
    right = edit_for(base)
    transposed = Edit({DOWN_PROJ: Factor(dyadic(0, 128, 1), dyadic(1, 1, 64))}, right.fingerprint, right.base_sha256, {})
    refused(tmp_path, transposed, base, "F16", r"shape \[64, 128\], the edit's is \[128, 64\]")
    missing = Edit({DOWN_PROJ.replace("1", "9"): right.factors[DOWN_PROJ]}, right.fingerprint, right.base_sha256, {})
    refused(tmp_path, missing, base, "F16", r"no tensor blk\.9\.ffn_down\.weight")
    unknown = Edit({"model.layers.0.mlp.magic.weight": right.factors[DOWN_PROJ]}, right.fingerprint, right.base_sha256, {})
    refused(tmp_path, unknown, base, "F16", "magic")
    permuted = edit_for(base, hf_names={"blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight"})
    refused(tmp_path, permuted, base, "F16", "another layout")


def test_an_unknown_type_lists_the_known(tmp_path: Path) -> None:
    refused(tmp_path, None, tiny_gguf(tmp_path), "Q9_Z", r"unknown type 'Q9_Z'; the types are F32, F16, .*Q4_K_M")


def test_the_base_is_never_overwritten(tmp_path: Path) -> None:
    base = tiny_gguf(tmp_path)
    refused(tmp_path, None, base, "F16", "is the base itself", out=base.name)


def test_missing_and_truncated_bases(tmp_path: Path) -> None:
    refused(tmp_path, None, tmp_path / "none.gguf", "F16", "no such file")
    base = tiny_gguf(tmp_path)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(base.read_bytes()[:-500])
    refused(tmp_path, None, cut, "Q8_0", "truncated")


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_values_too_large_for_float16(tmp_path: Path, kind: str) -> None:
    base = tiny_gguf(tmp_path, type="Q8_0")
    edit = edit_for(base).scaled(1e6)
    refused(tmp_path, edit, base, kind, "too large for")
    assert run(edit, base, tmp_path / "out.gguf", "BF16").exists()


def test_values_that_are_no_numbers(tmp_path: Path) -> None:
    module = tiny_module()
    module.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    refused(tmp_path, None, write_gguf(module, tmp_path / "nan.gguf"), "F16", "no finite numbers")


def test_an_architecture_llama_cpp_does_not_know_is_converted_to_floats_but_not_quantized(tmp_path: Path) -> None:
    base = write_gguf(tiny_module(), tmp_path / "base.gguf", metadata={"general.architecture": "nonesuch"})
    assert run(None, base, tmp_path / "out.gguf", "F16").exists()
    reason = r"base\.gguf: llama\.cpp could not quantize it to Q8_0 \(unknown model architecture: 'nonesuch'\)"
    refused(tmp_path, None, base, "Q8_0", reason, out="quantized.gguf")


def test_a_base_on_which_llama_cpp_aborts_is_one_line_too(tmp_path: Path) -> None:
    base = write_gguf(tiny_module(), tmp_path / "base.gguf", metadata={"qwen2.block_count": 1 << 20})
    refused(tmp_path, None, base, "Q8_0", r"base\.gguf: llama\.cpp could not quantize it to Q8_0 \(.*GGML_ASSERT.*failed\)")


def test_the_quantizing_process_ends_with_its_parent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "source")  # llama.cpp waits for ever to read this
    command = [sys.executable, "-P", "-m", "trailmed.export.quantize_worker", str(tmp_path / "source"), str(tmp_path / "target"), "7", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as worker:
        with pytest.raises(subprocess.TimeoutExpired):
            worker.wait(timeout=3)
        assert worker.stdin is not None
        worker.stdin.close()
        assert worker.wait(timeout=30) == 1


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_too_little_space_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    base = tiny_gguf(tmp_path)
    monkeypatch.setattr(bake_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(tmp_path, None, base, kind, r"needs .* MiB of disk, .* has 0 MiB free")


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_disk_that_fills_up_leaves_nothing_and_the_old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    base = tiny_gguf(tmp_path)
    (tmp_path / "out.gguf").write_bytes(b"from an earlier run")

    def full(path: Path, *_: Any) -> None:
        path.write_bytes(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bake_module, "write_gguf", full)
    refused(tmp_path, None, base, kind, "the disk is full")
    assert (tmp_path / "out.gguf").read_bytes() == b"from an earlier run"


def test_an_interrupted_quantization_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_gguf(tmp_path)

    def interrupted(_source: Path, target: Path, *_: Any, **__: Any) -> None:
        target.write_bytes(b"some of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(bake_module, "quantize_file", interrupted)
    before = leftovers(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(None, base, tmp_path / "out.gguf", "Q8_0")
    assert leftovers(tmp_path) == before


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1])
@pytest.mark.parametrize("threads", [1, 3])
def test_quantize_rows_agrees_with_gguf_py(kind: Kind, threads: int) -> None:
    values = np.random.default_rng(3).normal(size=(7, 96)).astype(np.float32)
    ours = gguf.dequantize(quantize_rows(values, kind, threads), kind)
    theirs = gguf.dequantize(gguf.quantize(values, kind).view(np.uint8), kind)
    step = {Kind.Q8_0: 1 / 127, Kind.Q4_0: 1 / 7, Kind.Q5_1: 1 / 15}.get(kind, 0)
    largest = np.abs(values.reshape(7, 3, 32)).max(axis=2).repeat(32, axis=1)
    assert (np.abs(ours - theirs) <= 1.01 * step * largest).all()
    assert np.mean(ours != theirs) < 0.02


def test_quantize_rows_refuses_what_ggml_cannot() -> None:
    with pytest.raises(ValueError, match="multiple"):
        quantize_rows(np.zeros((2, 48), np.float32), Kind.Q8_0, 1)
    with pytest.raises(ValueError, match="importance matrix"):
        quantize_rows(np.zeros((2, 256), np.float32), Kind.IQ2_XXS, 1)
