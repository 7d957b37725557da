"""llama.cpp's own tokenizer, read from a GGUF: what the phone will do to the text is what we do to it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp

from ..errors import TrailmedError
from . import llama_log

_NO_TOKEN = -1
_TYPE_NONE = 0
_TYPE_SENTENCEPIECE = 1


class Tokenizer:
    """The tokenizer of the GGUF at `path`, loaded without its weights (`vocab_only`).

    Raises `TrailmedError` when the file is missing or llama.cpp finds no tokenizer in it. Not safe for use by several
    threads at once.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise TrailmedError(f"{path}: no such file")
        self.path = path
        llama_log.silence()
        llama_log.forget_complaints()
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        parameters.n_gpu_layers = 0
        self._model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self._model:
            raise TrailmedError(f"{path}: llama.cpp cannot read its tokenizer ({llama_log.last_complaint()}); use another GGUF")
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        if llama_cpp.llama_vocab_type(self._vocab) == _TYPE_NONE:
            raise TrailmedError(f"{path}: holds no tokenizer; use a GGUF of a whole model")

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`. Control tokens written in it (`<|im_start|>`) become those tokens; no BOS or EOS is added.

        Raises `TrailmedError` when `text` holds half a surrogate pair, which no UTF-8 can carry.
        """
        try:
            raw = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TrailmedError(f"text to tokenize is not valid Unicode at character {error.start}; remove that character") from error
        room = len(raw) + 8
        while True:
            ids = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(self._vocab, raw, len(raw), ids, room, False, True)
            if count >= 0:
                return list(ids[:count])
            room = -count

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens spelled out; bytes that are no UTF-8 become U+FFFD. `decode(encode(t)) == t`.

        Raises `TrailmedError` for an id outside the vocabulary.
        """
        pieces = []
        for position, token in enumerate(ids):
            if not 0 <= token < self.size:
                raise TrailmedError(f"{self.path}: no token {token}; ids run from 0 to {self.size - 1}")
            # sentencepiece writes a space before the text that was never typed; llama.cpp drops it when asked to strip one
            pieces.append(self._piece(token, lstrip=1 if position == 0 and self._adds_space else 0))
        return b"".join(pieces).decode("utf-8", errors="replace")

    def token_text(self, token: int) -> str:
        """The vocabulary's spelling of `token` ("" for no token, -1)."""
        if token == _NO_TOKEN:
            return ""
        raw: bytes = llama_cpp.llama_vocab_get_text(self._vocab, token)
        return raw.decode("utf-8", errors="replace")

    @cached_property
    def size(self) -> int:
        """How many tokens the vocabulary has."""
        return int(llama_cpp.llama_vocab_n_tokens(self._vocab))

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends generation (EOS, end of turn, …), as llama.cpp judges it."""
        return frozenset(token for token in range(self.size) if llama_cpp.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def bos_id(self) -> int | None:
        """The beginning-of-sequence token, if there is one."""
        token = int(llama_cpp.llama_vocab_bos(self._vocab))
        return None if token == _NO_TOKEN else token

    @cached_property
    def eos_id(self) -> int | None:
        """The end-of-sequence token, if there is one (`eos_ids` has all that end an answer)."""
        token = int(llama_cpp.llama_vocab_eos(self._vocab))
        return None if token == _NO_TOKEN else token

    @property
    def bos_token(self) -> str:
        """Spelling of the beginning-of-sequence token, "" if there is none."""
        return self.token_text(int(llama_cpp.llama_vocab_bos(self._vocab)))

    @property
    def eos_token(self) -> str:
        """Spelling of the end-of-sequence token, "" if there is none."""
        return self.token_text(int(llama_cpp.llama_vocab_eos(self._vocab)))

    @cached_property
    def _adds_space(self) -> bool:
        if llama_cpp.llama_vocab_type(self._vocab) != _TYPE_SENTENCEPIECE:
            return False
        value = ctypes.create_string_buffer(8)
        found = llama_cpp.llama_model_meta_val_str(self._model, b"tokenizer.ggml.add_space_prefix", value, len(value))
        return found < 0 or value.value == b"true"

    def _piece(self, token: int, lstrip: int) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, room, lstrip, True)
            if count >= 0:
                return buffer.raw[:count]
            room = -count
