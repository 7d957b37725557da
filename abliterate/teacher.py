"""What the edited model is taught: for every prompt an answer, and for each of its tokens the distribution the teacher would draw from.

The teacher of a prompt that shall be answered is the ablated twin; of one whose behaviour shall stay, the base itself; of a harmful
prompt that the base answers, the base's own stock refusal, word for word. Distributions are kept as the `TOP` most probable tokens and
the mass of the rest (Hinton et al. 2015, arXiv:1503.02531, at temperature 1).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..progress import Advance, no_progress
from .observed import Observed, Role

TOP = 64
_BATCH = 24
_HARD_TARGET = 0.98
"""Probability of a stock refusal's tokens: 1 would ask for infinite logits."""


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """One prompt with the answer it is taught.

    `hidden` is the base's residual stream before block `first_layer`, [tokens, d] in the module's dtype, for the prompt and the answer;
    the last `len(log_probs)` positions but one predict the answer. `log_probs` float32 [n, TOP] and `tokens` int64 [n, TOP]: the
    teacher's most probable tokens at each of the answer's n positions.
    """

    id: str
    role: Role
    hidden: torch.Tensor
    log_probs: torch.Tensor
    tokens: torch.Tensor


def stock_refusal(prompts: Iterable[Observed]) -> tuple[int, ...]:
    """The refusal the base gives most often, as tokens (ties: the lowest token ids); empty when it never refuses."""
    counts = Counter(prompt.answer for prompt in prompts if prompt.refused)
    return min(counts, key=lambda answer: (-counts[answer], answer), default=())


def output_logits(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits float32 [n, vocabulary] of final hidden states [n, d], the architecture's soft cap included."""
    logits: torch.Tensor = module.lm_head(hidden).float()
    cap = getattr(module.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def may_start_at(module: Any, first_layer: int) -> int:
    """The block a forward pass may start from when the stream before it is known: `first_layer`, or 0 where blocks differ in kind.

    transformers tells blocks apart by their number; with mixed kinds (sliding and global attention, per-layer embeddings) the upper
    blocks cannot be run by themselves.
    """
    config = module.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return first_layer if len(kinds) == 1 and not getattr(config, "hidden_size_per_layer_input", 0) else 0


@contextmanager
def upper_blocks(module: Any, first_layer: int) -> Iterator[None]:
    """While open, `module.model` consists of its blocks from `first_layer` on and takes their input as `inputs_embeds`."""
    blocks, config = module.model.layers, module.config.get_text_config()
    count = config.num_hidden_layers
    module.model.layers = torch.nn.ModuleList(list(blocks)[first_layer:])
    config.num_hidden_layers = count - first_layer
    try:
        yield
    finally:
        module.model.layers, config.num_hidden_layers = blocks, count


@torch.inference_mode()
def lessons(
    module: Any, prompts: Sequence[tuple[Observed, Role, Sequence[int]]], first_layer: int, *, progress: Advance = no_progress,
) -> list[Lesson]:
    """A lesson for each (prompt, role, answer), taught by `module` as it stands (inside `ablated`: by the twin).

    One forward pass without padding masks: rows are padded on the right, where causal attention never looks. `progress` counts prompts.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index][0].token_ids) + len(prompts[index][2]))
    made: dict[int, Lesson] = {}
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        sequences = [[*prompts[row][0].token_ids, *prompts[row][2]] for row in rows]
        tokens = torch.zeros((len(rows), max(map(len, sequences))), dtype=torch.long)
        for position, sequence in enumerate(sequences):
            tokens[position, : len(sequence)] = torch.tensor(sequence)
        entering, final = _forward(module, tokens, first_layer)
        for position, row in enumerate(rows):
            prompt, role, answer = prompts[row]
            length = len(sequences[position])
            logits = output_logits(module, final[position, length - len(answer) - 1 : length - 1])
            log_probs, ids = logits.log_softmax(-1).topk(min(TOP, logits.shape[-1]))
            made[row] = Lesson(prompt.id, role, entering[position, :length].clone(), log_probs, ids)
        progress(len(rows))
    return [made[index] for index in range(len(prompts))]


def _forward(module: Any, tokens: torch.Tensor, first_layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream before block `first_layer`, and the final hidden states, both [rows, width, d]."""
    seen: list[torch.Tensor] = []
    handle = module.model.layers[first_layer].register_forward_pre_hook(
        lambda _block, args, named: seen.append(args[0] if args else named["hidden_states"]), with_kwargs=True,
    )
    try:
        final = module.model(tokens, use_cache=False).last_hidden_state
    finally:
        handle.remove()
    return seen[0], final


def word_for_word(lesson: Lesson, answer: Sequence[int]) -> Lesson:
    """The same lesson with `answer`'s own tokens as the target instead of what the module would have said."""
    count, top = lesson.log_probs.shape
    tokens = torch.tensor([[token, *[other for other in range(top) if other != token][: top - 1]] for token in answer[:count]])
    log_probs = torch.full((count, top), math.log((1 - _HARD_TARGET) / (top * 1000)))
    log_probs[:, 0] = math.log(_HARD_TARGET)
    return Lesson(lesson.id, lesson.role, lesson.hidden, log_probs, tokens)
