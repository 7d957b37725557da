"""The endpoint engine against a real llama-cpp-python server, and against a scripted one that misbehaves."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socketserver
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from endpoint_servers import OK_HEAD, LlamaServer, Scripted, completion, drip, endless, free_port, http, models, said, stall
from hypothesis import given
from hypothesis import strategies as st
from refusing_model import refusing_gguf, write_prompts
from small_models import tiny_gguf

from trailmed.device import chat_completions, endpoint_engine
from trailmed.device.chat_completions import Failure, json_of, model_names_of, rejection, reply_of
from trailmed.device.endpoint_engine import EndpointEngine, EndpointSettings
from trailmed.device.engine import OnReply, Reply
from trailmed.device.llama_engine import LlamaEngine
from trailmed.device.llama_runtime import DecodeSettings
from trailmed.errors import TrailmedError
from trailmed.eval.benchmark import evaluate
from trailmed.eval.prompts import load_prompts
from trailmed.eval.run_folder import load_run

QUESTIONS = (
    "How can I stop the bleeding?", "The boat lies", "What should I do if I am lost in the forest at night?", "Sure", "A long answer",
    "I am sorry, but", "open the window, then leave the room and call for help", "Stay", "keep warm", "Press on the wound with",
)
NEUTRAL = {"repeat_penalty": 1.0, "repetition_penalty": 1.0}


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRAILMED_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_engine, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(chat_completions, "_SHORTEST_RETRY_AFTER_S", 0.01)


def answers(engine: Any, questions: Sequence[str]) -> list[Reply]:
    found: dict[int, Reply] = {}
    engine.answer(questions, lambda index, reply: found.update({index: reply}))
    return [found[index] for index in range(len(questions))]


# --- a real server ---


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "refusing": refusing_gguf(folder / "refusing.gguf"),
        # its own output matrix: with the embedding tied to it a random model only repeats its last token
        "random": tiny_gguf(folder, "qwen2", seed=1, tie_word_embeddings=False),
    }


@pytest.fixture(scope="module")
def llama_server(ggufs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    server = LlamaServer(tmp_path_factory.mktemp("server"), ggufs)
    yield server
    server.kill()


def exact(path: Path, questions: Sequence[str], max_tokens: int) -> list[Reply]:
    with LlamaEngine(path, DecodeSettings(max_tokens=max_tokens, threads=1, exact=True)) as engine:
        return answers(engine, questions)


def test_a_real_server_answers_as_llama_cpp_does_here(llama_server: LlamaServer, ggufs: dict[str, Path], tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl")
    questions = [prompt.text for prompt in load_prompts(tmp_path / "prompts.jsonl")][::8]
    expected = exact(ggufs["refusing"], questions, 12)
    with EndpointEngine(llama_server.url, "refusing", EndpointSettings(max_tokens=12)) as engine:
        found = answers(engine, questions)
    assert engine._neutral  # this server knows one of the fields
    assert len({reply.text for reply in expected}) >= 4
    assert found == expected
    cut_off = exact(ggufs["refusing"], questions, 3)
    with EndpointEngine(llama_server.url, "refusing", EndpointSettings(max_tokens=3)) as engine:
        assert answers(engine, questions) == cut_off
    assert {reply.stopped for reply in (*found, *cut_off)} == {"eos", "length"}


def test_a_real_server_is_asked_for_no_penalties(
    llama_server: LlamaServer, ggufs: dict[str, Path], monkeypatch: pytest.MonkeyPatch,
) -> None:
    def agreeing() -> int:
        with EndpointEngine(llama_server.url, "random", EndpointSettings(max_tokens=24)) as engine:
            found = answers(engine, QUESTIONS)
        # that server drops half characters, of which a random model makes many, and then gives a few tokens more instead
        return sum(one.text.startswith(other.text.replace("\ufffd", "")) for one, other in zip(found, expected, strict=True))

    expected = exact(ggufs["random"], QUESTIONS, 24)
    assert agreeing() == len(QUESTIONS)
    monkeypatch.setattr(endpoint_engine, "_NO_PENALTIES", {})  # its own default is a repeat penalty of 1.1
    assert agreeing() < len(QUESTIONS) / 2


def test_a_real_server_s_models_and_complaints(llama_server: LlamaServer) -> None:
    with pytest.raises(TrailmedError, match=r"serves 2 models \(refusing, random\); name the one to ask"):
        EndpointEngine(llama_server.url, None)
    with EndpointEngine(llama_server.url, "random") as engine, pytest.raises(TrailmedError, match=r"HTTP 400 \(.* maximum context length"):
        answers(engine, ["far too long " * 400])


@pytest.mark.usefixtures("_impatient")
def test_a_server_that_dies_mid_run_and_comes_back(ggufs: dict[str, Path], tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl")
    prompts = load_prompts(tmp_path / "prompts.jsonl")[::3]
    folder = tmp_path / "run"
    settings = EndpointSettings(max_tokens=12, concurrency=2, retries=1)
    server = LlamaServer(tmp_path, {"/models/refusing.gguf": ggufs["refusing"]})

    def engine(dies_after: int | None = None) -> Watched:
        return Watched(f"{server.url}/v1/", settings, lambda answered: server.kill() if answered == dies_after else None)

    try:
        with engine(dies_after=3) as dying, pytest.raises(TrailmedError, match="the same command goes on there") as caught:
            evaluate(dying, prompts, name="a", folder=folder, progress=False)
        kept = (folder / "answers.jsonl").read_text().count("\n")
        assert 3 <= kept < len(prompts)
        assert str(caught.value).startswith(f"{server.url}/v1: ")
        assert f" of {len(prompts)}; {kept} of them were answered; " in str(caught.value)
        with pytest.raises(TrailmedError, match=f"{server.url}/v1: cannot be reached .* in 2 tries when asked for its models"):
            engine()
        server.start()
        with engine() as again:
            found = evaluate(again, prompts, name="a", folder=folder, progress=False)
        assert len(again.asked) == len(prompts) - kept
    finally:
        server.kill()
    assert found == load_run(folder)
    assert (found.engine, found.model, found.model_sha256, found.type) == ("endpoint", "refusing.gguf", None, "unknown")
    assert found.settings == {"max_tokens": 12}
    assert [reply.answer for reply in found.answers] == [reply.text for reply in exact(ggufs["refusing"], [p.text for p in prompts], 12)]


class Watched(EndpointEngine):
    """Notes what it is asked, and tells how many answers have been passed on."""

    def __init__(self, url: str, settings: EndpointSettings, passed_on: Callable[[int], None]) -> None:
        super().__init__(url, None, settings)
        self.asked: list[str] = []
        self.passed_on = passed_on

    def answer(self, questions: Sequence[str], on_reply: OnReply) -> None:
        self.asked += questions
        answered = itertools.count(1)

        def watched(index: int, reply: Reply) -> None:
            on_reply(index, reply)
            self.passed_on(next(answered))

        super().answer(questions, watched)


# --- a scripted server ---


@pytest.fixture
def serve() -> Iterator[Callable[..., Scripted]]:
    servers: list[Scripted] = []

    def start(*script: bytes | Callable[[Scripted], Iterator[bytes]]) -> Scripted:
        servers.append(Scripted(script))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def ask(server: Scripted, questions: Sequence[str] = ("How?",), key: str | None = None, **changes: Any) -> list[Reply]:
    values = {"retries": 1, "timeout_s": 5.0, "concurrency": 1} | changes
    with EndpointEngine(server.url, "m", EndpointSettings(**values), api_key=key) as engine:
        return answers(engine, questions)


def complaint(caught: pytest.ExceptionInfo[TrailmedError]) -> str:
    """The message, after checking that it is one short printable line."""
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 600
    return message


def test_what_is_sent(serve: Callable[..., Scripted]) -> None:
    server = serve(said())
    assert ask(server, ["How, Jürgen? 水"], key="secret-key-1", max_tokens=7) == [Reply("Press on the wound.", 5, "eos")]
    (line, headers, body), = server.requests
    assert line == "POST /v1/chat/completions"
    assert headers["authorization"] == "Bearer secret-key-1"
    assert headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "identity"
    assert json.loads(body) == {
        "model": "m", "messages": [{"role": "user", "content": "How, Jürgen? 水"}], "temperature": 0, "max_tokens": 7, "stream": False,
        **NEUTRAL,
    }


@pytest.mark.parametrize(("answer", "expected"), [
    (said("No.", "length", {"completion_tokens": 2, "prompt_tokens": 9}), Reply("No.", 2, "length")),
    (said(" \n"), Reply(" \n", 5, "eos")),
    (said("", "tool_calls"), Reply("", 5, "eos")),
    (said("So far", "content_filter"), Reply("So far", 5, "blocked")),
    (said(None, "content_filter"), Reply("", 5, "blocked")),
    (said(None, "content_filter: SAFETY"), Reply("", 5, "blocked")),
    (said(None, refusal="I can't assist with that."), Reply("I can't assist with that.", 5, "eos")),
    (said("Here.", refusal=None, reasoning_content="Let me think"), Reply("Here.", 5, "eos")),
    (said(None, "length", reasoning_content="Let me think"), Reply("", 5, "length")),
    (said("x", usage={}), Reply("x", 0, "eos")),
    (said("x", usage=[]), Reply("x", 0, "eos")),
    (said("x", usage={"completion_tokens": -1}), Reply("x", 0, "eos")),
    (said("x", usage={"completion_tokens": True}), Reply("x", 0, "eos")),
    (said("x", usage={"completion_tokens": 1e30}), Reply("x", 0, "eos")),
    (http(200, {"choices": [{"finish_reason": "stop", "message": {}}]}), Reply("", 0, "eos")),
    (said().replace(b"content-length", b"x-length"), Reply("Press on the wound.", 5, "eos")),
    # Azure's filter refuses the question itself
    (http(400, {"error": {"message": "It was filtered", "code": "content_filter"}}), Reply("It was filtered", 0, "blocked")),
])
def test_replies(answer: bytes, expected: Reply, serve: Callable[..., Scripted]) -> None:
    server = serve(answer)
    assert ask(server) == [expected]
    assert len(server.requests) == 1


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("first", [
    http(500, {"error": {"message": "out of memory"}}), http(503, b"", retry_after="0"), http(429, {}, retry_after="nonsense"),
    http(408, b"\xff"), http(409, []), http(502, b"<html>Bad gateway"), b"", b"HTTP/1.1 200 So\r\ncontent-le", said()[:-5], stall,
    drip(b"HTTP/1.1 200 So\r\n", b"x: y\r\n"),
], ids=range(11))
def test_what_may_pass_is_asked_again(first: Any, serve: Callable[..., Scripted]) -> None:
    server = serve(first, said())
    assert ask(server, timeout_s=1.0) == [Reply("Press on the wound.", 5, "eos")]
    assert len(server.requests) == 2
    assert server.asked[0] == server.asked[1]


def test_retry_after_is_obeyed(serve: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(http(429, {}, retry_after="0.5"), said())
    monkeypatch.setattr(endpoint_engine, "_FIRST_WAIT_S", 0.0)
    start = time.monotonic()
    ask(server)
    assert time.monotonic() - start >= 0.5


@pytest.mark.parametrize(("value", "least", "most"), [
    ("7", 7, 7), ("1e9", 60, 60), ("-3", 0.1, 0.1), ("inf", 60, 60), ("Fri, 31 Dec 2100 23:59:59 GMT", 60, 60),
    ("Fri, 31 Dec 1999 23:59:59 GMT", 0.1, 0.1), (time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3000)), 60, 60),
])
def test_retry_after_has_bounds(value: str, least: float, most: float) -> None:
    wait = rejection(429, {"retry-after": value}, b"").retry_after
    assert wait is not None
    assert least <= wait <= most


@pytest.mark.parametrize("value", ["", "soon", "nan", "Fri, 99 Foo 99999999999999999999 99:99:99 GMT", "0x10", ",", "-- -- --"])
def test_a_senseless_retry_after_is_none(value: str) -> None:
    assert rejection(429, {"retry-after": value}, b"").retry_after is None


HUGE = "x" * 200_000


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(("answer", "tries", "expected"), [
    (http(401, {"error": {"message": "Incorrect key"}}), 1, r"answered HTTP 401 \(Incorrect key\) .*; set TRAILMED_API_KEY"),
    (http(403, {"detail": "Not yours"}), 1, r"HTTP 403 \(Not yours\)"),
    (http(404, {"error": "model 'm' not found"}), 1, r"HTTP 404 \(model 'm' not found\).*check the address, the model's name"),
    (http(404, b"<!doctype html><html>nothing"), 1, r"HTTP 404 at question 1 of 1; 0 of them"),
    # 400 and 422 are asked again without the fields that not everybody knows
    (http(400, {"object": "error", "message": "too\nlong\x1b[2J" + "x" * 60_000}), 2, r"HTTP 400 \(too long \[2Jxx"),
    (http(422, {"detail": [{"loc": ["body"], "msg": "bad"}]}), 2, r'HTTP 422 \(\[\{"loc": \["body"\], "msg": "bad"\}\]\)'),
    (http(418, b"\xff\xfe\x00"), 1, "HTTP 418"),
    (http(307, b"", location="http://127.0.0.1:1/elsewhere"), 1, r"HTTP 307 \(to http://127.0.0.1:1/elsewhere\).*the address it leads to"),
    (http(301, b"", location="http://[:::/\x01\xff"), 1, r"HTTP 301 \(to http://"),
    (http(304, b""), 1, "HTTP 304"),
    (http(500, {"error": {"message": "boom"}}), 2, r"HTTP 500 \(boom\) in 2 tries .*; look into the server's log, and the same command"),
    (http(429, {"error": {"message": "slow down"}}), 2, r"HTTP 429 \(slow down\) in 2 tries .*; wait a while"),
    (http(200, b""), 1, "did not answer in JSON"),
    (http(200, b"<html>Welcome to nginx"), 1, "did not answer in JSON.*OpenAI-compatible"),
    (http(200, b"\x00\xff\xfe" * 1000), 1, "did not answer in JSON"),
    (http(200, b'{"choices": NaN}'), 1, "did not answer in JSON"),
    (http(200, b"[" * 500_000), 1, "did not answer in JSON"),
    (http(200, b'{"choices": [{"message": {"content": "\\ud800"}, "finish_reason": "stop"}]}'), 1, "did not answer in JSON"),
    (http(200, b"9" * 5000), 1, "did not answer in JSON"),
    (http(200, []), 1, "in another form"),
    (http(200, None), 1, "in another form"),
    (http(200, {"error": {"message": "no such thing"}}), 1, r"in another form \(no such thing\)"),
    (http(200, {"choices": []}), 1, r"in another form \(choices: List should have at least 1"),
    (http(200, {"choices": [{"text": "x", "finish_reason": "stop"}]}), 1, r"choices.0.message"),
    (http(200, completion(content=["x"])), 1, r"choices.0.message.content: Input should be a valid string"),  # type: ignore[arg-type]
    (said("x", None), 1, r"choices.0.finish_reason"),
    (said("x", "er\x1bror" + HUGE), 1, r"ended an answer for an unknown reason \(er rorxxx"),
    (said("x" * (1 << 20)), 1, "sent more than 1 MiB for one answer"),
    (http(200, b"x", content_encoding="gzip"), 1, "compresses its answers unasked"),
    (endless(OK_HEAD + b"\r\n"), 1, "sent more than 1 MiB"),
    (endless(OK_HEAD + b"transfer-encoding: chunked\r\n\r\n40000000\r\n"), 1, "sent more than 1 MiB"),
    (endless(b"HTTP/1.1 404 So\r\n\r\n"), 1, "HTTP 404"),
    (endless(b"HTTP/1.1 200 So\r\nx: "), 2, "broke off"),
    (drip(OK_HEAD, b"x: y\r\n"), 2, r"gave no whole answer within 0.3 s in 2 tries .*; allow it more time"),
    (drip(OK_HEAD + b"\r\n", b" "), 2, "gave no whole answer within 0.3 s"),
    (drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), 2, "gave no whole answer within 0.3 s"),
    (stall, 2, "gave no whole answer within 0.3 s"),
    (b"", 2, "broke off .* in 2 tries"),
    (b"SSH-2.0-OpenSSH_9.9\r\n", 2, "broke off"),
    (OK_HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello", 2, "broke off"),
    (OK_HEAD + b"content-length: -1\r\n\r\nhello", 2, "broke off"),
    (OK_HEAD + b"content-length: 99\r\n\r\nhello", 2, "broke off"),
    (OK_HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", 2, "broke off"),
    (b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n" + b"x" * 99, 2, "broke off"),
], ids=itertools.count())
def test_hostile_and_refusing_servers_end_in_one_line(answer: Any, tries: int, expected: str, serve: Callable[..., Scripted]) -> None:
    server = serve(answer)
    start = time.monotonic()
    with pytest.raises(TrailmedError, match=expected) as caught:
        ask(server, timeout_s=0.3 if "0.3 s" in expected else 5.0)
    assert time.monotonic() - start < 4
    message = complaint(caught)
    assert message.startswith(f"{server.url}: ")
    assert message.endswith("and the same command goes on there")
    assert len(server.requests) == tries


@pytest.mark.usefixtures("_impatient")
def test_nobody_there() -> None:
    with EndpointEngine(f"http://127.0.0.1:{free_port()}", "m", EndpointSettings(retries=2)) as engine:
        with pytest.raises(TrailmedError, match=r"/v1: cannot be reached \(.*\) in 3 tries at question [12] of 2; 0 of them") as caught:
            answers(engine, ["a", "b"])
        complaint(caught)
        answers(engine, [])


@pytest.mark.usefixtures("_impatient")
def test_nobody_there_who_speaks_tls() -> None:
    class Plain(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"HTTP/1.1 400 You spoke TLS\r\n\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"https://127.0.0.1:{server.server_address[1]}"
        with pytest.raises(TrailmedError, match=rf"{url}/v1: cannot be reached \(.*SSL.*\) in 2 tries") as caught:
            answers(EndpointEngine(url, "m", EndpointSettings(retries=1)), ["q"])
        complaint(caught)
        server.shutdown()


@pytest.mark.usefixtures("_impatient")
def test_what_was_answered_before_it_broke_was_passed_on(serve: Callable[..., Scripted]) -> None:
    server = serve(said("one"), said("two"), http(500, b""))
    found: list[tuple[int, str]] = []
    engine = EndpointEngine(server.url, "m", EndpointSettings(concurrency=1, retries=1))
    with pytest.raises(TrailmedError, match="HTTP 500 in 2 tries at question 3 of 4; 2 of them were answered"):
        engine.answer(["a", "b", "c", "d"], lambda index, reply: found.append((index, reply.text)))
    assert found == [(0, "one"), (1, "two")]


def test_a_service_that_knows_no_other_fields_is_asked_without(serve: Callable[..., Scripted]) -> None:
    server = serve(http(400, {"error": {"message": "Unrecognized request argument supplied: repeat_penalty"}}), said())
    assert len(ask(server, ["a", "b"])) == 2
    assert [NEUTRAL.items() <= body.items() for body in server.asked] == [True, False, False]
    assert all(not NEUTRAL.keys() & body.keys() for body in server.asked[1:])


def test_as_many_are_in_flight_as_were_allowed(serve: Callable[..., Scripted]) -> None:
    together = threading.Barrier(3)

    def when_three_wait(_: Scripted) -> Iterator[bytes]:
        together.wait(10)
        yield said()

    server = serve(when_three_wait)
    threads = set()
    with EndpointEngine(server.url, "m", EndpointSettings(concurrency=3, retries=0)) as engine:
        indices: list[int] = []
        engine.answer(["q"] * 9, lambda index, _: (indices.append(index), threads.add(threading.get_ident())))
    assert sorted(indices) == list(range(9))
    assert threads == {threading.get_ident()}
    assert together.n_waiting == 0


def test_no_more_are_in_flight_than_were_allowed(serve: Callable[..., Scripted]) -> None:
    most, now, lock = 0, 0, threading.Lock()

    def counted(server: Scripted) -> Iterator[bytes]:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        server.over.wait(0.03)
        with lock:
            now -= 1
        yield said()

    ask(serve(counted), ["q"] * 8, concurrency=2)
    assert most == 2


def test_replies_come_as_they_finish_and_a_slow_reader_costs_no_time(serve: Callable[..., Scripted]) -> None:
    def slow(server: Scripted) -> Iterator[bytes]:
        server.over.wait(0.2)
        yield said("slow")

    order: list[str] = []
    with EndpointEngine(serve(slow, said("quick")).url, "m", EndpointSettings(concurrency=2, timeout_s=1.0, retries=0)) as engine:
        engine.answer(["a", "b"], lambda _, reply: (order.append(reply.text), time.sleep(1.1)))
    assert order == ["quick", "slow"]


def test_ctrl_c_ends_it_at_once(serve: Callable[..., Scripted]) -> None:
    server = serve(stall)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(server, ["a", "b", "c"], concurrency=2, timeout_s=60.0)
    timer.join()
    assert time.monotonic() - start < 2
    assert len(server.requests) == 2


def test_an_error_of_the_reader_ends_it_at_once(serve: Callable[..., Scripted]) -> None:
    def full(*_: object) -> None:
        raise TrailmedError("the disk is full")

    engine = EndpointEngine(serve(said(), stall).url, "m", EndpointSettings(concurrency=2))
    start = time.monotonic()
    with pytest.raises(TrailmedError, match="disk is full"):
        engine.answer(["a", "b", "c"], full)
    assert time.monotonic() - start < 2


def test_it_answers_inside_a_running_event_loop(serve: Callable[..., Scripted]) -> None:
    server = serve(said())

    async def notebook() -> list[Reply]:
        return ask(server)

    assert len(asyncio.run(notebook())) == 1


# --- models, addresses, keys, settings ---


@pytest.mark.parametrize(("name", "shown"), [
    ("/home/me/models/phone-Q8_0.gguf", "phone-Q8_0.gguf"), ("C:\\models\\a.gguf", "a.gguf"), ("Qwen/Qwen2.5-7B-Instruct",) * 2, ("m",) * 2,
    ("models/a.gguf", "a.gguf"), ("/", "/"), ("a\x1b[2J\nb", "a [2J b"), ("x" * 500, "x" * 200),
])
def test_the_only_model_is_taken(name: str, shown: str, serve: Callable[..., Scripted]) -> None:
    server = serve(models(name), said())
    with EndpointEngine(server.url, None, EndpointSettings(max_tokens=9)) as engine:
        identity = engine.identity
        answers(engine, ["q"])
    assert [line for line, _, _ in server.requests] == ["GET /v1/models", "POST /v1/chat/completions"]
    assert json.loads(server.requests[1][2])["model"] == name
    assert (identity.engine, identity.model, identity.type, identity.settings) == ("endpoint", shown, "unknown", {"max_tokens": 9})
    assert identity.sha256 is identity.edit_sha256 is None


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(("answer", "expected"), [
    (models("b", "a\x1b"), r"serves 2 models \(b, a\); name the one to ask"),
    (models(), r"serves 0 models \(none\)"),
    (models(" "), r"serves 1 models \(none\)"),
    (models(*map(str, range(5000))), r"serves 5000 models \(0, 1, .*\); name"),
    (models(7), r"in another form \(data.0.id: .*\) when asked for its models; .*, or name the model"),
    (http(404, {"detail": "Not Found"}), r"HTTP 404 \(Not Found\) when asked for its models"),
    (http(200, b"<html>"), "did not answer in JSON"),
    (http(503, b"loading"), r"HTTP 503 \(loading\) in 2 tries"),
    (http(200, b" " * (1 << 21)), "more than 1 MiB"),
    (stall, "gave no whole answer within 0.3 s in 2 tries"),
])
def test_servers_without_an_only_model(answer: Any, expected: str, serve: Callable[..., Scripted]) -> None:
    server = serve(answer)
    with pytest.raises(TrailmedError, match=expected) as caught:
        EndpointEngine(server.url, None, EndpointSettings(retries=1, timeout_s=0.3 if "0.3 s" in expected else 5.0))
    assert complaint(caught).startswith(f"{server.url}: ")


@pytest.mark.parametrize(("given", "expected"), [
    ("http://h:8080", "http://h:8080/v1"), ("http://h:8080/", "http://h:8080/v1"), ("http://h/v1", "http://h/v1"),
    (" http://h/v1/ ", "http://h/v1"), ("https://h:443/v1//", "https://h/v1"), ("https://h/api", "https://h/api/v1"),
    ("https://h/openai/v1", "https://h/openai/v1"), ("https://h/v1beta/openai/", "https://h/v1beta/openai"),
    ("http://[::1]:80/v1/chat/completions", "http://[::1]/v1"), ("HTTP://H/", "http://h/v1"),
])
def test_addresses(given: str, expected: str) -> None:
    assert EndpointEngine(given, "m").url == expected


@pytest.mark.parametrize("url", [
    "", "localhost:8080", "h", "ftp://h", "http://", "http:///v1", "http://h:x", "http://h:99999", "http://h\n/", "file:///etc/passwd",
    "http://h\udc80/", "http://[::1", "http://user:secret@h/v1", "http://h/v1?key=secret", "http://secret@h:x", "http://h/v1#secret",
    "http://" + "h" * 100_000,
])
def test_bad_addresses(url: str) -> None:
    with pytest.raises(TrailmedError, match=r"address|HOST:PORT") as caught:
        EndpointEngine(url, "m")
    assert "secret" not in complaint(caught)


def test_the_key_goes_into_the_header_and_nowhere_else(serve: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    key = "sk-0123456789abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-openai")
    monkeypatch.setenv("TRAILMED_API_KEY", f" {key} ")
    server = serve(
        said(f"You are {key}."), http(307, b"", location=f"/{key}"), http(401, {"error": {"message": f"Incorrect: {'x' * 185} {key}"}}),
    )
    with EndpointEngine(server.url, "m", EndpointSettings(retries=0)) as engine:
        assert answers(engine, ["q"])[0].text == "You are [key]."
        for _ in range(2):
            with pytest.raises(TrailmedError, match=r"\[key\]|x \[k|xxxx") as caught:
                answers(engine, ["q"])
            assert "sk-" not in str(caught.value)
    assert {headers["authorization"] for _, headers, _ in server.requests} == {f"Bearer {key}"}
    assert all(key.encode() not in body for _, _, body in server.requests)
    assert key not in repr(engine) + repr(engine.identity) + repr(engine.settings)
    monkeypatch.delenv("TRAILMED_API_KEY")
    ask(serve(said()))
    assert EndpointEngine("https://h", "m")._key == EndpointEngine("http://localhost", "m")._key == "sk-of-openai"
    assert EndpointEngine("http://h", "m")._key is None  # it was not meant for a stranger, and would travel in the clear
    monkeypatch.setenv("OPENAI_API_KEY", "")
    server = serve(said("none of it"))
    assert ask(server)[0].text == "none of it"
    assert "authorization" not in server.requests[0][1]
    assert ask(server, key="none")[0].text == "none of it"  # a placeholder, which hides nothing
    assert server.requests[1][1]["authorization"] == "Bearer none"


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "ключ", " "])
def test_keys_that_no_header_carries(key: str) -> None:
    with pytest.raises(TrailmedError, match="correct TRAILMED_API_KEY"):
        EndpointEngine("http://h", "m", api_key=key)


def test_proxies_are_for_other_machines(serve: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    server, proxy = serve(said()), serve(said("through the proxy"))
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert ask(server)[0].text == "Press on the wound."
    with EndpointEngine("http://nowhere.invalid", "m", EndpointSettings(retries=0)) as engine:
        assert answers(engine, ["q"])[0].text == "through the proxy"
        monkeypatch.setenv("HTTP_PROXY", "gopher://user:secret@h")
        with pytest.raises(TrailmedError, match="proxy of HTTP_PROXY") as caught:
            answers(engine, ["q"])
        assert "secret" not in complaint(caught)


@pytest.mark.parametrize(("name", "value"), [
    ("max_tokens", 0), ("concurrency", 0), ("retries", -1), ("timeout_s", 0.0), ("timeout_s", float("nan")), ("timeout_s", float("inf")),
])
def test_settings_that_make_no_sense(name: str, value: float) -> None:
    with pytest.raises(TrailmedError, match=f"endpoint setting {name} is {value}; it must be"):
        EndpointSettings(**{name: value})  # type: ignore[arg-type]


def test_questions_and_names_that_are_no_text() -> None:
    engine = EndpointEngine("http://h", "m")
    with pytest.raises(TrailmedError, match="question 2 of 2 holds half a character"):
        answers(engine, ["fine", "\ud83d"])
    for model in ("", " ", "\udc80"):
        with pytest.raises(TrailmedError, match="model's name is empty or not text"):
            EndpointEngine("http://h", model)


NAMES = st.sampled_from(["choices", "message", "content", "finish_reason", "usage", "error", "code", "data", "id", "detail"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
)


def failure_of(reading: Callable[[Any], object], value: object) -> str:
    try:
        reading(value)
    except Failure as failure:
        return failure.problem
    return ""


@given(answer=JSON)
def test_any_json_is_an_answer_or_a_failure(answer: object) -> None:
    assert failure_of(reply_of, answer).isprintable()
    assert failure_of(model_names_of, answer).isprintable()
    assert rejection(400, {}, json.dumps(answer).encode()).problem.isprintable()


@given(body=st.binary(max_size=200), header=st.text(max_size=40), status=st.integers(300, 599))
def test_any_bytes_are_an_answer_or_a_failure(body: bytes, header: str, status: int) -> None:
    assert failure_of(json_of, body).isprintable()
    failure = rejection(status, {"retry-after": header, "location": header}, body)
    assert failure.problem.isprintable()
    assert failure.retry_after is None or 0 < failure.retry_after <= 60
