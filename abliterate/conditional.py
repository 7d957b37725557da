"""The conditional edit: in each of the middle blocks one neuron reads how harmful a request is and moves the refusal's odds accordingly.

A neuron of a gated MLP writes W_down[:, j] · act(gate · x) · (up · x). The edit takes over, in each block, the neuron that did least.
Its gate opens at the last token of a prompt whose refusal can be at stake, and stays shut at everyday requests and at every other token,
where act is next to zero. Its up row reads, linearly, whether what is asked is an emergency (negative) or does harm (positive), and its
column raises the log-odds of a refusal. All rows are ridge regressions, solved in closed form: nothing is trained, nothing is random.
Help or refusal is decided at one token. An edit that acts on every token, as one of the residual writers does, disturbs what has long
been decided, up to answers that go in circles; the nonlinearity that every block has spares both that and everyday requests.

It is conditional activation steering (Lee et al. 2024, arXiv:2409.05907) written into the weights, as knowledge neurons are (Dai et al.
2022, arXiv:2104.08696), and of rank 1 in each of the three matrices of a block's MLP.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..errors import TrailmedError
from ..progress import Advance, progress_bar
from .activations import inputs_at
from .calibrate import MOST_COUNTS, Counts, least_move, separation
from .edit import Edit, Factor
from .factors import attached
from .neuron import Neuron
from .observed import Observed, Role, evenly_spread, refusal_at_stake, role_of
from .opening import OpeningProbe
from .origin import EditOrigin
from .reading import STEEPNESS, Rows, class_of, elsewhere, fitted_rows, folds
from .teacher import refusal_openings
from .validation import both_kinds, by_kind, refusal_counts, telling

_SAMPLED = 64
"""Prompts the gradient is the mean of."""
_ASKED = 128
"""Prompts of either kind asked in cross-validation, and of the validation prompts."""
_GATES = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "swish")
"""Activation functions that are next to zero well below zero, and the identity well above it."""

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""(B, A) by tensor name."""


