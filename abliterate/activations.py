"""Activations at the last token(s) of each prompt: the residual stream after every layer, and the inputs of linear layers.

No logits are ever computed: only the inner transformer runs, and forward hooks keep the few rows that are asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field

from ..errors import TrailmedError
from ..progress import Advance, no_progress
from .packing import Packing, blocks_are_alike, pack, run_packed, shared_prefix
from .tensor_file import read_tensor, write_tensor

TokenIds = Sequence[Sequence[int]]

_FORMAT = 1
_KIND = "activations"
_BLOCK = re.compile(r"\.layers\.(\d+)\.")
_PACKED_TOKENS = 1024
"""Of a packed row besides what is shared: its mask grows with the square."""


class HasModule(Protocol):
    """Anything with a causal `PreTrainedModel` in eval mode, such as `LoadedModel`."""

    @property
    def module(self) -> Any: ...


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: int = Field(ge=_FORMAT, le=_FORMAT)
    prompts_sha256: str = Field(pattern="^([0-9a-f]{64})?$")


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """The residual stream at the last token of n prompts.

    `residual` is float32 [n, layers + 1, d] on the CPU: index 0 is the embeddings' output (what the first layer reads), index l the
    stream after layer l, before the final norm. `prompts_sha256` names the prompts (hex, or "" when nobody said). Raises ValueError
    for another shape or dtype, a malformed hash, or values that are no finite numbers.
    """

    residual: torch.Tensor
    prompts_sha256: str = ""

    def __post_init__(self) -> None:
        if self.residual.ndim != 3 or self.residual.shape[1] < 2 or 0 in self.residual.shape:
            raise ValueError(f"activations have the shape [n, layers + 1, d], not {list(self.residual.shape)}")
        if self.residual.dtype != torch.float32:
            raise ValueError(f"activations are float32, not {self.residual.dtype}")
        if not torch.isfinite(self.residual).all():
            raise ValueError("activations hold values that are no finite numbers")
        _Header(format=_FORMAT, prompts_sha256=self.prompts_sha256)

    @property
    def layers(self) -> int:
        """Number of layers (the stream has one entry more)."""
        return self.residual.shape[1] - 1

    def save(self, path: Path) -> None:
        """Write safetensors with a JSON header: the same activations, the same bytes."""
        write_tensor(path, _KIND, self.residual, _Header(format=_FORMAT, prompts_sha256=self.prompts_sha256))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote, trusting nothing in it. Raises `TrailmedError` for a missing, foreign or damaged file."""
        return read_tensor(path, _KIND, _Header, lambda residual, header: cls(residual, header.prompts_sha256))


def capture(
    model: HasModule, token_ids: TokenIds, *, prompts_sha256: str = "", batch_tokens: int = 2048, progress: Advance = no_progress,
) -> Activations:
    """The residual stream of every layer at the last token of each prompt, in the order given; `progress` counts prompts.

    Where the model's blocks are alike, prompts are packed (see `packing`). Else they run in batches of like length, at most
    `batch_tokens` tokens with padding, padded on the right: attention is causal, so nothing a last token reads comes after it and no mask
    is needed (sliding-window layers included). The module may be in any dtype and on any device.

    Raises ValueError for no prompts or an empty one, `TrailmedError` when the model's activations are no finite numbers.
    """
    decoder = text_decoder(model.module)
    layers = _layers(decoder)
    ends = [[len(ids) - 1] for ids in token_ids]
    _check_positions(token_ids, ends)
    residual = torch.empty(len(token_ids), len(layers) + 1, decoder.config.hidden_size)
    rows: _Rows

    def keep(index: int) -> Callable[..., None]:
        def hook(_module: Any, _args: Any, output: torch.Tensor) -> None:
            residual[rows.places, index] = rows.of(output)
        return hook

    def keep_embeddings(_module: Any, args: tuple[Any, ...]) -> None:
        residual[rows.places, 0] = rows.of(args[0])

    with ExitStack() as hooks:
        hooks.enter_context(layers[0].register_forward_pre_hook(keep_embeddings))
        for index, layer in enumerate(layers, start=1):
            hooks.enter_context(layer.register_forward_hook(keep(index)))
        for rows, run in _passes(model.module, token_ids, ends, batch_tokens, len(layers)):
            run()
            progress(len(rows.batch))
    _check_finite(residual)
    return Activations(residual, prompts_sha256)


