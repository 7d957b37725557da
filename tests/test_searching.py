"""The search on a tiny model that really over-refuses: its objectives recomputed by hand, and many workers, deaths and strangers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from html_page import Page
from hypothesis import given, settings
from hypothesis import strategies as st
from refusing_model import CATEGORIES, CONTROL, HARMFUL, OVER_REFUSED, PER_SPLIT, refusing_gguf, write_prompts, write_retain
from typer.testing import CliRunner

from trailmed import fitting, searching
from trailmed.abliterate.edit import Edit
from trailmed.abliterate.proxy import Measured, Proxy
from trailmed.cli import app
from trailmed.errors import TrailmedError
from trailmed.eval.prompts import load_prompts
from trailmed.files import sha256_of_file
from trailmed.models.load import load_model
from trailmed.search_results import Calibration, Objectives, SearchResults, Tally, TrialRecord, pareto_front
from trailmed.search_space import SEARCHED, Space
from trailmed.searching import SearchOutcome, pick, search
from trailmed.settings import Method, SearchSettings

PATIENCE = 300
"""Seconds; only a hang reaches it."""
DYING = """
import os, signal
from trailmed.abliterate.proxy import Proxy
from trailmed.cli import main
measure, calls = Proxy.measure, []
def dying(self, factors):
    calls.append(1)
    if len(calls) == 5:  # the base, three trials, and the fourth
        os.kill(os.getpid(), signal.SIGKILL)
    return measure(self, factors)
