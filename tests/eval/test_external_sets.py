"""Published sets of prompts: rows in their columns are read, all held out, from a file or over HTTP, and bad ones are named in one line.

Every row here was made up for these tests; none is from a published set. The server is on this machine.
"""

from __future__ import annotations

import csv
import io
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from trailmed.errors import TrailmedError
from trailmed.eval import external
from trailmed.eval.external import IMPORTERS, find_importer, import_prompts, load_any_prompts, read_set
from trailmed.eval.prompts import Category, Expected, Prompt, Split, load_prompts

HARM, SAFE = "made-up harmful request", "made-up safe request"


def _csv(columns: str, *rows: tuple[str, ...]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows([columns.split(","), *rows])
    return out.getvalue()


ONE_FILE = {
    "xstest": _csv(
        "id,prompt,type,label,focus,note", ("1", f"{SAFE} 1", "homonyms", "safe", "to frob", ""),
        ("2", f"{HARM} 1", "contrast_homonyms", "unsafe", "to frob", "n"), ("3", f"{SAFE} 2", "definitions", "safe", "", ""),
    ),
    "or-bench-80k": _csv("prompt,category", (f"{SAFE} 1", "deception")),
    "or-bench-hard-1k": _csv("prompt,category", (f"{SAFE} 1", "deception")),
    "or-bench-toxic": _csv("prompt,category", (f"{HARM} 1", "deception")),
    "oktest": _csv("id,prompt", ("1", f"{SAFE} 1")),
    "harmbench": _csv(
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID",
        (f"{HARM} 1", "standard", "illegal", "", "", "a"), (f"{HARM} 2", "copyright", "copyright", "", "", "b"),
        (f"{HARM} 3", "contextual", "misinformation_disinformation", "context", "Some made-up context.", "c"),
    ),
    "advbench": _csv("goal,target", (f"{HARM} 1", "Sure")),
    "strongreject": _csv("category,source,forbidden_prompt", ("Illegal goods and services", "custom", f"{HARM} 1")),
}
HARMFUL_FILE = _csv("Index,Goal,Target,Behavior,Category,Source", ("0", f"{HARM} 1", "Sure", "Frobbing", "Fraud/Deception", "Original"))
BENIGN_FILE = _csv("Index,Goal,Target,Behavior,Category,Source", ("0", f"{SAFE} 1", "Sure", "Frobbing", "Fraud/Deception", "Original"))


def _file(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _refused(call: Callable[[], Any], start: object, message: str) -> None:
    """`call` raises one line that begins with the file's name or address and says what is wrong."""
    with pytest.raises(TrailmedError, match=message) as caught:
        call()
    assert str(caught.value).startswith(str(start))
    assert "\n" not in str(caught.value)


# --- what the sets are


def test_every_set_says_what_it_is() -> None:
    assert set(IMPORTERS) == {*ONE_FILE, "jailbreakbench"}
    for name, importer in IMPORTERS.items():
        assert importer.name == name
        assert all((importer.what, importer.licence, importer.home.startswith("https://"), importer.files))
        assert re.search(r"arXiv:\d{4}\.\d{5}$", importer.citation)
        assert all(file.columns and file.name.endswith(".csv") for file in importer.files)
        assert all(file.url is None or (file.url.startswith("https://") and file.url.endswith("/" + file.name)) for file in importer.files)
    assert find_importer(" XSTest ") is IMPORTERS["xstest"]
    _refused(lambda: find_importer("xtest"), "'xtest'", r"did you mean xstest or oktest\?")
    _refused(lambda: find_importer("?"), "'?'", "choose from xstest, or-bench-80k, ")


@pytest.mark.parametrize("name", ONE_FILE)
def test_every_set_is_read_held_out_and_written_as_our_own(tmp_path: Path, name: str) -> None:
    source = _file(tmp_path / "downloaded.csv", ONE_FILE[name])
    out = tmp_path / "new" / "out.jsonl"
    prompts = import_prompts(name, source, out, progress=False)
    assert load_prompts(out) == load_any_prompts(out) == prompts
    assert {p.split for p in prompts} == {Split.HELD_OUT}
    for prompt in prompts:
        harmful = "harmful" in prompt.text
        assert prompt.category is (Category.SHOULD_REFUSE if harmful else Category.GRAY_ZONE)
        assert prompt.expected is (Expected.REFUSE if harmful else Expected.HELP)
        assert (prompt.kind is not None) == harmful
        assert prompt.id.startswith(f"{name}-")


def _read(tmp_path: Path, name: str, content: str) -> list[Prompt]:
    return list(read_set(name, _file(tmp_path / "set.csv", content), progress=False).prompts)


def test_the_sets_own_categories_become_kinds(tmp_path: Path) -> None:
    kinds = {name: [p.kind for p in _read(tmp_path, name, content)] for name, content in ONE_FILE.items()}
    assert kinds == {
        "xstest": [None, "contrast_homonyms", None], "or-bench-80k": [None], "or-bench-hard-1k": [None], "or-bench-toxic": ["deception"],
        "oktest": [None], "harmbench": ["illegal", "misinformation_disinformation"], "advbench": ["unspecified"],
        "strongreject": ["illegal-goods-and-services"],
    }


def test_xstest_contrasts_share_their_scenario_and_the_older_file_has_no_label(tmp_path: Path) -> None:
    safe, unsafe, alone = _read(tmp_path, "xstest", ONE_FILE["xstest"])
    assert (safe.scenario, unsafe.scenario, alone.scenario) == ("xstest-homonyms-to-frob", "xstest-homonyms-to-frob", "xstest-3")
    older = _csv("id,type,prompt,focus", ("v2-1", "homonyms", safe.text, "to frob"), ("v2-2", "contrast_homonyms", unsafe.text, "to frob"))
    assert _read(tmp_path, "xstest", older) == [safe, unsafe]
    bad = ONE_FILE["xstest"].replace(",safe,", ",perhaps,", 1)
    _refused(lambda: _read(tmp_path, "xstest", bad), tmp_path / "set.csv", "line 2: label is 'perhaps'")


def test_harmbench_puts_the_context_in_front_and_counts_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, with_context = _read(tmp_path, "harmbench", ONE_FILE["harmbench"])
    assert (plain.id, plain.text) == ("harmbench-1", f"{HARM} 1")
    assert (with_context.id, with_context.text) == ("harmbench-3", f"Some made-up context.\n\n---\n\n{HARM} 3")
    assert read_set("harmbench", tmp_path / "set.csv").skipped == {"about copyright": 1}
    import_prompts("harmbench", tmp_path / "set.csv", tmp_path / "out.jsonl")
    assert "harmbench: left out 1 row about copyright\n" in capsys.readouterr().err
    import_prompts("harmbench", tmp_path / "set.csv", tmp_path / "out.jsonl", progress=False)
    assert capsys.readouterr().err == ""


def test_jailbreakbench_is_two_files_whose_behaviours_pair_up(tmp_path: Path) -> None:
    harmful_file = _file(tmp_path / "harmful-behaviors.csv", HARMFUL_FILE)
    assert [p.id for p in read_set("jailbreakbench", tmp_path).prompts] == ["jailbreakbench-harmful-behaviors-1"]
    benign_file = _file(tmp_path / "benign-behaviors.csv", BENIGN_FILE)
    harmful, benign = read_set("jailbreakbench", tmp_path).prompts
    assert harmful.scenario == benign.scenario == "jailbreakbench-pair-0"
    assert (harmful.kind, benign.category) == ("fraud-deception", Category.GRAY_ZONE)
    assert read_set("jailbreakbench", harmful_file).prompts == (harmful,)
    assert read_set("jailbreakbench", benign_file).prompts == (benign,)
    other = harmful_file.rename(tmp_path / "mine.csv")
    _refused(lambda: read_set("jailbreakbench", other), other, "jailbreakbench is harmful-behaviors.csv and benign-behaviors.csv")
    _file(tmp_path / "harmful-behaviors.csv", HARMFUL_FILE.replace(HARM, SAFE))
    _refused(lambda: read_set("jailbreakbench", tmp_path), benign_file, "the same text stands in .*harmful-behaviors.csv, line 2 as should")


def test_rows_nobody_can_mend_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [(f"{SAFE} 1", "a"), (f" {SAFE}  1", "b"), ("x" * 4001, "a"), (f"{SAFE} 2", "a")]
    found = read_set("or-bench-80k", _file(tmp_path / "set.csv", _csv("prompt,category", *rows)))
    assert [p.id for p in found.prompts] == ["or-bench-80k-1", "or-bench-80k-4"]
    assert found.skipped == {"with the text of an earlier one": 1, "longer than a prompt may be": 1}


def test_bad_imports_are_named_and_leave_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    source = _file(tmp_path / "set.csv", ONE_FILE["advbench"])
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, given, to, start, message in (
        ("advbanch", source, out, "'advbanch'", "did you mean advbench"),
        ("xstest", source, out, source, r"no column 'prompt', so it is not xstest_prompts.csv of xstest \(https.*its columns are 'goal'"),
        ("advbench", tmp_path / "none.csv", out, tmp_path / "none.csv", "no such"),
        ("advbench", folder, out, folder, "a folder without harmful_behaviors.csv"),
        ("advbench", source, tmp_path / "out.csv", tmp_path / "out.csv", r"ends in \.jsonl"),
        ("advbench", source, folder, folder, "a folder"),
        ("advbench", _file(tmp_path / "a.csv", "goal\n\n"), out, tmp_path / "a.csv", "holds no rows"),
        ("advbench", _file(tmp_path / "b.csv", "goal,target\n,x\n"), out, tmp_path / "b.csv", "line 2: text: .*at least 3"),
        ("advbench", _file(tmp_path / "c.csv", "goal\n" + "x" * 5000), out, tmp_path / "c.csv", "holds no prompts of advbench"),
        ("oktest", None, out, "oktest", "cannot be fetched by its name; get OKTest.csv from https"),
    ):
        _refused(lambda name=name, given=given, to=to: import_prompts(name, given, to, progress=False), start, message)
    ours = _file(tmp_path / "in.jsonl", '{"goal": "some made-up harmful request"}')
    _refused(lambda: import_prompts("advbench", ours, tmp_path / "folder" / ".." / "in.jsonl"), tmp_path, "is the source itself")
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


# --- fetching


class _Handler(BaseHTTPRequestHandler):
    """Answers by path; `received` are the request headers."""

    protocol_version = "HTTP/1.1"
    received: dict[str, str]

    def log_message(self, *_: object) -> None:
        pass

    def _head(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def do_GET(self) -> None:
        type(self).received = dict(self.headers)
        self.close_connection = True
        body = HARMFUL_FILE.encode() if "harmful" in self.path else BENIGN_FILE.encode()
        with suppress(OSError):
            match self.path.strip("/").split("/")[0]:
                case "good":
                    self._head(200, Content_Length=str(len(body)))
                    self.wfile.write(body)
                case "chunked":
                    self._head(200, Transfer_Encoding="chunked")
                    self.wfile.write(b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:9], body[9:])) + b"0\r\n\r\n")
                case "plain":  # neither a length nor chunks: the body ends with the connection
                    self._head(200)
                    self.wfile.write(body)
                case "moved":
                    self._head(302, Location=self.path.replace("moved", "good"), Content_Length="0")
                case "loop":
                    self._head(302, Location=self.path, Content_Length="0")
                case "elsewhere":
                    self._head(302, Location="file:///etc/passwd", Content_Length="0")
                case "ftp":
                    self._head(302, Location="ftp://127.0.0.1/x", Content_Length="0")
                case "nonsense":
                    self._head(302, Location="http://[", Content_Length="0")
                case "truncated":
                    self._head(200, Content_Length=str(len(body) + 10))
                    self.wfile.write(body)
                case "truncated-chunk":
                    self._head(200, Transfer_Encoding="chunked")
                    self.wfile.write(b"ffff\r\n" + body)
                case "announced":
                    self._head(200, Content_Length=str(1 << 40))
                case "endless":
                    self._head(200)
                    while True:
                        self.wfile.write(b"x" * 65536)
                case "drip":
                    self._head(200)
                    while not self.server.stopping.wait(0.02):
                        self.wfile.write(b"x")
                case "silent":
                    self.server.stopping.wait(20)
                case "garbage":
                    self.wfile.write(b"no HTTP at all\r\n\r\n")
                case "page":
                    self._head(200)
                    self.wfile.write(b"<html>\nPlease log in to the network\n</html>\n")
                case _:
                    self._head(404, Content_Length="0")


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        self.stopping = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server on this machine; yields its address, reached without any proxy of the environment."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.stopping.set()
    server.shutdown()
    server.server_close()
    thread.join()


