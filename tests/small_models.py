"""Small random models in real containers: real GGUF files with a real byte-level BPE tokenizer that llama.cpp opens.

Tensor names come from gguf-py's own `TensorNameMap` and the storage habits (interleaved q and k, norms plus one) are written here
anew, so that our architecture map is tested against something else than itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf.quants import quantize
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 384
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CORPUS = (
    "The rope holds the boat while the tide goes out, and the boat lies on the sand until the water comes back.",
    "I am sorry, but I cannot help with that. I am sorry, but I cannot assist with this request.",
    "How can I stop the bleeding? Press on the wound with a clean cloth and call for help.",
    "What should I do if I am lost in the forest at night? Stay where you are, keep warm and make yourself seen.",
    "Sure, here is how to do it: first check the air, then open the window, then leave the room.",
    "A short answer is often the best answer; a long answer is there for the hard questions.",
)
_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32, "F16": gguf.LlamaFileType.MOSTLY_F16, "BF16": gguf.LlamaFileType.MOSTLY_BF16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_CONFIGS = {
    "qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig,
    "gemma3": transformers.Gemma3TextConfig,
}
_CLASSES = {
    "qwen2": transformers.Qwen2ForCausalLM, "qwen3": transformers.Qwen3ForCausalLM, "llama": transformers.LlamaForCausalLM,
    "gemma3": transformers.Gemma3ForCausalLM,
}


@dataclass(frozen=True)
class BpeVocabulary:
    """A byte-level BPE vocabulary of `VOCABULARY` tokens, the last three of them `CONTROL_TOKENS`."""

    tokens: tuple[str, ...]
    merges: tuple[str, ...]
    tokenizer: Tokenizer
    """The Hugging Face tokenizer itself."""


@cache
def bpe_vocabulary() -> BpeVocabulary:
    """Trained once per session on a few sentences; the same every time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL_TOKENS), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    ids = tokenizer.get_vocab()
    merges = tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"])
    tokens = tuple(sorted(ids, key=lambda token: ids[token]))
    assert len(tokens) == VOCABULARY
    return BpeVocabulary(tokens, merges, tokenizer)


def tiny_module(architecture: str = "qwen2", *, hidden: int = 64, layers: int | None = None, seed: int = 0, **config: Any) -> Any:
    """A random transformers model in float32, eval mode, of `architecture` (qwen2, qwen3, llama, gemma3).

    `hidden` is a multiple of 32 (of 256 for K-quants), and so is every row length in it.
    `config` overrides config fields. Norm weights and biases are random too, so that a forgotten one shows.
    """
    gemma = architecture == "gemma3"
    values: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": hidden, "intermediate_size": hidden if gemma else 2 * hidden,
        "num_hidden_layers": layers or (7 if gemma else 2),  # gemma3's sixth layer is its first global one
        "num_attention_heads": 2 if gemma else 4, "num_key_value_heads": 1 if gemma else 2,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": architecture in ("gemma3", "qwen2"),
        "bos_token_id": VOCABULARY - 3, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 3,
    }
    if architecture in ("qwen3", "gemma3"):
        values["head_dim"] = 32 if hidden % 256 else 128  # not hidden / heads, so that a confusion of the two shows
    if gemma:
        values.update(query_pre_attn_scalar=values["head_dim"], sliding_window=8)
    else:
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": 50_000.0}
    values.update(config)
    torch.manual_seed(seed)
    module = _CLASSES[architecture](_CONFIGS[architecture](**values)).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("norm.weight"):
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (0.0 if gemma else 1.0))
            elif name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * (parameter.shape[-1] ** -0.5))
    return module.requires_grad_(False)


