"""Directional ablation: what the edited matrices can and cannot write, by float64 and by running the edited model."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCABULARY, tiny_module

from trailmed.abliterate.activations import capture
from trailmed.abliterate.directions import Directions, DirectionSettings
from trailmed.abliterate.origin import EditOrigin
from trailmed.abliterate.project import COMPONENTS, project
from trailmed.errors import TrailmedError
from trailmed.models.architecture import ARCHITECTURES

ORIGIN = EditOrigin("a" * 64, "b" * 64, {"split": "fit"}, removed=("gray_zone",), kept=("should_refuse",), seed=5)
MODEL = SimpleNamespace(module=tiny_module("qwen2", layers=3), architecture=ARCHITECTURES["qwen2"])
WEIGHTS = {name: tensor.numpy() for name, tensor in MODEL.module.state_dict().items()}
WRITERS = [f"model.layers.{layer}.{name}.weight" for layer in range(3) for name in ("self_attn.o_proj", "mlp.down_proj")]


def directions(seed: int = 0, *, rank: int = 2, layers: int = 3, hidden: int = 64) -> Directions:
    rows = np.random.default_rng(seed).normal(size=(layers + 1, hidden, rank))
    return Directions(torch.from_numpy(np.linalg.qr(rows)[0]).mT.float().contiguous(), DirectionSettings(rank=rank))


def same_everywhere(rank: int = 2) -> Directions:
    basis = directions(rank=rank).basis
    return Directions(basis[:1].expand_as(basis).contiguous(), DirectionSettings(rank=rank))


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.floats(-1, 2))
@settings(max_examples=20, deadline=None)
def test_a_projected_weight_has_a_share_of_its_component(seed: int, rank: int, alpha: float) -> None:
    along = directions(seed, rank=rank)
    edit = project(MODEL, along, ORIGIN, alpha=alpha)
    assert sorted(edit.factors) == sorted(WRITERS)
    for name, factor in edit.factors.items():
        rows = along.basis[int(name.split(".")[2]) + 1].numpy().astype(np.float64)
        weight = WEIGHTS[name].astype(np.float64)
        assert factor.rank == rank
        assert factor.row_scale is None
        np.testing.assert_allclose(factor.apply_to(WEIGHTS[name]), weight - alpha * rows.T @ rows @ weight, atol=2e-6)
        np.testing.assert_allclose(rows @ factor.apply_to(WEIGHTS[name]), (1 - alpha) * rows @ weight, atol=1e-5)


@pytest.mark.parametrize("preserve_norm", [True, False])
def test_alpha_zero_is_the_identity(preserve_norm: bool) -> None:
    for name, factor in project(MODEL, directions(), ORIGIN, alpha=0.0, preserve_norm=preserve_norm).factors.items():
        np.testing.assert_allclose(factor.apply_to(WEIGHTS[name]), WEIGHTS[name], rtol=2e-7)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.7])
def test_biproject_restores_each_rows_norm(alpha: float) -> None:
    plain, restored = (project(MODEL, directions(), ORIGIN, alpha=alpha, preserve_norm=value).factors for value in (False, True))
    for name, factor in restored.items():
        edited, unscaled = factor.apply_to(WEIGHTS[name]), plain[name].apply_to(WEIGHTS[name])
        np.testing.assert_allclose(np.linalg.norm(edited, axis=1), np.linalg.norm(WEIGHTS[name], axis=1), rtol=1e-5)
        np.testing.assert_allclose(
            edited / np.linalg.norm(edited, axis=1, keepdims=True), unscaled / np.linalg.norm(unscaled, axis=1, keepdims=True), atol=1e-5,
        )


def test_biproject_leaves_a_row_that_is_gone() -> None:
    basis = torch.zeros(4, 1, 64)
    basis[:, 0, 7] = 1
    for name, factor in project(MODEL, Directions(basis), ORIGIN, preserve_norm=True).factors.items():
        edited = factor.apply_to(WEIGHTS[name])
        assert not edited[7].any()
        np.testing.assert_array_equal(np.delete(edited, 7, axis=0), np.delete(WEIGHTS[name], 7, axis=0))


def test_the_edited_model_cannot_write_along_the_directions() -> None:
    """Run with every writer projected, the stream keeps the component the embeddings put there, at every layer."""
    along = same_everywhere()
    module = copy.deepcopy(MODEL.module)
    ids = np.random.default_rng(1).integers(0, VOCABULARY - 3, (5, 9)).tolist()
    before = capture(SimpleNamespace(module=module), ids).residual @ along.basis[0].mT
    state = module.state_dict()
    for name, factor in project(MODEL, along, ORIGIN).factors.items():
        state[name].copy_(torch.from_numpy(factor.apply_to(WEIGHTS[name])))
    after = capture(SimpleNamespace(module=module), ids).residual @ along.basis[0].mT
    torch.testing.assert_close(after, after[:, :1].expand_as(after), atol=1e-5, rtol=0)
    assert (before - before[:, :1]).abs().max() > 0.1


def test_layers_and_components_choose() -> None:
    edit = project(MODEL, directions(), ORIGIN, layers=[2, 0], components=["down_proj"])
    assert list(edit.factors) == ["model.layers.0.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"]
    assert edit.recipe["layers"] == [0, 2]
    assert edit.recipe["components"] == ["down_proj"]


def test_a_layer_without_direction_and_a_shorter_basis() -> None:
    basis = directions().basis.clone()
    basis[1] = 0
    basis[2, 1] = 0
    edit = project(MODEL, Directions(basis), ORIGIN)
    assert {name: factor.rank for name, factor in edit.factors.items()} == {
        name: rank for name, rank in zip(WRITERS, (0, 0, 1, 1, 2, 2), strict=True) if rank
    }
    assert edit.recipe["layers"] == [1, 2]
    with pytest.raises(TrailmedError, match="nothing to edit"):
        project(MODEL, Directions(basis), ORIGIN, layers=[0])


def test_the_edit_says_where_it_comes_from() -> None:
    edit = project(MODEL, directions(), ORIGIN, alpha=0.75, preserve_norm=True)
    assert (edit.fingerprint, edit.base_sha256, edit.removed, edit.kept, edit.seed) == (
        "a" * 64, "b" * 64, ("gray_zone",), ("should_refuse",), 5,
    )
    assert edit.recipe["split"] == "fit"
    assert (edit.recipe["method"], edit.recipe["alpha"]) == ("biproject", 0.75)
    assert edit.recipe["directions"]["rank"] == 2
    assert project(MODEL, directions(), ORIGIN).recipe["method"] == "project"


def test_a_bfloat16_module() -> None:
    model = SimpleNamespace(module=copy.deepcopy(MODEL.module).to(torch.bfloat16), architecture=MODEL.architecture)
    along = directions()
    factor = project(model, along, ORIGIN).factors[WRITERS[0]]
    weight = model.module.state_dict()[WRITERS[0]].float().numpy()
    np.testing.assert_allclose(along.basis[1].numpy() @ factor.apply_to(weight), 0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_other_architectures(architecture: str) -> None:
    module = tiny_module(architecture)
    layers = module.config.num_hidden_layers
    model = SimpleNamespace(module=module, architecture=ARCHITECTURES[architecture])
    assert len(project(model, directions(layers=layers), ORIGIN).factors) == 2 * layers


@pytest.mark.parametrize(
    ("given_directions", "changes", "error", "message"), [
        (directions(layers=2), {}, TrailmedError, "2 layers of width 64"),
        (directions(hidden=32), {}, TrailmedError, "width 32"),
        (directions(), {"components": ["embed"]}, ValueError, "unknown component 'embed'"),
        (directions(), {"layers": [3]}, ValueError, "0 to 2"),
        (directions(), {"layers": [-1]}, ValueError, "0 to 2"),
        (directions(), {"layers": []}, TrailmedError, "nothing to edit"),
        (directions(), {"alpha": float("nan")}, ValueError, "alpha"),
    ],
)
def test_wrong_arguments(given_directions: Directions, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        project(MODEL, given_directions, ORIGIN, **changes)


def test_components_are_what_writes_to_the_stream() -> None:
    names = ARCHITECTURES["qwen2"].residual_writers(0)
    assert tuple(name.split(".")[-2] for name in names) == COMPONENTS
