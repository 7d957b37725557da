"""How a model begins to answer: with what odds, and by what margin, it opens as a refusal does.

An edit of middle blocks is tried many times over on the same prompts. So what the blocks below it compute is kept, the beginning that
all prompts share is computed once, and every opening of a refusal is a short branch behind its prompt (see `packing`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from .calibrate import log_odds
from .packing import Packing, blocks_are_alike, pack, run_blocks, run_packed, shared_prefix
from .teacher import output_logits, padded_forward

_BATCH = 24


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """`prompts` are indices; `ends` the places (rows, columns) of their last tokens; `says[i][k]` those that predict opening k of prompt i,
    one for each of its tokens.

    Packed: `stream` is the residual stream [1, T, d] before the first edited block. Else `sequences` are run whole.
    """

    prompts: Sequence[int]
    ends: tuple[list[int], list[int]]
    says: Sequence[Sequence[Sequence[tuple[int, int]]]]
    stream: torch.Tensor | None = None
    packing: Packing | None = None
    sequences: Sequence[Sequence[int]] = ()


class OpeningProbe:
    """Prompts (token ids) and the `openings` of a refusal, asked of `module` as it stands, edited from block `first_block` on.

    Blocks below `first_block` must stay as they are for the probe's life. Raises ValueError when there is no opening or no prompt.
    """

    def __init__(self, module: Any, token_ids: Sequence[Sequence[int]], openings: Sequence[Sequence[int]], first_block: int) -> None:
        if not openings or not token_ids:
            raise ValueError("no opening of a refusal, or no prompt, is given")
        self._module, self._openings, self._first = module, openings, first_block
        self._count = len(token_ids)
        order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
        batches = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
        if blocks_are_alike(module):
            shared = shared_prefix(token_ids)
            self._batches = [self._packed(token_ids, rows, shared) for rows in batches]
        else:
            self._batches = [self._whole(token_ids, rows) for rows in batches]

    @torch.no_grad()
    def margins(self) -> list[float]:
        """For each prompt how surely, in nats, a greedy answer opens as a refusal; negative when it does not.

        The margin of an opening is the smallest, over its tokens, of log p(token) less that of the best other token; of several
        openings the one with the largest margin counts.
        """
        found = [0.0] * self._count
        for batch in self._batches:
            for prompt, logits in self._logits(batch):
                found[prompt] = max(min(map(_margin, rows, opening)) for rows, opening in zip(logits, self._openings, strict=True))
        return found

    @torch.no_grad()
    def first_logits(self) -> torch.Tensor:
        """For each prompt the logits of the answer's first token, float32 [n, vocabulary]."""
        found: dict[int, torch.Tensor] = {}
        for batch in self._batches:
            found |= {prompt: logits[0][0] for prompt, logits in self._logits(batch)}
        return torch.stack([found[prompt] for prompt in range(self._count)])

    def odds_gradients(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """By tensor name the gradient float32 [d_out] of the mean log-odds of a refusal.

        They are log(p / (1 − p)), p the probability of the openings together. The gradient is taken with respect to a vector added to what
        the layer of that name puts out at each prompt's last token.
        """
        added = {name: torch.zeros(self._module.get_parameter(name).shape[0], requires_grad=True) for name in names}
        for batch in self._batches:
            with ExitStack() as hooks:
                for name, vector in added.items():
                    layer = self._module.get_submodule(name.removesuffix(".weight"))
                    hooks.enter_context(layer.register_forward_hook(_adding(vector, batch.ends)))
                total = torch.stack([self._log_odds(logits) for _, logits in self._logits(batch)]).sum()
                (total / self._count).backward()  # type: ignore[no-untyped-call]
        return {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in added.items()}

    def _log_odds(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        said = [
            rows.log_softmax(-1)[range(len(opening)), list(opening)].sum()
            for rows, opening in zip(logits, self._openings, strict=True)
        ]
        return log_odds(torch.stack(said).logsumexp(0))

    def _logits(self, batch: _Batch) -> Iterator[tuple[int, list[torch.Tensor]]]:
        """For each prompt of the batch the logits [len(opening), vocabulary] where each opening is predicted."""
        if batch.stream is not None and batch.packing is not None:
            blocks = len(self._module.model.layers)
            final = self._module.model.norm(run_blocks(self._module, batch.stream, batch.packing, self._first, blocks))
        else:
            final = padded_forward(self._module, batch.sequences)
        # The output matrix is the largest of all: it is read once a batch, and applied to a place once, however many openings begin there.
        places = dict.fromkeys(place for says in batch.says for opening in says for place in opening)
        rows, columns = zip(*places, strict=True)
        logits = output_logits(self._module, final[list(rows), list(columns)])
        index = {place: number for number, place in enumerate(places)}
        for prompt, says in zip(batch.prompts, batch.says, strict=True):
            yield prompt, [logits[[index[place] for place in opening]] for opening in says]

    def _packed(self, token_ids: Sequence[Sequence[int]], rows: Sequence[int], shared: int) -> _Batch:
        tails = [list(opening[:-1]) for opening in self._openings]
        packing = pack(shared, [len(token_ids[row]) - shared for row in rows], [len(tail) for tail in tails])
        branches = [token for tail in tails for token in tail]
        ends, says = [], []
        for row, own in zip(rows, packing.own, strict=True):
            end = own.start + len(token_ids[row]) - shared - 1
            ends.append(end)
            start, each = end + 1, []
            for tail in tails:
                each.append([(0, place) for place in (end, *range(start, start + len(tail)))])
                start += len(tail)
            says.append(each)
        with torch.no_grad():
            stream = run_packed(self._module, [[*token_ids[row], *branches] for row in rows], packing, self._first)
        return _Batch(rows, ([0] * len(ends), ends), says, stream, packing)

    def _whole(self, token_ids: Sequence[Sequence[int]], rows: Sequence[int]) -> _Batch:
        """One sequence for every prompt and opening: for models whose blocks cannot be run one by one."""
        sequences: list[list[int]] = []
        ends, says = [], []
        for row in rows:
            end, each = len(token_ids[row]) - 1, []
            for opening in self._openings:
                each.append([(len(sequences), place) for place in range(end, end + len(opening))])
                sequences.append([*token_ids[row], *opening[:-1]])
                ends.append(end)
            says.append(each)
        return _Batch(rows, (list(range(len(ends))), ends), says, sequences=sequences)


def _margin(row: torch.Tensor, token: int) -> float:
    best = row.topk(2)
    other = best.values[1] if int(best.indices[0]) == token else best.values[0]
    return float(row[token] - other)


def _adding(vector: torch.Tensor, ends: tuple[list[int], list[int]]) -> Callable[..., torch.Tensor]:
    def add(_layer: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        places = (torch.tensor(ends[0]), torch.tensor(ends[1]))
        return output.index_put(places, vector.to(output.dtype).expand(len(ends[0]), -1), accumulate=True)
    return add
