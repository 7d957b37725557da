"""Baking an edit into a GGUF: only the tensors it names are decoded, everything else is carried over byte for byte."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from .. import __version__
from ..abliterate.edit import Edit, Factor
from ..errors import TrailmedError
from ..files import PARTIAL_SUFFIX, sha256_of_file, write_atomically
from ..models.architecture import Layout as StoredLayout
from ..models.architecture import architecture_of
from ..models.fingerprint import fingerprint
from ..models.gguf_file import GgufFile, TensorInfo
from ..progress import progress_bar
from .ggml_quantize import FLOAT_TYPES, file_type_of, quantize_file, quantize_rows
from .gguf_writer import Layout, OutputTensor, layout_like, write_gguf

KEY_FILE_TYPE = "general.file_type"
KEY_VERSION = "trailmed.version"
KEY_BASE_SHA256 = "trailmed.base.sha256"
KEY_EDIT_SHA256 = "trailmed.edit.sha256"
KEY_EDIT_RECIPE = "trailmed.edit.recipe"

_F16, _BF16, _F32 = GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F32
_FLOATS = frozenset(FLOAT_TYPES.values())
_NO_WEIGHTS = frozenset(GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64", "F64"))
_ALWAYS_F32 = (
    "_norm", "ffn_gate_inp", "position_embd", "token_types", "ssm_conv1d", "shortconv", "altup_correct_coef", "altup_predict_coef",
)
"""Parts of the names of matrices that `convert_hf_to_gguf.py` stores as float32 whatever the file's type."""
_LARGEST_F16 = 65504.0
_VALUES_AT_ONCE = 1 << 22
_MEBIBYTE = 1 << 20
_NEARLY_FULL = 1 << 20
_DEFAULT_THREADS = os.cpu_count() or 1


@dataclass(frozen=True, slots=True)
class _Baking:
    """One base and what is to be done to its tensors, by GGUF name."""

    file: GgufFile
    factors: Mapping[str, Factor]
    changes: Mapping[str, str | int]
    threads: int


def bake(edit: Edit | None, base: Path, out: Path, type: str, *, threads: int = _DEFAULT_THREADS, progress: bool = True) -> None:
    """Write to `out` the GGUF `base` with `edit` applied, as file type `type` (F16, BF16, F32, Q8_0, Q4_K_M, …); no edit: convert only.

    Where `base` is of that type already, or the type is a float one, tensors stream from file to file: each edited one is decoded,
    W' = diag(row_scale)(W + B A) is computed in float32, and it is encoded again by llama.cpp's quantizer, a few megabytes at a time.
    Other conversions go through a float file beside `out` (removed afterwards), which `llama_model_quantize` reads.
    Metadata is carried over but for `general.file_type`; `trailmed.*` keys record the base's and the edit's sha256 and the recipe.
    A plain conversion of an edited file keeps those. The same inputs give the same bytes.

    Raises `TrailmedError` for an unknown type, an unreadable base, an edit made for another model or naming tensors this one
    does not have in that shape, a base that carries an edit already, values the type cannot hold, or a disk without room.
    """
    file_type = file_type_of(type)
    with GgufFile.open(base) as file:
        if out.exists() and out.samefile(base):
            raise TrailmedError(f"{out}: is the base itself; choose another output")
        factors = {} if edit is None else _factors_by_gguf_name(edit, file)
        work = _Baking(file, factors, {KEY_FILE_TYPE: int(file_type), **_provenance(edit, file)}, threads)
        same_type = file.metadata.get(KEY_FILE_TYPE) == file_type
        if same_type or file_type in FLOAT_TYPES:
            layout = _plan(work, FLOAT_TYPES.get(file_type), same_type=same_type)
            _require_space(out, layout.nbytes)
            with write_atomically(out) as scratch:
                _write(work, scratch, layout, f"baking {type.upper()} (MiB)", progress)
        else:
            _bake_through_float(work, out, file_type, type.upper(), progress)


def _bake_through_float(work: _Baking, out: Path, file_type: LlamaFileType, label: str, progress: bool) -> None:
    dominant = _dominant_type(work.file)
    through = dominant if dominant in _FLOATS else _F16
    layout = _plan(work, through, same_type=False)
    _require_space(out, layout.nbytes + _quantized_size(work.file, label))
    intermediate = out.with_name(f".{out.name}.{through.name.lower()}{PARTIAL_SUFFIX}")
    with write_atomically(out) as scratch:
        try:
            _write(work, intermediate, layout, f"decoding to {through.name} (MiB)", progress)
            with progress_bar(f"quantizing to {label} (tensors)", len(layout.tensors), enabled=progress) as advance:
                quantize_file(intermediate, scratch, file_type, threads=work.threads, progress=advance)
        except ValueError as error:
            if shutil.disk_usage(out.parent).free < _NEARLY_FULL:
                # llama.cpp does not say why its writing failed.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise TrailmedError(f"{work.file.path}: llama.cpp could not quantize it to {label} ({error}); choose another type") from None
        finally:
            intermediate.unlink(missing_ok=True)


