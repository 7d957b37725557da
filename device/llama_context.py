"""One llama.cpp context and its batch: cache cells for several sequences, in one pool or in one each, freed when the `with` block ends."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..errors import TrailmedError
from ..models import llama_log

_BATCH_TOKENS = 512
"""Tokens per `llama_decode` call: llama-cpp-python's default, which `exact` must keep to."""
POOL_STEP = 256
"""llama.cpp makes the pool of a sequence kept apart a multiple of this many cells, and attention looks through multiples of it."""
_FLASH_ATTENTION_AUTO = -1
_FLASH_ATTENTION_OFF = 0
_DECODE_ERRORS = {1: "no free cache cells", 2: "aborted", -1: "invalid batch", -2: "out of memory", -3: "computation failed"}


class LlamaContext:
    """A context of `model` with `cells` cache cells for sequences 0 … `slots` - 1.

    `apart` divides the cells evenly, a multiple of `POOL_STEP` each, and keeps a copy of the shared prefix in every pool. Attention then
    looks through the cells of its own sequence only, but a batch must hold equally many tokens of sequences 0, 1, 2, … without a gap:
    llama.cpp computes any other in pieces. Otherwise all share one ("unified") pool, and the prefix is sequence `slots`.
    `exact` gives the settings of llama-cpp-python's own `Llama` (apart, no flash attention).
    Raises `TrailmedError`, naming `path`, when there is not enough memory.
    """

    def __init__(self, model: Any, path: Path, *, cells: int, slots: int, threads: int, exact: bool, apart: bool) -> None:
        self._context: Any = None
        self._batch: Any = None
        self._path = path
        self._slots = slots
        self._apart = apart or exact
        self._prefix = 0
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = cells
        parameters.n_batch = parameters.n_ubatch = _BATCH_TOKENS
        parameters.n_seq_max = slots if self._apart else slots + 1
        parameters.n_outputs_max = parameters.n_seq_max
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.flash_attn_type = _FLASH_ATTENTION_OFF if exact else _FLASH_ATTENTION_AUTO
        parameters.kv_unified = not self._apart
        parameters.swa_full = True  # a sliding-window layer that drops old cells could not share a prefix
        parameters.offload_kqv = parameters.op_offload = False
        parameters.no_perf = True
        llama_log.silence()
        llama_log.forget_complaints()
        self._context = llama_cpp.llama_init_from_model(model, parameters)
        if not self._context:
            raise TrailmedError(
                f"{path}: llama.cpp cannot make room for {slots} sequences of {cells} tokens together "
                f"({llama_log.last_complaint()}); lower slots or max_tokens"
            )
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        self._vocabulary_size = int(llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        llama_log.forget_complaints()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and its cache. Closing twice does no harm."""
        batch, self._batch = getattr(self, "_batch", None), None
        if batch is not None:
            llama_cpp.llama_batch_free(batch)
        context, self._context = getattr(self, "_context", None), None
        if context:
            llama_cpp.llama_free(context)

    def feed_prefix(self, tokens: Sequence[int]) -> None:
        """Compute what every sequence begins with, once."""
        home = 0 if self._apart else self._slots
        while self._prefix < len(tokens):
            self._prefix += self.add(tokens[self._prefix :], self._prefix, home, wanted=False)
            self.decode()
        if self._apart and self._prefix:
            for slot in range(1, self._slots):
                llama_cpp.llama_memory_seq_cp(self._memory, home, slot, -1, -1)

    def share_prefix(self, slot: int) -> None:
        """Begin sequence `slot` with the prefix: in one pool, its cells now belong to both; a pool of its own holds it already."""
        if self._prefix and not self._apart:
            llama_cpp.llama_memory_seq_cp(self._memory, self._slots, slot, 0, self._prefix)

    def free(self, slot: int) -> None:
        """Give the cells of sequence `slot` back; a pool of its own keeps the prefix for the next one."""
        llama_cpp.llama_memory_seq_rm(self._memory, slot, self._prefix if self._apart else -1, -1)

    def move(self, source: int, target: int) -> None:
        """Let sequence `source` go on as sequence `target`, which is free. Only for sequences kept apart: all the pool is copied."""
        llama_cpp.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self.free(source)

    def add(self, tokens: Sequence[int], position: int, slot: int, *, wanted: bool = True) -> int:
        """Put `tokens` of sequence `slot`, the first at `position`, into the batch; returns how many still fitted.

        If `wanted`, logits are asked for at the last token, if it fitted.
        """
        batch = self._batch
        start = int(batch.n_tokens)
        count = min(len(tokens), _BATCH_TOKENS - start)
        for offset in range(count):
            batch.token[start + offset] = tokens[offset]
            batch.pos[start + offset] = position + offset
            batch.n_seq_id[start + offset] = 1
            batch.seq_id[start + offset][0] = slot
            batch.logits[start + offset] = wanted and offset == len(tokens) - 1
        batch.n_tokens = start + count
        return count

    def decode(self) -> None:
        """Compute the batch and empty it. Raises `TrailmedError` when llama.cpp fails."""
        code = llama_cpp.llama_decode(self._context, self._batch)
        self._batch.n_tokens = 0
        if code != 0:
            reason = llama_log.last_complaint(_DECODE_ERRORS.get(code, "no reason given"))
            raise TrailmedError(f"{self._path}: llama.cpp failed to decode (code {code}: {reason}); try fewer slots, or another GGUF")

    def logits(self, rows: int) -> npt.NDArray[np.float32]:
        """Logits float32 [rows, vocabulary] of the last `decode`, in the order they were asked for; a view until the next one."""
        pointer = llama_cpp.llama_get_logits(self._context)
        if not pointer:
            raise TrailmedError(f"{self._path}: the model gives no logits; use a GGUF of a text-generating model")
        return np.ctypeslib.as_array(pointer, shape=(rows, self._vocabulary_size))
