"""The architecture map: which tensor is called what in GGUF and in Hugging Face, and how its values are stored there.

Names follow llama.cpp's `gguf-py/gguf/constants.py` on one side and transformers' `state_dict()` on the other. Two of llama.cpp's
storage habits are undone on reading (`convert_hf_to_gguf.py`): the llama family's q and k rows are interleaved for its rotary
embedding, and Gemma's RMSNorm weights are stored plus one.

A new architecture is one more entry in `ARCHITECTURES` (and, if its hyperparameters are new, a builder in `hf_config.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from ..errors import TrailmedError
from .gguf_file import GgufFile

_LAYER = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)")
_HF_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)\.(weight|bias)")


class Layout(Enum):
    """How GGUF stores a tensor, compared with Hugging Face."""

    SAME = "same"
    INTERLEAVED_HEADS = "rows of each query head interleaved"
    INTERLEAVED_KV_HEADS = "rows of each key head interleaved"
    PLUS_ONE = "one added to every value"


@dataclass(frozen=True, slots=True)
class Heads:
    """Attention heads per layer: of the queries, and of the keys and values."""

    query: int
    key_value: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """One family of models. `layer` and `outer` map GGUF stems to Hugging Face stems; `layouts` holds the stems not stored alike."""

    name: str
    hf_class: str
    """Name of the transformers class, `getattr(transformers, hf_class)`."""
    layer: Mapping[str, str]
    """Stems inside a block: `blk.I.STEM.weight` ↔ `model.layers.I.STEM.weight`."""
    layouts: Mapping[str, Layout]
    """By GGUF stem; a stem that is not named has `Layout.SAME`."""
    outer: Mapping[str, str]
    """Stems outside the blocks."""

    def to_hf(self, gguf_name: str) -> str | None:
        """The `state_dict()` name of a GGUF tensor, or None when it has none there (`rope_freqs.weight`)."""
        if match := _LAYER.fullmatch(gguf_name):
            index, stem, kind = match.groups()
            inner = self.layer.get(stem)
            return None if inner is None else f"model.layers.{index}.{inner}.{kind}"
        stem, _, kind = gguf_name.rpartition(".")
        outer = self.outer.get(stem)
        return None if outer is None or kind not in ("weight", "bias") else f"{outer}.{kind}"

    def to_gguf(self, hf_name: str) -> str:
        """The GGUF name of a `state_dict()` tensor. Raises `TrailmedError` for a name this architecture does not have."""
        if match := _HF_LAYER.fullmatch(hf_name):
            index, inner, kind = match.groups()
            for stem, name in self.layer.items():
                if name == inner:
                    return f"blk.{index}.{stem}.{kind}"
        stem_and_kind = hf_name.rpartition(".")
        for stem, name in self.outer.items():
            if name == stem_and_kind[0] and stem_and_kind[2] in ("weight", "bias"):
                return f"{stem}.{stem_and_kind[2]}"
        raise TrailmedError(f"{hf_name}: no tensor of the {self.name} architecture has this name; check which model it belongs to")

    def residual_writers(self, layer: int) -> tuple[str, str]:
        """Hugging Face names of the two matrices [hidden, d_in] of block `layer` whose outputs are added to the residual stream."""
        return f"model.layers.{layer}.self_attn.o_proj.weight", f"model.layers.{layer}.mlp.down_proj.weight"

    def mlp(self, layer: int) -> tuple[str, str, str]:
        """Hugging Face names of the matrices of block `layer`'s gated MLP, W_down (act(W_gate x) · W_up x): gate, up and down."""
        return (
            f"model.layers.{layer}.mlp.gate_proj.weight", f"model.layers.{layer}.mlp.up_proj.weight",
            f"model.layers.{layer}.mlp.down_proj.weight",
        )

    def to_hf_values(self, gguf_name: str, values: npt.NDArray[np.float32], heads: Heads) -> npt.NDArray[np.float32]:
        """The values that transformers expects, from those GGUF stores; float32, same shape, maybe the same array changed in place."""
        layout = self.layouts.get(gguf_name.split(".")[-2], Layout.SAME)
        if layout is Layout.PLUS_ONE:
            np.subtract(values, np.float32(1), out=values)
        elif layout is Layout.INTERLEAVED_HEADS:
            return _halves_apart(values, heads.query)
        elif layout is Layout.INTERLEAVED_KV_HEADS:
            return _halves_apart(values, heads.key_value)
        return values


def _halves_apart(values: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Undo `LlamaModel.permute` of llama.cpp's converter.

    GGUF holds each head's rows as x₀ y₀ x₁ y₁ … (pairs that rotate together are neighbours); transformers wants x₀ x₁ … y₀ y₁ ….
    """
    rows, *rest = values.shape
    return values.reshape(heads, rows // heads // 2, 2, *rest).swapaxes(1, 2).reshape(values.shape)


_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_TWO_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_FOUR_NORMS = {
    "attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({
    architecture.name: architecture
    for architecture in (
        Architecture("qwen2", "Qwen2ForCausalLM", layer={**_ATTENTION, **_MLP, **_TWO_NORMS}, layouts={}, outer=_OUTER),
        Architecture("qwen3", "Qwen3ForCausalLM", layer={**_ATTENTION, **_HEAD_NORMS, **_MLP, **_TWO_NORMS}, layouts={}, outer=_OUTER),
        Architecture(
            "llama", "LlamaForCausalLM", layer={**_ATTENTION, **_MLP, **_TWO_NORMS},
            layouts={"attn_q": Layout.INTERLEAVED_HEADS, "attn_k": Layout.INTERLEAVED_KV_HEADS}, outer=_OUTER,
        ),
        Architecture(
            "gemma3", "Gemma3ForCausalLM", layer={**_ATTENTION, **_HEAD_NORMS, **_MLP, **_FOUR_NORMS},
            layouts=dict.fromkeys((*_HEAD_NORMS, *_FOUR_NORMS, "output_norm"), Layout.PLUS_ONE), outer=_OUTER,
        ),
    )
})


def architecture_of(file: GgufFile) -> Architecture:
    """The architecture `file` names in `general.architecture`; raises `TrailmedError` for one that is not supported."""
    name = file.metadata.get("general.architecture")
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        shown = f"architecture {name[:60]!r}" if isinstance(name, str) else "no architecture"
        raise TrailmedError(f"{file.path}: {shown} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return architecture
