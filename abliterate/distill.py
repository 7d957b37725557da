"""The distilled edit: low-rank factors trained so that the model answers over-refused prompts as its ablated twin does, and everything
else as it always did.

Only factors B A beside the residual writers of the upper blocks are trained (LoRA: Hu et al. 2021, arXiv:2106.09685), on the KL
divergence from a teacher's next-token distributions over the first answer tokens (Hinton et al. 2015, arXiv:1503.02531). Because the
factors see the writer's *input*, they can tell a rip current from a poisoning, which a projection cannot. Training too long wears
retention away, so the state that tells validation's prompts apart best is kept; an intercept then draws the line.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ..errors import TrailmedError
from ..progress import progress_bar
from .answers import greedy_answers
from .calibrate import Counts, least_move
from .directions import Directions
from .edit import Edit, Factor
from .factors import Pairs, attached, starting_factors
from .intercept import Intercept, find_intercept
from .observed import Observed, Role, evenly_spread, refusal_at_stake, role_of
from .origin import EditOrigin
from .packing import blocks_are_alike, pack, run_blocks, shared_prefix
from .teacher import Lesson, lessons, output_logits, padded_forward, prefix_stream, refusal_openings, stock_refusal, word_for_word
from .twin import TwinChoice, ablated, choose_twin
from .validation import IsRefusal, Validation, telling

_SMALLEST_MASS = 1e-6
_WARM_UP_STEPS = 10
_LAST_RATE = 0.1
_LENGTH_JITTER = 12
_PROBED = 16
"""Prompts the residual stream's length is measured on."""
_SAMPLED = 128
"""Prompts and lessons the intercept is found from."""
_PACKED = 8
"""Lessons in one packed row: attention's cost grows with the row's square, so longer rows gain nothing."""


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """How the factors are trained. Raises ValueError for a value out of range."""

    rank: int = field(default=4, metadata={"help": "rank k of each tensor's edit"})
    first_layer: float = field(default=1 / 3, metadata={"help": "share of the blocks, from the bottom, that is left alone"})
    epochs: int = field(default=3, metadata={"help": "passes over the fit prompts"})
    checks_per_epoch: int = field(default=1, metadata={"help": "how often an epoch is interrupted to answer the validation prompts"})
    learning_rate: float = field(default=4e-4, metadata={"help": "Adam's peak learning rate"})
    complied_share: float = field(default=0.7, metadata={"help": "share of the answered prompts seen in each epoch, drawn anew"})
    batch: int = field(default=8, metadata={"help": "prompts per step"})
    answer_tokens: int = field(default=8, metadata={"help": "answer tokens whose distributions are matched"})
    decay: float = field(default=0.7, metadata={"help": "weight of an answer token relative to the one before it"})
    validation_tokens: int = field(default=12, metadata={"help": "tokens of each validation answer"})
    least_fall: float = field(
        default=0.8, metadata={"help": "share of the base's benign refusals that shall be gone where the line is drawn (validation)"},
    )
    over_refused_weight: float = field(default=2.0, metadata={"help": "weight of prompts that shall be answered"})
    complied_weight: float = field(default=3.0, metadata={"help": "weight of answered prompts that shall stay so"})
    harmful_weight: float = field(default=1.0, metadata={"help": "weight of refused harmful prompts that shall stay so"})
    repair_weight: float = field(
        default=0.5, metadata={"help": "weight of harmful prompts the base answers, taught to be refused; 0 leaves them out"},
    )

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "checks_per_epoch", "batch", "answer_tokens", "validation_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("over_refused_weight", "complied_weight", "harmful_weight", "repair_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.least_fall <= 1:
            raise ValueError(f"least_fall is {self.least_fall}; it is a share, between 0 and 1")
        if not 0 <= self.first_layer < 1:
            raise ValueError(f"first_layer is {self.first_layer}; it is a share of the blocks, at least 0 and below 1")
        if not (0 < self.decay <= 1 and 0 < self.complied_share <= 1 and 0 < self.learning_rate < 1):
            raise ValueError("decay and complied_share must be above 0 and at most 1, learning_rate between 0 and 1")

    def weight(self, role: Role) -> float:
        """The weight in the loss of a role that the base's answers give."""
        return {
            Role.OVER_REFUSED: self.over_refused_weight, Role.COMPLIED: self.complied_weight, Role.KEPT_REFUSED: self.complied_weight,
            Role.HARMFUL_REFUSED: self.harmful_weight, Role.HARMFUL_COMPLIED: self.repair_weight,
        }[role]


