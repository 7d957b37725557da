"""Which floating-point type the PyTorch side computes in on this machine."""

from __future__ import annotations

import torch


def compute_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively (AVX512-BF16 or AMX; 3 to 4 times float32's speed there), else float32.

    Emulated bfloat16 is slower than float32 and no better, so every other processor gets float32.
    """
    native = torch.backends.mkldnn.is_available() and (  # type: ignore[no-untyped-call]
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )
    return torch.bfloat16 if native else torch.float32
