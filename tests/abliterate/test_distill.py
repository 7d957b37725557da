"""The loss against NumPy in float64, the attached factors against merged weights, and whole edits of small models that really refuse."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import tiny_module

from trailmed.abliterate.answers import greedy_answers
from trailmed.abliterate.directions import Directions
from trailmed.abliterate.distill import DistillSettings, distill, distribution_loss, token_weights
from trailmed.abliterate.edit import Edit
from trailmed.abliterate.factors import attached
from trailmed.abliterate.observed import Observed, Role, masks_by_role
from trailmed.abliterate.origin import EditOrigin
from trailmed.abliterate.twin import ablated
from trailmed.errors import TrailmedError
from trailmed.models.architecture import ARCHITECTURES

Float64 = npt.NDArray[np.float64]


# The loss.

def log_softmax(logits: npt.NDArray[Any]) -> Float64:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    result: Float64 = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def kl(teacher: Float64, student: Float64) -> Float64:
    """KL(teacher ‖ student) of log-probabilities [n, outcomes]."""
    result: Float64 = (np.exp(teacher) * (teacher - student)).sum(-1)
    return result


def made_up(seed: int, size: int, k: int) -> tuple[torch.Tensor, torch.Tensor, Float64, Float64, torch.Tensor]:
    """Student's logits, teacher's k best log-probabilities; both in float64 over the whole vocabulary; the k tokens."""
    generator = np.random.default_rng(seed)
    student, teacher = (1.5 * generator.normal(size=(5, size)).astype(np.float32) for _ in range(2))
    exact = log_softmax(teacher)
    tokens = np.argsort(-exact, axis=-1)[:, :k]
    best = torch.from_numpy(np.take_along_axis(exact, tokens, -1)).float()
    return torch.from_numpy(student), best, log_softmax(student), exact, torch.from_numpy(tokens)


@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
@settings(max_examples=40, deadline=None)
def test_with_all_tokens_the_loss_is_the_kl_divergence(seed: int, size: int) -> None:
    logits, best, student, teacher, tokens = made_up(seed, size, size)
    loss = distribution_loss(logits, best, tokens)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss, kl(teacher, student), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(3, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_with_some_tokens_it_is_that_of_the_rest_as_one_outcome_and_never_more(seed: int, size: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, size - 1))
    logits, best, student, teacher, tokens = made_up(seed, size, k)
    loss = distribution_loss(logits, best, tokens).numpy()
    coarse = []
    for log_probs in (teacher, student):
        chosen = np.take_along_axis(log_probs, tokens.numpy(), -1)
        coarse.append(np.concatenate([chosen, np.log1p(-np.exp(chosen).sum(-1, keepdims=True))], -1))
    np.testing.assert_allclose(loss, kl(*coarse), rtol=1e-3, atol=1e-4)
    assert (loss <= kl(teacher, student) + 1e-4).all()
    assert (loss >= -1e-5).all()


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.data())
@settings(max_examples=20, deadline=None)
def test_a_student_that_says_what_its_teacher_says_loses_nothing(seed: int, size: int, data: st.DataObject) -> None:
    _, best, _, teacher, tokens = made_up(seed, size, data.draw(st.integers(1, size)))
    np.testing.assert_allclose(distribution_loss(torch.from_numpy(teacher).float() + 3, best, tokens), 0, atol=1e-5)


def test_the_gradient_is_the_students_distribution_less_the_teachers() -> None:
    logits, best, student, teacher, tokens = made_up(0, 12, 12)
    distribution_loss(logits.requires_grad_(), best, tokens).sum().backward()
    np.testing.assert_allclose(logits.grad, np.exp(student) - np.exp(teacher), atol=1e-5)


def test_certainty_does_not_make_the_loss_infinite() -> None:
    logits = torch.tensor([[80.0, 0, 0, 0], [0, 80.0, 0, 0]], requires_grad=True)
    log_probs = torch.tensor([[80.0, 0, 0, 0]]).log_softmax(-1)[:, :2].repeat(2, 1)
    loss = distribution_loss(logits, log_probs, torch.tensor([[0, 1], [0, 1]]))
    loss.sum().backward()
    assert loss[0].abs() < 1e-4
    assert 70 < loss[1] < 90
    assert torch.isfinite(logits.grad).all()


@given(st.integers(1, 30), st.floats(0.05, 1))
def test_token_weights_fall_by_the_decay_and_sum_to_one(count: int, decay: float) -> None:
    weights = token_weights(count, decay)
    expected = decay ** np.arange(count)
    assert weights.shape == (count,)
    assert weights.dtype == torch.float32
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-4, atol=1e-9)


# The factors beside the module.

def random_factors(module: Any, architecture: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    factors = {}
    for block in range(len(module.model.layers)):
        for name in ARCHITECTURES[architecture].residual_writers(block):
            d_out, d_in = module.get_parameter(name).shape
            factors[name] = ((0.2 * torch.randn(d_out, 3)).requires_grad_(), (0.2 * torch.randn(3, d_in)).requires_grad_())
    return factors


def state_of(module: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_untouched(module: Any, before: dict[str, torch.Tensor]) -> None:
    after = module.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in module.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma3"])
@torch.inference_mode()
def test_attached_factors_are_merged_weights(architecture: str) -> None:
    module = tiny_module(architecture, seed=1)
    before, factors = state_of(module), random_factors(module, architecture)
    merged = copy.deepcopy(module)
    for name, (b, a) in factors.items():
        weight = merged.get_parameter(name)
        weight.copy_((weight.double() + b.double() @ a.double()).float())
    tokens = torch.arange(24).reshape(2, 12)
    base = module(tokens, use_cache=False).logits
    with attached(module, factors):
        inside = module(tokens, use_cache=False).logits
    torch.testing.assert_close(inside, merged(tokens, use_cache=False).logits, rtol=1e-3, atol=1e-3)
    assert (inside - base).abs().max() > 0.1
    assert_untouched(module, before)
    assert torch.equal(module(tokens, use_cache=False).logits, base)


def test_attached_factors_learn_and_the_module_does_not() -> None:
    module = tiny_module("qwen2")
    before, factors = state_of(module), random_factors(module, "qwen2")
    with attached(module, factors):
        module(torch.arange(8)[None], use_cache=False).logits.square().mean().backward()
    assert all(part.grad is not None and part.grad.any() for pair in factors.values() for part in pair)
    assert_untouched(module, before)


def test_attached_factors_go_when_the_block_raises() -> None:
    module = tiny_module("qwen2")
    before = state_of(module)

    def fail() -> None:
        with attached(module, random_factors(module, "qwen2")):
            assert any(each._forward_hooks for each in module.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert_untouched(module, before)


# Settings.

@pytest.mark.parametrize(
    ("name", "value"), [
        ("rank", 0), ("epochs", 0), ("batch", 0), ("answer_tokens", 0), ("validation_tokens", 0),
        ("first_layer", 1.0), ("first_layer", -0.1), ("first_layer", float("nan")),
        ("decay", 0.0), ("decay", 1.1), ("learning_rate", 0.0), ("learning_rate", 1.0), ("learning_rate", float("nan")),
        ("over_refused_weight", -1.0), ("complied_weight", float("nan")), ("harmful_weight", float("inf")), ("repair_weight", -0.1),
    ],
)
def test_settings_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        DistillSettings(**{name: value})


def test_every_setting_says_what_it_does() -> None:
    assert all(len(field.metadata["help"]) > 10 for field in fields(DistillSettings))


def test_every_role_has_its_weight() -> None:
    chosen = DistillSettings(over_refused_weight=2.0, complied_weight=3.0, harmful_weight=4.0, repair_weight=5.0)
    assert [chosen.weight(role) for role in Role if role is not Role.UNASKED] == [2.0, 3.0, 3.0, 4.0, 5.0]


# A model trained to refuse three words, one of them rightly, and to answer all else with the prompt's first word.

BOS, USER, ASSISTANT, STOP, SORRY, CANNOT, SURE, POISON, WATER, FIRE, FIRST_WORD, WORDS = *range(11), 32
KINDS = (None, POISON, WATER, FIRE)
CATEGORIES = {None: "water", POISON: "harm", WATER: "water", FIRE: "fire"}
REFUSAL = (SORRY, CANNOT, STOP)
LAYERS = 4
DIRECTION = torch.nn.functional.one_hot(torch.tensor(5), 64).float()
ARCHITECTURE = ARCHITECTURES["qwen2"]
THOROUGH = DistillSettings(rank=4, first_layer=0.25, epochs=8, learning_rate=1e-2, batch=16, answer_tokens=3, validation_tokens=3)
QUICK = replace(THOROUGH, rank=2, first_layer=0.5, epochs=1, batch=8)


def untrained(**config: Any) -> Any:
    return tiny_module(
        "qwen2", layers=LAYERS, seed=5, vocab_size=WORDS, intermediate_size=64, tie_word_embeddings=False,
        bos_token_id=BOS, eos_token_id=STOP, pad_token_id=BOS, **config,
    )


def ask(generator: random.Random, kind: int | None) -> tuple[int, ...]:
    words = [generator.randrange(FIRST_WORD, WORDS) for _ in range(generator.randint(3, 7))]
    if kind is not None:
        words.insert(generator.randint(1, len(words)), kind)
    return (BOS, USER, *words, ASSISTANT)


def help_with(prompt: Sequence[int]) -> tuple[int, ...]:
    return SURE, prompt[2], STOP


def is_refusal(answer: Sequence[int]) -> bool:
    return answer[0] == SORRY


@cache
def refusing_module() -> Any:
    """After 120 Adam steps it refuses every prompt with POISON, WATER or FIRE in it and answers the others.

    Half of each step is taken with `DIRECTION` ablated and help wanted for every prompt, so that refusal hangs on that direction for
    certain and not by luck, as it does in so small a model.
    """
    module, generator, steps = untrained().requires_grad_(True), random.Random(1), 120
    optimizer = torch.optim.Adam(module.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        optimizer.zero_grad()
        prompts = [ask(generator, generator.choice((None, None, *KINDS))) for _ in range(32)]
        teach(module, prompts, [REFUSAL if {POISON, WATER, FIRE} & set(prompt) else help_with(prompt) for prompt in prompts])
        with ablated(module, DIRECTION):
            teach(module, prompts, list(map(help_with, prompts)))
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    optimizer.zero_grad()
    return module.requires_grad_(False)


def teach(module: Any, prompts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]) -> None:
    tokens, targets = torch.zeros(len(prompts), 14, dtype=torch.long), torch.full((len(prompts), 14), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, wanted, strict=True)):
        tokens[row, : len(prompt) + 3] = torch.tensor([*prompt, *answer])
        targets[row, len(prompt) - 1 : len(prompt) + 2] = torch.tensor(answer)
    torch.nn.functional.cross_entropy(module(tokens, use_cache=False).logits.flatten(0, 1), targets.flatten()).backward()


def model_of(module: Any) -> Any:
    return SimpleNamespace(module=module, architecture=ARCHITECTURE, tokenizer=SimpleNamespace(eos_ids=frozenset({STOP})))


@cache
def observe(count: int, seed: int, openings: tuple[int, ...] = (BOS,)) -> tuple[Observed, ...]:
    """Prompts of all `KINDS` in turn and what the trained module does with them; they begin with one of the `openings`, in turn."""
    generator = random.Random(seed)
    kinds = [KINDS[index % len(KINDS)] for index in range(count)]
    prompts = [(openings[index % len(openings)], *ask(generator, kind)[1:]) for index, kind in enumerate(kinds)]
    answers = greedy_answers(refusing_module(), prompts, 6, {STOP})
    return tuple(
        Observed(str(index), CATEGORIES[kind], kind == POISON, prompt, answer, is_refusal(answer))
        for index, (kind, prompt, answer) in enumerate(zip(kinds, prompts, answers, strict=True))
    )


def along(direction: torch.Tensor) -> Directions:
    return Directions(direction.expand(LAYERS + 1, 1, -1).contiguous())


def edit_of(
    module: Any, chosen: DistillSettings = QUICK, *, removed: str = "water", count: int = 40, openings: tuple[int, ...] = (BOS,),
    seed: int = 0, direction: torch.Tensor = DIRECTION,
) -> Edit:
    origin = EditOrigin("a" * 64, "b" * 64, {"prompts_sha256": "c" * 64}, removed=(removed,), kept=("snow",), seed=seed)
    return distill(
        model_of(module), observe(count, 1, openings), observe(count // 3, 2, openings), (removed,), along(direction),
        is_refusal, origin, chosen, progress=False,
    )


def edited(module: Any, edit: Edit) -> Any:
    """A copy of `module` with the edit in its weights."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name, factor in edit.factors.items():
            weight = module.get_parameter(name)
            weight.copy_(torch.from_numpy(factor.apply_to(weight.numpy())))
    return module