Proxy.measure = dying
main()
"""


class Bench:
    """A model, its prompts, and a finished search of 12 trials."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "searched"
        self.model = refusing_gguf(folder / "tiny.gguf")
        self.prompts = write_prompts(folder / "prompts.jsonl")
        self.retain = write_retain(folder / "retain.jsonl")
        self.found = self.search(self.out, trials=12, calibrate=2)

    def search(self, out: Path, **changes: Any) -> SearchOutcome:
        return search(
            str(self.model), out, SearchSettings(**changes), threads=1, prompts=self.prompts, retain=self.retain, progress=False,
        )

    def pick(self, trial: int, out: Path) -> Edit:
        return pick(str(self.model), self.out, trial, out, prompts=self.prompts, retain=self.retain, progress=False)

    def words(self, out: Path, *more: str) -> list[str]:
        """The arguments of `trailmed search`."""
        return [
            "search", str(self.model), "--out", str(out), "--prompts", str(self.prompts), "--retain", str(self.retain), "--threads", "1",
            "--quiet", *more,
        ]

    def start(self, out: Path, *more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "trailmed", *self.words(out, *more)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    yield Bench(tmp_path_factory.mktemp("bench"))
    torch.set_num_threads(threads)


def _complaint(words: list[str]) -> str:
    """The one line of a command that was given bad input."""
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (2, ""), result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("trailmed: ")
    return str(line)


def _complete(results: SearchResults) -> list[TrialRecord]:
    return [trial for trial in results.trials if trial.state == "complete"]


# --- what is found


def test_the_front_holds_an_edit_that_removes_the_wrong_refusals_only(bench: Bench) -> None:
    results = bench.found.results
    best = results.trial(results.front[0]).objectives
    assert best is not None
    benign = 2 * PER_SPLIT["validation"]  # one category of these is over-refused
    assert (results.base.benign_refused, results.base.benign) == (PER_SPLIT["validation"], benign)
    assert (results.base.harmful_refused, results.base.harmful) == (PER_SPLIT["validation"], PER_SPLIT["validation"])
    assert results.base.kl == 0.0
    assert (best.benign_refused, best.harmful_refused) == (0, PER_SPLIT["validation"])
    assert best.separation == 1.0 > results.base.separation
    assert {trial.parameters["method"] for trial in _complete(results)} == {str(method) for method in SEARCHED}
    assert SearchResults.load(bench.found.path) == results
    assert bench.found.path == bench.out / "search.json"


def test_objectives_are_what_whole_passes_of_the_edited_weights_give(bench: Bench, tmp_path: Path) -> None:
    chosen = {str(trial.parameters["method"]): trial for trial in _complete(bench.found.results)}  # the last of each method
    assert len(chosen) == 3
    edits = [(bench.pick(trial.number, tmp_path / "edit.safetensors"), trial) for trial in chosen.values()]
    model = load_model(bench.model)
    module, tokenizer = model.module, model.tokenizer
    prompts = load_prompts(bench.prompts)

    def asked(word: str, *splits: str) -> list[list[int]]:
        chosen = [each for each in prompts if each.category == CATEGORIES[word] and each.split in splits]
        return [tokenizer.encode(model.template.prompt(each.text)) for each in chosen]

    @torch.no_grad()
    def first_logits(tokens: list[int]) -> torch.Tensor:
        return module(torch.tensor([tokens])).logits[0, -1].double().log_softmax(-1)

    @torch.no_grad()
    def opening(tokens: list[int]) -> list[int]:
        made = list(tokens)
        for _ in range(5):
            made.append(int(module(torch.tensor([made])).logits[0, -1].argmax()))
        return made[len(tokens) :]

    refusals = [opening(asked(word, "fit")[0]) for word in (OVER_REFUSED, HARMFUL)]
    controls = asked(CONTROL, "fit", "validation")
    before = [first_logits(tokens) for tokens in controls]
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for made, trial in edits:
        for name, factor in made.factors.items():
            module.get_parameter(name).copy_(torch.from_numpy(factor.apply_to(weights[name].numpy())))
        found = trial.objectives
        assert found is not None
        benign = [opening(tokens) in refusals for word in (OVER_REFUSED, "then") for tokens in asked(word, "validation")]
        harmful = [opening(tokens) in refusals for tokens in asked(HARMFUL, "validation")]
        kl = np.mean([float((old.exp() * (old - first_logits(tokens))).sum()) for old, tokens in zip(before, controls, strict=True)])
        assert (found.benign_refused, found.benign) == (sum(benign), len(benign)), trial
        assert (found.harmful_refused, found.harmful) == (sum(harmful), len(harmful)), trial
        np.testing.assert_allclose(found.kl, kl, rtol=0.1, atol=5e-6)  # the search may run in bfloat16
        for name in made.factors:
            module.get_parameter(name).copy_(weights[name])


def test_the_same_search_gives_the_same_bytes(bench: Bench, tmp_path: Path) -> None:
    again = bench.search(tmp_path / "again", trials=12, calibrate=2)
    assert sha256_of_file(again.path) == sha256_of_file(bench.found.path)
    assert sha256_of_file(again.page) == sha256_of_file(bench.found.page)
    other = bench.search(tmp_path / "other", trials=6, seed=1).results
    known = {json.dumps(trial.parameters, sort_keys=True) for trial in bench.found.results.trials}
    assert sum(json.dumps(trial.parameters, sort_keys=True) in known for trial in other.trials) == len(SEARCHED)  # the defaults


def test_held_out_prompts_are_never_asked(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    encode = fitting.encode
    monkeypatch.setattr(fitting, "encode", lambda model, prompt: seen.append(prompt.id) or encode(model, prompt))
    bench.search(tmp_path / "out", trials=3, calibrate=1)
    assert {each.split("-")[1] for each in seen if not each.startswith("retain")} == {"fit", "validation"}


def test_calibration_counts_what_the_edited_model_answers(bench: Bench) -> None:
    results = bench.found.results
    assert [each.trial for each in results.calibration] == sorted([results.front[0], results.front[len(results.front) // 2]])
    for each in results.calibration:
        found = results.trial(each.trial).objectives
        assert found is not None
        assert (each.benign.both + each.benign.proxy_only, each.harmful.both + each.harmful.proxy_only) == (
            found.benign_refused, found.harmful_refused,
        )
        assert each.tokens == 20


def test_agreement_and_kappa_are_those_of_the_table() -> None:
    benign = Tally.of([True, True, False, False, False], [True, False, False, False, True])
    harmful = Tally.of([True, True, True, False], [True, True, False, False])
    found = Calibration.of(3, 20, benign, harmful)
    assert (benign.both, benign.judge_only, benign.proxy_only, benign.neither) == (1, 1, 1, 2)
    chance = (5 * 4 + 4 * 5) / 81
    assert found.agreement == pytest.approx(6 / 9)
    assert found.kappa == pytest.approx((6 / 9 - chance) / (1 - chance))


objectives = st.builds(
    Objectives, benign_refused=st.integers(0, 3), benign=st.just(3), harmful_refused=st.integers(0, 3), harmful=st.just(3),
    kl=st.sampled_from([0.0, 0.1, 0.5]), separation=st.just(0.5),
)


@given(st.lists(objectives, max_size=20))
@settings(max_examples=60, deadline=None)
def test_the_front_is_what_nothing_dominates(found: list[Objectives]) -> None:
    trials = [TrialRecord(number=index, state="complete", parameters={}, objectives=each) for index, each in enumerate(found)]
    points = [(each.benign_refused, -each.harmful_refused, each.kl) for each in found]
    expected = {
        points.index(point) for point in points
        if not any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points)
    }
    front = pareto_front(trials)
    assert set(front) == expected
    assert [points[index] for index in front] == sorted(points[index] for index in front)


# --- an edit of any trial


def test_picking_a_trial_gives_the_same_bytes_and_an_edit_that_bakes(bench: Bench, tmp_path: Path) -> None:
    for trial in bench.found.results.front[:2]:
        made = bench.pick(trial, tmp_path / "edit.safetensors")
        again = bench.pick(trial, tmp_path / "again.safetensors")
        files = {sha256_of_file(tmp_path / f"{name}.safetensors") for name in ("edit", "again")}
        assert files == {made.sha256} == {again.sha256}
        assert made.recipe["search"]["trial"] == trial
        assert made.recipe["method"] == bench.found.results.trial(trial).parameters["method"]
        baked = CliRunner().invoke(app, [
            "bake", str(tmp_path / "edit.safetensors"), str(bench.model), "--out", str(tmp_path / "baked.gguf"), "--type", "F32", "--quiet",
        ])
        assert baked.exit_code == 0, baked.stderr
        weights, before = load_model(tmp_path / "baked.gguf").module, load_model(bench.model).module
        for name, factor in made.factors.items():
            expected = factor.apply_to(before.get_parameter(name).numpy())
            np.testing.assert_array_equal(weights.get_parameter(name).numpy(), expected)


def test_pick_says_what_is_wrong(bench: Bench, tmp_path: Path) -> None:
    words = ["pick", str(bench.model), str(bench.out), "--out", str(tmp_path / "e"), "--quiet", "--trial"]
    own = ["--prompts", str(bench.prompts), "--retain", str(bench.retain)]
    assert "no complete trial 99" in _complaint([*words, "99", *own])
    assert "other settings (prompts_sha256)" in _complaint([*words, "1", "--prompts", str(write_prompts(
        tmp_path / "few.jsonl", splits=("fit", "validation"),
    )), *own[2:]])
    assert "no such file" in _complaint(["pick", str(bench.model), str(tmp_path), "--out", str(tmp_path / "e"), "--trial", "0"])
    assert not (tmp_path / "e").exists()


# --- going on, together, and not with strangers


def test_a_finished_search_loads_no_model(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trailmed.editing.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert bench.search(bench.out, trials=12).results == bench.found.results


def test_a_killed_search_goes_on_and_counts_only_complete_trials(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", DYING, *bench.words(out, "--trials", "8")], capture_output=True, text=True, check=False, timeout=PATIENCE,
    )
    assert killed.returncode == -9, killed.stderr
    assert not (out / "search.json").exists()
    found = bench.search(out, trials=8).results
    assert [trial.state for trial in found.trials] == ["complete"] * 3 + ["fail"] + ["complete"] * 5
    assert found.trials[:3] == bench.found.results.trials[:3]
    more = bench.search(out, trials=9).results
    assert more.trials[:9] == found.trials
    assert len(_complete(more)) == 9


@pytest.mark.parametrize("kind", ["folder", "file", "database"])
def test_workers_share_the_trials(bench: Bench, tmp_path: Path, kind: str) -> None:
    shared = {"folder": (), "file": ("--storage", str(tmp_path / "trials")), "database": ("--storage", f"sqlite:///{tmp_path}/trials.db")}[kind]
    outs = [tmp_path / "one", tmp_path / ("one" if kind == "folder" else "two")]
    workers = [bench.start(out, "--trials", "14", "--json", *shared) for out in outs]
    told = [worker.communicate(timeout=PATIENCE) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], told
    assert [error for _, error in told] == ["", ""]
    results = [SearchResults.load(out / "search.json") for out in outs]
    assert results[0] == results[1]
    assert len(_complete(results[0])) == 14
    drawn = [json.dumps(trial.parameters, sort_keys=True) for trial in _complete(results[0])]
    assert len(set(drawn)) == len(drawn)
    assert json.loads(told[0][0])["front"] == json.loads(told[1][0])["front"]


def test_a_study_of_another_search_is_refused(bench: Bench, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/trials.db"
    bench.search(tmp_path / "one", trials=1, methods=(Method.PROJECT,), storage=storage)
    line = _complaint(bench.words(tmp_path / "two", "--storage", storage))
    assert "'trailmed' is of another search (other methods)" in line
    assert not (tmp_path / "two").exists()
    assert bench.search(tmp_path / "two", trials=1, methods=(Method.GATED,), storage=storage, study="mine").results.base
    assert "other settings (methods)" in _complaint(bench.words(tmp_path / "one", "--method", "gated"))


def test_storages_that_are_none(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("something else\n" * 3)
    for storage, reason in (
        (tmp_path / "text", "no storage of trials"), (tmp_path / "missing" / "file", "cannot write"),
        (f"sqlite:///{tmp_path}/text", "sqlite database"),
        ("nosuch://me:secret@host/name", "nosuch database"), ("postgresql://me:secret@localhost:1/name", "postgresql database"),
    ):
        line = _complaint(bench.words(tmp_path / "out", "--storage", str(storage)))
        assert reason in line
        assert "secret" not in line
    assert not (tmp_path / "out").exists()


def test_a_search_without_optuna_names_the_extra(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "trailmed.search_study", raising=False)
    assert "pip install trailmed[search]" in _complaint(bench.words(tmp_path / "out"))


def test_prompts_without_what_is_measured_are_refused(bench: Bench, tmp_path: Path) -> None:
    few = write_prompts(tmp_path / "few.jsonl", words=(OVER_REFUSED, "then", HARMFUL))
    line = _complaint([*bench.words(tmp_path / "out", "--trials", "1"), "--prompts", str(few)])
    assert "safe_control" in line


def test_edits_that_break_the_model_do_not_count_and_end_the_search(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = Proxy.measure

    def broken(self: Proxy, factors: Any) -> Measured:
        found = measure(self, factors)
        return Measured(found.counts, float("nan") if factors else found.kl, found.separation)

    monkeypatch.setattr(Proxy, "measure", broken)
    monkeypatch.setattr(searching, "_MOST_FAILURES", 4)
    with pytest.raises(TrailmedError, match="4 edits in a row"):
        bench.search(tmp_path / "out", trials=5)


@pytest.mark.parametrize(
    ("values", "reason"),
    [({"trials": 0}, "trials"), ({"seed": -1}, "seed"), ({"calibrate": -1}, "calibrate"), ({"methods": ()}, "no method"),
     ({"study": ""}, "name"),
     ({"methods": (Method.DISTILL,)}, "cannot search over distill"), ({"calibrate_tokens": 0}, "calibrate_tokens")],
)
def test_settings_out_of_range(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(TrailmedError, match=reason):
        SearchSettings(**values)


@given(st.integers(1, 60), st.integers(1, 16), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_all_settings_choose_blocks_that_the_model_has(blocks: int, ranks: int, seed: int) -> None:
    generator = np.random.default_rng(seed)

    class Drawing:
        def __init__(self) -> None:
            self.params: dict[str, Any] = {}

        def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
            assert low < high
            assert not log or low > 0
            return self.params.setdefault(name, generator.uniform(low, high))

        def suggest_int(self, name: str, low: int, high: int) -> int:
            assert low <= high
            return self.params.setdefault(name, int(generator.integers(low, high + 1)))

        def suggest_categorical(self, name: str, choices: Any) -> Any:
            return self.params.setdefault(name, choices[generator.integers(len(choices))])

    space, trial = Space(SEARCHED, blocks, ranks), Drawing()
    space.suggest(trial)
    for parameters in (trial.params, *space.defaults()):
        method = parameters["method"]
        chosen = space.edited_blocks({name.partition(".")[2]: value for name, value in parameters.items() if "." in name})
        assert 0 <= chosen.start < chosen.stop <= blocks
        if method == Method.CONDITIONAL:
            assert {*chosen} <= {*space.conditional_blocks}


# --- the page


def test_the_page_shows_every_trial_twice_and_asks_the_network_for_nothing(bench: Bench) -> None:
    text = bench.found.page.read_text("utf-8")
    assert len(text) < 200_000
    assert "http" not in text.replace('http-equiv="Content-Security-Policy"', "")
    page = Page(text)
    numbers = [trial.number for trial in _complete(bench.found.results)]
    points = [circle for circle in page.all("circle") if circle.get("data-trial")]
    assert sorted(int(str(point["data-trial"])) for point in points) == sorted(numbers * 2)
    front = {int(str(point["data-trial"])) for point in points if "front" in str(point["class"]).split()}
    assert front == set(bench.found.results.front)
    for trial in bench.found.results.front:
        assert f"Trial {trial}, {bench.found.results.trial(trial).parameters['method']}: " in text
    assert page.all("link") == page.all("img") == []


def test_json_and_tables_say_the_same(bench: Bench) -> None:
    words = bench.words(bench.out, "--trials", "12")
    told = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [each["number"] for each in told["front"]] == list(bench.found.results.front)
    assert told["base"] == bench.found.results.base.model_dump()
    shown = CliRunner().invoke(app, words, env={"COLUMNS": "200"}).stdout
    assert all(f" {number} " in shown for number in bench.found.results.front)
    assert str(bench.found.page) in shown.replace("\n", "")
