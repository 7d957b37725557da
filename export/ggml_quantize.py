"""llama.cpp's own quantizer: rows in memory through ggml, whole files through `llama_model_quantize`."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryFile
from types import MappingProxyType
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from llama_cpp import _ctypes_extensions

from ..errors import TrailmedError
from ..progress import Advance, no_progress
from . import quantize_worker

FILE_TYPES: Mapping[str, LlamaFileType] = MappingProxyType({
    name.removeprefix("MOSTLY_").removeprefix("ALL_"): LlamaFileType[name]
    for name in (
        "ALL_F32", "MOSTLY_F16", "MOSTLY_BF16", "MOSTLY_Q8_0",
        "MOSTLY_Q6_K", "MOSTLY_Q5_K_M", "MOSTLY_Q5_K_S", "MOSTLY_Q5_1", "MOSTLY_Q5_0",
        "MOSTLY_Q4_K_M", "MOSTLY_Q4_K_S", "MOSTLY_Q4_1", "MOSTLY_Q4_0", "MOSTLY_IQ4_NL", "MOSTLY_IQ4_XS",
        "MOSTLY_Q3_K_L", "MOSTLY_Q3_K_M", "MOSTLY_Q3_K_S", "MOSTLY_Q2_K",
    )
})
"""The file types llama.cpp writes without an importance matrix, by the names its `llama-quantize` uses."""

FLOAT_TYPES: Mapping[LlamaFileType, GGMLQuantizationType] = MappingProxyType({
    LlamaFileType.ALL_F32: GGMLQuantizationType.F32,
    LlamaFileType.MOSTLY_F16: GGMLQuantizationType.F16,
    LlamaFileType.MOSTLY_BF16: GGMLQuantizationType.BF16,
})

_SHOWN_OF_A_REASON = 300
_READ_OF_COMPLAINTS = 1 << 16
_DOTS_AT_ONCE = 256


def file_type_of(name: str) -> LlamaFileType:
    """The file type called `name` (any case); raises `TrailmedError` that lists all names for an unknown one."""
    try:
        return FILE_TYPES[name.upper()]
    except KeyError:
        raise TrailmedError(f"unknown type {name!r}; the types are {', '.join(FILE_TYPES)}") from None


def quantize_rows(values: npt.NDArray[np.float32], kind: GGMLQuantizationType, threads: int) -> npt.NDArray[np.uint8]:
    """Encode float32 [n, d_in] as `kind` with `ggml_quantize_chunk`: uint8 [n, bytes of a row], the same for any number of `threads`.

    Raises ValueError when the rows are no multiple of the type's block, or the type needs an importance matrix.
    """
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    rows, width = values.shape
    if width % block_values:
        raise ValueError(f"rows of {width} values are no multiple of {kind.name}'s block of {block_values}")
    library = _ggml()
    if library.ggml_quantize_requires_imatrix(kind):
        raise ValueError(f"{kind.name} cannot be encoded without an importance matrix")
    values = np.ascontiguousarray(values)
    encoded = np.empty((rows, width // block_values * block_bytes), dtype=np.uint8)

    def encode(start: int) -> None:
        count = min(step, rows - start)
        library.ggml_quantize_chunk(kind, values.ctypes.data, encoded.ctypes.data, start * width, count, width, None)

    step = max(1, -(-rows // max(1, threads)))
    if step >= rows:
        encode(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(encode, range(0, rows, step)))
    return encoded


def quantize_file(source: Path, target: Path, file_type: LlamaFileType, *, threads: int, progress: Advance = no_progress) -> None:
    """Quantize the GGUF `source` (float types) into `target` with `llama_model_quantize`; metadata is carried over.

    It runs in a process of its own (see `quantize_worker`). `progress` is called once per tensor. Raises ValueError with llama.cpp's
    reason when it fails; `target` may then be half-written.
    """
    command = [sys.executable, "-P", "-m", quantize_worker.__name__, str(source), str(target), str(int(file_type)), str(threads)]
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    with TemporaryFile() as complaints:
        with Popen(command, stdin=PIPE, stdout=PIPE, stderr=complaints, bufsize=0, env=environment) as worker:
            try:
                assert worker.stdout is not None
                while done := worker.stdout.read(_DOTS_AT_ONCE):
                    progress(len(done))
                # stdin stays open until here: closing it ends the worker.
                code = worker.wait()
            except BaseException:
                worker.kill()
                raise
        if code != 0:
            complaints.seek(0)
            raise ValueError(_reason(complaints.read(_READ_OF_COMPLAINTS)))


def _reason(complaints: bytes) -> str:
    lines = [" ".join(line.split()) for line in complaints.decode("utf-8", errors="replace").splitlines()]
    telling = next((line for line in lines if "failed" in line), next(filter(None, lines), "it gave no reason"))
    return telling.rpartition("failed to quantize: ")[2][:_SHOWN_OF_A_REASON]


@functools.cache
def _ggml() -> Any:
    """The ggml library that llama-cpp-python carries."""
    library = _ctypes_extensions.load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
