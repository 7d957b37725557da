"""A Hugging Face directory, or a GGUF with its weights dequantized, as an `Engine` on transformers and PyTorch, on the CPU.

This is full precision as the model's maker meant it: what a quantized model on the phone is compared with. Several questions are
answered together, padded on the left; the row of an answer that has ended leaves the batch, cache and all, so that the others go on
faster. transformers' own `generate` is not used: it would apply the checkpoint's sampling habits (a repetition penalty, say), where
an `Engine` is to be greedy, and it gives answers only when the last of a batch has ended.

A checkpoint is a stranger's: only safetensors are read, never a pickle; code that comes with it never runs; nothing is fetched.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.utils import logging as transformers_logging

from ..errors import TrailmedError
from ..files import sha256_of_file
from ..models.chat_template import ChatTemplate
from ..models.gguf_file import GgufFile
from ..models.load import load_model
from ..models.precision import compute_dtype
from ..models.source import check_checkpoint
from .engine import EngineIdentity, OnReply, Reply
from .llama_engine import edit_sha256_of, type_of
from .model_folder import chat_template_of, folder_name, json_object, sha256_of_files
from .system import physical_cores

TRANSFORMERS = "transformers"

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_TYPES = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
"""Element types as safetensors and llama.cpp both name them; whatever else a checkpoint holds has no such name."""
_NEEDED_INPUTS = ("input_ids", "attention_mask", "past_key_values")
_OPTIONAL_INPUTS = ("position_ids", "use_cache", "logits_to_keep")
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_UNPRINTED_TOKENS = (2, 3)
"""Unknown and control: GGUF token types (llama.h, `llama_token_type`) that llama.cpp leaves out of a text."""


def _default_dtype() -> str:
    return next(name for name, dtype in _DTYPES.items() if dtype is compute_dtype())


@dataclass(frozen=True, slots=True)
class TransformersSettings:
    """How a `TransformersEngine` answers. Raises `TrailmedError` for a count below 1 and an unknown type."""

    max_tokens: int = field(default=96, metadata={"help": "longest answer, in tokens"})
    slots: int = field(default=16, metadata={"help": "questions answered together"})
    threads: int = field(default_factory=physical_cores, metadata={"help": "CPU threads (default: physical cores)"})
    dtype: str = field(
        default_factory=_default_dtype,
        metadata={"help": "type computed in: bfloat16 or float32 (default: bfloat16 where the processor multiplies it natively)"},
    )

    def __post_init__(self) -> None:
        for name in ("max_tokens", "slots", "threads"):
            if getattr(self, name) < 1:
                raise TrailmedError(f"transformers setting {name} is {getattr(self, name)}; it must be at least 1")
        if self.dtype not in _DTYPES:
            raise TrailmedError(f"transformers setting dtype is {self.dtype!r}; choose from {', '.join(_DTYPES)}")


@dataclass(frozen=True, slots=True)
class _Opened:
    """A model ready to answer, wherever it came from. `encode` may raise anything for a text that it cannot encode."""

    module: Any
    template: ChatTemplate
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    end_ids: frozenset[int]


class TransformersEngine:
    """Answers with the model at `path`, a Hugging Face directory (config.json, safetensors, tokenizer) or a GGUF; a context manager.

    Greedy (ties: lowest id), in batches of `slots` questions of like length, the longest first. An answer ends at any of the end
    tokens in generation_config.json (config.json where that is missing) and the tokenizer's own; a GGUF's are llama.cpp's. Each reply
    is given when it has ended. Questions are encoded under the model's own chat template, which spells BOS out: none is added.

    `identity.sha256` is that of the weights: of model.safetensors or the GGUF, or of all shards' bytes one after the other in the
    order of their names (`cat *.safetensors | sha256sum` where nothing else lies there). `identity.type` is what the weights have been
    rounded to: the files' type, or BF16 where that holds more and bfloat16 is computed in; a quantized GGUF's is "dequantized Q8_0".
    `edit_sha256` is known of GGUFs only.

    Raises `TrailmedError` when there is no such model, its weights are pickled, quantized, incomplete or broken, it asks for code of
    its own, or transformers does not know it or cannot load it. Not safe for use by several threads at once.
    """

    def __init__(self, path: Path, settings: TransformersSettings = TransformersSettings()) -> None:
        self._opened: _Opened | None = None
        self.path = path
        self.settings = settings
        dtype = _DTYPES[settings.dtype]
        if path.is_dir():
            name, sha256, edit_sha256, type_, self._opened = _open_directory(path, dtype)
        else:
            name, sha256, edit_sha256, type_, self._opened = _open_gguf(path, dtype)
        self.identity = EngineIdentity(TRANSFORMERS, name, sha256, edit_sha256, type_, asdict(settings))
        self._inputs = _inputs_of(self._opened.module, path)
        self._vocabulary_size = int(self._opened.module.get_input_embeddings().num_embeddings)
        limit = getattr(self._opened.module.config.get_text_config(), "max_position_embeddings", None)
        self._context_limit = limit if isinstance(limit, int) and limit > 0 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the model; the engine cannot be used afterwards. Closing twice does no harm."""
        self._opened = None

    def encode(self, questions: Sequence[str]) -> list[list[int]]:
        """Each question as a single user turn under the model's own chat template, as token ids.

        Raises `TrailmedError` for a model without chat template and a question that the tokenizer refuses.
        """
        opened = self._usable()
        encoded = []
        for number, question in enumerate(questions, start=1):
            prompt = opened.template.prompt(question)
            try:
                encoded.append(opened.encode(prompt))
            except TrailmedError:
                raise
            except Exception as error:  # lone surrogates come as UnicodeEncodeError or TypeError, other things as they like
                raise TrailmedError(
                    f"{self.path}: question {number} of {len(questions)} cannot be tokenized ({_one_line(error)}); change its text"
                ) from error
        return encoded

    def answer(self, questions: Sequence[str], on_reply: OnReply) -> None:
        """See `Engine.answer`. Raises `TrailmedError` as `encode` does, for a question too long for the model's context, when memory
        runs out, and for a model that fails or returns logits that are not numbers."""
        opened = self._usable()
        prompts = self.encode(questions)
        self._check(prompts)
        # the batch that needs most memory first: if it cannot be had, that shows at once
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        with _torch_threads(self.settings.threads):
            for start in range(0, len(order), self.settings.slots):
                batch = order[start : start + self.settings.slots]

                def finished(row: int, tokens: Sequence[int], stopped: Literal["eos", "length"], batch: Sequence[int] = batch) -> None:
                    on_reply(batch[row], Reply(opened.decode(tokens), len(tokens), stopped))

                self._decode(opened, [prompts[index] for index in batch], finished)

    def _usable(self) -> _Opened:
        if self._opened is None:
            raise TrailmedError(f"{self.path}: the engine was closed; open it anew")
        return self._opened

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        for number, prompt in enumerate(prompts, start=1):
            where = f"{self.path}: question {number} of {len(prompts)}"
            if not prompt:
                raise TrailmedError(f"{where} becomes no token at all under its chat template; use another model")
            if max(prompt) >= self._vocabulary_size:
                raise TrailmedError(
                    f"{where} has token {max(prompt)}, the model ends at {self._vocabulary_size - 1}; its tokenizer is another model's, "
                    "download the model again"
                )
            if self._context_limit is not None and len(prompt) + self.settings.max_tokens > self._context_limit:
                raise TrailmedError(
                    f"{where} has {len(prompt)} tokens; with {self.settings.max_tokens} for the answer that is more than the model's "
                    f"context of {self._context_limit}; shorten it or lower max_tokens"
                )

    def _decode(
        self, opened: _Opened, prompts: Sequence[Sequence[int]],
        finished: Callable[[int, Sequence[int], Literal["eos", "length"]], None],
    ) -> None:
        """Answer one batch of token-id `prompts`; `finished` is given a prompt's place and its answer's tokens without the end token."""
        rows = list(range(len(prompts)))
        answers: list[list[int]] = [[] for _ in prompts]
        width = max(map(len, prompts))
        tokens = torch.zeros((len(prompts), width), dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(prompts):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        cache = transformers.DynamicCache(config=opened.module.config)
        while rows:
            chosen = self._next_tokens(opened.module, tokens, mask, positions, cache)
            places = []
            for place, (row, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
                if token in opened.end_ids:
                    finished(row, answers[row], "eos")
                    continue
                answers[row].append(token)
                if len(answers[row]) < self.settings.max_tokens:
                    places.append(place)
                else:
                    finished(row, answers[row], "length")
            if not places:
                return
            if len(places) < len(rows):
                kept = torch.tensor(places)
                rows = [rows[place] for place in places]
                chosen, mask, positions = chosen[kept], mask[kept], positions[kept]
                cache.reorder_cache(kept)
            tokens = chosen[:, None]
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            positions = positions[:, -1:] + 1

    @torch.inference_mode()
    def _next_tokens(self, module: Any, tokens: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """One forward pass: the most probable next token of each row, int64 [rows]. `tokens` [rows, n] are new, `mask` [rows, all]."""
        given = {
            "input_ids": tokens, "attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True,
            "logits_to_keep": 1,
        }
        try:
            logits = module(**{name: given[name] for name in self._inputs}).logits[:, -1]
        except (RuntimeError, MemoryError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise TrailmedError(
                f"{self.path}: PyTorch failed over a batch of {len(tokens)} ({_one_line(error)}); lower slots, or use another model"
            ) from error
        chosen: torch.Tensor = logits.argmax(-1)
        # argmax stops at a NaN, so the greatest value tells whether the row holds one
        if not torch.isfinite(logits.gather(1, chosen[:, None])).all():
            raise TrailmedError(f"{self.path}: its logits are not numbers; its weights are broken, or too large for {self.settings.dtype}")
        return chosen


def _open_directory(path: Path, dtype: torch.dtype) -> tuple[str, str, str | None, str, _Opened]:
    """Name, sha256, edit, type and model of the Hugging Face directory at `path`."""
    check_checkpoint(path)
    _refuse_what_would_not_be_loaded_alone(path)
    weights = _weight_files(path)
    template = chat_template_of(path)
    stored = _stored_type(weights)
    with _quiet_transformers():
        try:
            tokenizer = _tokenizer(path)
        except TrailmedError:
            raise
        except Exception as error:  # a stranger's files can make it raise anything
            raise TrailmedError(f"{path}: transformers cannot read its tokenizer ({_one_line(error)}); download the model again") from error
        try:
            module, report = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True, attn_implementation="sdpa",
                output_loading_info=True,
            )
        except Exception as error:
            raise TrailmedError(f"{path}: transformers cannot load it ({_one_line(error)}); use another model") from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would fill them with random numbers and answer all the same
        raise TrailmedError(f"{path}: {missing[0]} is missing from its weights ({len(missing)} tensors are); download the model again")
    module.requires_grad_(False).eval()

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def encode(text: str) -> list[int]:
        text.encode("utf-8")  # half a surrogate pair is told here, under its name
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    opened = _Opened(module, template, encode, decode, _end_ids(module, tokenizer))
    return folder_name(path), sha256_of_files(weights), None, _rounded(stored, dtype), opened


def _open_gguf(path: Path, dtype: torch.dtype) -> tuple[str, str, str | None, str, _Opened]:
    """Name, sha256, edit, type and model of the GGUF at `path`."""
    with GgufFile.open(path) as file:
        edit_sha256, stored = edit_sha256_of(file.metadata), type_of(file.metadata)
        types = file.metadata.get("tokenizer.ggml.token_type", [])
    unprinted = {token for token, type_ in enumerate(types) if type_ in _UNPRINTED_TOKENS}
    loaded = load_model(path, dtype=dtype)

    def decode(tokens: Sequence[int]) -> str:
        return loaded.tokenizer.decode([token for token in tokens if token not in unprinted])

    type_ = _rounded(stored, dtype) if stored in _TYPES else "unknown" if stored == "unknown" else f"dequantized {stored}"
    opened = _Opened(loaded.module, loaded.template, loaded.tokenizer.encode, decode, loaded.tokenizer.eos_ids)
    return path.name, sha256_of_file(path), edit_sha256, type_, opened


def _refuse_what_would_not_be_loaded_alone(path: Path) -> None:
    """Refuse a checkpoint of which transformers would load something else than its plain weights, or only a part of it."""
    if (path / "adapter_config.json").exists():
        raise TrailmedError(f"{path}: holds an adapter (adapter_config.json); merge it into the weights first")
    config = json_object(path / "config.json")
    for section in (config, config.get("text_config")):
        if isinstance(section, Mapping) and section.get("quantization_config"):
            raise TrailmedError(f"{path}: its weights are quantized (quantization_config); use the full-precision model, or a GGUF")
    if "transformers_weights" in config:
        raise TrailmedError(f"{path}: config.json names other weights (transformers_weights); rename them to model.safetensors instead")
    if config.get("is_encoder_decoder"):
        raise TrailmedError(f"{path}: not a model that continues text (it has an encoder); use a decoder-only model")


def _weight_files(path: Path) -> list[Path]:
    """The files that transformers will read the weights from, by name: model.safetensors, or else the shards of its index."""
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    shards = json_object(path / "model.safetensors.index.json").get("weight_map")
    if not isinstance(shards, Mapping) or not shards:
        raise TrailmedError(f"{path}: has neither model.safetensors nor an index of shards; download the model again")
    names = sorted({str(name) for name in shards.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise TrailmedError(f"{path}: its index of shards names {name!r}, which is no *.safetensors in this folder; use another model")
    return [path / name for name in names]


def _stored_type(weights: Sequence[Path]) -> str:
    """The type of most of the elements in the files, in llama.cpp's words, "unknown" if it has none. Reads the headers only."""
    elements: Counter[str] = Counter()
    for file in weights:
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118  (no mapping)
                    tensor = opened.get_slice(name)
                    size = 1
                    for length in tensor.get_shape():
                        size *= length
                    elements[tensor.get_dtype()] += size
        except (SafetensorError, OSError) as error:
            raise TrailmedError(f"{file}: not a whole safetensors file ({_one_line(error)}); download the model again") from error
    return _TYPES.get(max(elements, key=lambda name: elements[name], default=""), "unknown")


def _rounded(stored: str, dtype: torch.dtype) -> str:
    """What weights stored as `stored` are once they are in `dtype`: float32 keeps everything, bfloat16 rounds F32 and F16."""
    return "BF16" if dtype is torch.bfloat16 and stored in _TYPES else stored


def _tokenizer(path: Path) -> Any:
    """tokenizer.json as it stands where there is one, as every other program reads it; else what transformers makes of older files.

    `AutoTokenizer` would build some families' pre-tokenizers anew, and differ from the file where a finetune changed them.
    """
    found = [name for name in _VOCABULARIES if (path / name).is_file()]
    if not found:
        # transformers would make an empty one of some families' and answer gibberish
        raise TrailmedError(f"{path}: has no tokenizer ({', '.join(_VOCABULARIES)}); download the model again")
    kind = transformers.PreTrainedTokenizerFast if "tokenizer.json" in found else transformers.AutoTokenizer
    return kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _end_ids(module: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: one or several in the generation config, and the tokenizer's EOS."""
    configured = module.generation_config.eos_token_id if module.generation_config is not None else None
    several = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(token for token in (*several, tokenizer.eos_token_id) if isinstance(token, int))


def _inputs_of(module: Any, path: Path) -> tuple[str, ...]:
    """What the module's `forward` takes of what `_next_tokens` has to give."""
    taken = inspect.signature(module.forward).parameters
    for name in _NEEDED_INPUTS:
        if name not in taken:
            raise TrailmedError(f"{path}: {type(module).__name__} takes no {name}, so it cannot be decoded in batches; use another model")
    return _NEEDED_INPUTS + tuple(name for name in _OPTIONAL_INPUTS if name in taken)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """PyTorch's thread count is the process's; give it back as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bar and no advice on stderr; what matters of it is raised."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