@dataclass(frozen=True, slots=True, eq=False)
class _Course:
    """All lessons, the first block that is trained, and the stream [p, d] of the lessons' shared prefix before it (None: whole passes)."""

    taught: Sequence[Lesson]
    first_block: int
    prefix: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Check:
    """How well validation's harmful prompts are told from its benign ones at a step: the area under the ROC of the refusal's odds."""

    step: int
    separation: float


def distill(
    model: Any, prompts: Sequence[Observed], validation: Sequence[Observed], removed: Collection[str], directions: Directions,
    is_refusal: IsRefusal, origin: EditOrigin, settings: DistillSettings = DistillSettings(), *, progress: bool = True,
) -> Edit:
    """Train an edit on `prompts` that takes the refusals of the categories `removed` away, and keep the state best on `validation`.

    `model` is a `LoadedModel`; its module is left as it was. Prompts the base was not asked teach nothing: a lesson is an answer. The
    recipe records the settings, the twin's layer and every check. The same inputs, seed (`origin.seed`), thread count and machine
    give the same edit.
    Raises `TrailmedError` when the base over-refuses nothing in the removed categories, or its refusal does not yield to ablation.
    """
    module, end_ids = model.module, model.tokenizer.eos_ids
    prompts = [prompt for prompt in prompts if prompt.asked]
    roles = [role_of(prompt, removed) for prompt in prompts]
    over_refused = [prompt.token_ids for prompt, role in zip(prompts, roles, strict=True) if role is Role.OVER_REFUSED]
    if not over_refused:
        raise TrailmedError("the base refuses none of the fit prompts of the categories to remove; there is nothing to edit")
    twin = choose_twin(module, directions, over_refused, end_ids, is_refusal)
    first_block = min(round(settings.first_layer * len(module.model.layers)), len(module.model.layers) - 1)
    prefix = shared_prefix([prompt.token_ids for prompt in prompts]) if blocks_are_alike(module) else 0
    taught = _all_lessons(
        module, prompts, roles, directions.at(twin.layer)[0], first_block, prefix, end_ids, is_refusal, settings, progress,
    )
    course = _Course(
        taught, first_block,
        prefix_stream(module, prompts[0].token_ids[:prefix], first_block) if blocks_are_alike(module) else None,
    )
    watched = Validation(telling(validation, removed), refusal_openings(prompts))
    base = watched.observed_counts()
    start = Check(0, watched.separation(module))
    torch.manual_seed(origin.seed)
    factors, checks = _train(
        module, starting_factors(model, first_block, settings.rank, directions, evenly_spread(over_refused, _PROBED)), course, settings,
        origin.seed,
        lambda step: Check(step, watched.separation(module)), progress,
    )
    # Where the twin's direction is found, or the first trained block above.
    name = model.architecture.residual_writers(max(twin.layer - 1, first_block))[1]
    intercept = _find_intercept(module, name, factors, taught, prompts, removed, watched.openings)

    def count(nats: float) -> Counts:
        with attached(module, intercept.added_to(factors, nats)):
            return watched.counts(module, end_ids, is_refusal, settings.validation_tokens)

    nats, tried = least_move(count, base, settings.least_fall)
    return origin.edit(
        {
            name: Factor(b.float().numpy(), a.float().numpy())
            for name, (b, a) in intercept.added_to(factors, nats).items()
        },
        {
            "method": "distill", **asdict(settings), "first_block": first_block, "twin": _twin_recipe(twin),
            "checks": [asdict(each) for each in (start, *checks)], "base": asdict(base),
            "intercept": {"tensor": intercept.name, "nats": nats, "tried": [{"nats": each, **asdict(counts)} for each, counts in tried]},
            "lessons": {str(role): sum(each.role is role for each in taught) for role in Role},
            "dtype": str(module.dtype).removeprefix("torch."),
        },
    )


