"""A folder made by ONNX Runtime GenAI's model builder as an `Engine` on ONNX Runtime, on the CPU.

`python -m onnxruntime_genai.models.builder` writes genai_config.json, model.onnx, its data and the tokenizer's files; an app on a phone
runs them as this engine does, tokenizer included.

The folder is a stranger's: `onnx_folder` checks it before ONNX Runtime sees any of it.

ONNX Runtime and GenAI report usage to Microsoft unless told not to: they are told so before they are loaded. What a person in distress
asks stays on the machine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import tokenizers

from ..errors import TrailmedError
from .engine import EngineIdentity, OnReply, Reply
from .model_folder import chat_template_of, folder_name, sha256_of_files
from .onnx_folder import BUILD, data_files, genai_config, imported, one_line, parsed_model, weight_type
from .system import physical_cores

ONNXRUNTIME_GENAI = "onnxruntime-genai"

_FATAL = 4  # ORT_LOGGING_LEVEL_FATAL; everything else is raised as well


@dataclass(frozen=True, slots=True)
class OnnxSettings:
    """How an `OnnxEngine` answers. Raises `TrailmedError` for a count below 1."""

    max_tokens: int = field(default=96, metadata={"help": "longest answer, in tokens"})
    slots: int = field(default=16, metadata={"help": "questions answered together"})
    threads: int = field(default_factory=physical_cores, metadata={"help": "CPU threads (default: physical cores)"})

    def __post_init__(self) -> None:
        for name in ("max_tokens", "slots", "threads"):
            if getattr(self, name) < 1:
                raise TrailmedError(f"ONNX setting {name} is {getattr(self, name)}; it must be at least 1")


class OnnxEngine:
    """Answers with the model in the folder at `path` (genai_config.json, model.onnx, tokenizer); a context manager.

    Greedy, whatever genai_config.json says of sampling and penalties, in batches of `slots` questions of like length, the longest
    first; one at a time where the model keeps more than keys and values (a recurrent or sliding state), which padding would spoil.
    An answer ends at the end tokens that genai_config.json names, and is given when it has ended. Questions are encoded under the
    folder's own chat template, which spells BOS out, by GenAI's own tokenizer, as an app on the phone would encode them.

    `identity.sha256` is that of model.onnx and its data files, one after the other, data in the order of their names
    (`cat model.onnx model.onnx.data | sha256sum`). `identity.type` is that of most of the weights multiplied: F32, F16, BF16, int8 or
    int4 ("unknown" when none can be found).

    Raises `TrailmedError` when onnxruntime-genai is not installed, the folder is not whole, its configuration or model asks for more
    than its own files, it is no plain text model, has no chat template, or ONNX Runtime cannot load it. Not safe for use by several
    threads at once.
    """

    def __init__(self, path: Path, settings: OnnxSettings = OnnxSettings()) -> None:
        self._model: Any = None
        self._tokenizer: Any = None
        self.path = path
        self.settings = settings
        self._config = genai_config(path)
        self._template = chat_template_of(path)
        self._decoder = _decoder(path)
        self._genai = _genai()
        graph = parsed_model(self._config.model_file)
        weights = [self._config.model_file, *data_files(graph, self._config.model_file)]
        self.identity = EngineIdentity(
            ONNXRUNTIME_GENAI, folder_name(path), sha256_of_files(weights), None, weight_type(graph), asdict(settings),
        )
        del graph
        self._load()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model; the engine cannot be used afterwards. Closing twice does no harm."""
        self._model = self._tokenizer = None

    def encode(self, questions: Sequence[str]) -> list[list[int]]:
        """Each question as a single user turn under the model's own chat template, as token ids.

        Raises `TrailmedError` for a question that holds half a surrogate pair, or a NUL, where GenAI would stop reading.
        """
        encoded = []
        for number, question in enumerate(questions, start=1):
            prompt = self._template.prompt(question)
            if re.search("[\0\ud800-\udfff]", prompt):
                raise TrailmedError(
                    f"{self.path}: question {number} of {len(questions)} holds a NUL or half a character; take that out of it"
                )
            encoded.append(self._tokenized(prompt))
        return encoded

    def answer(self, questions: Sequence[str], on_reply: OnReply) -> None:
        """See `Engine.answer`. Raises `TrailmedError` as `encode` does, for a question too long for the model's context, when memory
        runs out, and for a model that fails or returns logits that are not numbers."""
        if self._model is None:
            raise TrailmedError(f"{self.path}: the engine was closed; open it anew")
        prompts = self.encode(questions)
        self._check(prompts)
        slots = self.settings.slots if self._config.padded else 1
        # the batch that needs most memory first: if it cannot be had, that shows at once
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        for start in range(0, len(order), slots):
            batch = order[start : start + slots]

            def finished(row: int, tokens: Sequence[int], stopped: Literal["eos", "length"], batch: Sequence[int] = batch) -> None:
                on_reply(batch[row], Reply(self._text(tokens), len(tokens), stopped))

            self._decode([prompts[index] for index in batch], finished)

    def _load(self) -> None:
        # what a question becomes ends in the same token whatever it is: that of the answer's opening
        try:
            config = self._genai.Config(str(self.path))
            self._tokenizer = self._genai.Tokenizer(config)
            self._tokenizer.update_options(add_special_tokens="false", skip_special_tokens="true")
            last = self.encode(["?"])[0][-1:]
            self._padding = 0 if last != [0] else 1
            session = {"intra_op_num_threads": self.settings.threads, "log_severity_level": _FATAL}
            config.clear_providers()
            config.overlay(json.dumps({"model": {"pad_token_id": self._padding, "decoder": {"session_options": session}}}))
            self._model = self._genai.Model(config)
        except (RuntimeError, MemoryError, ValueError, TypeError) as error:
            raise TrailmedError(f"{self.path}: ONNX Runtime GenAI cannot load it ({one_line(error)}); {BUILD}") from error

    def _tokenized(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text).tolist()
        return tokens

    def _text(self, tokens: Sequence[int]) -> str:
        # not GenAI's decode: it drops whatever follows half a character, and its stream drops the space after one
        return str(self._decoder.decode(list(tokens), skip_special_tokens=True))

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        for number, prompt in enumerate(prompts, start=1):
            where = f"{self.path}: question {number} of {len(prompts)}"
            if not prompt:
                raise TrailmedError(f"{where} becomes no token at all under its chat template; use another model")
            if max(prompt) >= self._config.vocabulary_size:
                raise TrailmedError(
                    f"{where} has token {max(prompt)}, the model ends at {self._config.vocabulary_size - 1}; its tokenizer is another "
                    f"model's, {BUILD}"
                )
            if prompt[-1] == self._padding:
                # GenAI takes padding at the end of a prompt away, whether we put it there or not
                raise TrailmedError(f"{where} ends in the token for padding; use a chat template that always opens the answer alike")
            if len(prompt) + self.settings.max_tokens > self._config.context_length:
                raise TrailmedError(
                    f"{where} has {len(prompt)} tokens; with {self.settings.max_tokens} for the answer that is more than the model's "
                    f"context of {self._config.context_length}; shorten it or lower max_tokens"
                )

    def _decode(
        self, prompts: Sequence[Sequence[int]], finished: Callable[[int, Sequence[int], Literal["eos", "length"]], None],
    ) -> None:
        """Answer one batch of token-id `prompts`; `finished` is given a prompt's place and its answer's tokens without the end token."""
        width = max(map(len, prompts))
        # on the right: GenAI derives each row's length from it, and GroupQueryAttention knows no padding on the left
        tokens = np.full((len(prompts), width), self._padding, dtype=np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        answers: list[list[int]] = [[] for _ in prompts]
        waiting = set(range(len(prompts)))
        steps = self._steps(tokens)
        while waiting:
            for row, token in enumerate(next(steps)):
                if row not in waiting:
                    continue
                if token in self._config.end_ids:
                    waiting.remove(row)
                    finished(row, answers[row], "eos")
                    continue
                answers[row].append(token)
                if len(answers[row]) == self.settings.max_tokens:
                    waiting.remove(row)
                    finished(row, answers[row], "length")

    def _steps(self, tokens: npt.NDArray[np.int32]) -> Iterator[list[int]]:
        """The next token of each row of `tokens` [rows, width], step by step, `max_tokens` times at most."""
        try:
            parameters = self._genai.GeneratorParams(self._model)
            parameters.set_search_options(
                batch_size=len(tokens), max_length=tokens.shape[1] + self.settings.max_tokens, min_length=0, do_sample=False,
                num_beams=1, num_return_sequences=1, repetition_penalty=1.0, no_repeat_ngram_size=0,
            )
            generator = self._genai.Generator(self._model, parameters)
            generator.append_tokens(tokens)
            for step in range(self.settings.max_tokens):
                generator.generate_next_token()
                if step == 0 and not np.isfinite(generator.get_logits()).all():
                    raise TrailmedError(f"{self.path}: its logits are not numbers; its weights are broken, {BUILD}")
                yield generator.get_next_tokens().tolist()
        except (RuntimeError, MemoryError, ValueError, TypeError) as error:
            raise TrailmedError(
                f"{self.path}: ONNX Runtime GenAI failed over a batch of {len(tokens)} ({one_line(error)}); lower slots, or {BUILD}"
            ) from error


def _genai() -> ModuleType:
    """onnxruntime_genai, told to report nothing before it is loaded."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    genai = imported("onnxruntime_genai")
    genai.disable_telemetry_events()
    return genai


def _decoder(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise TrailmedError(f"{folder}: has no tokenizer.json; {BUILD}")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # all that the Rust side raises
        raise TrailmedError(f"{path}: not a tokenizer ({one_line(error)}); {BUILD}") from error
