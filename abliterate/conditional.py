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
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from ..errors import TrailmedError
from ..progress import Advance, progress_bar
from .activations import inputs_at
from .calibrate import MOST_COUNTS, Counts, least_move, separation
from .edit import Edit, Factor
from .factors import attached
from .observed import Observed, Role, evenly_spread, refusal_at_stake, role_of
from .opening import OpeningProbe
from .origin import EditOrigin
from .teacher import refusal_openings
from .validation import telling

_SAMPLED = 64
"""Prompts the gradient is the mean of."""
_CROSSED = 128
"""Prompts asked in cross-validation."""
_ELSEWHERE_TOKENS = 4
"""Of the second half of each answered prompt."""
_ANSWER_TOKENS = 16
_STEEPNESS = 8.0
"""How far the gate opens: act(8) is 8 and act(−8) is 0 for every activation function gated MLPs have, within a thousandth of 8."""
_CONSTANT_RIDGE = 0.003
_ELSEWHERE_WEIGHT = 0.02
"""Of the other tokens in the regression of what is read, where the gate has been shut already; each class of prompts weighs 1."""
_FOLDS = 4
_READINGS = {
    Role.OVER_REFUSED: -1.0, Role.COMPLIED: -1.0, Role.KEPT_REFUSED: 0.0, Role.HARMFUL_REFUSED: 1.0, Role.HARMFUL_COMPLIED: 1.0,
}
_GATES = ("silu", "gelu", "gelu_pytorch_tanh", "gelu_new", "swish")
"""Activation functions that are next to zero well below zero, and the identity well above it."""


class PromptClass(NamedTuple):
    """What the rows are fitted to alike: prompts of one role, benign ones of categories that are not removed apart from the others."""

    role: Role
    spared: bool


class Rows(NamedTuple):
    """The rows of one block's neuron, float32 [d]: `gate` reads 1 where it shall open and −1 elsewhere, `harm` −1 to 1, `one` always 1."""

    gate: torch.Tensor
    harm: torch.Tensor
    one: torch.Tensor