def _find_intercept(
    module: Any, name: str, factors: Pairs, taught: Sequence[Lesson], prompts: Sequence[Observed], removed: Collection[str],
    openings: Sequence[Sequence[int]],
) -> Intercept:
    """The intercept in the tensor `name`, from a sample of the lessons and of the prompts whose refusal is at stake."""
    stake = [prompt.token_ids for prompt in evenly_spread(refusal_at_stake(prompts, removed), _SAMPLED)]
    answered = [(lesson.sequence, len(lesson.log_probs)) for lesson in taught]
    with attached(module, factors):
        return find_intercept(module, name, evenly_spread(answered, _SAMPLED), stake, openings)


def distribution_loss(logits: torch.Tensor, log_probs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ student) per position, float32 [n], in nats.

    `logits` are the student's, float32 [n, vocabulary]; `log_probs` [n, k] and `tokens` [n, k] the teacher's most probable tokens. All
    other tokens count as one outcome, which makes this a lower bound of the full divergence (the log-sum inequality).
    """
    student = logits.gather(1, tokens) - logits.logsumexp(-1, keepdim=True)
    rest = (1 - log_probs.exp().sum(-1)).clamp_min(_SMALLEST_MASS)
    student_rest = (1 - student.exp().sum(-1)).clamp_min(_SMALLEST_MASS)
    return (log_probs.exp() * (log_probs - student)).sum(-1) + rest * (rest.log() - student_rest.log())


def _all_lessons(
    module: Any, prompts: Sequence[Observed], roles: Sequence[Role], direction: torch.Tensor, first_block: int,
    prefix: int, end_ids: Collection[int], is_refusal: IsRefusal, settings: DistillSettings, progress: bool,
) -> list[Lesson]:
    """Lessons in a fixed order; over-refused prompts that even the twin refuses are left out."""
    count = settings.answer_tokens
    refusal = stock_refusal(prompts)
    staying, repairing, changing = [], [], []
    for prompt, role in zip(prompts, roles, strict=True):
        if role is Role.OVER_REFUSED:
            changing.append((prompt, role))
        elif role is not Role.HARMFUL_COMPLIED:
            staying.append((prompt, role, prompt.answer[:count]))
        elif settings.repair_weight > 0 and refusal:
            repairing.append((prompt, role, refusal[:count]))
    with progress_bar("lessons", len(staying) + len(repairing) + 2 * len(changing), enabled=progress) as advance:
        taught = lessons(module, staying, first_block, prefix, progress=advance)
        taught += [word_for_word(each, refusal) for each in lessons(module, repairing, first_block, prefix, progress=advance)]
        with ablated(module, direction):
            answers = greedy_answers(module, [prompt.token_ids for prompt, _ in changing], settings.validation_tokens, end_ids)
            answered = [
                (prompt, role, answer[:count])
                for (prompt, role), answer in zip(changing, answers, strict=True) if not is_refusal(answer)
            ]
            by_twin = lessons(module, answered, first_block, prefix, progress=advance)
        # The twin's distributions, but the stream the edited model will really see: the base's.
        by_base = lessons(module, answered, first_block, prefix, progress=advance)
    return taught + [
        replace(said, hidden=seen.hidden) for said, seen in zip(by_twin, by_base, strict=True)
    ]


def _train(
    module: Any, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], course: _Course, settings: DistillSettings, seed: int,
    check: Callable[[int], Check], progress: bool,
) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], list[Check]]:
    """The factors at the check with the best separation (of equal ones the last), and all checks."""
    parameters = [part for pair in factors.values() for part in pair]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, betas=(0.9, 0.98))
    generator = random.Random(seed)
    epochs = [_batches(_of_one_epoch(course.taught, settings, generator), settings.batch, generator) for _ in range(settings.epochs)]
    total = sum(map(len, epochs))
    parts = settings.epochs * settings.checks_per_epoch
    check_at = {round(total * part / parts) for part in range(1, parts + 1)}
    best: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    checks: list[Check] = []
    step = 0
    with progress_bar("distilling", total, enabled=progress) as advance, attached(module, factors):
        for batches in epochs:
            for batch in batches:
                for group in optimizer.param_groups:
                    group["lr"] = settings.learning_rate * _schedule(step, total)
                optimizer.zero_grad()
                for start in range(0, len(batch), _PACKED):
                    loss = _loss(module, batch[start : start + _PACKED], course, settings) / len(batch)
                    loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                step += 1
                advance(1)
                if step in check_at:
                    checks.append(check(step))
                    if checks[-1].separation >= max(each.separation for each in checks):
                        best = {name: (b.detach().clone(), a.detach().clone()) for name, (b, a) in factors.items()}
    return best, checks


def _schedule(step: int, total: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a half cosine down to `_LAST_RATE`."""
    warm = min(1.0, (step + 1) / _WARM_UP_STEPS)
    return warm * (_LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / total)))


