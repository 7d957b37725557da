"""The one place where llama.cpp's log goes: nothing is printed, errors are kept so that ours can quote them."""

from __future__ import annotations

import ctypes
import threading

import llama_cpp

_LEVEL_ERROR = 4
_LEVEL_CONTINUE = 5
"""Of `enum ggml_log_level` (ggml.h)."""
_KEPT_LINES = 20

_complaints: list[str] = []
_lock = threading.Lock()
_level_in_force = 0


def _collect(level: int, text: bytes | None, _user_data: ctypes.c_void_p) -> None:
    """ggml's log callback (`ggml_log_callback` of ggml.h); level 5 continues the previous message."""
    global _level_in_force
    with _lock:
        if level != _LEVEL_CONTINUE:
            _level_in_force = level
        if _level_in_force == _LEVEL_ERROR and text:
            line = " ".join(text.decode("utf-8", errors="replace").split())
            if line.strip(". ") and len(_complaints) < _KEPT_LINES:
                _complaints.append(line)


# ctypes callbacks die with their last reference, and llama.cpp would then call freed memory: this one lives with the module.
_callback = llama_cpp.llama_log_callback(_collect)


def silence() -> None:
    """Send llama.cpp's and ggml's log to this module; call it before each use of llama.cpp (importing llama_cpp resets it)."""
    llama_cpp.llama_log_set(_callback, ctypes.c_void_p(0))


def forget_complaints() -> None:
    """Drop what was collected, so that `last_complaint` speaks of what comes next."""
    with _lock:
        _complaints.clear()


def last_complaint(default: str = "llama.cpp gave no reason") -> str:
    """What llama.cpp complained of since `forget_complaints`: the first error, for later ones are its echoes; at most 300 characters."""
    with _lock:
        return _complaints[0][:300] if _complaints else default
