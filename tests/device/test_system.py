from __future__ import annotations

import os
import subprocess
import sys

import psutil

from trailmed.device.system import machine, physical_cores


def test_machine_facts_are_plausible() -> None:
    facts = machine()
    assert facts.cpu.strip()
    assert 1 <= facts.physical_cores == physical_cores() <= facts.logical_cores <= (os.cpu_count() or 1)
    assert facts.memory_bytes == psutil.virtual_memory().total


def test_peak_memory_keeps_what_was_once_held() -> None:
    # in a process of its own: this one's peak may already be higher
    code = (
        "from trailmed.device.system import peak_rss_bytes; before = peak_rss_bytes(); block = bytes(1 << 8) * (1 << 20); del block; "
        "print(before, peak_rss_bytes())"
    )
    before, after = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split())
    assert before > 1 << 20
    assert (1 << 28) <= after < before + (1 << 29)
