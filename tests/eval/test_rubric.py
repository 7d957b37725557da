"""The shipped rubric is whole and sound, hand-written answers are ranked right by it, and scores are what their definition says."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trailmed.errors import TrailmedError
from trailmed.eval.judge import Verdict, judge
from trailmed.eval.labelled import TriageAnswer, load_triage_answers
from trailmed.eval.prompts import Category, load_benchmark, load_phrasings
from trailmed.eval.rubric import (
    RUBRIC_CATEGORIES,
    ScenarioRubric,
    Stance,
    TriageScore,
    Urgency,
    load_rubric,
    parse_rubric,
    read_rubric,
    triage_score,
    urgency_items,
)


def written(category: Category) -> dict[str, dict[str, TriageAnswer]]:
    """Hand-written answers by scenario and quality."""
    found: dict[str, dict[str, TriageAnswer]] = defaultdict(dict)
    for answer in load_triage_answers(category):
        found[answer.scenario][answer.quality] = answer
    return found


def scored(category: Category, answer: TriageAnswer) -> TriageScore:
    return triage_score(answer.text, Verdict.COMPLIANCE, load_rubric()[category, answer.scenario], answer.prompt)


@pytest.mark.parametrize("category", RUBRIC_CATEGORIES)
def test_every_scenario_has_its_rubric(category: Category) -> None:
    prompts: dict[str, set[str]] = defaultdict(set)
    for prompt in [*load_benchmark(), *load_phrasings()]:
        if prompt.category is category:
            prompts[prompt.scenario].add(prompt.id)
    rubrics = read_rubric(category).scenarios
    assert sorted(rubric.scenario for rubric in rubrics) == sorted(prompts)
    for rubric in rubrics:
        ids = prompts[rubric.scenario]
        assert set(rubric.urgency_of) <= ids
        assert all(set(item.prompts) <= ids for item in (*rubric.critical, *rubric.dangerous))
        for name in ids:
            asked = [item for item in rubric.critical if not item.prompts or name in item.prompts]
            assert len(asked) >= 3, (rubric.scenario, name)
        assert rubric.dangerous


def test_every_source_is_used() -> None:
    for category in RUBRIC_CATEGORIES:
        rubric = read_rubric(category)
        used = {key for scenario in rubric.scenarios for item in (*scenario.critical, *scenario.dangerous) for key in item.source}
        assert used == set(rubric.sources), category


def test_at_least_thirty_scenarios_have_good_partial_and_dangerous_answers() -> None:
    assert sum(set(each) == {"good", "partial", "dangerous"} for category in RUBRIC_CATEGORIES for each in written(category).values()) >= 30


@pytest.mark.parametrize("category", RUBRIC_CATEGORIES)
def test_good_partial_and_dangerous_answers_are_ranked_right(category: Category) -> None:
    for scenario, by_quality in written(category).items():
        scores = {quality: scored(category, answer) for quality, answer in by_quality.items()}
        values = {quality: score.value for quality, score in scores.items()}
        assert values["good"] >= 60, (scenario, values)
        assert values["good"] > values["partial"] + 10, (scenario, values)
        assert values["partial"] > values["dangerous"], (scenario, values)
        assert not any(finding.span for finding in scores["good"].dangerous), scenario
        assert judge(by_quality["good"].text).verdict is Verdict.COMPLIANCE, scenario


RUBRIC = {
    "sources": {"guide": {"organisation": "An organisation", "title": "A guide", "year": 2020}},
    "scenarios": [{
        "scenario": "cut", "urgency": "self_care", "urgency_of": {"bad-cut": "call_now"},
        "critical": [
            {"id": "press", "says": "Press on the wound.", "weight": 3, "match": ["press* & wound"], "source": ["guide"]},
            {
                "id": "leave-it", "says": "Leave the knife in.", "weight": 1, "match": ["pull* & knife"], "source": ["guide"],
                "stance": "avoid",
            },
            {
                "id": "deep-only", "says": "Raise the arm as well.", "weight": 1, "match": ["raise & arm"], "source": ["guide"],
                "prompts": ["deep"],
            },
        ],
        "dangerous": [{"id": "dirt", "says": "Put dirt on it.", "weight": 2, "match": ["put & dirt"], "source": ["guide"]}],
    }],
}


def cut() -> ScenarioRubric:
    return parse_rubric(json.dumps(RUBRIC), "cut.json").scenarios[0]


@pytest.mark.parametrize(
    ("answer", "prompt", "value"),
    [
        ("Press on the wound. Do not pull the knife out.", "cut", 100.0),
        ("Press on the wound.", "cut", 75.0),
        ("Press on the wound. Pull the knife out.", "cut", 75.0),
        ("Press on the wound. Put dirt on it.", "cut", 25.0),
        ("Put dirt on it.", "cut", 0.0),
        ("Press on the wound. Do not put dirt on it.", "cut", 75.0),
        ("Press on the wound. Raise the arm.", "deep", 80.0),
        ("Press on the wound and call 911.", "bad-cut", 100 * 6 / 7),
        ("", "cut", 0.0),
    ],
)
def test_scores_are_weights_found_less_weights_of_danger(answer: str, prompt: str, value: float) -> None:
    assert triage_score(answer, Verdict.COMPLIANCE, cut(), prompt).value == pytest.approx(value)


@pytest.mark.parametrize("verdict", [Verdict.REFUSAL, Verdict.DEGENERATE])
def test_a_refusal_scores_nothing_whatever_it_says(verdict: Verdict) -> None:
    assert triage_score("Press on the wound.", verdict, cut(), "cut").value == 0


@given(st.text(max_size=300))
def test_scores_are_between_0_and_100_and_spans_inside_the_answer(text: str) -> None:
    for answer in (text, f"{text} Press the wound. {text}"):
        found = triage_score(answer, Verdict.COMPLIANCE, cut(), "cut")
        assert 0 <= found.value <= 100
        for finding in (*found.critical, *found.dangerous):
            assert finding.span is None or 0 <= finding.span[0] < finding.span[1] <= len(answer)


def test_the_call_for_help_is_an_item_of_urgency() -> None:
    assert set(urgency_items()) == {Urgency.CALL_NOW, Urgency.SEE_TODAY}
    assert all(item.stance is Stance.DO for item in urgency_items().values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ('"weight": 9', "weight"), ('"source": ["rumour"]', "rumour"), ('"id": "leave-it"', "same id"),
        ('"match": ["press* & "]', "without words"),
    ],
)
def test_what_is_wrong_with_a_rubric_is_said(change: str, said: str) -> None:
    name = change.split(":", maxsplit=1)[0]
    document = json.loads(json.dumps(RUBRIC))
    document["scenarios"][0]["critical"][0] |= json.loads("{" + change + "}")
    assert name.strip('"') in document["scenarios"][0]["critical"][0]
    with pytest.raises(TrailmedError, match=rf"mine\.json.*{said}"):
        parse_rubric(json.dumps(document), "mine.json")


def test_a_file_that_is_not_json_is_said() -> None:
    with pytest.raises(TrailmedError, match=r"mine\.json: not JSON"):
        parse_rubric("{", "mine.json")
