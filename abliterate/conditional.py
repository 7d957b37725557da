"""The conditional edit: one rank per residual writer reads how harmful a request is and moves the refusal's odds accordingly.

The rows are ridge regressions: at its last token an over-refused prompt reads −1, a benign one that the base answers 0, a harmful one
that it answers +1, and one that it refuses 0.7, so that a line drawn lower does not cost it its refusal. The columns are the natural
gradient of the log-odds of a refusal, however the base words it, so that answered prompts change least for the nats it moves (see
`fisher`). It is conditional activation steering (Lee et al. 2024, arXiv:2409.05907) with the condition linear, and therefore written
into the weights. Closed form: the least-norm solution does not follow the single prompt as gradient descent on the same rows does. A
constant row beside it reads 1 at the last token of a prompt that a line between help and refusal is for, and draws that line where the
answers to prompts it was not fitted to say; at benign prompts of categories that are not removed it reads 0. Both read 0 elsewhere in
answered prompts and in their answers: the decision is made at one token, and an edit that acts on every token disturbs what has long
been decided, up to answers that go in circles.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import TrailmedError
from ..progress import Advance, progress_bar
from .activations import capture_inputs, inputs_at
from .calibrate import MOST_COUNTS, Counts, least_move
from .edit import Edit, Factor
from .factors import attached
from .fisher import first_token_scores, natural_gradient
from .gated import ridge_gate
from .intercept import refusal_gradients
from .observed import Observed, Role, evenly_spread, refusal_at_stake, role_of
from .origin import EditOrigin
from .project import written_names
from .teacher import refusal_openings
from .validation import IsRefusal, Validation, telling

_SAMPLED = 64
"""Prompts the gradient is the mean of."""
_UNDISTURBED = 96
"""Answered prompts the Fisher information is the mean of."""
_CROSSED = 160
"""Prompts asked in cross-validation."""
_ELSEWHERE_PROMPTS = 160
"""Answered prompts whose other tokens the rows shall not act on."""
_ELSEWHERE_TOKENS = 4
"""Of each such prompt's second half and of the beginning of its answer, each."""
_ANSWER_TOKENS = 8
_ELSEWHERE_WEIGHT = 2.0
"""Of all those tokens together; the last tokens of the prompts of one class have 1."""
_CONSTANT_RIDGE = 0.01
_FOLDS = 4
_READINGS = {
    Role.OVER_REFUSED: -1.0, Role.HARMFUL_COMPLIED: 1.0, Role.COMPLIED: 0.0, Role.KEPT_REFUSED: 0.0, Role.HARMFUL_REFUSED: 0.7,
}


class PromptClass(NamedTuple):
    """What the rows are fitted to alike: prompts of one role, benign ones of categories that are not removed apart from the others."""

    role: Role
    spared: bool


