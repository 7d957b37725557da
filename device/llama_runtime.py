"""Greedy decoding of many prompts at once on llama.cpp, through llama-cpp-python's low-level API.

All sequences share one context. A sequence leaves at its end and its place goes to the next prompt (continuous batching: Yu et al.
2022, "Orca"). What all prompts begin with is computed once. There are two ways to go:

* apart: each sequence has a pool of cache cells of its own, and every step is one `llama_decode` call with one token of each, whether
  of its prompt or of its answer. Attention then costs little, and batches are always equally wide. For answers to short prompts.
* together: one pool for all; a step carries the next token of each running answer and as many tokens of new prompts as still fit.
  Attention has to look through the cells of all sequences for its own. For prompts of any length, and for models that cannot be copied.

llama.cpp's kernels are not batch-invariant: the same prompts under the same settings give the same tokens, but other company in
the batch can tip a near-tie. `exact=True` decodes one sequence at a time, exactly as `llama_cpp.Llama.generate` does.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..errors import TrailmedError
from ..models import llama_log
from ..models.gguf_file import GgufFile
from ..models.tokenizer import Tokenizer
from ..progress import Advance, no_progress
from .llama_context import POOL_STEP, LlamaContext
from .system import physical_cores

_NO_VOCABULARY = 0
_MOST_CELLS = 16_384
"""Cache cells held for all sequences together, unless a single one needs more; 32 chat prompts with short answers need some 3500,
or 8192 if kept apart."""
_MOST_BYTES_APART = 1 << 29
"""Cache bytes up to which sequences are kept apart; 8192 cells need 0.1 GB for Qwen2.5-0.5B, 1.6 GB for SmolLM2-1.7B."""


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """max_tokens: longest answer, in tokens; slots: sequences decoded together; threads: CPU threads; exact: one sequence at a time.

    Raises `TrailmedError` when a count is below 1.
    """

    max_tokens: int = 48
    slots: int = 64
    threads: int = field(default_factory=physical_cores)
    exact: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "slots", "threads"):
            if getattr(self, name) < 1:
                raise TrailmedError(f"decode setting {name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer: its tokens without the end token, their text, and whether an end token or the length limit stopped it."""

    tokens: tuple[int, ...]
    text: str
    stopped: Literal["eos", "length"]


OnGeneration = Callable[[int, Generation], None]
"""Called with a prompt's index and its finished answer."""


def _ignore(_index: int, _generation: Generation) -> None:
    """The `OnGeneration` that nobody listens to."""


@dataclass(frozen=True, slots=True)
class DecodeStats:
    """What a `generate` call did: tokens in the prompts, tokens in the answers, wall-clock seconds, and the length of the shared
    prefix, in tokens, that was computed once instead of once a prompt."""

    prompt_tokens: int
    generated_tokens: int
    seconds: float
    prefix_tokens_shared: int


@dataclass(slots=True)
class _Sequence:
    """A prompt being answered. `pending` are the tokens to feed next, the first of them at `position`; empty: it is over."""

    prompt: int  # index into the prompts
    slot: int
    cells: int  # cache cells set aside for it
    pending: Sequence[int]
    position: int

    def advance(self, fed: int) -> None:
        """The first `fed` pending tokens are in the batch."""
        self.position += fed
        self.pending = self.pending[fed:]


