"""The prompts: what is shipped keeps its promises, a user's own file is checked line by line, splits keep scenarios in one piece."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trailmed.errors import TrailmedError
from trailmed.eval import prompts as prompts_module
from trailmed.eval.prompts import (
    BENIGN_CATEGORIES,
    SPLIT_SHARES,
    Category,
    Expected,
    Prompt,
    Split,
    SplitChoice,
    assign_splits,
    load_benchmark,
    load_challenge,
    load_phrasings,
    load_prompts,
    load_retain,
    parse_categories,
    prompts_hash,
    sample,
    select,
)

PLAIN = {
    "id": "rip-1", "category": "wilderness_survival", "scenario": "rip-current", "text": "How do I get out of a rip current?",
    "expected": "help", "voice": "plain",
}
HARMFUL = {**PLAIN, "id": "bad-1", "category": "should_refuse", "expected": "refuse", "kind": "fraud"}


def _normalised(text: str) -> str:
    return " ".join("".join(letter if letter.isalnum() else " " for letter in text.casefold()).split())


def _write(path: Path, *records: Any) -> Path:
    path.write_text("".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records), encoding="utf-8")
    return path


# --- what is shipped


def test_the_benchmark_has_its_eight_categories_and_its_size() -> None:
    benchmark = load_benchmark()
    counts = Counter(prompt.category for prompt in benchmark)
    assert set(counts) == set(Category)
    assert len(Category) == 8
    assert len(benchmark) >= 480
    assert counts[Category.SHOULD_REFUSE] >= 100
    assert min(counts.values()) >= 48
    everything = Counter(prompt.category for prompt in [*benchmark, *load_phrasings()])
    assert min(everything.values()) >= 50


def test_with_the_further_phrasings_every_scenario_is_asked_in_two_ways_or_more() -> None:
    benchmark, phrasings = load_benchmark(), load_phrasings()
    asked = Counter((prompt.category, prompt.scenario) for prompt in [*benchmark, *phrasings])
    assert set(asked.values()) == {2, 3}
    stored = {(prompt.category, prompt.scenario): prompt for prompt in benchmark}
    for prompt in phrasings:
        known = stored[prompt.category, prompt.scenario]
        assert (prompt.split, prompt.kind, prompt.expected, prompt.twin) == (known.split, known.kind, known.expected, None)
    texts = [_normalised(prompt.text) for prompt in [*benchmark, *phrasings, *load_retain()]]
    for values in ([prompt.id for prompt in [*benchmark, *phrasings]], texts):
        assert [value for value, count in Counter(values).items() if count > 1] == []
    voices = [prompt.voice for prompt in phrasings]
    assert len(set(voices)) >= 10


def test_the_challenge_set_is_all_held_out_and_asks_every_benign_category_and_every_kind_of_harm() -> None:
    challenge = load_challenge()
    assert {prompt.split for prompt in challenge} == {Split.HELD_OUT}
    assert {prompt.category for prompt in challenge} == {*Category} - {Category.SAFE_CONTROL}
    assert {prompt.kind for prompt in challenge} == {prompt.kind for prompt in load_benchmark()}
    assert len(challenge) >= 400


def test_harmful_requests_are_of_many_kinds_and_voices() -> None:
    harmful = select(load_benchmark(), categories=[Category.SHOULD_REFUSE])
    assert len({prompt.kind for prompt in harmful}) >= 10
    assert len({prompt.voice for prompt in harmful}) >= 3
    held_out = [prompt.kind for prompt in harmful if prompt.split is Split.HELD_OUT]
    assert len(set(held_out)) >= 10


@pytest.mark.parametrize("load", [load_benchmark, load_phrasings, load_challenge, load_retain])
def test_ids_and_texts_are_unique(load: Any) -> None:
    prompts = load()
    for values in ([prompt.id for prompt in prompts], [_normalised(prompt.text) for prompt in prompts]):
        assert [value for value, count in Counter(values).items() if count > 1] == []


def test_every_shipped_prompt_has_its_split_and_no_scenario_is_cut_in_two() -> None:
    splits = defaultdict(set)
    for prompt in load_benchmark():
        splits[prompt.scenario].add(prompt.split)
    assert {scenario: found for scenario, found in splits.items() if len(found) != 1 or None in found} == {}
    assert {prompt.split for prompt in load_retain()} <= {Split.FIT, None}


@pytest.mark.parametrize("category", Category)
def test_each_category_is_split_about_50_15_35(category: Category) -> None:
    counts = Counter(prompt.split for prompt in select(load_benchmark(), categories=[category]))
    shares = {split: counts[split] / counts.total() for split in Split}
    assert {split: share for split, share in shares.items() if abs(share - SPLIT_SHARES[split]) > 0.08} == {}


@pytest.mark.parametrize("load", [load_benchmark, load_challenge, load_retain])
def test_twins_point_at_each_other_across_the_line(load: Any) -> None:
    by_id = {prompt.id: prompt for prompt in load()}
    pairs = [(prompt, by_id.get(prompt.twin)) for prompt in by_id.values() if prompt.twin is not None]
    wrong = [
        prompt.id for prompt, twin in pairs
        if twin is None or twin.twin != prompt.id or twin.scenario != prompt.scenario or twin.split is not prompt.split
        or {prompt.expected, twin.expected} != set(Expected)
    ]
    assert wrong == []
    assert len(pairs) >= 2 * 20


@pytest.mark.parametrize("load", [load_benchmark, load_challenge])
def test_the_retain_set_shares_nothing_with_what_is_measured(load: Any) -> None:
    measured, retain = load(), load_retain()
    for field in ("id", "scenario"):
        assert {getattr(p, field) for p in measured} & {getattr(p, field) for p in retain} == set()
    assert {_normalised(p.text) for p in measured} & {_normalised(p.text) for p in retain} == set()
    assert {p.expected for p in retain} == set(Expected)


def test_the_benchmark_is_ordered_and_the_same_every_time() -> None:
    benchmark = load_benchmark()
    order = list(Category)
    assert [p.category for p in benchmark] == sorted((p.category for p in benchmark), key=order.index)
    assert prompts_hash(load_benchmark()) == prompts_hash(benchmark)


def test_a_sample_is_even_stable_and_grows() -> None:
    benchmark = load_benchmark()
    shuffled = random.Random(1).sample(benchmark, len(benchmark))
    for limit in (1, 8, 20, 100, 10_000):
        chosen = sample(benchmark, limit)
        assert len(chosen) == min(limit, len(benchmark))
        assert [prompt.id for prompt in chosen] == [prompt.id for prompt in benchmark if prompt in chosen]
        assert {prompt.id for prompt in sample(shuffled, limit)} == {prompt.id for prompt in chosen}
        assert {prompt.id for prompt in chosen} <= {prompt.id for prompt in sample(benchmark, limit + 1)}
    counts = Counter(prompt.category for prompt in sample(benchmark, 100))
    assert set(counts.values()) == {12, 13}


def test_a_choice_of_split() -> None:
    assert {choice.chosen for choice in SplitChoice} == {None, *Split}


# --- a user's own file


def test_a_users_file_is_read_and_split(tmp_path: Path) -> None:
    path = _write(tmp_path / "mine.jsonl", PLAIN, "", {**HARMFUL, "split": "held_out"})
    first, second = load_prompts(path)
    assert first.model_dump(exclude={"split"}) == Prompt.model_validate(PLAIN).model_dump(exclude={"split"})
    # the two share a scenario, so the stored split rules both
    assert first.split is second.split is Split.HELD_OUT


@pytest.mark.parametrize(("line", "message"), [
    ("{", "not a JSON object"),
    ("[" * 100_000, "not a JSON object"),
    ("[]", "record: "),
    ('"a"', "record: "),
    ("{}", "id: "),
    ({**PLAIN, "id": "Rip 1"}, "id: "),
    ({**PLAIN, "id": "x" * 81}, "id: "),
    ({**PLAIN, "category": "medicine"}, "category: .*emergency_medical"),
    ({**PLAIN, "text": "a"}, "text: "),
    ({**PLAIN, "text": "a" * 4001}, "text: "),
    ({**PLAIN, "text": 3}, "text: "),
    ({**PLAIN, "expected": "refuse"}, "wilderness_survival cannot be expected to refuse"),
    ({**HARMFUL, "expected": "help"}, "should_refuse cannot be expected to help"),
    ({**PLAIN, "kind": "fraud"}, "`kind` belongs to should_refuse"),
    ({key: value for key, value in HARMFUL.items() if key != "kind"}, "`kind` belongs to should_refuse"),
    ({**PLAIN, "split": "test"}, "split: "),
    ({**PLAIN, "note": "x"}, "note: "),
    (PLAIN, "id 'rip-1' occurs twice"),
])
def test_a_bad_line_is_named_in_one_line(tmp_path: Path, line: Any, message: str) -> None:
    path = _write(tmp_path / "mine.jsonl", PLAIN, "", line)
    with pytest.raises(TrailmedError, match=rf"(?s)^{path}, line 3: .*{message}") as caught:
        load_prompts(path)
    assert "\n" not in str(caught.value)


def test_unreadable_files_are_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    _write(tmp_path / "large.jsonl", PLAIN, " " * (1 << 17))
    (tmp_path / "empty.jsonl").write_text("\n  \n")
    monkeypatch.setattr(prompts_module, "MAX_PROMPT_FILE_BYTES", 1 << 17)
    for name, message in (
        ("none.jsonl", "no such prompts file"), ("latin.jsonl", "not UTF-8"), ("large.jsonl", "larger than"),
        ("empty.jsonl", "holds no prompts"), ("", "cannot be read"),
    ):
        with pytest.raises(TrailmedError, match=f"^{tmp_path / name}: {message}") as caught:
            load_prompts(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_categories_are_read_as_people_write_them() -> None:
    assert parse_categories(["Gray-Zone", " home_safety ", "gray_zone"]) == (Category.GRAY_ZONE, Category.HOME_SAFETY)
    with pytest.raises(TrailmedError, match="unknown category 'medicine'; choose from emergency_medical, "):
        parse_categories(["medicine"])


def test_selecting_by_split_and_category() -> None:
    benchmark = load_benchmark()
    held_out = select(benchmark, split=Split.HELD_OUT)
    assert held_out == [p for p in benchmark if p.split is Split.HELD_OUT]
    assert select(held_out, categories=[Category.GRAY_ZONE]) == [p for p in held_out if p.category is Category.GRAY_ZONE]
    assert select(benchmark, categories=[]) == []
    assert sum(len(select(benchmark, split=split)) for split in Split) == len(benchmark)


def test_the_hash_sees_every_field_and_the_order() -> None:
    first, second = Prompt.model_validate(PLAIN), Prompt.model_validate(HARMFUL)
    hashes = {
        prompts_hash([first, second]), prompts_hash([second, first]), prompts_hash([first]),
        *(prompts_hash([first.model_copy(update=change), second])
          for change in ({"text": "How?"}, {"split": Split.FIT}, {"voice": "terse"}, {"scenario": "x"}, {"twin": "y"})),
    }
    assert len(hashes) == 8


# --- splits by scenario


def _prompt(number: int, scenario: int, category: Category, split: Split | None) -> Prompt:
    harmful = category is Category.SHOULD_REFUSE
    return Prompt(
        id=f"p-{number}", category=category, scenario=f"s-{scenario}", text=f"text {number}",
        expected=Expected.REFUSE if harmful else Expected.HELP, voice="plain", kind="fraud" if harmful else None, split=split,
    )


@st.composite
def _prompt_lists(draw: st.DrawFn) -> list[Prompt]:
    """Up to 80 prompts in up to 30 scenarios, some of which have a stored split."""
    scenarios = draw(st.lists(st.sampled_from([None, None, *Split]), min_size=1, max_size=30))
    members = draw(st.lists(st.tuples(st.integers(0, len(scenarios) - 1), st.sampled_from(Category)), min_size=1, max_size=80))
    return [_prompt(number, scenario, category, scenarios[scenario]) for number, (scenario, category) in enumerate(members)]


def _shares(prompts: Sequence[Prompt], category: Category) -> dict[Split, float]:
    counts = Counter(p.split for p in prompts if p.category is category)
    return {split: counts[split] / counts.total() for split in Split}


@given(_prompt_lists(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_splits_are_by_scenario_and_do_not_hang_on_the_order(prompts: list[Prompt], rng: random.Random) -> None:
    found = assign_splits(prompts)
    assert [p.model_copy(update={"split": None}) for p in found] == [p.model_copy(update={"split": None}) for p in prompts]
    assert all(after.split is before.split for before, after in zip(prompts, found, strict=True) if before.split is not None)
    by_scenario = defaultdict(set)
    for prompt in found:
        by_scenario[prompt.scenario].add(prompt.split)
    assert all(len(splits) == 1 and None not in splits for splits in by_scenario.values())
    assert assign_splits(found) == found
    shuffled = rng.sample(prompts, len(prompts))
    assert {p.id: p.split for p in assign_splits(shuffled)} == {p.id: p.split for p in found}


@given(st.integers(40, 120), st.integers(1, 3), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_splits_come_close_to_their_shares(scenarios: int, paraphrases: int, salt: int) -> None:
    """With many small scenarios of one category every share is met to within two scenarios."""
    prompts = [
        _prompt(number * paraphrases + copy, salt + number, BENIGN_CATEGORIES[0], None)
        for number in range(scenarios) for copy in range(paraphrases)
    ]
    shares = _shares(assign_splits(prompts), BENIGN_CATEGORIES[0])
    assert all(abs(shares[split] - SPLIT_SHARES[split]) <= 2 / scenarios for split in Split)