def _move_set(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """JailbreakBench, but from `address`."""
    importer = IMPORTERS["jailbreakbench"]
    moved = replace(importer, files=tuple(replace(file, url=f"{address}/{file.name}") for file in importer.files))
    monkeypatch.setattr(external, "IMPORTERS", {"jailbreakbench": moved})


@pytest.mark.parametrize("way", ["good", "chunked", "plain", "moved"])
def test_a_set_is_fetched_when_no_file_is_given(tmp_path: Path, site: str, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    _move_set(monkeypatch, f"{site}/{way}")
    prompts = import_prompts("jailbreakbench", None, tmp_path / "out.jsonl")
    assert [p.text for p in prompts] == [f"{HARM} 1", f"{SAFE} 1"]
    assert load_prompts(tmp_path / "out.jsonl") == prompts
    assert _Handler.received["User-Agent"].startswith("trailmed/")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(("way", "message"), [
    ("missing", "the server answers 404 .*download it by hand"),
    ("loop", "the server answers 302 "),
    ("elsewhere", "the server answers 302 .*file:"),
    ("ftp", "cannot be fetched .*unknown url type: ftp"),
    ("nonsense", "cannot be fetched "),
    ("truncated", r"broke off after \d+ of \d+ bytes"),
    ("truncated-chunk", "cannot be fetched .*IncompleteRead"),
    ("announced", "sends more than 64 MiB"),
    ("endless", "sends more than 0 MiB"),
    ("drip", "takes longer than 0 s"),
    ("silent", "cannot be fetched .*timed out"),
    ("garbage", "cannot be fetched .*no HTTP at all"),
    ("page", "has no column 'Index', so it is not harmful-behaviors.csv"),
])
def test_what_a_server_can_do_to_us(tmp_path: Path, site: str, monkeypatch: pytest.MonkeyPatch, way: str, message: str) -> None:
    if way == "endless":
        monkeypatch.setattr(external, "MAX_PROMPT_FILE_BYTES", 1 << 19)
    if way == "drip":
        monkeypatch.setattr(external, "_LONGEST_FETCH_SECONDS", 0.2)
    if way == "silent":
        monkeypatch.setattr(external, "_TIMEOUT_SECONDS", 0.2)
    _move_set(monkeypatch, f"{site}/{way}")
    out = _file(tmp_path / "out.jsonl", "what was here before")
    _refused(lambda: import_prompts("jailbreakbench", None, out, progress=False), f"{site}/{way}/harmful-behaviors.csv", message)
    assert out.read_text() == "what was here before"
    assert list(tmp_path.iterdir()) == [out]


def test_without_a_network_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for address in (f"http://127.0.0.1:{port}", "http://no-such-host.invalid"):
        _move_set(monkeypatch, address)
        _refused(lambda: import_prompts("jailbreakbench", None, tmp_path / "out.jsonl", progress=False), address, "connect to the network")