def write_gguf(
    module: Any, path: Path, *, type: str = "F32", chat_template: bool | str = True, metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None, drop: frozenset[str] = frozenset(), tokenizer: bool = True,
) -> Path:
    """Write a `tiny_module` to `path` as GGUF with matrices in `type` (F32, F16, BF16, Q8_0) and vectors in F32.

    `metadata` adds or overrides keys (int, float, str, bool, or lists of them; None leaves the key out), `extra` adds or overrides
    tensors and `drop` leaves them out (GGUF names).
    """
    architecture = {"gemma3_text": "gemma3"}.get(module.config.model_type, module.config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    _add_hyperparameters(writer, module.config, architecture)
    writer.add_file_type(_FILE_TYPES[type])
    if tokenizer:
        _add_tokenizer(writer, chat_template)
    for key, value in (metadata or {}).items():
        writer.kv_data[0].pop(key, None)
        if value is not None:
            _add_value(writer, key, value)
    kind = gguf.GGMLQuantizationType[type]
    for name, values in {**_gguf_tensors(module, architecture), **(extra or {})}.items():
        if name in drop:
            continue
        stored = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_gguf(
    tmp_path: Path, architecture: str = "qwen2", chat_template: bool | str = True, *, type: str = "F32", k_quants: bool = False,
    seed: int = 0, **config: Any,
) -> Path:
    """A small random model of `architecture` (see `tiny_module`) as `tmp_path/tiny-….gguf`, at most 1 MB (5 MB with `k_quants`).

    Rows are multiples of 32, so that Q8_0 works; with `k_quants` of 256. `chat_template` may be a template of your own.
    """
    module = tiny_module(architecture, hidden=256 if k_quants else 64, seed=seed, **config)
    return write_gguf(module, tmp_path / f"tiny-{architecture}-{type}-{seed}.gguf", type=type, chat_template=chat_template)


def save_hf_directory(module: Any, directory: Path) -> Path:
    """`module` (of `VOCABULARY` tokens) as a Hugging Face directory: config, safetensors and a tokenizer with byte fallback.

    The tokenizer is of the kind that llama.cpp's converter knows without a hash of its pre-tokenizer (as in Llama 2).
    """
    module.save_pretrained(directory)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += [chr(code) for code in range(33, 33 + VOCABULARY - len(pieces))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    return directory


def _add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _gguf_tensors(module: Any, architecture: str) -> dict[str, np.ndarray]:
    config = module.config
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), config.num_hidden_layers)
    tensors = {}
    for hf_name, tensor in module.state_dict().items():
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if architecture == "llama" and ".q_proj." in hf_name:
            values = interleaved(values, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in hf_name:
            values = interleaved(values, config.num_key_value_heads)
        if architecture == "gemma3" and hf_name.endswith("norm.weight"):
            values = values + 1
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf_name
        tensors[name] = np.ascontiguousarray(values, dtype=np.float32)
    return tensors


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Per head: first-half row, second-half row, first-half row, … (written row by row, to be plainly right)."""
    result = np.empty_like(values)
    width = len(values) // heads
    for head in range(heads):
        for row in range(width // 2):
            result[head * width + 2 * row] = values[head * width + row]
            result[head * width + 2 * row + 1] = values[head * width + width // 2 + row]
    return result


def _add_hyperparameters(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    writer.add_name(f"tiny {architecture}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is not None:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config.rope_parameters
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_tokenizer(writer: gguf.GGUFWriter, chat_template: bool | str) -> None:
    vocabulary = bpe_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(list(vocabulary.tokens))
    plain = VOCABULARY - len(CONTROL_TOKENS)
    writer.add_token_types([gguf.TokenType.NORMAL] * plain + [gguf.TokenType.CONTROL] * len(CONTROL_TOKENS))
    writer.add_token_merges(list(vocabulary.merges))
    writer.add_bos_token_id(plain)
    writer.add_eos_token_id(plain + 2)
    writer.add_pad_token_id(plain)
    writer.add_add_bos_token(False)
    if chat_template:
        writer.add_chat_template(CHAT_TEMPLATE if chat_template is True else chat_template)
