"""The GGUF at a path as an `Engine` on llama.cpp, and what its metadata says about it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gguf

from ..files import sha256_of_file
from ..models.chat_template import ChatTemplate
from ..models.gguf_file import GgufFile
from .engine import EngineIdentity, OnReply, Reply
from .llama_runtime import DecodeSettings, Generation, LlamaRuntime

LLAMA_CPP = "llama.cpp"

_KEY_EDIT_SHA256 = "trailmed.edit.sha256"  # written by export.bake, which the device does not import
_KEY_FILE_TYPE = "general.file_type"
_KEY_CHAT_TEMPLATE = "tokenizer.chat_template"


class LlamaEngine:
    """Answers with `LlamaRuntime`, whose errors it raises, under the GGUF's own chat template; a context manager.

    Raises `TrailmedError` also when the GGUF has no chat template.
    """

    def __init__(self, path: Path, settings: DecodeSettings = DecodeSettings()) -> None:
        with GgufFile.open(path) as file:
            wanted = (_KEY_EDIT_SHA256, _KEY_FILE_TYPE, _KEY_CHAT_TEMPLATE)
            metadata = {key: file.metadata[key] for key in wanted if key in file.metadata}
        self.runtime = LlamaRuntime(path, settings)
        self._metadata = metadata
        source = metadata.get(_KEY_CHAT_TEMPLATE)
        self._template = ChatTemplate(
            source if isinstance(source, str) else None,
            origin=str(path), bos_token=self.runtime.tokenizer.bos_token, eos_token=self.runtime.tokenizer.eos_token,
        )
        self._template.prompt("ping")  # a missing or broken one is told before anything is begun

    def __enter__(self) -> Self:
        self.runtime.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.runtime.__exit__(kind, error, trace)

    @cached_property
    def identity(self) -> EngineIdentity:
        """See `Engine.identity`; the file is hashed when this is first asked for."""
        path, metadata = self.runtime.path, self._metadata
        return EngineIdentity(
            LLAMA_CPP, path.name, sha256_of_file(path), edit_sha256_of(metadata), type_of(metadata), asdict(self.runtime.settings),
        )

    def encode(self, questions: Sequence[str]) -> list[list[int]]:
        """Each question as a single user turn under the model's own chat template, as token ids."""
        return [self.runtime.encode(self._template.prompt(question)) for question in questions]

    def answer(self, questions: Sequence[str], on_reply: OnReply) -> None:
        """See `Engine.answer`. Up to `slots` questions are answered together."""
        def finished(index: int, generation: Generation) -> None:
            on_reply(index, Reply(generation.text, len(generation.tokens), generation.stopped))

        self.runtime.generate(self.encode(questions), on_generation=finished)


def edit_sha256_of(metadata: Mapping[str, Any]) -> str | None:
    value = metadata.get(_KEY_EDIT_SHA256)
    return value if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) else None


def type_of(metadata: Mapping[str, Any]) -> str:
    """The file's type under llama.cpp's name (F16, Q8_0, Q4_K_M, …)."""
    try:
        name: str = gguf.LlamaFileType(metadata[_KEY_FILE_TYPE]).name
    except (KeyError, ValueError):
        return "unknown"
    return name.removeprefix("ALL_").removeprefix("MOSTLY_")