@dataclass(frozen=True, slots=True)
class ConditionalSettings:
    """Where the edit sits and how far it moves the odds. Raises ValueError for a value out of range."""

    nats: float = field(
        default=7.0, metadata={"help": "nats by which the log-odds of refusing move up where a request reads as harm, else down"},
    )
    ridge: float = field(default=0.003, metadata={"help": "regularization of the reading, relative to the variance of what is read"})
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
    `model` is a `LoadedModel`; its module is left as it was. Nothing is random. Raises `TrailmedError` when the base over-refuses nothing
    in the removed categories, its odds of refusing do not depend on these blocks, or their MLPs are not gated by a SiLU or GELU.
    """
    module = model.module
    roles = [role_of(prompt, removed) for prompt in prompts]
    if Role.OVER_REFUSED not in roles:
        raise TrailmedError("the base refuses none of the fit prompts of the categories to remove; there is nothing to edit")
    activation = getattr(module.config.get_text_config(), "hidden_act", None) or module.config.get_text_config().hidden_activation
    if activation not in _GATES:
        raise TrailmedError(f"the model's MLPs use {str(activation)[:40]!r}; conditional needs a SiLU or GELU gate, use another method")
    classes = [
        PromptClass(role, not prompt.should_refuse and prompt.category not in removed) for prompt, role in zip(prompts, roles, strict=True)
    ]
    openings = refusal_openings(prompts)
    blocks = len(module.model.layers)
    first = min(round(settings.first_layer * blocks), blocks - 1)
    edited = range(first, max(first + 1, round(settings.last_layer * blocks)))
    mlps = {block: model.architecture.mlp(block) for block in edited}
    with progress_bar("inputs of the MLPs", len(prompts), enabled=progress) as advance:
        inputs, owners, others = _inputs(module, prompts, roles, [mlps[block][0] for block in edited], advance)
    columns = _columns(module, [mlps[block][2] for block in edited], [
        prompt.token_ids for prompt in evenly_spread(refusal_at_stake(prompts, removed), _SAMPLED)
    ], openings, first)

    idle = {block: Neuron.idlest(module, names) for block, names in mlps.items()}

    def rows_without(left_out: Collection[str]) -> dict[int, Rows]:
        kept = [index for index, prompt in enumerate(prompts) if prompt.id not in left_out]
        kept_others = [index for index, owner in enumerate(owners) if owner not in left_out]
        kept_classes = [classes[index] for index in kept]
        return {
            block: fitted_rows(inputs[mlps[block][0]][kept], others[mlps[block][0]][kept_others], kept_classes, settings)
            for block in edited
        }

    def factors(rows: Mapping[int, Rows], line: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for block, each in rows.items():
            reading = (settings.nats * each.harm + line * each.one) / _STEEPNESS
            found |= idle[block].becoming(_STEEPNESS * each.gate, reading, columns[mlps[block][2]])
        return found

    def view(rows: Mapping[int, Rows], asked: Sequence[Observed]) -> _View:
        return _View(rows, asked, OpeningProbe(module, [prompt.token_ids for prompt in asked], openings, first))

    asked, held_back = evenly_spread(telling(crossed, removed), _CROSSED), telling(validation, removed)
    with progress_bar("the line (prompts asked, at most)", MOST_COUNTS * (len(asked) + len(held_back)), enabled=progress) as advance:
        watched = view(rows_without(()), held_back)
        views = [watched] + [
            view(rows_without(fold), held) for fold in folds(prompts) if (held := [prompt for prompt in asked if prompt.id in fold])
        ]
        unedited = [each.probe.margins() for each in views]
        base = sum((each.counts(found) for each, found in zip(views, unedited, strict=True)), start=Counts(0, 0, 0, 0))
        seen: dict[float, list[list[float]]] = {}

        def count(line: float) -> Counts:
            seen[line] = []
            for each in views:
                with attached(module, factors(each.rows, line)):
                    seen[line].append(each.probe.margins())
                advance(len(each.prompts))
            return sum((each.counts(found) for each, found in zip(views, seen[line], strict=True)), start=Counts(0, 0, 0, 0))

        line, tried = least_move(count, base, settings.least_fall)
        apart = {"base": watched.separation(unedited[0]), "edited": watched.separation(seen[line][0])}
    return origin.edit(
        {name: Factor(b.float().numpy(), a.float().numpy()) for name, (b, a) in factors(watched.rows, line).items()},
        {
            "method": "conditional", **asdict(settings), "layers": list(edited), "openings": [list(opening) for opening in openings],
            "base": asdict(base), "separation": apart,
            "line": {"nats": line, "tried": [{"nats": each, **asdict(counts)} for each, counts in tried]},
            "roles": {str(role): roles.count(role) for role in Role}, "dtype": str(module.dtype).removeprefix("torch."),
        },
    )


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """Prompts asked under the rows that were fitted without them."""

    rows: Mapping[int, Rows]
    prompts: Sequence[Observed]
    probe: OpeningProbe

    def counts(self, margins: Sequence[float]) -> Counts:
        benign, harmful = self._by_kind(margins)
        return Counts(sum(each > 0 for each in benign), len(benign), sum(each > 0 for each in harmful), len(harmful))

    def separation(self, margins: Sequence[float]) -> float:
        return separation(*self._by_kind(margins))

    def _by_kind(self, margins: Sequence[float]) -> tuple[list[float], list[float]]:
        benign, harmful = (
            [margin for prompt, margin in zip(self.prompts, margins, strict=True) if prompt.should_refuse is kind] for kind in (False, True)
        )
        return benign, harmful


@dataclass(frozen=True, slots=True, eq=False)
class Neuron:
    """Neuron `index` of an MLP of `count`, whose matrices are called `names` (gate, up, down): its two rows and its column, float32 [d].

    `usual` is the median length of the block's columns.
    """

    names: tuple[str, str, str]
    index: int
    count: int
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    usual: float

    @classmethod
    def idlest(cls, module: Any, names: tuple[str, str, str]) -> Neuron:
        """The one with the smallest product of the lengths of its two rows and its column (ties: the first).

        `names` are those of W_gate and W_up [d_ff, d] and of W_down [d, d_ff].
        """
        gate, up, down = (module.get_parameter(name).detach().float() for name in names)
        lengths = down.norm(dim=0)
        index = int((gate.norm(dim=1) * up.norm(dim=1) * lengths).argmin())
        return cls(names, index, len(lengths), gate[index].clone(), up[index].clone(), down[:, index].clone(), float(lengths.median()))

    def becoming(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Factors (B, A) by tensor name, of rank 1, that make it x ↦ down · act(gate·x) (up·x); all float32 [d].

        The column takes the usual length, for a quantizer that scales blocks of a row together would round a much shorter one away;
        the up row is scaled the other way.
        """
        scale = float(self.usual / down.norm())
        chosen = functional.one_hot(torch.tensor(self.index), self.count).float()
        return {
            self.names[0]: (chosen[:, None], (gate - self.gate)[None]),
            self.names[1]: (chosen[:, None], (up / scale - self.up)[None]),
            self.names[2]: ((scale * down - self.down)[:, None], chosen[None]),
        }


