"""Directions against float64 NumPy, hand cases and properties; the file against hostile bytes."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trailmed.abliterate.activations import Activations
from trailmed.abliterate.directions import (
    Directions,
    DirectionSettings,
    best_layer,
    class_mask,
    cohens_d,
    compute_directions,
    gram_schmidt_two_pass,
    mean_difference,
    normalize,
    orthogonalize,
    per_category_directions,
    subspace,
    winsorize,
)
from trailmed.errors import TrailmedError

SHA = "d" * 64
N, LAYERS, D = 30, 5, 12
OVER_REFUSED = torch.arange(N) < 8
COMPLIED = (torch.arange(N) >= 8) & (torch.arange(N) < 22)
HARMFUL = torch.arange(N) >= 22
CATEGORIES = ["medical"] * 4 + ["survival"] * 4 + ["medical"] * 14 + ["harm"] * 8

seeds = st.integers(0, 2**32 - 1)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def activations(seed: int = 0) -> Activations:
    """Classes apart from each other around a large common mean; at index 0 all prompts alike, as under a chat template."""
    residual = random(seed, N, LAYERS + 1, D) + 5 * random(seed + 1, LAYERS + 1, D)
    residual += OVER_REFUSED[:, None, None] * random(seed + 2, LAYERS + 1, D) + HARMFUL[:, None, None] * random(seed + 3, LAYERS + 1, D)
    residual[:, 0] = residual[0, 0]
    return Activations(residual.float(), SHA)


@given(seeds, st.floats(0.01, 1))
@settings(max_examples=60, deadline=None)
def test_winsorize_clips_each_layer_at_its_quantile(seed: int, quantile: float) -> None:
    acts = random(seed, 7, 3, 5) * torch.tensor([1.0, 10.0, 0.1])[:, None]
    clipped = winsorize(acts, quantile)
    assert torch.equal(winsorize(clipped, quantile), clipped)
    for layer in range(3):
        magnitudes = np.sort(np.abs(acts[:, layer].numpy()).ravel())
        bound = next(value for count, value in enumerate(magnitudes, start=1) if count >= quantile * 35)
        np.testing.assert_array_equal(clipped[:, layer].numpy(), np.clip(acts[:, layer].numpy(), -bound, bound))


def test_winsorize_at_one_changes_nothing_and_never_its_argument() -> None:
    acts = random(0, 4, 2, 3)
    before = acts.clone()
    assert torch.equal(winsorize(acts, 1.0), before)
    assert not torch.equal(winsorize(acts, 0.5), before)
    assert torch.equal(acts, before)
    for quantile in (0.0, 1.1, float("nan")):
        with pytest.raises(ValueError, match="quantile"):
            winsorize(acts, quantile)


def test_mean_difference_of_float32_is_summed_in_float64() -> None:
    positive, negative = random(1, 500, 2, 4).float() + 4096, random(2, 300, 2, 4).float() + 4096
    expected = positive.numpy().astype(np.float64).mean(0) - negative.numpy().astype(np.float64).mean(0)
    result = mean_difference(positive, negative)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_per_category_directions() -> None:
    acts = random(0, 6, 2, 3)
    masks = {"a": [True, True, False, False, False, False], "b": torch.tensor([False, False, True, False, False, False])}
    directions = per_category_directions(acts, masks, [False, False, False, True, True, True])
    rest = acts.numpy()[3:].mean(0)
    np.testing.assert_allclose(directions["a"], acts.numpy()[:2].mean(0) - rest)
    np.testing.assert_allclose(directions["b"], acts.numpy()[2] - rest)
    with pytest.raises(TrailmedError, match="over-refused c"):
        per_category_directions(acts, {"c": [False] * 6}, masks["a"])


@given(seeds, st.floats(0, 1), st.floats(1e-9, 1e3))
@settings(max_examples=60, deadline=None)
def test_orthogonalize_takes_out_a_share_of_the_component(seed: int, strength: float, spread: float) -> None:
    against = random(seed, 3, 8)
    direction = against * 7 + spread * random(seed + 1, 3, 8)  # nearly parallel for a small spread
    result = orthogonalize(direction, against, strength)
    unit = against.numpy() / np.linalg.norm(against.numpy(), axis=-1, keepdims=True)
    component = np.sum(direction.numpy() * unit, axis=-1, keepdims=True)
    np.testing.assert_allclose(np.sum(result.numpy() * unit, axis=-1, keepdims=True), (1 - strength) * component, rtol=1e-9, atol=1e-12)
    full = orthogonalize(direction, against)
    assert ((full * torch.from_numpy(unit)).sum(-1).abs() <= 1e-12 * full.norm(dim=-1) + 1e-14 * spread).all()
    torch.testing.assert_close(result - full, (1 - strength) * torch.from_numpy(component * unit), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(gram_schmidt_two_pass(direction, against), full)


def test_orthogonalize_by_hand_and_against_nothing() -> None:
    direction = torch.tensor([3.0, 4.0])
    assert orthogonalize(direction, torch.tensor([2.0, 0.0])).tolist() == [0.0, 4.0]
    assert orthogonalize(direction, torch.tensor([2.0, 0.0]), 0.5).tolist() == [1.5, 4.0]
    assert orthogonalize(direction, torch.zeros(2)).tolist() == [3.0, 4.0]
    assert normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]


@given(seeds, st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_subspace_is_the_best_of_its_rank(seed: int, m: int, k: int) -> None:
    rows = random(seed, m, 2, 9)
    basis = subspace(rows, k).numpy()
    assert basis.shape == (2, k, 9)
    for layer in range(2):
        matrix = rows[:, layer].numpy()
        values = np.linalg.svd(matrix, compute_uv=False)
        kept = basis[layer, : min(m, k)]
        np.testing.assert_allclose(kept @ kept.T, np.eye(len(kept)), atol=1e-9)
        assert not basis[layer, min(m, k):].any()
        # Eckart–Young: what a best rank-k subspace leaves is the tail of the singular values
        left = matrix - matrix @ kept.T @ kept
        np.testing.assert_allclose(np.linalg.norm(left) ** 2, (values[k:] ** 2).sum(), atol=1e-9)
        assert (kept @ matrix.sum(0) >= -1e-9).all()


def test_subspace_of_dependent_rows_has_zero_rows() -> None:
    row = random(0, 1, 2, 6)
    basis = subspace(torch.cat([row, 2 * row, -row / 3]), 3)
    torch.testing.assert_close(basis[:, 0], normalize(row[0]))
    assert not basis[:, 1:].any()
    assert not subspace(torch.zeros(2, 1, 4), 2).any()


def test_cohens_d() -> None:
    positive, negative, direction = random(0, 9, 3, 4) + 1, random(1, 6, 3, 4), random(2, 3, 4)
    for layer, d in enumerate(cohens_d(positive, negative, direction * 17)):
        unit = direction[layer].numpy() / np.linalg.norm(direction[layer].numpy())
        first, second = positive[:, layer].numpy() @ unit, negative[:, layer].numpy() @ unit
        pooled = np.sqrt((8 * first.var(ddof=1) + 5 * second.var(ddof=1)) / 13)
        assert d == pytest.approx((first.mean() - second.mean()) / pooled)
    assert cohens_d(torch.ones(2, 1, 1), torch.zeros(2, 1, 1), torch.ones(1, 1)).item() == torch.inf
    assert cohens_d(torch.ones(2, 1, 1), torch.ones(2, 1, 1), torch.ones(1, 1)).item() == 0
    with pytest.raises(ValueError, match="two prompts"):
        cohens_d(positive[:1], negative, direction)


def test_best_layer_is_the_most_separated_of_the_middle() -> None:
    residual = random(0, N, 11, D).float()
    for layer, distance in ((0, 90.0), (1, 90.0), (4, 5.0), (6, 20.0), (9, 90.0), (10, 90.0)):  # 2 … 8 are the middle of 10
        residual[OVER_REFUSED, layer] += distance
    assert best_layer(Activations(residual), OVER_REFUSED, COMPLIED) == 6
    assert best_layer(Activations(residual[:, :2]), OVER_REFUSED, COMPLIED) == 1
    with pytest.raises(TrailmedError, match="two prompts"):
        best_layer(Activations(residual), torch.arange(N) == 0, COMPLIED)


def reference_direction(acts: Activations, layer: int, *, quantile: float, gram_schmidt: bool, strength: float) -> Any:
    """The rank-1 recipe at one layer, written plainly in float64."""
    stream = acts.residual[:, layer].numpy().astype(np.float64)
    bound = np.quantile(np.abs(stream), quantile, method="inverted_cdf")
    stream = np.clip(stream, -bound, bound)
    harmless = stream[COMPLIED].mean(0)
    direction = stream[OVER_REFUSED].mean(0) - harmless
    harmful = stream[HARMFUL].mean(0) - harmless
    if gram_schmidt:
        direction -= direction @ harmless / (harmless @ harmless) * harmless
        harmful -= harmful @ harmless / (harmless @ harmless) * harmless
    direction -= strength * (direction @ harmful) / (harmful @ harmful) * harmful
    return direction / np.linalg.norm(direction)


@pytest.mark.parametrize("quantile", [1.0, 0.9])
@pytest.mark.parametrize("gram_schmidt", [True, False])
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_the_rank_one_recipe(quantile: float, gram_schmidt: bool, strength: float) -> None:
    acts = activations()
    chosen = DirectionSettings(winsorize_quantile=quantile, gram_schmidt=gram_schmidt, orthogonalize_harmful=strength)
    directions = compute_directions(acts, OVER_REFUSED, COMPLIED, HARMFUL, chosen)
    assert directions.basis.shape == (LAYERS + 1, 1, D)
    assert not directions.basis[0].any()
    assert directions.at(0).shape == (0, D)
    assert directions.prompts_sha256 == SHA
    for layer in range(1, LAYERS + 1):
        expected = reference_direction(acts, layer, quantile=quantile, gram_schmidt=gram_schmidt, strength=strength)
        np.testing.assert_allclose(directions.at(layer)[0], expected, atol=1e-6)


@given(seeds, st.sampled_from(["differences", "categories"]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_subspace_is_orthogonal_to_the_harmful_direction_and_the_harmless_mean(seed: int, source: Any, gram_schmidt: bool) -> None:
    acts = activations(seed)
    chosen = DirectionSettings(rank=2, subspace=source, gram_schmidt=gram_schmidt, winsorize_quantile=1.0)
    basis = compute_directions(acts, OVER_REFUSED, COMPLIED, HARMFUL, chosen, categories=CATEGORIES).basis.numpy()
    stream = acts.residual.numpy().astype(np.float64)
    harmless = stream[COMPLIED].mean(0)
    harmful = stream[HARMFUL].mean(0) - harmless
    for layer in range(1, LAYERS + 1):
        np.testing.assert_allclose(basis[layer] @ basis[layer].T, np.eye(2), atol=1e-6)
        np.testing.assert_allclose(basis[layer] @ harmful[layer], 0, atol=1e-5)
        if gram_schmidt:
            np.testing.assert_allclose(basis[layer] @ harmless[layer], 0, atol=1e-5)


def test_the_subspace_of_categories_spans_their_means() -> None:
    acts = activations()
    chosen = DirectionSettings(rank=2, subspace="categories", gram_schmidt=False, orthogonalize_harmful=0.0, winsorize_quantile=1.0)
    directions = compute_directions(acts, OVER_REFUSED, COMPLIED, torch.zeros(N, dtype=torch.bool), chosen, categories=CATEGORIES)
    stream = acts.residual.numpy().astype(np.float64)
    for layer in range(1, LAYERS + 1):
        rows = directions.at(layer).numpy()
        for of_category in (slice(0, 4), slice(4, 8)):
            difference = stream[of_category, layer].mean(0) - stream[COMPLIED, layer].mean(0)
            np.testing.assert_allclose(difference @ rows.T @ rows, difference, atol=1e-5)


def test_one_layers_direction_everywhere() -> None:
    per_layer = compute_directions(activations(), OVER_REFUSED, COMPLIED, HARMFUL, DirectionSettings())
    one = compute_directions(activations(), OVER_REFUSED, COMPLIED, HARMFUL, DirectionSettings(layer=3))
    for layer in range(LAYERS + 1):
        assert torch.equal(one.basis[layer], per_layer.basis[3])


@pytest.mark.parametrize(
    ("chosen", "masks", "message"), [
        ({}, {"over_refused": torch.zeros(N, dtype=torch.bool)}, "no over-refused prompt"),
        ({}, {"complied": torch.zeros(N, dtype=torch.bool)}, "no complied prompt"),
        ({}, {"harmful_refused": torch.zeros(N, dtype=torch.bool)}, "no refused harmful prompt"),
        ({"layer": LAYERS + 1}, {}, "the model has 5 layers"),
        ({"layer": 0}, {}, "do not differ"),
        ({"rank": 9}, {}, "choose a lower rank"),
        ({"rank": 3, "subspace": "categories"}, {}, "categories with over-refused prompts"),
        ({}, {"over_refused": COMPLIED}, "do not differ"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(chosen: dict[str, Any], masks: dict[str, torch.Tensor], message: str) -> None:
    classes = {"over_refused": OVER_REFUSED, "complied": COMPLIED, "harmful_refused": HARMFUL, **masks}
    with pytest.raises(TrailmedError, match=message) as caught:
        compute_directions(activations(), **classes, settings=DirectionSettings(**chosen), categories=CATEGORIES)
    assert "\n" not in str(caught.value)


def test_masks_and_categories_of_another_shape() -> None:
    for mask in ([1, 0], torch.ones(3, dtype=torch.bool), []):
        with pytest.raises(ValueError, match="mask"):
            class_mask(mask, 2, "some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="category"):
        compute_directions(activations(), OVER_REFUSED, COMPLIED, HARMFUL, DirectionSettings(rank=2, subspace="categories"))


@pytest.mark.parametrize(
    "wrong", [
        {"winsorize_quantile": 0.0}, {"winsorize_quantile": 1.5}, {"winsorize_quantile": float("nan")}, {"orthogonalize_harmful": -0.1},
        {"orthogonalize_harmful": float("inf")}, {"rank": 0}, {"subspace": "x"}, {"layer": -1}, {"layer": "best"},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DirectionSettings(**wrong)


def test_every_setting_says_what_it_does() -> None:
    assert all(len(field.metadata["help"]) > 20 for field in fields(DirectionSettings))


def test_saved_and_loaded(tmp_path: Path) -> None:
    original = compute_directions(activations(), OVER_REFUSED, COMPLIED, HARMFUL, DirectionSettings(rank=2, layer=2))
    for name in "ab":
        original.save(tmp_path / name)
    loaded = Directions.load(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert torch.equal(loaded.basis, original.basis)
    assert (loaded.settings, loaded.prompts_sha256) == (original.settings, SHA)


@pytest.mark.parametrize(
    ("basis", "header", "reason"), [
        (torch.ones(3, 1, 4), {}, "orthonormal"),
        (torch.eye(4)[None, :2].repeat(3, 1, 1) * torch.tensor([1.0, 0.3])[:, None], {}, "orthonormal"),
        (torch.full((3, 1, 4), torch.nan), {}, "orthonormal"),
        (torch.zeros(3, 4), {}, "shape"),
        (torch.zeros(1, 1, 4), {}, "shape"),
        (torch.zeros(3, 1, 4), {"settings": {**asdict(DirectionSettings()), "rank": 0}}, "rank"),
        (torch.zeros(3, 1, 4), {"settings": {**asdict(DirectionSettings()), "rank": "1"}}, "rank: Input should be a valid integer"),
        (torch.zeros(3, 1, 4), {"settings": {**asdict(DirectionSettings()), "layer": True}}, "layer"),
        (torch.zeros(3, 1, 4), {"settings": {**asdict(DirectionSettings()), "more": 1}}, "unknown setting 'more'"),
        (torch.zeros(3, 1, 4), {"settings": []}, "settings"),
        (torch.zeros(3, 1, 4), {"prompts_sha256": "x"}, "prompts_sha256"),
    ],
)
def test_a_hostile_file_is_one_line(tmp_path: Path, basis: torch.Tensor, header: dict[str, Any], reason: str) -> None:
    text = json.dumps({"format": 1, "prompts_sha256": SHA, "settings": asdict(DirectionSettings()), **header})
    (tmp_path / "x").write_bytes(safetensors.torch.save({"directions": basis}, metadata={"trailmed.directions": text}))
    with pytest.raises(TrailmedError, match="not a trailmed file of directions") as caught:
        Directions.load(tmp_path / "x")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