def capture_inputs(
    model: HasModule, token_ids: TokenIds, module_names: Sequence[str], *, positions: int = 1, batch_tokens: int = 2048,
    progress: Advance = no_progress,
) -> dict[str, torch.Tensor]:
    """What the named linear layers read at the last token of each prompt: by name, float32 [n, d_in] on the CPU.

    With `positions` > 1 at the last `positions` tokens, in their order: [n, positions, d_in] (token ids may well hold the beginning
    of an answer after the prompt). Names, memory, batches and errors as in `inputs_at`.
    """
    if positions < 1:
        raise ValueError(f"cannot take the last {positions} tokens")
    ends = [range(len(ids) - positions, len(ids)) for ids in token_ids]
    inputs = inputs_at(model.module, token_ids, ends, module_names, batch_tokens=batch_tokens, progress=progress)
    if positions == 1:
        return inputs
    return {name: values.reshape(len(token_ids), positions, -1) for name, values in inputs.items()}


def inputs_at(
    module: Any, token_ids: TokenIds, positions: Sequence[Sequence[int]], module_names: Sequence[str], *, batch_tokens: int = 2048,
    progress: Advance = no_progress,
) -> dict[str, torch.Tensor]:
    """What the named linear layers of `module` read at `positions` (token indices) of each sequence: float32 [Σ positions, d_in] by name.

    Rows are in the order given, sequence by sequence. A name may be the module's or that of its weight
    (`model.layers.3.mlp.down_proj.weight`); the result is keyed by the names given. All results are held in memory, on the CPU:
    Σ positions · Σ d_in · 4 bytes. Batches and errors as in `capture`; ValueError also for a position that a sequence does not have and
    for an unknown name. Where the model's blocks are alike, sequences are packed (see `packing`) and blocks above the last named left out.
    """
    _check_positions(token_ids, positions)
    modules = {name: _linear(module, name) for name in module_names}
    inputs = {name: torch.empty(sum(map(len, positions)), linear.in_features) for name, linear in modules.items()}
    rows: _Rows

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...]) -> None:
            inputs[name][rows.places] = rows.of(args[0])
        return hook

    last = max((_block_of(name) for name in module_names), default=0)
    with ExitStack() as hooks:
        for name, linear in modules.items():
            hooks.enter_context(linear.register_forward_pre_hook(keep(name)))
        for rows, run in _passes(module, token_ids, positions, batch_tokens, last + 1):
            run()
            progress(len(rows.batch))
    for values in inputs.values():
        _check_finite(values)
    return inputs


