"""What this machine is: figures that belong beside every measured speed."""

from __future__ import annotations

import os
import platform
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_CPU_INFO = Path("/proc/cpuinfo")
_SELF_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""Resets VmHWM (proc(5), /proc/pid/clear_refs)."""


@dataclass(frozen=True, slots=True)
class Machine:
    """cpu: the processor's name; physical_cores and logical_cores: those this process may use; memory_bytes: installed RAM."""

    cpu: str
    physical_cores: int
    logical_cores: int
    memory_bytes: int
    system: str
    python: str


def machine() -> Machine:
    """The machine this process runs on."""
    return Machine(
        cpu=_cpu_name(), physical_cores=physical_cores(), logical_cores=_usable_cores(),
        memory_bytes=int(psutil.virtual_memory().total),
        system=f"{platform.system()} {platform.release()} {platform.machine()}", python=platform.python_version(),
    )


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once; at least 1.

    llama.cpp's matrix products gain nothing from the second thread of a core, so this is the default thread count.
    """
    return max(1, min(psutil.cpu_count(logical=False) or _usable_cores(), _usable_cores()))


def peak_rss_bytes() -> int:
    """The most memory this process has held at once, in bytes, since the start or the last `reset_peak_rss`.

    Memory-mapped weights that were read count. Linux: VmHWM of /proc/self/status; elsewhere `getrusage`, which nothing resets.
    """
    try:
        status = _SELF_STATUS.read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


def reset_peak_rss() -> None:
    """Start counting `peak_rss_bytes` anew from what the process holds now (Linux; elsewhere nothing happens)."""
    with suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_name() -> str:
    # platform.processor() is empty on most Linux systems
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Hardware")))
    return next(named, "") or platform.processor() or platform.machine() or "unknown"