@dataclass(frozen=True, slots=True)
class ConditionalSettings:
    """Where the edit sits and how far it moves the odds. Raises ValueError for a value out of range."""

    nats: float = field(
        default=3.5, metadata={"help": "nats of a refusal's log-odds that over-refused and answered harmful prompts are moved apart"},
    )
    damping: float = field(
        default=0.1, metadata={"help": "how much of the plain gradient the columns keep; small spares answered prompts, but changes more"},
    )
    ridge: float = field(default=0.1, metadata={"help": "regularization of the rows, relative to the variance of what the layers read"})
    first_layer: float = field(default=0.5, metadata={"help": "share of the blocks below the edited ones"})
    last_layer: float = field(default=0.7, metadata={"help": "share of the blocks below the end of the edited ones"})
    validation_tokens: int = field(default=12, metadata={"help": "tokens of each validation answer"})
    least_fall: float = field(
        default=0.8, metadata={"help": "share of the base's benign refusals that shall be gone where the line is drawn (validation)"},
    )

    def __post_init__(self) -> None:
        for name in ("nats", "damping", "ridge"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a positive number")
        if not 0 <= self.first_layer < self.last_layer <= 1:
            raise ValueError("first_layer and last_layer must be shares of the blocks, the first below the last")
        if self.validation_tokens < 1 or not 0 <= self.least_fall <= 1:
            raise ValueError("validation_tokens must be at least 1, and least_fall a share between 0 and 1")


def conditional(
    model: Any, prompts: Sequence[Observed], validation: Sequence[Observed], removed: Collection[str], is_refusal: IsRefusal,
    origin: EditOrigin, settings: ConditionalSettings = ConditionalSettings(), *, crossed: Sequence[Observed] = (), progress: bool = True,
) -> Edit:
    """Fit the rows to `prompts`, draw the line by `validation`, and return W' = W + x (c·a + t·u)ᵀ for the writers of the middle blocks.

    a [d_in] is the regression, u [d_in] the constant row (`condition_row`, `constant_row`), x [d_out] the natural gradient of the
    log-odds of a refusal (`refusal_openings`), all tensors together moving them by a nat; the factors are float32 of rank 1. t is the least
    move of the line that holds the limits (`least_move`). Besides `validation` an even sample of `crossed` (a part of `prompts`) draws
    the line, each prompt answered under rows fitted without its fold's scenarios: validation alone is too small to place the line by.
    `model` is a `LoadedModel`; its module is left as it was. Nothing is random. Raises `TrailmedError` when the base over-refuses nothing
    in the removed categories, or its odds of refusing do not depend on these tensors.
    """
    module = model.module
    roles = [role_of(prompt, removed) for prompt in prompts]
    if Role.OVER_REFUSED not in roles:
        raise TrailmedError("the base refuses none of the fit prompts of the categories to remove; there is nothing to edit")
    classes = [
        PromptClass(role, not prompt.should_refuse and prompt.category not in removed) for prompt, role in zip(prompts, roles, strict=True)
    ]
    openings = refusal_openings(prompts)
    blocks = len(module.model.layers)
    first = min(round(settings.first_layer * blocks), blocks - 1)
    edited = range(first, max(first + 1, round(settings.last_layer * blocks)))
    names = [name for block in edited for name in written_names(model.architecture, block)]
    answered = [prompt for prompt, role in zip(prompts, roles, strict=True) if role is Role.COMPLIED]
    with progress_bar("inputs of the writers", len(prompts) + min(len(answered), _ELSEWHERE_PROMPTS), enabled=progress) as advance:
        inputs = {
            name: each.reshape(len(prompts), -1)
            for name, each in capture_inputs(model, [prompt.token_ids for prompt in prompts], names, progress=advance).items()
        }
        owners, others = _elsewhere(module, evenly_spread(answered, _ELSEWHERE_PROMPTS), names, advance)
    constants = {name: constant_row(x, others[name], classes) for name, x in inputs.items()}
    sampled = [prompt.token_ids for prompt in evenly_spread(refusal_at_stake(prompts, removed), _SAMPLED)]
    undisturbed = [prompt.token_ids for prompt in evenly_spread(answered, _UNDISTURBED)]
    try:
        columns = natural_gradient(
            refusal_gradients(module, constants, sampled, openings), first_token_scores(module, constants, undisturbed), len(undisturbed),
            settings.damping,
        )
    except ValueError as error:
        raise TrailmedError("the odds of a refusal do not depend on the tensors to edit; use another method than conditional") from error

    def rows_without(left_out: Collection[str]) -> dict[str, torch.Tensor]:
        kept = [index for index, prompt in enumerate(prompts) if prompt.id not in left_out]
        kept_others = [index for index, owner in enumerate(owners) if owner not in left_out]
        kept_classes = [classes[index] for index in kept]
        return {
            name: condition_row(x[kept], others[name][kept_others], kept_classes, settings.ridge) for name, x in inputs.items()
        }

    def factors(rows: dict[str, torch.Tensor], line: float) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {name: (columns[name][:, None], (settings.nats * rows[name] + line * constants[name])[None]) for name in names}

    rows, watched = rows_without(()), Validation(telling(validation, removed), openings)
    asked = evenly_spread(telling(crossed, removed), _CROSSED)
    views = [(rows, watched)] + [
        (rows_without(fold), Validation(held, openings))
        for fold in folds(prompts) if (held := [prompt for prompt in asked if prompt.id in fold])
    ]
    base = sum((view.observed_counts() for _, view in views), start=Counts(0, 0, 0, 0))
    apart = watched.separation(module)

    with progress_bar("the line (answers, at most)", MOST_COUNTS * (base.benign + base.harmful), enabled=progress) as advance:

        def count(line: float) -> Counts:
            found = Counts(0, 0, 0, 0)
            for fitted, view in views:
                with attached(module, factors(fitted, line)):
                    found += view.counts(module, model.tokenizer.eos_ids, is_refusal, settings.validation_tokens)
                advance(len(view.prompts))
            return found

        line, tried = least_move(count, base, settings.least_fall)
    with attached(module, factors(rows, line)):
        moved_apart = watched.separation(module)
    return origin.edit(
        {name: Factor(b.float().numpy(), a.float().numpy()) for name, (b, a) in factors(rows, line).items()},
        {
            "method": "conditional", **asdict(settings), "layers": list(edited), "base": asdict(base),
            "separation": {"base": apart, "edited": moved_apart},
            "line": {"nats": line, "tried": [{"nats": each, **asdict(counts)} for each, counts in tried]},
            "roles": {str(role): roles.count(role) for role in Role}, "dtype": str(module.dtype).removeprefix("torch."),
        },
    )


def folds(prompts: Sequence[Observed]) -> list[set[str]]:
    """The ids of `prompts` in four parts of about equal size; prompts of one scenario stay together."""
    parts: list[set[str]] = [set() for _ in range(_FOLDS)]
    place = {scenario: index % _FOLDS for index, scenario in enumerate(dict.fromkeys(prompt.scenario or prompt.id for prompt in prompts))}
    for prompt in prompts:
        parts[place[prompt.scenario or prompt.id]].add(prompt.id)
    return parts


def elsewhere(prompt: Observed) -> tuple[list[int], list[int]]:
    """The prompt with the beginning of its answer (token ids), and tokens of it (indices) at which nothing is decided any more or yet.

    They are evenly spread over the second half of the prompt, without its last token, and over the answer's beginning.
    """
    end = len(prompt.token_ids) - 1
    sequence = [*prompt.token_ids, *prompt.answer[:_ANSWER_TOKENS]]
    within = evenly_spread(range(max(1, end // 2), end), _ELSEWHERE_TOKENS)
    return sequence, within + evenly_spread(range(end + 1, len(sequence)), _ELSEWHERE_TOKENS)


def _elsewhere(
    module: Any, prompts: Sequence[Observed], names: Sequence[str], progress: Advance,
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """What the layers `names` read `elsewhere` in `prompts`: the prompt's id of every row, and the rows [m, d_in] by name."""
    taken = [(prompt.id, *elsewhere(prompt)) for prompt in prompts]
    owners = [owner for owner, _, positions in taken for _ in positions]
    if not owners:
        return [], {name: torch.zeros(0, module.get_parameter(name).shape[1]) for name in names}
    sequences, positions = [sequence for _, sequence, _ in taken], [positions for _, _, positions in taken]
    return owners, inputs_at(module, sequences, positions, names, progress=progress)


def condition_row(inputs: torch.Tensor, others: torch.Tensor, classes: Sequence[PromptClass], ridge: float) -> torch.Tensor:
    """The row a, float32 [d_in], that reads `_READINGS` at the last tokens of prompts of these classes and 0 at other tokens.

    `inputs` is float32 [n, d_in] at the last tokens, `others` [m, d_in] elsewhere (m may be 0). Every class present weighs the same,
    however many prompts it has, and the other tokens twice as much; `ridge` is relative to the weighted variance of `inputs`. What
    ridge regression shrinks is given back: the mean reading of the harmful prompts less that of the over-refused ones is 1 afterwards
    (without harmful prompts: that of the over-refused is −1/2). Raises `TrailmedError` when the row cannot tell them apart.
    """
    targets = torch.tensor([_READINGS[each.role] for each in classes], dtype=torch.float64)
    row = _ridge_row(inputs, others, classes, targets, ridge)
    read = inputs.double() @ row
    low = float(read[targets < 0].mean())
    gap = float(read[targets > 0].mean()) - low if (targets > 0).any() else -2 * low
    if not gap > 0:
        raise TrailmedError("over-refused and harmful prompts look alike to the layers; use more prompts, or another method")
    return (row / gap).float()


def constant_row(inputs: torch.Tensor, others: torch.Tensor, classes: Sequence[PromptClass]) -> torch.Tensor:
    """The row u, float32 [d_in], that reads 1 (on average exactly) at the last tokens of prompts that are not spared, 0 at those that are.

    At other tokens it reads 0 too. Arguments and weights as in `condition_row`. Raises `TrailmedError` when the layer reads nothing at
    the last tokens.
    """
    targets = torch.tensor([float(not each.spared) for each in classes], dtype=torch.float64)
    row = _ridge_row(inputs, others, classes, targets, _CONSTANT_RIDGE)
    mean = float((inputs.double() @ row)[targets > 0].mean())
    if not mean > 0:
        raise TrailmedError("the layers read nothing at the last tokens; use another method than conditional")
    return (row / mean).float()


def _ridge_row(
    inputs: torch.Tensor, others: torch.Tensor, classes: Sequence[PromptClass], targets: torch.Tensor, ridge: float,
) -> torch.Tensor:
    """float64 [d_in] that reads `targets` [n] from `inputs` and 0 from `others`, weighted and regularized as in `condition_row`."""
    counts = Counter(classes)
    weights = torch.tensor([1 / counts[each] for each in classes], dtype=torch.float64)
    ends, rest = inputs.double(), others.double()
    variance = float(((ends - ends.mean(0)).square().sum(1) * weights).mean())
    if not variance > 0:
        return torch.zeros(inputs.shape[1], dtype=torch.float64)
    x = torch.cat([ends, rest])
    weights = torch.cat([weights, torch.full((len(rest),), _ELSEWHERE_WEIGHT / max(1, len(rest)), dtype=torch.float64)])
    squares = float((x.square().sum(1) * weights).mean())
    return ridge_gate(x, torch.cat([targets, torch.zeros(len(rest))])[:, None], weights, ridge * variance / squares)[0]
