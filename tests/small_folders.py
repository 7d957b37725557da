"""Small random models as the folders that other programs read: Hugging Face's, and ONNX Runtime GenAI's made from one."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import transformers
from small_models import CHAT_TEMPLATE, CONTROL_TOKENS, bpe_vocabulary
from tokenizers import Tokenizer, decoders, processors

BOS, _, EOS = CONTROL_TOKENS


def chat_directory(module: Any, directory: Path, *, chat_template: str | None = CHAT_TEMPLATE, **saving: Any) -> Path:
    """`module` as a Hugging Face directory with the tokenizer that `small_models.write_gguf` gives to a GGUF, and its chat template.

    Unlike that one, the tokenizer adds BOS when it is left to itself. `saving` goes to `save_pretrained`.
    """
    module.save_pretrained(directory, **saving)
    tokenizer = Tokenizer.from_str(bpe_vocabulary().tokenizer.to_str())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=BOS)
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return directory


def onnx_folder(directory: Path, folder: Path, precision: str = "fp32") -> Path:
    """`folder` with the model in the Hugging Face `directory`, made by ONNX Runtime GenAI's model builder for the CPU."""
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    arguments = ("", str(directory), str(folder), precision, "cpu", str(folder.with_name(f"{folder.name}-cache")))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        create_model(*arguments, **parse_extra_options(*arguments, []))
    return folder


def change_json(path: Path, **changes: Any) -> None:
    """Set the names `changes` in the JSON object in `path`, which is made if need be; None takes a name out."""
    value = json.loads(path.read_text()) if path.exists() else {}
    value.update(changes)
    path.write_text(json.dumps({name: entry for name, entry in value.items() if entry is not None}))