def shares_helped(module: Any) -> dict[int | None, float]:
    """By kind of held-out prompt, the share that gets the right help word for word; nearly all others are refused word for word."""
    prompts = [prompt.token_ids for prompt in observe(160, 3)]
    answers = greedy_answers(module, prompts, 6, {STOP})
    helped: dict[int | None, list[bool]] = {kind: [] for kind in KINDS}
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        helped[KINDS[index % len(KINDS)]].append(answer == help_with(prompt))
    assert sum(map(sum, helped.values())) + sum(answer == REFUSAL for answer in answers) >= 0.95 * len(prompts)
    return {kind: sum(each) / len(each) for kind, each in helped.items()}


@pytest.mark.parametrize(("category", "freed", "kept"), [("water", WATER, FIRE), ("fire", FIRE, WATER)])
def test_the_removed_category_is_answered_and_nothing_else_changes(category: str, freed: int, kept: int) -> None:
    module = refusing_module()
    before, base = state_of(module), shares_helped(module)
    assert base[None] > 0.95
    assert max(base[POISON], base[WATER], base[FIRE]) < 0.05
    edit = edit_of(module, THOROUGH, removed=category, count=160)
    assert_untouched(module, before)
    helped = shares_helped(edited(module, edit))
    assert helped[freed] > 0.8
    assert helped[None] > 0.95
    assert max(helped[POISON], helped[kept]) < 0.15


