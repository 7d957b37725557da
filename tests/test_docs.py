"""The documentation against the program: examples parse, cheap ones run, links lead somewhere, every command and option is described."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from trailmed.cli import app
from trailmed.eval.external import IMPORTERS
from trailmed.eval.prompts import parse_categories
from trailmed.export.ggml_quantize import file_type_of
from trailmed.models.catalogue import CATALOGUE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(```+)([^\n`]*)\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]\n]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
CLI: Any = typer.main.get_command(app)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def examples(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Each `$ …` line of the console blocks, continuation lines joined, with the output lines shown under it."""
    for _, language, body in FENCE.findall(page.read_text("utf-8")):
        if language.strip() != "console":
            continue
        shown: list[tuple[str, list[str]]] = []
        for line in body.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                shown.append((line[2:], []))
            elif shown and line.strip():
                shown[-1][1].append(line.strip())
        yield from shown


def trailmed_calls(command: str) -> Iterator[list[str]]:
    """The arguments of every call of trailmed in a shell line (pipes, `&&`, `;`, redirections and leading variables understood)."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    call: list[str] | None = None
    starts, skip = True, False
    for word in lexer:
        if set(word) <= set("|&;"):
            starts, skip, call = True, False, None
        elif set(word) <= set("<>"):
            skip = True
        elif skip:
            skip = False
        elif starts and not re.match(r"[A-Za-z_]\w*=", word):
            starts = False
            if Path(word).name == "trailmed":
                call = []
                yield call
        elif call is not None:
            call.append(word)


CALLS = [
    pytest.param(call, shown, id=f"{named(page)}: {command}")
    for page in PAGES if page.exists() for command, shown in examples(page) for call in list(trailmed_calls(command))
]


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words it is called by."""
    def below(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
        if children := getattr(command, "commands", None):
            for name, child in children.items():
                yield from below((*words, name), child)
        else:
            yield words, command
    return below((), CLI)


def parse(call: list[str]) -> dict[str, Any]:
    """The parameters that the command line makes of `call`, nothing executed; raises as click does for what it does not accept."""
    context, command, arguments = None, CLI, list(call)
    name = "trailmed"
    while True:
        try:
            context = command.make_context(name, arguments, parent=context)
        except typer.Exit:  # --help and --version end here
            return {}
        if not getattr(command, "commands", None):
            return dict(context.params)
        name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])


def is_cheap(call: list[str]) -> bool:
    return bool({"--help", "--version"} & {*call}) or call[:2] in (["models", "list"], ["prompts", "list"]) or call == ["validate"]


def run(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRAILMED_CACHE": str(cache), "COLUMNS": "140"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )


def test_there_are_examples_of_every_command() -> None:
    called: list[Any] = [example.values[0] for example in CALLS]
    for words, _ in commands():
        assert any(tuple(call[: len(words)]) == words for call in called), f"no example of trailmed {' '.join(words)}"
    assert any(map(is_cheap, called))


def test_a_wrong_example_is_noticed() -> None:
    for wrong in (["run", "m"], ["eval", "m", "--splitt", "fit"], ["eval", "m", "--split", "test"], ["eval", "m", "n"], ["ask"]):
        with pytest.raises(Exception, match=r"(?i)missing|no such|not one of|unexpected"):
            parse(wrong)
    assert list(trailmed_calls("A=1 trailmed eval m -o 'a b' | head && .venv/bin/trailmed compare a b > c; echo trailmed")) == [
        ["eval", "m", "-o", "a b"], ["compare", "a", "b"],
    ]


@pytest.mark.parametrize("call", [pytest.param(example.values[0], id=example.id) for example in CALLS])
def test_example_parses(call: list[str]) -> None:
    given = parse(call)
    for option in ("remove", "keep", "category"):
        parse_categories(given.get(option) or [])
    if "type" in given:
        file_type_of(given["type"])
    names = IMPORTERS if call[0] == "prompts" else CATALOGUE
    for argument in (given.get("model"), given.get("name")):
        assert not argument or argument in names or "/" in argument or argument.endswith(".gguf"), f"{argument}: no such model"


@pytest.mark.parametrize(("call", "shown"), [example for example in CALLS if is_cheap(example.values[0])])
def test_cheap_example_runs(call: list[str], shown: list[str], tmp_path: Path) -> None:
    done = run(["-m", "trailmed", *call], tmp_path)
    assert done.returncode == 0, done.stderr
    printed = [line.strip() for line in done.stdout.splitlines()]
    assert printed
    assert all(line in printed for line in shown)


def test_every_command_and_option_is_described() -> None:
    page = ROOT.joinpath("docs", "COMMANDS.md").read_text("utf-8")
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    for words, command in commands():
        name = " ".join(("trailmed", *words))
        assert name in sections, f"{name} has no section in COMMANDS.md"
        described = {*re.findall(r"--[a-z][a-z-]*", re.sub(r"```.*?```", "", sections[name], flags=re.DOTALL))}
        options = {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")} - {"--help"}
        assert options <= described, f"{name}: COMMANDS.md does not describe {sorted(options - described)}"
        assert described <= options, f"{name}: COMMANDS.md describes {sorted(described - options)}, which it does not have"
    extra = [title for title in sections if title.startswith("trailmed ") and tuple(title.split()[1:]) not in {w for w, _ in commands()}]
    assert not extra, f"COMMANDS.md describes {extra}, which do not exist"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    for target in LINK.findall(text):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), f"{named(page)} links to {target}, which does not exist"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors(linked), f"{named(page)} links to {target}: no such heading"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+?)\s*$", FENCE.sub("", page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", ROOT.joinpath("Makefile").read_text("utf-8"), re.MULTILINE))
    blocks = " ".join(re.findall(r"^(?:    |\$ )(make [a-z]+)", page.read_text("utf-8"), re.MULTILINE))
    assert {*re.findall(r"make ([a-z]+)", blocks)} <= targets


def test_data_card_counts_are_those_of_the_data(tmp_path: Path) -> None:
    done = run(["docs/count_prompts.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    script = runpy.run_path(str(ROOT / "docs" / "count_prompts.py"))
    card = ROOT.joinpath("docs", "BENCHMARK.md").read_text("utf-8")
    counted = card.partition(script["BEGIN"])[2].partition(script["END"])[0]
    assert counted == done.stdout, "the prompts have changed: run `python docs/count_prompts.py --write`"
    checks = "scenarios that also occur in the retain set", "texts that also occur in the retain set", "scenarios in more than one split"
    for check in checks:
        assert f"| {check} | 0 |" in counted
    assert "asked in 1 ways" not in counted
