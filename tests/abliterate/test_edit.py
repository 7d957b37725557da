"""`Edit`: its algebra against float64, its file against hostile bytes."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trailmed.abliterate.edit import Edit, Factor
from trailmed.errors import TrailmedError

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
DOWN_PROJ = "model.layers.1.mlp.down_proj.weight"
HEADER: dict[str, Any] = {
    "format": 1, "fingerprint": "a" * 64, "base_sha256": "b" * 64, "recipe": {"method": "gated"}, "removed": ["x"], "kept": [], "seed": 3,
}


def random(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def factor(seed: int = 0, *, rank: int = 2, scaled: bool = False, shape: tuple[int, int] = (6, 9)) -> Factor:
    row_scale = np.abs(random(seed + 2, shape[0])) + np.float32(0.5) if scaled else None
    return Factor(random(seed, shape[0], rank), random(seed + 1, rank, shape[1]), row_scale)


def edit(factors: dict[str, Factor] | None = None, **changes: Any) -> Edit:
    given = {
        "fingerprint": "a" * 64, "base_sha256": "b" * 64, "recipe": {"method": "gated", "ridge": 0.1}, "removed": ("emergency",),
        "kept": ("should_refuse",), "seed": 7, **changes,
    }
    return Edit(factors=factors or {O_PROJ: factor(), DOWN_PROJ: factor(10, scaled=True, rank=3)}, **given)


def exact(weight: npt.NDArray[Any], *factors: Factor) -> npt.NDArray[np.float64]:
    """The factors applied one after the other in float64, by the definition."""
    result = weight.astype(np.float64)
    for each in factors:
        result = result + np.einsum("ik,kj->ij", each.b.astype(np.float64), each.a.astype(np.float64))
        if each.row_scale is not None:
            result = np.diag(each.row_scale.astype(np.float64)) @ result
    return result


@pytest.mark.parametrize("scaled", [False, True])
def test_apply_to_follows_the_definition(scaled: bool) -> None:
    weight, one = random(5, 6, 9), factor(scaled=scaled)
    np.testing.assert_allclose(one.apply_to(weight), exact(weight, one), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(weight, random(5, 6, 9), err_msg="the weight itself must stay")
    np.testing.assert_allclose(one.apply_to_rows(weight[2:5], 2), exact(weight, one)[2:5], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.delta(), one.b.astype(np.float64) @ one.a.astype(np.float64), rtol=1e-5, atol=1e-6)


def test_apply_to_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match="shape"):
        factor().apply_to(random(0, 9, 6))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.3, 1.0, 2.5])
def test_scaled(scale: float) -> None:
    weight, whole = random(5, 6, 9), edit()
    part = whole.scaled(scale)
    plain = part.factors[O_PROJ].apply_to(weight)
    np.testing.assert_allclose(plain, weight + scale * (exact(weight, whole.factors[O_PROJ]) - weight), rtol=1e-4, atol=1e-5)
    if scale == 0:
        np.testing.assert_array_equal(part.factors[DOWN_PROJ].apply_to(weight), weight)
    if scale == 1:
        np.testing.assert_allclose(part.factors[DOWN_PROJ].apply_to(weight), exact(weight, whole.factors[DOWN_PROJ]), rtol=1e-5, atol=1e-5)
    assert part.scaled(0.5).recipe["scale"] == scale * 0.5


@pytest.mark.parametrize("first_scaled", [False, True])
@pytest.mark.parametrize("second_scaled", [False, True])
def test_concatenated_is_one_after_the_other(first_scaled: bool, second_scaled: bool) -> None:
    one, two, weight = factor(scaled=first_scaled), factor(20, rank=3, scaled=second_scaled), random(5, 6, 9)
    joined = edit({O_PROJ: one}).concatenated(edit({O_PROJ: two, DOWN_PROJ: one}, removed=("home",), kept=("emergency", "control")))
    assert joined.factors[O_PROJ].rank == 5
    np.testing.assert_allclose(joined.factors[O_PROJ].apply_to(weight), exact(weight, one, two), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(joined.factors[DOWN_PROJ].delta(), one.delta())
    assert (joined.removed, joined.kept) == (("emergency", "home"), ("control", "should_refuse"))
    assert [part["method"] for part in joined.recipe["parts"]] == ["gated", "gated"]


def test_edits_of_two_models_do_not_join() -> None:
    with pytest.raises(TrailmedError, match="different models"):
        edit().concatenated(edit(fingerprint="c" * 64))


def test_a_row_scaled_to_nothing_cannot_be_edited_again() -> None:
    zeroing = Factor(random(0, 6, 1), random(1, 1, 9), np.zeros(6, np.float32))
    with pytest.raises(ValueError, match="scaled to 0"):
        edit({O_PROJ: zeroing}).concatenated(edit({O_PROJ: factor()}))


def test_save_and_load(tmp_path: Path) -> None:
    original = edit()
    original.save(tmp_path / "edit.safetensors")
    loaded = Edit.load(tmp_path / "edit.safetensors")
    assert loaded.sha256 == original.sha256 == hashlib.sha256((tmp_path / "edit.safetensors").read_bytes()).hexdigest()
    assert (loaded.fingerprint, loaded.base_sha256, loaded.removed, loaded.kept, loaded.seed) == (
        original.fingerprint, original.base_sha256, original.removed, original.kept, original.seed,
    )
    assert dict(loaded.recipe) == dict(original.recipe)
    assert loaded.factors.keys() == original.factors.keys()
    for name, ours in original.factors.items():
        theirs = loaded.factors[name]
        np.testing.assert_array_equal(theirs.b, ours.b)
        np.testing.assert_array_equal(theirs.a, ours.a)
        assert (theirs.row_scale is None) == (ours.row_scale is None)
    assert loaded.size == 6 * 2 + 2 * 9 + 6 * 3 + 3 * 9 + 6


def test_the_same_edit_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    parts = {O_PROJ: factor(), DOWN_PROJ: factor(10)}
    edit(parts).save(tmp_path / "one")
    edit(dict(reversed(parts.items())), recipe={"ridge": 0.1, "method": "gated"}).save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert edit(parts, seed=8).sha256 != edit(parts).sha256


def test_factors_belong_to_the_edit_alone() -> None:
    b = random(0, 6, 2)
    made = Factor(b, random(1, 2, 9))
    b[:] = 0
    assert made.b.any()
    with pytest.raises(ValueError, match="read-only"):
        made.b[0, 0] = 1


@pytest.mark.parametrize(("b", "a", "row_scale"), [
    (random(0, 6, 2), random(0, 3, 9), None),
    (random(0, 6), random(0, 6, 9), None),
    (random(0, 6, 0), random(0, 0, 9), None),
    (random(0, 6, 2), random(0, 2, 9), random(0, 5)),
    (random(0, 6, 2).astype(np.float64), random(0, 2, 9), None),
    (np.full((6, 2), np.nan, np.float32), random(0, 2, 9), None),
    (random(0, 6, 2), np.full((2, 9), np.inf, np.float32), None),
    (random(0, 6, 2), random(0, 2, 9), np.full(6, -np.inf, np.float32)),
])
def test_impossible_factors(b: Any, a: Any, row_scale: Any) -> None:
    with pytest.raises(ValueError, match=r"product|fit|float32|finite"):
        Factor(b, a, row_scale)


@pytest.mark.parametrize("changes", [
    {"fingerprint": "short"}, {"base_sha256": "A" * 64}, {"recipe": {"x": float("nan")}}, {"seed": -1}, {"removed": ("a", 3)},
])
def test_impossible_edits(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        edit(**changes)


def test_no_factors() -> None:
    with pytest.raises(ValueError, match="changes nothing"):
        Edit({}, "a" * 64, "b" * 64, {})


GOOD_TENSORS = {f"{O_PROJ}.b": random(0, 6, 2), f"{O_PROJ}.a": random(1, 2, 9)}
HOSTILE: dict[str, tuple[dict[str, Any], dict[str, str] | None]] = {
    "no header": (GOOD_TENSORS, None),
    "header no JSON": (GOOD_TENSORS, {"trailmed.edit": "{"}),
    "header a list": (GOOD_TENSORS, {"trailmed.edit": "[]"}),
    "header nested deeply": (GOOD_TENSORS, {"trailmed.edit": "[" * 100_000}),
    "header too long": (GOOD_TENSORS, {"trailmed.edit": json.dumps({**HEADER, "recipe": {"x": "y" * (1 << 20)}})}),
    "newer format": (GOOD_TENSORS, {"trailmed.edit": json.dumps({**HEADER, "format": 2})}),
    "unknown key": (GOOD_TENSORS, {"trailmed.edit": json.dumps({**HEADER, "code": "x"})}),
    "key missing": (GOOD_TENSORS, {"trailmed.edit": json.dumps({key: HEADER[key] for key in HEADER if key != "seed"})}),
    "wrong kind": (GOOD_TENSORS, {"trailmed.edit": json.dumps({**HEADER, "seed": "3"})}),
    "recipe no object": (GOOD_TENSORS, {"trailmed.edit": json.dumps({**HEADER, "recipe": [1]})}),
    "NaN in the recipe": (GOOD_TENSORS, {"trailmed.edit": json.dumps({**HEADER, "recipe": {"x": float("nan")}})}),
    "fingerprint no hash": (GOOD_TENSORS, {"trailmed.edit": json.dumps({**HEADER, "fingerprint": "../../etc"})}),
    "half a factor": ({f"{O_PROJ}.b": random(0, 6, 2)}, {"trailmed.edit": json.dumps(HEADER)}),
    "unknown part": ({**GOOD_TENSORS, f"{O_PROJ}.c": random(0, 1)}, {"trailmed.edit": json.dumps(HEADER)}),
    "nameless": ({**GOOD_TENSORS, "b": random(0, 1)}, {"trailmed.edit": json.dumps(HEADER)}),
    "no tensors": ({}, {"trailmed.edit": json.dumps(HEADER)}),
    "double": ({**GOOD_TENSORS, f"{O_PROJ}.a": np.zeros((2, 9))}, {"trailmed.edit": json.dumps(HEADER)}),
    "half": ({**GOOD_TENSORS, f"{O_PROJ}.a": np.zeros((2, 9), np.float16)}, {"trailmed.edit": json.dumps(HEADER)}),
    "ranks differ": ({**GOOD_TENSORS, f"{O_PROJ}.a": random(0, 3, 9)}, {"trailmed.edit": json.dumps(HEADER)}),
    "three axes": ({**GOOD_TENSORS, f"{O_PROJ}.a": random(0, 2, 3, 3)}, {"trailmed.edit": json.dumps(HEADER)}),
    "infinite": ({**GOOD_TENSORS, f"{O_PROJ}.a": np.full((2, 9), np.inf, np.float32)}, {"trailmed.edit": json.dumps(HEADER)}),
    "NaN": ({**GOOD_TENSORS, f"{O_PROJ}.a": np.full((2, 9), np.nan, np.float32)}, {"trailmed.edit": json.dumps(HEADER)}),
}


def test_the_hostile_cases_differ_from_a_good_file_only_where_they_say(tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(safetensors.numpy.save(GOOD_TENSORS, {"trailmed.edit": json.dumps(HEADER)}))
    assert Edit.load(tmp_path / "good").seed == 3


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(tmp_path: Path, case: str) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(safetensors.numpy.save(HOSTILE[case][0], HOSTILE[case][1]))
    with pytest.raises(TrailmedError, match="not a trailmed edit") as caught:
        Edit.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [
    b"", b"abc", struct.pack("<Q", 1 << 60), struct.pack("<Q", 90 << 20) + b"{}", struct.pack("<Q", 2) + b"{}", b"PK\3\4" + bytes(50),
])
def test_no_safetensors_at_all(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(TrailmedError, match="not a trailmed edit"):
        Edit.load(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TrailmedError, match="no such file"):
        Edit.load(tmp_path / "none")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=5), cut=st.integers(0, 2000) | st.none())
def test_changed_bytes_never_escape_as_another_exception(tmp_path: Path, edits: list[tuple[int, int]], cut: int | None) -> None:
    content = bytearray(safetensors.numpy.save(GOOD_TENSORS, {"trailmed.edit": json.dumps(HEADER)}))
    for position, value in edits:
        content[position % len(content)] = value
    path = tmp_path / "mutated.safetensors"
    path.write_bytes(content[:cut])
    message, factors = "", {}
    try:
        factors = dict(Edit.load(path).factors)
    except TrailmedError as error:
        message = str(error)
    assert "\n" not in message
    assert all(np.isfinite(one.a).all() and np.isfinite(one.b).all() for one in factors.values())
