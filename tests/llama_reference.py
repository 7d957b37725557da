"""llama.cpp's logits, computed as exactly as it can: float32 cache, no flash attention, no repacked weights, one thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt
import torch

from trailmed.models import llama_log

_GGML_TYPE_F32 = 0
_FLASH_ATTENTION_OFF = 0


class LlamaReference:
    """A model open in llama.cpp. Use `llama_reference`, which closes it."""

    def __init__(self, path: Path, context_length: int, threads: int) -> None:
        llama_log.silence()
        llama_log.forget_complaints()
        model_parameters = llama_cpp.llama_model_default_params()
        model_parameters.n_gpu_layers = 0
        model_parameters.use_extra_bufts = False
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_parameters)
        assert self.model, llama_log.last_complaint()
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = context_length
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = _GGML_TYPE_F32
        parameters.flash_attn_type = _FLASH_ATTENTION_OFF
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        assert self.context, llama_log.last_complaint()
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits after every token of `ids`, float32 [len(ids), vocabulary]."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for position, token in enumerate(ids):
                batch.token[position] = token
                batch.pos[position] = position
                batch.n_seq_id[position] = 1
                batch.seq_id[position][0] = 0
                batch.logits[position] = 1
            assert llama_cpp.llama_decode(self.context, batch) == 0, llama_log.last_complaint()
            pointer = llama_cpp.llama_get_logits(self.context)
            return np.ctypeslib.as_array(pointer, shape=(len(ids), self.vocabulary)).copy()
        finally:
            llama_cpp.llama_batch_free(batch)

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


@contextmanager
def llama_reference(path: Path, *, context_length: int = 512, threads: int = 1) -> Iterator[LlamaReference]:
    """llama.cpp with the GGUF at `path` open, for prompts of up to `context_length` tokens."""
    reference = LlamaReference(path, context_length, threads)
    try:
        yield reference
    finally:
        reference.close()


def module_logits(module: torch.nn.Module, ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """A transformers module's logits after every token of `ids`, float32 [len(ids), vocabulary]."""
    with torch.inference_mode():
        logits: torch.Tensor = module(torch.tensor([list(ids)])).logits[0].float()
    return logits.numpy()


def mean_kl(reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    """Mean over positions of KL(reference ‖ other) in nats, from logits [n, vocabulary]."""
    first = torch.log_softmax(torch.from_numpy(reference).double(), dim=-1)
    second = torch.log_softmax(torch.from_numpy(other).double(), dim=-1)
    return float((first.exp() * (first - second)).sum(-1).mean())
