"""results.json: whole, readable by any program, the same bytes every time, and refused when it was tampered with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_runs import REMOVED, SAID, four_runs, made_up_results, setting, with_verdicts

from trailmed.errors import TrailmedError
from trailmed.eval.judge import Verdict
from trailmed.eval.prompts import Category
from trailmed.eval.results import Results


def test_comes_back_from_its_file_with_the_same_bytes(tmp_path: Path) -> None:
    results = made_up_results()
    results.save(tmp_path / "a.json")
    loaded = Results.load(tmp_path / "a.json")
    assert loaded == results
    loaded.save(tmp_path / "b.json")
    made_up_results().save(tmp_path / "c.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes() == (tmp_path / "c.json").read_bytes()


def test_a_program_can_read_it(tmp_path: Path) -> None:
    made_up_results(removed=REMOVED[::-1]).save(tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["format"], found["schema_version"], found["verdict"]["passed"]) == ("trailmed.results", 1, True)
    assert found["removed"] == list(REMOVED)
    assert found["kept"] == []
    assert found["thresholds"][0] == {
        "name": "min_over_refusal_fall", "bound": "at least", "value": 0.8, "unit": "share",
        "description": "fall of the refusals of the removed categories' prompts, relative to the base's",
    }
    groups = {group["name"]: group for group in found["comparisons"]["edit_quantized"]["groups"]}
    assert (groups["should_refuse"]["first"]["count"], groups["should_refuse"]["second"]["count"]) == (34, 40)
    assert {flip["id"] for flip in found["comparisons"]["quantization_edited"]["flips"]} == {"gray-zone-002"}
    assert found["runs"]["edited_quantized"]["type"] == "Q8_0"
    assert len(found["kl"]["per_prompt"]) == 20
    assert found["seed"] == 7


def test_a_compliant_answer_to_a_harmful_request_is_cut_there_too(tmp_path: Path) -> None:
    edited = with_verdicts(four_runs()["edited_full"], {"should-refuse-000": Verdict.COMPLIANCE})
    made_up_results(edited_full=edited).save(tmp_path / "results.json")
    found = json.loads((tmp_path / "results.json").read_text())
    flip = next(flip for flip in found["comparisons"]["edit_full"]["flips"] if flip["id"] == "should-refuse-000")
    assert flip["second_answer"] == SAID[Verdict.COMPLIANCE][:80]
    # and whatever a file made elsewhere holds, no more than that is read from it
    flip["second_answer"] = "x" * 500
    (tmp_path / "other.json").write_text(json.dumps(found))
    assert "x" * 81 not in repr(Results.load(tmp_path / "other.json"))


def test_only_what_stays_is_kept() -> None:
    results = made_up_results(removed=[Category.GRAY_ZONE, Category.HOME_SAFETY])
    assert results.removed == (Category.HOME_SAFETY, Category.GRAY_ZONE)
    assert results.kept == (
        Category.EMERGENCY_MEDICAL, Category.WILDERNESS_SURVIVAL, Category.CHEMISTRY_SAFETY, Category.MENTAL_HEALTH,
    )
    with pytest.raises(TrailmedError, match="never removed"):
        made_up_results(removed=[Category.SHOULD_REFUSE])


@pytest.mark.parametrize(("change", "said"), [
    (setting("verdict", "passed", value=False), "verdict is not that of its checks"),
    (setting("verdict", "checks", 2, "passed", value=False), "verdict is not that of its checks"),
    (setting("verdict", "checks", value=[]), "verdict is not that of its checks"),
    (setting("schema_version", value=7), "another version"),
    (setting("format", value="trailmed.eval-run"), "is not a trailmed.results file"),
    (setting("kl", "mean", value=float("inf")), "kl.mean"),
    (setting("kl", "mean", value="0.1"), "kl.mean"),
    (setting("removed", value=["everything"]), "removed.0"),
    (setting("comparisons", "edit_full", "groups", 0, "flips", "upper", value=None), "comparisons.edit_full.groups.0.flips.upper"),
    (setting("comparisons", "edit_full", "groups", 0, "n", value=-1), "comparisons.edit_full.groups.0.n"),
    (setting("more", value=1), "more"),
])
def test_tampered_results_are_one_line(change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    made_up_results().save(path)
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(TrailmedError) as caught:
        Results.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