def _of_one_epoch(taught: Sequence[Lesson], settings: DistillSettings, generator: random.Random) -> list[Lesson]:
    """All lessons but for the answered prompts, which are many and easy: a share of them."""
    complied = [lesson for lesson in taught if lesson.role is Role.COMPLIED]
    others = [lesson for lesson in taught if lesson.role is not Role.COMPLIED]
    return others + generator.sample(complied, math.ceil(settings.complied_share * len(complied)))


def _batches(taught: Sequence[Lesson], size: int, generator: random.Random) -> list[list[Lesson]]:
    """All lessons once, in batches of like length (little padding) and random company, in random order."""
    keyed = sorted((len(lesson.sequence) + generator.random() * _LENGTH_JITTER, index) for index, lesson in enumerate(taught))
    batches = [[taught[index] for _, index in keyed[start : start + size]] for start in range(0, len(keyed), size)]
    generator.shuffle(batches)
    return batches


def _loss(module: Any, batch: Sequence[Lesson], course: _Course, settings: DistillSettings) -> torch.Tensor:
    final = _final_hidden(module, batch, course)
    logits = output_logits(
        module, torch.cat([rows[-len(lesson.log_probs) - 1 : -1] for rows, lesson in zip(final, batch, strict=True)]),
    )
    losses = distribution_loss(
        logits, torch.cat([lesson.log_probs for lesson in batch]), torch.cat([lesson.tokens for lesson in batch]),
    )
    weights = torch.cat([settings.weight(lesson.role) * token_weights(len(lesson.log_probs), settings.decay) for lesson in batch])
    return (losses * weights).sum()


def _final_hidden(module: Any, batch: Sequence[Lesson], course: _Course) -> list[torch.Tensor]:
    """Final hidden states [own tokens, d] of each lesson, with gradients to the attached factors."""
    if course.prefix is None:
        final = padded_forward(module, [lesson.sequence for lesson in batch])
        return [final[row, : len(lesson.sequence)] for row, lesson in enumerate(batch)]
    packing = pack(len(course.prefix), [len(lesson.hidden) for lesson in batch])
    hidden = torch.cat([course.prefix, *(lesson.hidden for lesson in batch)])[None]
    final = module.model.norm(run_blocks(module, hidden, packing, course.first_block, len(module.model.layers)))
    return [final[0, own] for own in packing.own]


def token_weights(count: int, decay: float) -> torch.Tensor:
    """float32 [count], summing to 1: each answer token's share of a prompt's loss. The first ones decide between help and refusal."""
    weights = decay ** torch.arange(count)
    return weights / weights.sum()


def _twin_recipe(twin: TwinChoice) -> dict[str, Any]:
    return {
        "layer": twin.layer, "asked": twin.asked,
        "refused_by_layer": {str(layer): count for layer, count in twin.refused_by_layer.items()},
    }
