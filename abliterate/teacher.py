"""What the edited model is taught: for every prompt an answer, and for each of its tokens the distribution the teacher would draw from.

The teacher of a prompt that shall be answered is the ablated twin; of one whose behaviour shall stay, the base itself; of a harmful
prompt that the base answers, the base's own stock refusal, word for word. Distributions are kept as the `TOP` most probable tokens and
the mass of the rest (Hinton et al. 2015, arXiv:1503.02531, at temperature 1).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..progress import Advance, no_progress
from .observed import Observed, Role
from .packing import blocks_are_alike, pack, run_blocks, run_packed

TOP = 64
_BATCH = 24
_OPENING_TOKENS = 5
_MOST_OPENINGS = 4
_COVERED = 0.99
"""Share of the base's refusals."""
_HARD_TARGET = 0.98
"""Probability of a stock refusal's tokens: 1 would ask for infinite logits."""


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """One prompt with the answer it is taught.

    `sequence` are the tokens of prompt and answer; `hidden` is the residual stream before the first trained block, [own tokens, d] in
    the module's dtype, without the prefix all lessons share (empty where the blocks are not alike). The last n positions but one predict
    the answer: `log_probs` float32 [n, TOP] and `tokens` int64 [n, TOP] are the teacher's most probable tokens there.
    """

    id: str
    role: Role
    sequence: tuple[int, ...]
    hidden: torch.Tensor
    log_probs: torch.Tensor
    tokens: torch.Tensor


def stock_refusal(prompts: Iterable[Observed]) -> tuple[int, ...]:
    """The refusal the base gives most often, as tokens (ties: the lowest token ids); empty when it never refuses."""
    counts = Counter(prompt.answer for prompt in prompts if prompt.refused)
    return min(counts, key=lambda answer: (-counts[answer], answer), default=())


def refusal_openings(prompts: Sequence[Observed]) -> list[tuple[int, ...]]:
    """The ways the base begins its refusals, the most frequent first (ties: the lowest token ids), each the first tokens of an answer.

    As few as cover `_COVERED` of its refusals, and at most `_MOST_OPENINGS`; none begins with another. Empty when it never refuses. An
    edit that moves the odds of one of them alone leaves the prompts that are refused in other words refused.
    """
    counts = Counter(prompt.answer[:_OPENING_TOKENS] for prompt in prompts if prompt.refused and prompt.answer)
    openings: list[tuple[int, ...]] = []
    for opening in sorted(counts, key=lambda each: (-counts[each], each)):
        if len(openings) == _MOST_OPENINGS or sum(counts[each] for each in openings) >= _COVERED * counts.total():
            break
        if not any(opening[: len(each)] == each or each[: len(opening)] == opening for each in openings):
            openings.append(opening)
    return openings


def output_logits(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits float32 [n, vocabulary] of final hidden states [n, d], the architecture's soft cap included."""
    logits: torch.Tensor = module.lm_head(hidden).float()
    cap = getattr(module.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


@torch.inference_mode()
def lessons(
    module: Any, prompts: Sequence[tuple[Observed, Role, Sequence[int]]], first_block: int, prefix: int, *,
    progress: Advance = no_progress,
) -> list[Lesson]:
    """A lesson for each (prompt, role, answer), taught by `module` as it stands (inside `ablated`: by the twin).

    `prefix` tokens are shared by all prompts; where blocks are not alike it must be 0. `progress` counts prompts.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index][0].token_ids) + len(prompts[index][2]))
    made: dict[int, Lesson] = {}
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        sequences = [(*prompts[row][0].token_ids, *prompts[row][2]) for row in rows]
        entering, final = _streams(module, sequences, first_block, prefix)
        for row, sequence, stream, last in zip(rows, sequences, entering, final, strict=True):
            prompt, role, answer = prompts[row]
            log_probs, ids = output_logits(module, last[-len(answer) - 1 : -1]).log_softmax(-1).topk(min(TOP, module.config.vocab_size))
            made[row] = Lesson(prompt.id, role, sequence, stream, log_probs, ids)
        progress(len(rows))
    return [made[index] for index in range(len(prompts))]


def prefix_stream(module: Any, prefix: Sequence[int], first_block: int) -> torch.Tensor:
    """The residual stream of the shared prefix before block `first_block`, [len(prefix), d]."""
    if not prefix:
        return torch.zeros((0, module.config.get_text_config().hidden_size), dtype=module.dtype)
    with torch.inference_mode():
        packing = pack(len(prefix), [])
        hidden = module.model.embed_tokens(torch.tensor([list(prefix)], dtype=torch.long))
        return run_blocks(module, hidden, packing, 0, first_block)[0].clone()


def _streams(
    module: Any, sequences: Sequence[Sequence[int]], first_block: int, prefix: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of each sequence's own tokens (those after the prefix): the stream before block `first_block`, and the final hidden states."""
    if not blocks_are_alike(module):
        final = padded_forward(module, sequences)
        rows = [final[row, : len(sequence)] for row, sequence in enumerate(sequences)]
        return [row.new_zeros(0) for row in rows], rows
    packing = pack(prefix, [len(sequence) - prefix for sequence in sequences])
    hidden = run_packed(module, sequences, packing, first_block)
    final = module.model.norm(run_blocks(module, hidden, packing, first_block, len(module.model.layers)))
    return [hidden[0, own].clone() for own in packing.own], [final[0, own] for own in packing.own]


def padded_forward(module: Any, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Final hidden states [n, longest, d] of the whole inner transformer.

    Rows are padded on the right, where causal attention never looks.
    """
    tokens = torch.zeros((len(sequences), max(map(len, sequences))), dtype=torch.long)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    final: torch.Tensor = module.model(tokens, use_cache=False).last_hidden_state
    return final


def word_for_word(lesson: Lesson, answer: Sequence[int]) -> Lesson:
    """The same lesson with `answer`'s own tokens as the target instead of what the module would have said."""
    count, top = lesson.log_probs.shape
    tokens = torch.tensor([[token, *[other for other in range(top) if other != token][: top - 1]] for token in answer[:count]])
    log_probs = torch.full((count, top), math.log((1 - _HARD_TARGET) / (top * 1000)))
    log_probs[:, 0] = math.log(_HARD_TARGET)
    return replace(lesson, log_probs=log_probs, tokens=tokens)
