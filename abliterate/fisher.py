"""The natural gradient: the change that moves the odds of a refusal by a nat and disturbs the answers of answered prompts least.

The plain gradient is the change of least length, but a residual stream is not a Euclidean space: some directions of it turn every first
word over, others nothing. How far a small change x of a layer's output moves a next-token distribution is ½ xᵀ F x nats of KL divergence,
with F the Fisher information. Least KL for a nat of odds is the natural gradient (Amari 1998), here with Levenberg–Marquardt damping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .teacher import output_logits, padded_forward

_BATCH = 8
_OUTCOMES = 4
"""First tokens of each prompt whose gradients make up the Fisher information; the rest of the mass is left out."""


def first_token_scores(module: Any, rows: Mapping[str, torch.Tensor], prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """√p ∇ log p of the most probable first answer tokens of `prompts` (token ids): float32 [4 n, Σ d_out].

    The gradient is taken, as in `refusal_gradients`, with respect to vectors that are added, a·x times, to what the layers put out; `rows`
    holds a, float32 [d_in], by tensor name, and the vectors stand side by side in its order. SᵀS / n is the Fisher information.
    """
    scores = [torch.zeros(0, sum(module.get_parameter(name).shape[0] for name in rows))]
    order = sorted(prompts, key=len)
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        added = {name: torch.zeros(len(batch), module.get_parameter(name).shape[0], requires_grad=True) for name in rows}
        with _added_by_row(module, added, rows):
            final = padded_forward(module, batch)
        ends = torch.stack([hidden[len(prompt) - 1] for hidden, prompt in zip(final, batch, strict=True)])
        likely = output_logits(module, ends).log_softmax(-1).topk(_OUTCOMES).values
        for outcome in range(_OUTCOMES):
            gradients = torch.autograd.grad(likely[:, outcome].sum(), list(added.values()), retain_graph=True)
            scores.append(torch.cat(gradients, dim=1) * (0.5 * likely[:, outcome].detach()).exp()[:, None])
    return torch.cat(scores)


def natural_gradient(gradients: Mapping[str, torch.Tensor], scores: torch.Tensor, count: int, damping: float) -> dict[str, torch.Tensor]:
    """x by tensor name, float32 [d_out], that minimizes xᵀ (F + λ 1) x where gᵀx = 1, over all tensors together.

    `gradients` holds g, float32 [d_out] by tensor name, `scores` [m, Σ d_out] of `count` prompts is what `first_token_scores` found for
    the same names, F = SᵀS / count, and λ is `damping` times the curvature of F along g. Solved in sample space (Woodbury). Raises
    ValueError when g is zero or not finite.
    """
    g = torch.cat(list(gradients.values())).double()
    square = float(g @ g)
    if not 0 < square < float("inf"):
        raise ValueError("the gradient is zero or not finite")
    s = scores.double() / max(1, count) ** 0.5
    ridge = damping * float((s @ g).square().sum()) / square
    x = g
    if ridge > 0:
        gram = s @ s.mT
        gram.diagonal().add_(ridge)
        x = g - s.mT @ torch.cholesky_solve((s @ g)[:, None], torch.linalg.cholesky(gram))[:, 0]
    x = x / (x @ g)
    parts = torch.split(x.float(), [len(each) for each in gradients.values()])
    return dict(zip(gradients, parts, strict=True))


@contextmanager
def _added_by_row(module: Any, added: Mapping[str, torch.Tensor], rows: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """While open, the layer called `name` adds a·x times `added[name][i]` to its output for the i-th prompt of the batch."""
    handles = []

    def adding(vectors: torch.Tensor, row: torch.Tensor) -> Callable[[Any, tuple[torch.Tensor, ...], torch.Tensor], torch.Tensor]:
        def add(_layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output + ((inputs[0].float() @ row)[..., None] * vectors[:, None]).to(output.dtype)
        return add

    for name, vectors in added.items():
        handles.append(module.get_submodule(name.removesuffix(".weight")).register_forward_hook(adding(vectors, rows[name])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