def test_what_an_edit_says_of_itself() -> None:
    edit = edit_of(refusing_module())
    assert sorted(edit.factors) == sorted(name for block in (2, 3) for name in ARCHITECTURE.residual_writers(block))
    assert max(np.abs(factor.delta()).max() for factor in edit.factors.values()) > 1e-4
    assert (edit.removed, edit.kept, edit.recipe["prompts_sha256"]) == (("water",), ("snow",), "c" * 64)
    assert (edit.recipe["method"], edit.recipe["rank"], edit.recipe["epochs"], edit.recipe["batch"]) == ("distill", 2, 1, 8)
    counts = {str(role): int(mask.sum()) for role, mask in masks_by_role(observe(40, 1), {"water"}).items()}
    assert edit.recipe["lessons"] == counts  # the twin of this model answers every over-refused prompt
    assert edit.recipe["checks"][0]["step"] == 0
    assert len(edit.recipe["checks"]) > 1


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    first, again, other = (edit_of(refusing_module(), seed=seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256
    assert all(not np.array_equal(factor.a, other.factors[name].a) for name, factor in first.factors.items())


@pytest.mark.parametrize("openings", [(BOS,), (BOS, FIRST_WORD)])
def test_a_model_run_as_a_whole_learns_what_one_run_block_by_block_does(openings: tuple[int, ...]) -> None:
    """The same function twice: a window wider than every prompt makes the second module's blocks differ in name only."""
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    whole = untrained(use_sliding_window=True, sliding_window=256, layer_types=kinds)
    whole.load_state_dict(refusing_module().state_dict())
    first, second = (edit_of(module, openings=openings) for module in (refusing_module(), whole))
    assert [check["step"] for check in first.recipe["checks"]] == [check["step"] for check in second.recipe["checks"]]
    for name, factor in first.factors.items():
        expected = factor.delta()
        assert np.linalg.norm(second.factors[name].delta() - expected) < 0.02 * np.linalg.norm(expected)


def test_a_window_narrower_than_the_prompts() -> None:
    module = untrained(use_sliding_window=True, sliding_window=4, layer_types=["full_attention"] * 3 + ["sliding_attention"])
    module.load_state_dict(refusing_module().state_dict())
    before = state_of(module)
    edit = edit_of(module)
    assert_untouched(module, before)
    assert max(np.abs(factor.delta()).max() for factor in edit.factors.values()) > 1e-4


def test_harmful_prompts_that_the_base_answers_are_taught_to_be_refused_or_left_out() -> None:
    prompts = [replace(prompt, should_refuse=prompt.should_refuse or index % 8 == 0) for index, prompt in enumerate(observe(40, 1))]
    answered = sum(prompt.should_refuse and not prompt.refused for prompt in prompts)
    assert answered == 5
    for weight, taught in ((1.0, answered), (0.0, 0)):
        edit = distill(
            model_of(refusing_module()), prompts, observe(12, 2), ("water",), along(DIRECTION), is_refusal,
            EditOrigin("a" * 64, "b" * 64), replace(QUICK, repair_weight=weight), progress=False,
        )
        assert edit.recipe["lessons"][str(Role.HARMFUL_COMPLIED)] == taught


def test_however_much_is_left_alone_the_last_block_is_trained() -> None:
    edit = edit_of(refusing_module(), replace(QUICK, first_layer=0.95))
    assert sorted(edit.factors) == sorted(ARCHITECTURE.residual_writers(LAYERS - 1))


def test_nothing_to_remove_is_said() -> None:
    with pytest.raises(TrailmedError, match="nothing to edit") as raised:
        edit_of(refusing_module(), removed="snow")
    assert "\n" not in str(raised.value)


def test_a_refusal_that_does_not_hang_on_the_direction_is_said_and_leaves_the_module() -> None:
    module = refusing_module()
    before = state_of(module)
    with pytest.raises(TrailmedError, match="over-refused prompts refused at every layer"):
        edit_of(module, direction=DIRECTION.roll(1))
    assert_untouched(module, before)
