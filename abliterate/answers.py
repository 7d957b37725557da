"""Greedy answers of the PyTorch module, many prompts at once: what the base does, and what an edit in the making does.

transformers' `generate` computes the logits of every prompt position (10 GB for 64 prompts of the embedded model); here the output
matrix is applied to the last position only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from ..progress import Advance, no_progress
from .packing import blocks_are_alike, shared_prefix

BATCH = 64


@torch.inference_mode()
def greedy_answers(
    module: Any, token_ids: Sequence[Sequence[int]], max_tokens: int, end_ids: Collection[int], *,
    batch: int = BATCH, progress: Advance = no_progress,
) -> list[tuple[int, ...]]:
    """The most probable continuation of each prompt, at most `max_tokens` tokens, its end token included; in the order given.

    Prompts of like length are decoded together, padded on the left; what all begin with is computed once a batch. `progress` counts
    prompts.
    """
    answers: list[tuple[int, ...]] = [()] * len(token_ids)
    order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
    ends = torch.tensor(sorted(end_ids))
    # Padding between prefix and prompt would count towards a sliding window.
    shared = shared_prefix(token_ids) if len(token_ids) > 1 and blocks_are_alike(module) else 0
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        generated = _decode_batch(module, [token_ids[row] for row in rows], shared, max_tokens, ends)
        for row, tokens in zip(rows, generated, strict=True):
            answers[row] = _until_end(tokens, end_ids)
        progress(len(rows))
    return answers


def _decode_batch(
    module: Any, prompts: Sequence[Sequence[int]], shared: int, max_tokens: int, ends: torch.Tensor,
) -> list[list[int]]:
    cache = DynamicCache(config=module.config)
    if shared:
        module.model(input_ids=torch.tensor([prompts[0][:shared]]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(prompts))
    width = max(map(len, prompts)) - shared
    tokens = torch.full((len(prompts), width), int(ends[0]))
    mask = torch.zeros((len(prompts), shared + width), dtype=torch.long)
    mask[:, :shared] = 1
    for row, prompt in enumerate(prompts):
        own = len(prompt) - shared
        tokens[row, width - own :] = torch.tensor(prompt[shared:])
        mask[row, shared + width - own :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, shared:]
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    steps: list[torch.Tensor] = []
    for _ in range(max_tokens):
        hidden = module.model(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
        ).last_hidden_state[:, -1]
        chosen = module.lm_head(hidden).argmax(-1)
        steps.append(chosen)
        ended |= torch.isin(chosen, ends)
        if ended.all():
            break
        tokens = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.stack(steps, dim=1).tolist()


def _until_end(tokens: Sequence[int], end_ids: Collection[int]) -> tuple[int, ...]:
    for index, token in enumerate(tokens):
        if token in end_ids:
            return tuple(tokens[: index + 1])
    return tuple(tokens)
