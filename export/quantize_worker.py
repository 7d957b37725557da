"""The process in which `llama_model_quantize` runs: `python -m trailmed.export.quantize_worker SOURCE TARGET FILE_TYPE THREADS`.

llama.cpp aborts its process on hyperparameters that contradict each other; here that ends this worker, not trailmed.
It writes one dot to stdout per tensor and, when it fails, llama.cpp's reason to stderr. It ends when its stdin does.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from typing import Any

import llama_cpp

_LOG_LEVEL_ERROR = 4
"""GGML_LOG_LEVEL_ERROR of ggml.h."""
_TENSOR_DONE = re.compile(rb"^\[ *\d+/ *\d+\]")
_BUFFER_BYTES = 1 << 30


def main(source: str, target: str, file_type: int, threads: int) -> int:
    """Quantize the GGUF `source` (float types) into `target`; returns llama.cpp's code, 0 for success."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = file_type
    params.nthread = threads
    params.max_buf_size = _BUFFER_BYTES
    # ctypes callbacks die with their last reference: this one must outlive the call.
    callback = llama_cpp.llama_log_callback(_report)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return int(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)))


def _report(level: int, text: bytes | None, _user_data: Any) -> None:
    if text and _TENSOR_DONE.match(text):
        os.write(sys.stdout.fileno(), b".")
    elif text and level == _LOG_LEVEL_ERROR:
        os.write(sys.stderr.fileno(), text)


def _end_with_parent() -> None:
    """A killed parent closes our stdin; going on would write into the file of its successor."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