class LlamaRuntime:
    """The GGUF at `path`, open in llama.cpp on the CPU; a context manager. Not safe for use by several threads at once.

    Raises `TrailmedError` when the file is missing or damaged, llama.cpp cannot load it, or it is no model that generates text.
    """

    def __init__(self, path: Path, settings: DecodeSettings = DecodeSettings()) -> None:
        self._model: Any = None
        self.path = path
        self.settings = settings
        self.last_stats: DecodeStats | None = None
        with GgufFile.open(path) as file:  # llama.cpp's own reader trusts more than this one does
            head = file.metadata.get(f"{file.metadata.get('general.architecture')}.attention.key_length")
        llama_log.silence()
        llama_log.forget_complaints()
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise TrailmedError(f"{path}: llama.cpp cannot load it ({llama_log.last_complaint()}); use another GGUF")
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        if llama_cpp.llama_vocab_type(self._vocab) == _NO_VOCABULARY:
            self.close()
            raise TrailmedError(f"{path}: holds no tokenizer; use a GGUF of a whole model")
        if llama_cpp.llama_model_has_encoder(self._model) or not llama_cpp.llama_model_has_decoder(self._model):
            self.close()
            raise TrailmedError(f"{path}: not a model that continues text (it has an encoder); use a decoder-only GGUF")
        self._vocabulary_size = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self._context_limit = int(llama_cpp.llama_model_n_ctx_train(self._model))
        if not isinstance(head, int):
            head = int(llama_cpp.llama_model_n_embd(self._model)) // max(int(llama_cpp.llama_model_n_head(self._model)), 1)
        heads, layers = int(llama_cpp.llama_model_n_head_kv(self._model)), int(llama_cpp.llama_model_n_layer(self._model))
        self._cell_bytes = 2 * 2 * head * heads * layers  # keys and values of two bytes a number, as if all layers were like the first
        # a recurrent state cannot be cut back to a prefix, in a pool of its own or in one for all
        self._can_share = not (llama_cpp.llama_model_is_recurrent(self._model) or llama_cpp.llama_model_is_hybrid(self._model))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; the runtime cannot be used afterwards. Closing twice does no harm."""
        model, self._model = getattr(self, "_model", None), None
        if model:
            llama_cpp.llama_model_free(model)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the same GGUF (opened at first use; takes about half a second)."""
        return Tokenizer(self.path)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, control tokens written in it included; nothing is added (see `Tokenizer.encode`)."""
        return self.tokenizer.encode(text)

    def generate(self, prompts: Sequence[Sequence[int]], *, on_generation: OnGeneration = _ignore) -> list[Generation]:
        """Answer token-id `prompts` greedily (ties: lowest id), one `Generation` each, in their order.

        Deterministic for given prompts and settings. `on_generation` is given each answer, with its prompt's index, as soon as it is
        finished; `last_stats` says how fast it went.

        Raises `TrailmedError` when a prompt is empty, holds a token outside the vocabulary, or leaves no room for `max_tokens` in
        the model's context; when memory runs out; and when llama.cpp fails or returns logits that are not numbers.
        """
        started = time.perf_counter()
        limit = self.settings.max_tokens
        self._check(prompts, limit)
        answers: list[list[int]] = [[] for _ in prompts]
        generations: dict[int, Generation] = {}
        prefix = self._shared_prefix(prompts)
        with closing(self._steps(prompts, prefix, limit)) as steps:  # frees the context at once, also when interrupted
            for due, logits in steps:
                for sequence, token in zip(due, self._greedy(due, logits), strict=True):
                    answer = answers[sequence.prompt]
                    stopped: Literal["eos", "length"] = "length"
                    if llama_cpp.llama_vocab_is_eog(self._vocab, token):
                        stopped = "eos"
                    else:
                        answer.append(token)
                        if len(answer) < limit:
                            sequence.pending = [token]
                            continue
                    generations[sequence.prompt] = Generation(tuple(answer), self._text(answer), stopped)
                    on_generation(sequence.prompt, generations[sequence.prompt])
        self.last_stats = DecodeStats(
            prompt_tokens=sum(map(len, prompts)), generated_tokens=sum(map(len, answers)), seconds=time.perf_counter() - started,
            prefix_tokens_shared=prefix,
        )
        return [generations[index] for index in range(len(prompts))]

    def first_token_log_probs(self, prompts: Sequence[Sequence[int]], *, progress: Advance = no_progress) -> npt.NDArray[np.float32]:
        """Log-softmax, in nats, of the logits after each prompt's last token: float32 [len(prompts), vocabulary].

        All rows are kept at once (0.6 MB each for 151,936 tokens). Raises as `generate` does.
        """
        self._check(prompts, 1)
        result = np.empty((len(prompts), self._vocabulary_size), dtype=np.float32)
        with closing(self._steps(prompts, self._shared_prefix(prompts), 1)) as steps:
            for due, logits in steps:
                self._greedy(due, logits)  # for its check
                shifted = logits - logits.max(axis=1, keepdims=True)
                shifted -= np.log(np.exp(shifted, dtype=np.float64).sum(axis=1, keepdims=True)).astype(np.float32)
                for sequence, row in zip(due, shifted, strict=True):
                    result[sequence.prompt] = row
                    progress(1)
        return result

    def _check(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        if not self._model:
            raise TrailmedError(f"{self.path}: the runtime was closed; open it anew")
        for number, prompt in enumerate(prompts, start=1):
            where = f"{self.path}: prompt {number} of {len(prompts)}"
            if not prompt:
                raise TrailmedError(f"{where} is empty; give it at least one token")
            if min(prompt) < 0 or max(prompt) >= self._vocabulary_size:
                raise TrailmedError(f"{where} holds a token outside the vocabulary of {self._vocabulary_size}; encode it with this model")
            if len(prompt) + max_tokens > self._context_limit:
                raise TrailmedError(
                    f"{where} has {len(prompt)} tokens; with {max_tokens} for the answer that is more than the model's context "
                    f"of {self._context_limit}; shorten it or lower max_tokens"
                )

    def _shared_prefix(self, prompts: Sequence[Sequence[int]]) -> int:
        """How many tokens are computed once for all `prompts`: what they begin with, less than any whole prompt."""
        if len(prompts) < 2 or self.settings.exact or not self._can_share:
            return 0
        # what the least and the greatest prompt in lexical order begin with, all begin with
        least, greatest = min(prompts, key=list), max(prompts, key=list)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(least, greatest, strict=False)))
        return min(common, min(map(len, prompts)) - 1)

    def _steps(
        self, prompts: Sequence[Sequence[int]], prefix: int, max_tokens: int
    ) -> Generator[tuple[list[_Sequence], npt.NDArray[np.float32]]]:
        """Decode step by step; yields the sequences whose next token is due, and their logits [sequences, vocabulary].

        The logits are a view that the next step overwrites. The consumer sets `pending` to go on with a sequence; one left
        without is over.
        """
        if not prompts:
            return
        exact = self.settings.exact
        # the last token of an answer is never fed back, so its cell is never used
        needs = [len(prompt) - prefix + max_tokens - 1 for prompt in prompts]
        slots = 1 if exact else min(self.settings.slots, len(prompts), llama_cpp.llama_max_parallel_sequences() - 1)
        largest = sorted(needs, reverse=True)[:slots]
        cells = min(sum(largest), max(largest[0], _MOST_CELLS))
        pools = slots * POOL_STEP * -(-(prefix + largest[0]) // POOL_STEP)
        # a prompt without an answer, or without company, is best fed whole
        apart = (
            self._can_share and max_tokens > 1 and slots > 1
            and pools <= _MOST_CELLS and pools * self._cell_bytes <= _MOST_BYTES_APART
        )
        if apart:
            cells = pools - prefix
        with LlamaContext(
            self._model, self.path, cells=prefix + cells, slots=slots, threads=self.settings.threads, exact=exact, apart=apart,
        ) as context:
            context.feed_prefix(prompts[0][:prefix])
            queue = deque(range(len(prompts)))
            running: list[_Sequence] = []
            while queue or running:
                free_slots = sorted(set(range(slots)).difference(each.slot for each in running))
                for index in [*queue] if free_slots else ():
                    if free_slots and needs[index] <= cells:
                        queue.remove(index)
                        cells -= needs[index]
                        slot = free_slots.pop(0)
                        context.share_prefix(slot)
                        running.append(_Sequence(index, slot, needs[index], prompts[index][prefix:], prefix))
                due = self._feed_apart(context, running) if apart else self._feed_together(context, running)
                if not due:
                    continue
                yield due, context.logits(len(due))
                for sequence in due:
                    if not sequence.pending:
                        running.remove(sequence)
                        context.free(sequence.slot)
                        cells += sequence.cells

    def _feed_apart(self, context: LlamaContext, running: list[_Sequence]) -> list[_Sequence]:
        """One step of sequences kept apart: a token of each, as sequences 0, 1, 2, … Returns the ones that were fed to their end.

        A prompt with more tokens than there are sequences would hold its place for too long; it is fed by itself, but for its last.
        """
        running.sort(key=lambda each: each.slot)
        for slot in range(len(running)):
            if running[slot].slot != slot:  # nobody is left to take this place: the last one does
                last = running.pop()
                context.move(last.slot, slot)
                last.slot = slot
                running.insert(slot, last)
        for sequence in running:
            while len(sequence.pending) - 1 > len(running):
                sequence.advance(context.add(sequence.pending[:-1], sequence.position, sequence.slot, wanted=False))
                context.decode()
        for sequence in running:
            sequence.advance(context.add(sequence.pending[:1], sequence.position, sequence.slot, wanted=len(sequence.pending) == 1))
        context.decode()
        return [sequence for sequence in running if not sequence.pending]

    def _feed_together(self, context: LlamaContext, running: Sequence[_Sequence]) -> list[_Sequence]:
        """One `llama_decode` call: what is pending, as far as a batch holds it. Returns the sequences that were fed to their end."""
        due = []
        for sequence in sorted(running, key=lambda each: len(each.pending)):  # a long prompt must not hold running answers up
            fed = context.add(sequence.pending, sequence.position, sequence.slot)
            sequence.advance(fed)
            if fed and not sequence.pending:
                due.append(sequence)
        context.decode()
        return due

    def _greedy(self, due: Sequence[_Sequence], logits: npt.NDArray[np.float32]) -> list[int]:
        tokens = logits.argmax(axis=1)
        # argmax stops at a NaN, so the greatest value tells whether the row holds one
        broken = ~np.isfinite(logits[np.arange(len(tokens)), tokens])
        if broken.any():
            number = due[int(broken.argmax())].prompt + 1
            raise TrailmedError(f"{self.path}: the logits after prompt {number} are not numbers; its weights are broken, use another GGUF")
        result: list[int] = tokens.tolist()
        return result

    def _text(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, control tokens left out. Joined as bytes first: a character may be spread over several tokens."""
        return b"".join(map(self._piece, tokens)).decode("utf-8", errors="replace")

    def _piece(self, token: int) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, room, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            room = -count