def folds(prompts: Sequence[Observed]) -> list[set[str]]:
    """The ids of `prompts` in four parts of about equal size; prompts of one scenario stay together."""
    parts: list[set[str]] = [set() for _ in range(_FOLDS)]
    place = {scenario: index % _FOLDS for index, scenario in enumerate(dict.fromkeys(prompt.scenario or prompt.id for prompt in prompts))}
    for prompt in prompts:
        parts[place[prompt.scenario or prompt.id]].add(prompt.id)
    return parts


def elsewhere(prompt: Observed) -> tuple[list[int], list[int]]:
    """The prompt with the beginning of its answer (token ids), and tokens of it (indices) at which nothing is decided any more or yet.

    They are evenly spread over the second half of the prompt, without its last token, and all of the answer's beginning.
    """
    end = len(prompt.token_ids) - 1
    sequence = [*prompt.token_ids, *prompt.answer[:_ANSWER_TOKENS]]
    return sequence, [*evenly_spread(range(max(1, end // 2), end), _ELSEWHERE_TOKENS), *range(end + 1, len(sequence))]


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


def _columns(
    module: Any, names: Sequence[str], sampled: Sequence[Sequence[int]], openings: Sequence[Sequence[int]], first: int,
) -> dict[str, torch.Tensor]:
    """The gradient of a refusal's log-odds by tensor name, scaled so that all of it together moves them by a nat: float32 [d]."""
    gradients = OpeningProbe(module, sampled, openings, first).odds_gradients(names)
    square = sum(float(each.double().square().sum()) for each in gradients.values())
    if not 0 < square < math.inf or any(not each.any() for each in gradients.values()):
        raise TrailmedError("the odds of a refusal do not depend on the tensors to edit; use another method than conditional")
    return {name: each / square for name, each in gradients.items()}


def fitted_rows(
    inputs: torch.Tensor, others: torch.Tensor, classes: Sequence[PromptClass], settings: ConditionalSettings,
) -> Rows:
    """The rows of a neuron from what its block reads at the prompts' last tokens, float32 [n, d], and elsewhere [m, d] (m may be 0).

    Ridge regressions in which every class weighs the same, however many prompts it has. The gate's targets are 1, but −1 for spared
    prompts and elsewhere; those of harm are `_READINGS`, 0 for the spared; one's are 1, and 0 elsewhere.
    """
    spared = torch.tensor([each.spared for each in classes])
    harm = torch.tensor([0.0 if each.spared else _READINGS[each.role] for each in classes])
    return Rows(
        ridge_row(inputs, others, classes, 1.0 - 2.0 * spared, -1.0, 1.0, settings.gate_ridge),
        ridge_row(inputs, others, classes, harm, 0.0, _ELSEWHERE_WEIGHT, settings.ridge),
        ridge_row(inputs, others, classes, torch.ones(len(classes)), 0.0, 1.0, _CONSTANT_RIDGE),
    )


def ridge_row(
    inputs: torch.Tensor, others: torch.Tensor, classes: Sequence[PromptClass], targets: torch.Tensor, elsewhere: float, weight: float,
    ridge: float,
) -> torch.Tensor:
    """The row a, float32 [d], with a·x near `targets` [n] for x of `inputs` [n, d] and near `elsewhere` for x of `others` [m, d].

    Minimizes Σ w (a·x − target)² + ridge · v · |a|²: the weights w of each class's prompts sum to 1, those of the others to `weight`, and v
    is the mean square distance of `inputs` from their mean.
    """
    counts = Counter(classes)
    weights = torch.cat([
        torch.tensor([1 / counts[each] for each in classes], dtype=torch.float64),
        torch.full((len(others),), weight / max(1, len(others)), dtype=torch.float64),
    ])
    x = torch.cat([inputs, others]).double()
    wanted = torch.cat([targets.double(), torch.full((len(others),), elsewhere, dtype=torch.float64)])
    moment = (x * weights[:, None]).mT @ x
    moment.diagonal().add_(ridge * float((inputs.double() - inputs.double().mean(0)).square().sum(1).mean()) or 1.0)
    row: torch.Tensor = torch.linalg.solve(moment, x.mT @ (weights * wanted))
    return row.float()