class _Rows:
    """Which rows of a batch are kept, and their places among those of all sequences. The batch is padded, or packed in one row."""

    def __init__(self, batch: Sequence[int], positions: Sequence[Sequence[int]], packing: Packing | None = None) -> None:
        self.batch = batch
        starts = [0, *accumulate(map(len, positions))]
        self.places = torch.tensor([place for index in batch for place in range(starts[index], starts[index + 1])])
        self._rows = torch.tensor([0 if packing else row for row, index in enumerate(batch) for _ in positions[index]])
        self._columns = torch.tensor([
            column if packing is None or column < packing.prefix else packing.own[row].start + column - packing.prefix
            for row, index in enumerate(batch) for column in positions[index]
        ])

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [rows, d] on the CPU, a copy, of `hidden` [batch, tokens, d]."""
        return hidden[self._rows.to(hidden.device), self._columns.to(hidden.device)].to("cpu", torch.float32)


def _passes(
    module: Any, token_ids: TokenIds, positions: Sequence[Sequence[int]], batch_tokens: int, blocks: int,
) -> Iterator[tuple[_Rows, Callable[[], object]]]:
    """The batches of a forward pass over the first `blocks` blocks (all, where they cannot run one by one): what to keep, and the run."""
    decoder = text_decoder(module)
    if not (blocks_are_alike(module) and module.device.type == "cpu"):
        for batch in length_batches([len(ids) for ids in token_ids], batch_tokens):
            yield _Rows(batch, positions), partial(run_decoder, decoder, padded(token_ids, batch))
        return
    shared = shared_prefix(token_ids)
    for batch in length_batches([len(ids) - shared for ids in token_ids], min(batch_tokens, _PACKED_TOKENS)):
        packing = pack(shared, [len(token_ids[index]) - shared for index in batch])
        run = torch.no_grad()(run_packed)
        yield _Rows(batch, positions, packing), partial(run, module, [token_ids[index] for index in batch], packing, blocks)


def text_decoder(module: Any) -> Any:
    """The inner text transformer of a causal (or multimodal) `PreTrainedModel`: embeddings, layers and final norm, no output matrix."""
    return module.get_decoder()


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices in batches of like length, shortest first; a batch padded to its longest has at most `batch_tokens` tokens.

    A prompt longer than that is a batch of its own. Raises ValueError unless `batch_tokens` is positive.
    """
    if batch_tokens < 1:
        raise ValueError(f"a batch of {batch_tokens} tokens holds nothing")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda prompt: (lengths[prompt], prompt)):
        if not batches or (len(batches[-1]) + 1) * lengths[index] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def padded(token_ids: TokenIds, batch: Sequence[int]) -> torch.Tensor:
    """int64 [len(batch), longest]: the prompts of `batch`, each padded on the right with its own last token.

    Its own, because a token the model never saw may have values that overflow, and masking multiplies them by 0.
    """
    longest = max(len(token_ids[prompt]) for prompt in batch)
    return torch.tensor([[*token_ids[prompt], *[token_ids[prompt][-1]] * (longest - len(token_ids[prompt]))] for prompt in batch])


def run_decoder(decoder: Any, ids: torch.Tensor) -> None:
    """One forward pass of the inner transformer over int64 [batch, tokens], nothing kept."""
    with torch.no_grad():
        decoder(input_ids=ids.to(next(decoder.parameters()).device), use_cache=False)


def _layers(decoder: Any) -> Sequence[Any]:
    layers: Sequence[Any] = decoder.layers[: decoder.config.num_hidden_layers]
    return layers


def _block_of(name: str) -> int:
    """The number of the block that a module of this name belongs to. Raises ValueError when the name says none."""
    found = _BLOCK.search(name)
    if not found:
        raise ValueError(f"{name!r} is in no block")
    return int(found[1])


def _linear(module: Any, name: str) -> torch.nn.Linear:
    try:
        linear = module.get_submodule(name.removesuffix(".weight"))
    except AttributeError:
        raise ValueError(f"the model has no module {name!r}") from None
    if not isinstance(linear, torch.nn.Linear):
        raise ValueError(f"{name!r} is a {type(linear).__name__}, not a linear layer")
    return linear


def _check_positions(token_ids: TokenIds, positions: Sequence[Sequence[int]]) -> None:
    if not token_ids:
        raise ValueError("no prompts to take activations of")
    for ids, wanted in zip(token_ids, positions, strict=True):
        if not all(0 <= position < len(ids) for position in wanted):
            raise ValueError(f"a prompt of {len(ids)} tokens has none at {min(wanted)} to {max(wanted)}")


def _check_finite(values: torch.Tensor) -> None:
    if not torch.isfinite(values).all():
        raise TrailmedError("the model's activations are no finite numbers; load it in float32, or use another GGUF of it")
