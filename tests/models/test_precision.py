"""The choice of the floating-point type, by the processor's features."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trailmed.models.precision import compute_dtype

CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.parametrize(
    ("onednn", "avx512_bf16", "amx", "dtype"), [
        (True, True, False, torch.bfloat16),
        (True, False, True, torch.bfloat16),
        (True, True, True, torch.bfloat16),
        (True, False, False, torch.float32),
        (False, True, True, torch.float32),
        (False, False, False, torch.float32),
    ],
)
def test_bfloat16_only_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, onednn: bool, avx512_bf16: bool, amx: bool, dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert compute_dtype() is dtype


@pytest.mark.skipif(not CPUINFO.is_file(), reason="this system does not list its processor's features")
def test_this_machine() -> None:
    features = {word for line in CPUINFO.read_text().splitlines() if line.startswith("flags") for word in line.split()}
    native = torch.backends.mkldnn.is_available() and bool(features & {"avx512_bf16", "amx_bf16"})
    assert compute_dtype() is (torch.bfloat16 if native else torch.float32)