def _factors_by_gguf_name(edit: Edit, file: GgufFile) -> dict[str, Factor]:
    """The edit's factors under this file's tensor names, after every check that the two belong together."""
    if KEY_EDIT_SHA256 in file.metadata:
        raise TrailmedError(f"{file.path}: carries an edit already; bake into the unedited model (join edits before baking)")
    architecture = architecture_of(file)
    if fingerprint(file) != edit.fingerprint:
        raise TrailmedError(f"{file.path}: the edit was made for another model; make one for this model with `trailmed edit`")
    factors = {}
    for hf_name, factor in edit.factors.items():
        name = architecture.to_gguf(hf_name)
        if name not in file.tensors:
            raise TrailmedError(f"{file.path}: has no tensor {name}, which the edit names ({hf_name}); make the edit anew for this model")
        if architecture.layouts.get(name.split(".")[-2], StoredLayout.SAME) is not StoredLayout.SAME:
            raise TrailmedError(f"{file.path}: {name} is stored in another layout than {hf_name}; edits of it cannot be baked into a GGUF")
        info = file.tensors[name]
        if info.shape != factor.shape:
            raise TrailmedError(
                f"{file.path}: {name} has the shape {list(info.shape)}, the edit's is {list(factor.shape)}; "
                "make the edit anew for this model"
            )
        factors[name] = factor
    return factors


def _provenance(edit: Edit | None, file: GgufFile) -> dict[str, str]:
    made_by = {KEY_VERSION: __version__}
    if edit is None and KEY_EDIT_SHA256 in file.metadata:
        # The base on record stays the unedited model.
        return made_by
    made_by[KEY_BASE_SHA256] = sha256_of_file(file.path)
    if edit is not None:
        made_by[KEY_EDIT_SHA256] = edit.sha256
        made_by[KEY_EDIT_RECIPE] = json.dumps(dict(edit.recipe), sort_keys=True, allow_nan=False)
    return made_by


def _plan(work: _Baking, target: GGMLQuantizationType | None, *, same_type: bool) -> Layout:
    """The output's layout; `target` is the float type matrices get, None to leave every tensor's type alone."""
    from_f32 = _dominant_type(work.file) is _F32
    tensors = [
        OutputTensor(
            info.name, info.shape,
            info.type if target is None else _type_in(info, target, keep_floats=same_type, keep_f32=not from_f32),
        )
        for info in work.file.tensors.values()
    ]
    return layout_like(work.file, work.changes, tensors)


def _type_in(info: TensorInfo, target: GGMLQuantizationType, *, keep_floats: bool, keep_f32: bool) -> GGMLQuantizationType:
    """The type of one tensor in a file of float type `target`, as llama.cpp's converter chooses it."""
    if len(info.shape) == 1 or info.type in _NO_WEIGHTS or (keep_floats and info.type in _FLOATS):
        return info.type
    # Whoever made a file of another type and left a matrix in float32 did so on purpose.
    if info.type is _F32 and (keep_f32 or any(part in info.name for part in _ALWAYS_F32)):
        return info.type
    return target


def _dominant_type(file: GgufFile) -> GGMLQuantizationType:
    """The type that most values of the file's matrices have; float32 for a file without matrices."""
    counts: Counter[GGMLQuantizationType] = Counter()
    for info in file.tensors.values():
        if len(info.shape) > 1:
            counts[info.type] += prod(info.shape)
    return counts.most_common(1)[0][0] if counts else _F32


def _write(work: _Baking, path: Path, layout: Layout, label: str, progress: bool) -> None:
    types = {tensor.name: tensor.type for tensor in layout.tensors}
    with progress_bar(label, -(-layout.nbytes // _MEBIBYTE), enabled=progress) as advance:
        done = 0

        def written(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            advance(done // _MEBIBYTE - before // _MEBIBYTE)

        write_gguf(path, layout, lambda name: _pieces(work, name, types[name]), written)
        advance(-(-layout.nbytes // _MEBIBYTE) - done // _MEBIBYTE)


def _pieces(work: _Baking, name: str, kind: GGMLQuantizationType) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of tensor `name` as `kind`, edited if the edit names it, some rows at a time."""
    file, info, factor = work.file, work.file.tensors[name], work.factors.get(name)
    if factor is None and kind is info.type:
        yield file.raw(name)
    else:
        rows = prod(info.shape[:-1])
        step = max(1, _VALUES_AT_ONCE // info.shape[-1])
        for start in range(0, rows, step):
            values = file.dequantize_rows(name, start, min(rows, start + step))
            if factor is not None:
                values = factor.apply_to_rows(values, start)
            _check_values(values, kind, f"{file.path}: {name}")
            try:
                yield quantize_rows(values, kind, work.threads)
            except ValueError as error:
                raise TrailmedError(f"{file.path}: {name}: {error}; use a base of another type") from None
    file.forget(name)


def _check_values(values: npt.NDArray[np.float32], kind: GGMLQuantizationType, what: str) -> None:
    largest = float(np.abs(values).max())
    if not np.isfinite(largest):
        raise TrailmedError(f"{what} holds values that are no finite numbers; use an undamaged base or a weaker edit")
    # Every quantized type has float16 scales.
    if largest > _LARGEST_F16 and kind not in (_F32, _BF16):
        raise TrailmedError(f"{what} holds values too large for {kind.name}; choose the type BF16 or F32")


def _quantized_size(file: GgufFile, label: str) -> int:
    """About how large a quantized file gets: every matrix in the type that names the file (mixed types make it a little larger)."""
    kind = next(GGMLQuantizationType[name] for name in (label, label.rpartition("_")[0]) if name in GGMLQuantizationType.__members__)
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    return sum(prod(info.shape) for info in file.tensors.values()) * int(block_bytes) // int(block_values)


def _require_space(out: Path, needed: int) -> None:
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TrailmedError(
            f"{out}: needs {-(-needed // _MEBIBYTE):,} MiB of disk, {folder} has {free // _MEBIBYTE:,} MiB free; "
            "free some space or choose another folder"
        )
