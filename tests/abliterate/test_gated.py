"""The gated edit: its ridge regression against the primal normal equations in float64, and what it does to inputs it was fitted on."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCABULARY, tiny_module

from trailmed.abliterate.activations import capture_inputs
from trailmed.abliterate.directions import Directions
from trailmed.abliterate.gated import GatedSettings, gated, ridge_gate
from trailmed.abliterate.origin import EditOrigin
from trailmed.errors import TrailmedError
from trailmed.models.architecture import ARCHITECTURES

ORIGIN = EditOrigin("a" * 64, "b" * 64)
LAYERS, HIDDEN, N, RANK = 2, 64, 26, 2
MODEL = SimpleNamespace(module=tiny_module("qwen2", layers=LAYERS), architecture=ARCHITECTURES["qwen2"])
WEIGHTS = {name: tensor.numpy() for name, tensor in MODEL.module.state_dict().items()}
NAMES = [name for layer in range(LAYERS) for name in MODEL.architecture.residual_writers(layer)]
OVER_REFUSED = torch.arange(N) < 6
COMPLIED = (torch.arange(N) >= 6) & (torch.arange(N) < 16)
HARMFUL = (torch.arange(N) >= 16) & (torch.arange(N) < 24)  # the last two are in no class
IDS = [np.random.default_rng(index).integers(0, VOCABULARY - 3, 5 + index % 4).tolist() for index in range(N)]
DIRECTIONS = Directions(
    torch.from_numpy(np.linalg.qr(np.random.default_rng(0).normal(size=(LAYERS + 1, HIDDEN, RANK)))[0]).mT.float().contiguous()
)
INPUTS = {positions: capture_inputs(MODEL, IDS, NAMES, positions=positions) for positions in (1, 3)}


def fit(chosen: GatedSettings = GatedSettings(), *, positions: int = 1, harmful: torch.Tensor = HARMFUL, **more: Any) -> Any:
    return gated(MODEL, DIRECTIONS, INPUTS[positions], OVER_REFUSED, COMPLIED, harmful, ORIGIN, chosen, **more)


def primal(
    inputs: npt.NDArray[Any], targets: npt.NDArray[Any], weights: npt.NDArray[Any], ridge: float,
) -> npt.NDArray[np.float64]:
    """G from (Σ w x xᵀ + λ 1) Gᵀ = Σ w x tᵀ, the d_in × d_in system."""
    weights = weights / weights.mean()
    penalty = ridge * np.mean(weights * (inputs**2).sum(1))
    left = np.einsum("n,ni,nj->ij", weights, inputs, inputs) + penalty * np.eye(inputs.shape[1])
    return np.linalg.solve(left, np.einsum("n,ni,nk->ik", weights, inputs, targets)).T


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 9), st.floats(1e-4, 10))
@settings(max_examples=60, deadline=None)
def test_the_sample_space_solution_is_the_primal_one(seed: int, n: int, d_in: int, ridge: float) -> None:
    random = np.random.default_rng(seed)
    inputs, targets, weights = random.normal(size=(n, d_in)) * 30, random.normal(size=(n, 3)), random.uniform(0.1, 5, n)
    gate = ridge_gate(*(torch.from_numpy(array) for array in (inputs, targets, weights)), ridge)
    assert gate.dtype == torch.float64
    np.testing.assert_allclose(gate, primal(inputs, targets, weights, ridge), rtol=1e-7, atol=1e-10)


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
@settings(max_examples=20, deadline=None)
def test_the_gate_scales_against_its_inputs_and_not_with_its_weights(seed: int, scale: float) -> None:
    random = np.random.default_rng(seed)
    inputs, targets, weights = (torch.from_numpy(random.normal(size=shape)) for shape in ((5, 8), (5, 2), (5,)))
    gate = ridge_gate(inputs, targets, weights.abs() + 0.1, 0.05)
    torch.testing.assert_close(ridge_gate(inputs * scale, targets, weights.abs() + 0.1, 0.05) * scale, gate)
    torch.testing.assert_close(ridge_gate(inputs, targets, (weights.abs() + 0.1) * scale, 0.05), gate)


@pytest.mark.parametrize("positions", [1, 3])
def test_products_of_inputs_are_computed_once_and_serve_other_settings(positions: int) -> None:
    grams: dict[str, torch.Tensor] = {}
    for chosen in (GatedSettings(), GatedSettings(alpha=0.5, ridge=0.3, complied_weight=2.0)):
        kept, anew = fit(chosen, positions=positions, grams=grams), fit(chosen, positions=positions)
        for name in NAMES:
            np.testing.assert_allclose(kept.factors[name].delta(), anew.factors[name].delta(), rtol=1e-4, atol=1e-6)
    assert set(grams) == set(NAMES)
    first = dict(grams)
    fit(positions=positions, grams=grams)
    assert all(grams[name] is first[name] for name in NAMES)


def test_inputs_of_nothing_but_zeros() -> None:
    with pytest.raises(ValueError, match="zero"):
        ridge_gate(torch.zeros(3, 4), torch.zeros(3, 1), torch.ones(3), 0.1)


@pytest.mark.parametrize("positions", [1, 3])
def test_factors_follow_the_definition(positions: int) -> None:
    chosen = GatedSettings(alpha=0.8, ridge=0.03, over_refused_weight=2.0, complied_weight=0.5, harmful_refused_weight=3.0)
    edit = fit(chosen, positions=positions)
    assert sorted(edit.factors) == sorted(NAMES)
    share = {0: (OVER_REFUSED, 2.0), 1: (COMPLIED, 0.5), 2: (HARMFUL, 3.0)}
    for name, factor in edit.factors.items():
        rows = DIRECTIONS.basis[int(name.split(".")[2]) + 1].numpy().astype(np.float64)
        x = INPUTS[positions][name].numpy().astype(np.float64).reshape(N, positions, -1)
        along = x @ WEIGHTS[name].astype(np.float64).T @ rows.T
        samples, targets, weights = [], [], []
        for prompt in range(N):
            for mask, weight in share.values():
                if not mask[prompt]:
                    continue
                for position in range(positions):
                    change = along[prompt, position] - along[COMPLIED.numpy(), position].mean(0)
                    samples.append(x[prompt, position])
                    targets.append(change if OVER_REFUSED[prompt] else np.zeros(RANK))
                    weights.append(weight / mask.sum().item())
        expected = primal(np.array(samples), np.array(targets), np.array(weights), 0.03)
        np.testing.assert_allclose(factor.a, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(factor.b, -0.8 * rows.T, atol=1e-7)


def test_with_little_ridge_the_fitted_prompts_go_where_they_shall() -> None:
    """There are fewer prompts than input dimensions, so both demands can be met at once."""
    edit = fit(GatedSettings(ridge=1e-9))
    for name, factor in edit.factors.items():
        rows = DIRECTIONS.basis[int(name.split(".")[2]) + 1].numpy()
        x = INPUTS[1][name].numpy()
        before, after = x @ WEIGHTS[name].T, x @ factor.apply_to(WEIGHTS[name]).T
        kept = (COMPLIED | HARMFUL).numpy()
        np.testing.assert_allclose(after[kept], before[kept], atol=1e-4)
        wanted = np.broadcast_to((before[COMPLIED.numpy()] @ rows.T).mean(0), (6, RANK))
        np.testing.assert_allclose(after[OVER_REFUSED.numpy()] @ rows.T, wanted, atol=1e-4)
        assert np.abs(before[OVER_REFUSED.numpy()] @ rows.T - wanted).max() > 0.1


def test_nothing_but_the_directions_changes() -> None:
    for name, factor in fit().factors.items():
        rows = DIRECTIONS.basis[int(name.split(".")[2]) + 1].numpy()
        outside = np.eye(HIDDEN) - rows.T @ rows
        np.testing.assert_allclose(outside @ factor.delta(), 0, atol=1e-6)
        assert np.abs(factor.delta()).max() > 1e-3


def test_alpha_zero_is_the_identity_and_strength_is_linear() -> None:
    base, double = fit().factors, fit(GatedSettings(alpha=2.0)).factors
    for name, factor in fit(GatedSettings(alpha=0.0)).factors.items():
        np.testing.assert_array_equal(factor.apply_to(WEIGHTS[name]), WEIGHTS[name])
        np.testing.assert_allclose(double[name].delta(), 2 * base[name].delta(), rtol=1e-5, atol=1e-7)


def test_without_refused_harmful_prompts_the_complied_ones_are_kept() -> None:
    edit = fit(GatedSettings(ridge=1e-9), harmful=torch.zeros(N, dtype=torch.bool))
    for name, factor in edit.factors.items():
        x = INPUTS[1][name].numpy()
        np.testing.assert_allclose(x[COMPLIED.numpy()] @ factor.delta().T, 0, atol=1e-4)
        assert np.abs(x[HARMFUL.numpy()] @ factor.delta().T).max() > 1e-3


def test_recipe_layers_components_and_progress() -> None:
    units: list[int] = []
    edit = fit(GatedSettings(ridge=0.2), layers=[1], components=["o_proj"], progress=units.append)
    assert list(edit.factors) == ["model.layers.1.self_attn.o_proj.weight"]
    assert units == [1]
    assert (edit.recipe["method"], edit.recipe["ridge"], edit.recipe["layers"]) == ("gated", 0.2, [1])
    assert edit.recipe["directions"]["gram_schmidt"] is True


@pytest.mark.parametrize(
    ("changes", "error", "message"), [
        ({"over_refused": torch.zeros(N, dtype=torch.bool)}, TrailmedError, "no over-refused prompt"),
        ({"complied": torch.zeros(N, dtype=torch.bool)}, TrailmedError, "no complied prompt"),
        ({"harmful_refused": OVER_REFUSED}, ValueError, "one class only"),
        ({"complied": torch.ones(N + 1, dtype=torch.bool)}, ValueError, "mask of complied"),
        ({"inputs": {NAMES[0]: INPUTS[1][NAMES[0]]}}, ValueError, "no inputs of"),
        ({"inputs": {**INPUTS[1], NAMES[1]: torch.zeros(N, 3)}}, ValueError, "shape"),
        ({"inputs": {**INPUTS[1], NAMES[1]: torch.zeros(N - 1, 2 * HIDDEN)}}, ValueError, "shape"),
        ({"inputs": {**INPUTS[1], NAMES[1]: torch.zeros(N, 2 * HIDDEN)}}, ValueError, "all inputs are zero"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"inputs": INPUTS[1], "over_refused": OVER_REFUSED, "complied": COMPLIED, "harmful_refused": HARMFUL, **changes}
    with pytest.raises(error, match=message):
        gated(MODEL, DIRECTIONS, origin=ORIGIN, **arguments)


@pytest.mark.parametrize("wrong", [{"alpha": float("inf")}, {"ridge": 0.0}, {"ridge": float("nan")}, {"complied_weight": -1.0}])
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GatedSettings(**wrong)


def test_every_setting_says_what_it_does() -> None:
    assert all(len(field.metadata["help"]) > 20 for field in fields(GatedSettings))
