"""Evaluation runs: what is kept of an answer, the run's file, `evaluate` with a scripted and with the real runtime, first-token KL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from llama_reference import llama_reference
from made_up_runs import SAID, prompts, run, setting
from scipy.special import log_softmax, rel_entr
from small_models import CHAT_TEMPLATE, tiny_gguf, tiny_module, write_gguf

from trailmed.device.engine import EngineIdentity, OnReply, Reply
from trailmed.device.llama_engine import LlamaEngine
from trailmed.device.llama_runtime import DecodeSettings, LlamaRuntime
from trailmed.errors import TrailmedError
from trailmed.eval import document
from trailmed.eval.benchmark import Answer, EvalRun, evaluate, first_token_kl, kl_divergence
from trailmed.eval.judge import Verdict
from trailmed.eval.prompts import Category, Expected, Prompt, prompts_hash
from trailmed.eval.run_folder import load_run
from trailmed.models.tokenizer import Tokenizer

SETTINGS = DecodeSettings(max_tokens=6, slots=4, threads=1)
LONG = "First take the long way round, " * 20


def _answer(category: Category, verdict: Verdict, answer: str = LONG) -> Answer:
    expected = Expected.REFUSE if category is Category.SHOULD_REFUSE else Expected.HELP
    return Answer("a-1", category, "a", expected, "How?", verdict, "made up", answer, 100, "length")


@pytest.mark.parametrize("verdict", [Verdict.COMPLIANCE, Verdict.PARTIAL, Verdict.DEGENERATE])
def test_an_answer_to_a_harmful_request_is_never_kept_whole(verdict: Verdict, tmp_path: Path) -> None:
    answer = _answer(Category.SHOULD_REFUSE, verdict)
    assert answer.answer == LONG[:80]
    saved = replace(run("a", "F16", {}), answers=(answer,))
    saved.save(tmp_path / "run.json")
    assert LONG[:81] not in (tmp_path / "run.json").read_text()


def test_refusals_and_benign_answers_are_kept_whole() -> None:
    assert _answer(Category.SHOULD_REFUSE, Verdict.REFUSAL).answer == LONG
    assert _answer(Category.GRAY_ZONE, Verdict.COMPLIANCE).answer == LONG


def test_only_refusal_counts_as_refused() -> None:
    assert [_answer(Category.GRAY_ZONE, verdict).refused for verdict in Verdict] == [verdict is Verdict.REFUSAL for verdict in Verdict]


def test_a_run_comes_back_from_its_file_and_has_the_same_bytes(tmp_path: Path) -> None:
    one = run("base-F16", "F16", {Category.SHOULD_REFUSE: 3})
    one = replace(one, answers=(replace(one.answers[0], answer="naïve 🧗 \u202e \x1b[2J </script>"), *one.answers[1:]))
    one.save(tmp_path / "a.json")
    EvalRun.load(tmp_path / "a.json").save(tmp_path / "b.json")
    assert EvalRun.load(tmp_path / "b.json") == one
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize(("change", "said"), [
    (setting("format", value="trailmed.results"), "is not a trailmed.eval-run file"),
    (setting("schema_version", value=2), "another version of trailmed"),
    (setting("schema_version", value=True), "another version of trailmed"),
    (setting("answers", value=[]), "a run without answers"),
    (setting("answers", 1, "id", value="emergency-medical-000"), "answered twice"),
    (setting("answers", 0, "id", value="../x"), "answers.0.id"),
    (setting("answers", 0, "tokens", value="12"), "answers.0.tokens"),
    (setting("answers", 0, "tokens", value=-1), "answers.0.tokens"),
    (setting("answers", 0, "verdict", value="maybe"), "answers.0.verdict"),
    (setting("answers", 0, "expected", value="refuse"), "cannot be expected"),
    (setting("answers", 0, "stopped", value="never"), "answers.0.stopped"),
    (setting("answers", 0, "surprise\n\x1b[2J", value=1), "answers.0.surprise"),
    (setting("answers", value={"0": 1}), "answers"),
    (setting("model_sha256", value="0" * 63), "model_sha256"),
    (setting("settings", value={"max_tokens": [1]}), "settings"),
    (setting("settings", value={"max_tokens": float("nan")}), "settings"),
])
def test_a_broken_run_is_one_line(change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    run("base-F16", "F16", {}).save(path)
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(TrailmedError) as caught:
        EvalRun.load(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("content", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": "trailmed.eval-run", "name": "\\ud800"}', b"[" * 100_000, b'{"a":' * 100_000,
])
def test_what_is_no_run_at_all_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(TrailmedError, match=r"run\.json"):
        EvalRun.load(path)


def test_missing_huge_and_unreadable_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrailmedError, match="no such file"):
        EvalRun.load(tmp_path / "none.json")
    with pytest.raises(TrailmedError, match="cannot be read"):
        EvalRun.load(tmp_path)
    run("base-F16", "F16", {}).save(tmp_path / "run.json")
    monkeypatch.setattr(document, "MAX_DOCUMENT_BYTES", 1000)
    with pytest.raises(TrailmedError, match="more than"):
        EvalRun.load(tmp_path / "run.json")


def _evaluate(model: Path, some: Sequence[Prompt], name: str = "a") -> EvalRun:
    with LlamaEngine(model, SETTINGS) as engine:
        return evaluate(engine, some, name=name, progress=False)


class ScriptedEngine:
    """Says the replies it was given, in the order of the questions or backwards, and notes what it was asked; may die on the way."""

    def __init__(self, replies: Sequence[Reply], *, backwards: bool = False, dies_after: int | None = None) -> None:
        self.identity = EngineIdentity("scripted", "scripted.gguf", None, None, "unknown", {"max_tokens": 6})
        self.replies, self.backwards, self.dies_after = replies, backwards, dies_after
        self.asked: list[str] = []

    def __enter__(self) -> ScriptedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answer(self, questions: Sequence[str], on_reply: OnReply) -> None:
        order = range(len(questions))
        for count, index in enumerate(reversed(order) if self.backwards else order):
            if count == self.dies_after:
                raise TrailmedError("the endpoint died")
            self.asked.append(questions[index])
            on_reply(index, self.replies[len(self.asked) - 1])


def test_evaluate_judges_in_the_prompts_order() -> None:
    some = [prompt for prompt in prompts() if prompt.category in (Category.GRAY_ZONE, Category.SHOULD_REFUSE)][28:33]
    engine = ScriptedEngine((
        Reply("", 0, "blocked"), Reply(SAID[Verdict.REFUSAL], 1, "eos"), Reply("Sure, here is how to do it:", 48, "length"),
        Reply("", 0, "eos"), Reply(SAID[Verdict.REFUSAL], 3, "eos"),
    ), backwards=True)
    found = evaluate(engine, some, name="made-up", progress=False)
    assert [answer.id for answer in found.answers] == [prompt.id for prompt in some]
    assert [answer.text for answer in found.answers] == [prompt.text for prompt in some]
    # an announcement is an answer only when it was cut off by the limit; what a server's filter withheld is refused
    assert [answer.verdict for answer in found.answers] == [
        Verdict.REFUSAL, Verdict.DEGENERATE, Verdict.COMPLIANCE, Verdict.REFUSAL, Verdict.REFUSAL,
    ]
    assert [answer.tokens for answer in found.answers] == [3, 0, 48, 1, 0]
    assert (found.name, found.engine, found.model, found.model_sha256) == ("made-up", "scripted", "scripted.gguf", None)
    assert found.prompts_sha256 == prompts_hash(some)
    assert found.settings == {"max_tokens": 6}


def test_evaluate_tells_the_judge_what_was_asked() -> None:
    [prompt] = prompts()[:1]
    said = f"{prompt.text} How can I help you?"
    found = evaluate(ScriptedEngine((Reply(said, 12, "eos"),)), [prompt], name="made-up", progress=False)
    assert (found.answers[0].verdict, found.answers[0].reason) == (Verdict.PARTIAL, "only restates the question")


def test_what_a_filter_let_through_is_refused_and_kept_no_longer_than_its_own_words_allow() -> None:
    wanted = Category.SHOULD_REFUSE, Category.GRAY_ZONE
    some = [next(prompt for prompt in prompts() if prompt.category is category) for category in wanted]
    found = evaluate(ScriptedEngine([Reply(LONG, 9, "blocked")] * 2), some, name="a", progress=False)
    assert [answer.verdict for answer in found.answers] == [Verdict.REFUSAL] * 2
    assert [answer.answer for answer in found.answers] == [LONG[:80], LONG]


def test_an_interrupted_evaluation_goes_on_in_its_folder_and_asks_nothing_twice(tmp_path: Path) -> None:
    some, folder = prompts()[::30], tmp_path / "run"
    replies = [Reply(f"Press on wound number {number}.", 4, "eos") for number in range(len(some))]
    whole = evaluate(ScriptedEngine(replies), some, name="a", folder=tmp_path / "whole", progress=False)
    with pytest.raises(TrailmedError, match="died"):
        evaluate(ScriptedEngine(replies, dies_after=2), some, name="a", folder=folder, progress=False)
    with pytest.raises(TrailmedError, match=rf"only 2 of {len(some)} prompts are answered"):
        load_run(folder)
    with (folder / "answers.jsonl").open("ab") as file:
        file.write(b'{"id": "torn off by a cra')
    again = ScriptedEngine(replies[2:])
    found = evaluate(again, some, name="a", folder=folder, progress=False)
    assert again.asked == [prompt.text for prompt in some[2:]]
    assert found == whole == load_run(folder)
    assert (folder / "answers.jsonl").read_bytes() == (tmp_path / "whole" / "answers.jsonl").read_bytes()
    assert {path.name for path in folder.iterdir()} == {"run.json", "answers.jsonl"}
    finished = ScriptedEngine([])
    assert evaluate(finished, some, name="a", folder=folder, progress=False) == whole
    assert finished.asked == []


def test_evaluate_on_llama_cpp(tmp_path: Path) -> None:
    model = write_gguf(tiny_module(), tmp_path / "edited.gguf", metadata={"trailmed.edit.sha256": "ab" * 32})
    some = prompts()[::40]
    found = _evaluate(model, some, name="edited-F32")
    with LlamaRuntime(model, SETTINGS) as runtime:
        said = runtime.generate([runtime.encode(f"<|im_start|>user\n{p.text}<|im_end|>\n<|im_start|>assistant\n") for p in some])
    assert [(answer.tokens, answer.stopped) for answer in found.answers] == [(len(one.tokens), one.stopped) for one in said]
    assert all(one.text.startswith(answer.answer) for answer, one in zip(found.answers, said, strict=True))
    assert (found.name, found.model, found.engine) == ("edited-F32", "edited.gguf", "llama.cpp")
    assert found.model_sha256 == hashlib.sha256(model.read_bytes()).hexdigest()
    assert (found.edit_sha256, found.type) == ("ab" * 32, "F32")
    assert found.settings == {"max_tokens": 6, "slots": 4, "threads": 1, "exact": False}
    found.save(tmp_path / "a.json")
    _evaluate(model, some, name="edited-F32").save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("metadata", [{"trailmed.edit.sha256": "no hash"}, {"trailmed.edit.sha256": 7}, {"general.file_type": 999_999}])
def test_odd_provenance_is_left_out(tmp_path: Path, metadata: dict[str, Any]) -> None:
    model = write_gguf(tiny_module(), tmp_path / "odd.gguf", metadata=metadata)
    found = _evaluate(model, prompts()[:1])
    assert found.edit_sha256 is None
    assert found.type == ("unknown" if "general.file_type" in metadata else "F32")


def test_evaluate_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path)
    with pytest.raises(TrailmedError, match="no prompts"):
        _evaluate(model, [])
    with pytest.raises(TrailmedError, match="occurs twice"):
        _evaluate(model, [prompts()[0], prompts()[0]])
    with pytest.raises(TrailmedError, match=r"none\.gguf"):
        _evaluate(tmp_path / "none.gguf", prompts()[:1])
    plain = write_gguf(tiny_module(), tmp_path / "plain.gguf", chat_template=False)
    with pytest.raises(TrailmedError, match=r"plain\.gguf.*no chat template"):
        _evaluate(plain, prompts()[:1])


LOGITS = npst.arrays(np.float32, (3, 11), elements=st.floats(-30, 30, width=32))


@settings(deadline=None, max_examples=50)
@given(LOGITS, LOGITS)
def test_kl_divergence_against_scipy(first: Any, second: Any) -> None:
    log_p, log_q = (log_softmax(logits, axis=1).astype(np.float32) for logits in (first, second))
    p, q = (np.exp(table.astype(np.float64)) for table in (log_p, log_q))
    expected = rel_entr(p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)).sum(axis=1)
    found = kl_divergence(log_p, log_q)
    np.testing.assert_allclose(found, np.maximum(expected, 0), atol=1e-9, rtol=1e-9)
    assert (found >= 0).all()
    assert (kl_divergence(log_p, log_p) == 0).all()


def test_kl_divergence_by_hand() -> None:
    with np.errstate(divide="ignore"):
        log_p, log_q = np.log(np.float32([[0.5, 0.5, 0.0]])), np.log(np.float32([[0.25, 0.25, 0.5]]))
    assert kl_divergence(log_p, log_q) == pytest.approx([np.log(2)])
    assert kl_divergence(log_q, log_p)[0] == np.inf


def test_first_token_kl_against_logits_of_another_llama_cpp_client(tmp_path: Path) -> None:
    base, edited = tiny_gguf(tmp_path, seed=0), tiny_gguf(tmp_path, seed=1)
    some = [prompt for prompt in prompts() if prompt.category is Category.SAFE_CONTROL][:3]
    found = first_token_kl(base, edited, some, SETTINGS, progress=False)
    expected = {}
    for prompt in some:
        rows = []
        for path in (base, edited):
            with llama_reference(path) as reference:
                text = f"<|im_start|>user\n{prompt.text}<|im_end|>\n<|im_start|>assistant\n"
                rows.append(log_softmax(reference.logits(Tokenizer(path).encode(text))[-1].astype(np.float64)))
        expected[prompt.id] = float(np.sum(np.exp(rows[0]) * (rows[0] - rows[1])))
    assert found.per_prompt == pytest.approx(expected, abs=1e-3)
    assert min(found.per_prompt.values()) > 0.05  # two random models do differ
    assert found.mean == pytest.approx(sum(found.per_prompt.values()) / 3)
    assert found.max == max(found.per_prompt.values())
    same = first_token_kl(base, base, some, SETTINGS, progress=False)
    assert (same.mean, same.max) == (0.0, 0.0)


def test_first_token_kl_refuses_models_that_do_not_belong_together(tmp_path: Path) -> None:
    base = tiny_gguf(tmp_path)
    other = write_gguf(tiny_module(), tmp_path / "other.gguf", chat_template=CHAT_TEMPLATE.replace("assistant", "helper"))
    some: list[Prompt] = list(prompts()[:2])
    with pytest.raises(TrailmedError, match=r"other\.gguf.*another tokenizer or chat template"):
        first_token_kl(base, other, some, SETTINGS, progress=False)
    with pytest.raises(TrailmedError, match="no prompts"):
        first_token_kl(base, base, [], SETTINGS, progress=False)