@dataclass(frozen=True, slots=True)
class ConditionalSettings:
    """Where the edit sits and how far it moves the odds. Raises ValueError for a value out of range."""

    nats: float = field(
        default=10.0, metadata={"help": "nats by which the log-odds of refusing move up where a request reads as harm, else down"},
    )
    ridge: float = field(default=0.001, metadata={"help": "regularization of the reading, relative to the variance of what is read"})
    gate_ridge: float = field(default=0.01, metadata={"help": "regularization of the gates, relative likewise"})
    first_layer: float = field(default=0.5, metadata={"help": "share of the blocks below the edited ones"})
    last_layer: float = field(default=0.75, metadata={"help": "share of the blocks below the end of the edited ones"})
    least_fall: float = field(
        default=0.8, metadata={"help": "share of the base's benign refusals that shall be gone where the line is drawn (cross-validation)"},
    )

    def __post_init__(self) -> None:
        for name in ("nats", "ridge", "gate_ridge"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a positive number")
        if not 0 <= self.first_layer < self.last_layer <= 1:
            raise ValueError("first_layer and last_layer must be shares of the blocks, the first below the last")
        if not 0 <= self.least_fall <= 1:
            raise ValueError("least_fall must be a share between 0 and 1")

    def layers(self, blocks: int) -> range:
        """The edited ones of so many blocks; at least one."""
        first = min(round(self.first_layer * blocks), blocks - 1)
        return range(first, max(first + 1, round(self.last_layer * blocks)))


class ConditionalFit:
    """What edits of one model to the same `prompts` and `removed` categories share: what its MLPs read, and which way refusal lies.

    Made once for `layers`, any of which an edit may use. The module is left as it was. Raises `TrailmedError` when the base over-refuses
    nothing in the removed categories, its odds of refusing do not depend on these blocks, or their MLPs are not gated by a SiLU or GELU.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Observed], removed: Collection[str], layers: range, *, progress: bool = True,
    ) -> None:
        module = model.module
        self.module, self.prompts, self.removed = module, prompts, frozenset(removed)
        roles = [role_of(prompt, removed) for prompt in prompts]
        if Role.OVER_REFUSED not in roles:
            raise TrailmedError("the base refuses none of the fit prompts of the categories to remove; there is nothing to edit")
        config = module.config.get_text_config()
        activation = getattr(config, "hidden_act", None) or config.hidden_activation
        if activation not in _GATES:
            raise TrailmedError(f"the model's MLPs use {str(activation)[:40]!r}; conditional needs a SiLU or GELU gate, use another method")
        self.roles = Counter(roles)
        self.openings = refusal_openings(prompts)
        self._mlps = {layer: model.architecture.mlp(layer) for layer in layers}
        self._idle = {layer: Neuron.idlest(module, names) for layer, names in self._mlps.items()}
        with progress_bar("inputs of the MLPs", len(prompts), enabled=progress) as advance:
            self._inputs, self._owners, self._others = _inputs(
                module, prompts, roles, [names[0] for names in self._mlps.values()], advance,
            )
        sampled = [prompt.token_ids for prompt in evenly_spread(refusal_at_stake(prompts, removed), _SAMPLED)]
        gradients = OpeningProbe(module, sampled, self.openings, layers[0]).odds_gradients([names[2] for names in self._mlps.values()])
        self._gradients = {layer: gradients[names[2]] for layer, names in self._mlps.items()}
        if any(not each.any() or not each.isfinite().all() for each in self._gradients.values()):
            raise TrailmedError("the odds of a refusal do not depend on the tensors to edit; use another method than conditional")

    def rows(self, settings: ConditionalSettings, layers: Sequence[int], left_out: Collection[str] = ()) -> dict[int, Rows]:
        """By block, fitted without the prompts whose ids are `left_out`."""
        kept = [index for index, prompt in enumerate(self.prompts) if prompt.id not in left_out]
        others = [index for index, owner in enumerate(self._owners) if owner not in left_out]
        classes = [class_of(self.prompts[index], self.removed) for index in kept]
        return {
            layer: fitted_rows(
                self._inputs[self._mlps[layer][0]][kept], self._others[self._mlps[layer][0]][others], classes,
                settings.ridge, settings.gate_ridge,
            )
            for layer in layers
        }

    def factors(self, rows: Mapping[int, Rows], nats: float, line: float) -> Factors:
        """The edit of the blocks of `rows`; all together they move the odds by `nats` where harm reads 1, and by `line` everywhere."""
        square = sum(float(self._gradients[layer].double().square().sum()) for layer in rows)
        found: Factors = {}
        for layer, each in rows.items():
            reading = (nats * each.harm + line * each.one) / STEEPNESS
            found |= self._idle[layer].becoming(STEEPNESS * each.gate, reading, self._gradients[layer] / square)
        return found

    def view(self, rows: Mapping[int, Rows], prompts: Sequence[Observed]) -> View:
        """`prompts` asked under `rows`, which were fitted without them."""
        return View(self, rows, prompts, OpeningProbe(self.module, [each.token_ids for each in prompts], self.openings, min(rows)))


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """Prompts asked under rows that were fitted without them."""

    fit: ConditionalFit
    rows: Mapping[int, Rows]
    prompts: Sequence[Observed]
    probe: OpeningProbe

    def margins(self, nats: float | None, line: float = 0.0) -> list[float]:
        """By how much each prompt's answer opens as a refusal (`OpeningProbe.margins`) under the edit; of the base where `nats` is None."""
        if nats is None:
            return self.probe.margins()
        with attached(self.fit.module, self.fit.factors(self.rows, nats, line)):
            return self.probe.margins()

    def counts(self, margins: Sequence[float]) -> Counts:
        return refusal_counts(self.prompts, [each > 0 for each in margins])

    def separation(self, margins: Sequence[float]) -> float:
        return separation(*by_kind(self.prompts, margins))


def conditional(
    model: Any, prompts: Sequence[Observed], validation: Sequence[Observed], removed: Collection[str], origin: EditOrigin,
    settings: ConditionalSettings = ConditionalSettings(), *, crossed: Sequence[Observed] = (), progress: bool = True,
) -> Edit:
    """Fit a neuron in each of the middle blocks to `prompts`, draw the line by `validation`, and return the edit.

    With x what the block's MLP reads [d], neuron j becomes x ↦ c · act(8 gate·x) (nats·harm·x + t·one·x) / 8, c [d] the gradient of the
    log-odds of a refusal (`refusal_openings`), all blocks together moving them by a nat. The rows are `Rows`; benign prompts of
    categories not in `removed` read −1 at the gate, as every other token does. t, in nats, draws the line between help and refusal: it is
    the least move that holds the limits (`least_move`), counted by how answers open. Besides `validation` an even sample of `crossed` (a
    part of `prompts`) draws the line, each prompt asked under rows fitted without its fold's scenarios.
    `model` is a `LoadedModel`; its module is left as it was. Nothing is random. Raises `TrailmedError` as `ConditionalFit` does.
    """
    layers = settings.layers(len(model.module.model.layers))
    fit = ConditionalFit(model, prompts, removed, layers, progress=progress)
    asked, held_back = evenly_spread(telling(crossed, removed), _ASKED), both_kinds(telling(validation, removed), _ASKED)
    with progress_bar("the line (prompts asked, at most)", MOST_COUNTS * (len(asked) + len(held_back)), enabled=progress) as advance:
        watched = fit.view(fit.rows(settings, layers), held_back)
        views = [watched] + [
            fit.view(fit.rows(settings, layers, fold), held)
            for fold in folds(prompts) if (held := [prompt for prompt in asked if prompt.id in fold])
        ]
        unedited = [each.margins(None) for each in views]
        base = sum((each.counts(found) for each, found in zip(views, unedited, strict=True)), start=Counts(0, 0, 0, 0))
        seen: dict[float, list[list[float]]] = {}

        def count(line: float) -> Counts:
            seen[line] = []
            for each in views:
                seen[line].append(each.margins(settings.nats, line))
                advance(len(each.prompts))
            return sum((each.counts(found) for each, found in zip(views, seen[line], strict=True)), start=Counts(0, 0, 0, 0))

        line, tried = least_move(count, base, settings.least_fall)
        apart = {"base": watched.separation(unedited[0]), "edited": watched.separation(seen[line][0])}
    return origin.edit(
        {name: Factor(b.float().numpy(), a.float().numpy()) for name, (b, a) in fit.factors(watched.rows, settings.nats, line).items()},
        {
            "method": "conditional", **asdict(settings), "layers": list(layers), "openings": [list(opening) for opening in fit.openings],
            "base": asdict(base), "separation": apart,
            "line": {"nats": line, "tried": [{"nats": each, **asdict(counts)} for each, counts in tried]},
            "roles": {str(role): fit.roles[role] for role in Role}, "dtype": str(model.module.dtype).removeprefix("torch."),
        },
    )


def _inputs(
    module: Any, prompts: Sequence[Observed], roles: Sequence[Role], names: Sequence[str], progress: Advance,
) -> tuple[dict[str, torch.Tensor], list[str], dict[str, torch.Tensor]]:
    """What the layers `names` read: at every prompt's last token [n, d]; and `elsewhere` in answered prompts [m, d].

    In the middle, whose prompt each row of the latter is.
    """
    sequences, positions = [], []
    for prompt, role in zip(prompts, roles, strict=True):
        sequence, others = elsewhere(prompt) if role is Role.COMPLIED else (list(prompt.token_ids), [])
        sequences.append(sequence)
        positions.append([len(prompt.token_ids) - 1, *others])
    read = inputs_at(module, sequences, positions, names, progress=progress)
    last = torch.tensor([place == 0 for each in positions for place in range(len(each))])
    owners = [prompt.id for prompt, each in zip(prompts, positions, strict=True) for _ in each[1:]]
    return {name: rows[last] for name, rows in read.items()}, owners, {name: rows[~last] for name, rows in read.items()}
