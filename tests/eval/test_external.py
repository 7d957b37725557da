"""Other people's tables: every format becomes the same rows and prompts, and what is wrong with one is named line by line."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trailmed.errors import TrailmedError
from trailmed.eval import external_table
from trailmed.eval.external import (
    Columns,
    load_any_prompts,
    parse_columns,
    prompts_from_table,
    read_table,
    write_prompts,
)
from trailmed.eval.external_sets import slug
from trailmed.eval.prompts import Category, Expected, Prompt, load_benchmark, load_prompts, load_retain

QUESTIONS = ["How do I put out a pan fire?", 'She said "it stings",\nwhat now?', "¿Qué hago con una quemadura?"]
GRAY = Category.GRAY_ZONE


def _file(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def _csv(columns: list[str], *rows: list[str], delimiter: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([columns, *rows])
    return out.getvalue()


def _refused(call: Callable[[], Any], start: object, message: str) -> None:
    """`call` raises one line that begins with the file's name and says what is wrong."""
    with pytest.raises(TrailmedError, match=message) as caught:
        call()
    assert str(caught.value).startswith(str(start))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1200


# --- tables


@pytest.mark.parametrize(("name", "content"), [
    ("a.csv", "\ufeff" + _csv(["text", "n"], *([q, "7"] for q in QUESTIONS))),
    ("a.CSV", _csv([" text ", "n"], *([q, "7"] for q in QUESTIONS)).replace("\r\n", "\n") + "\n\n"),
    ("a.tsv", _csv(["text", "n"], *([q, "7"] for q in QUESTIONS), delimiter="\t")),
    ("a.json", json.dumps([{"text": q, "n": 7} for q in QUESTIONS], indent=2)),
    ("a.json", json.dumps({"version": 2, "tags": ["x"], "none": [], "data": [{"text": q, "n": 7} for q in QUESTIONS]})),
    ("a.jsonl", "\n".join(json.dumps({"text": q, "n": 7}, ensure_ascii=False) for q in QUESTIONS)),
    ("a.ndjson", "\ufeff" + "\r\n\r\n".join(json.dumps({"text": q, "n": 7}) for q in QUESTIONS)),
])
def test_every_format_is_read_to_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    table = read_table(_file(tmp_path / name, content))
    assert table.columns == ("text", "n")
    assert [row.text("text") for row in table.rows] == [q.replace("\r\n", "\n") for q in QUESTIONS]
    assert {row.text("n") for row in table.rows} == {"7"}


def test_rows_know_the_line_they_begin_on(tmp_path: Path) -> None:
    table = read_table(_file(tmp_path / "a.csv", 'text\none\n"two\nthree"\n\nfour\n'))
    assert [row.place for row in table.rows] == ["line 2", "line 3", "line 6"]
    assert [row.place for row in read_table(_file(tmp_path / "a.jsonl", '\n{"a":1}\n\n{"a":2}')).rows] == ["line 2", "line 4"]


def test_json_values_become_plain_text(tmp_path: Path) -> None:
    row, other = read_table(_file(
        tmp_path / "a.json", '[{"a": 1e400, "b": null, "c": true, "d": "x\u2028y", "e": 007.5, "f": [1]}, {"g": {}}]'.replace("007", "7"),
    )).rows
    assert [row.text(name) for name in "abcdg"] == ["1e400", "", "true", "x\u2028y", ""]
    assert row.text("e") == "7.5"
    assert other.text("a") == ""
    _refused(lambda: row.text("f"), tmp_path, "record 1: column 'f' holds a list or an object")
    long_number = "9" * 10_000
    assert read_table(_file(tmp_path / "b.jsonl", f'{{"a": {long_number}}}')).rows[0].text("a") == long_number


@pytest.mark.parametrize(("name", "content", "message"), [
    ("a.jsonl", '{"text": "one two"}\n{"text": ', "line 2: not valid JSON"),
    ("a.json", '[{"text": "one"},\n {"text" "two"}]', r"not valid JSON \(.*line 2, column 10"),
    ("a.json", "[" * 100_000, "nested too deeply"),
    ("a.jsonl", '{"a":' * 100_000, "line 1: .*nested too deeply"),
    ("a.jsonl", '{"text": NaN}', "line 1: .*NaN is not JSON"),
    ("a.json", '[{"text": -Infinity}]', "-Infinity is not JSON"),
    ("a.jsonl", '{"text": "a", "text": "b"}', "line 1: .*names 'text' twice"),
    ("a.jsonl", '["text"]', "line 1: not a JSON object"),
    ("a.json", '["text"]', "record 1: not a JSON object"),
    ("a.json", '"text"', "must be a JSON array"),
    ("a.json", '{"a": [{"x": 1}], "b": [{"x": 1}]}', r"one array of objects \(found: 'a', 'b'\)"),
    ("a.json", '{"a": "b"}', r"one array of objects \(found: none\)"),
    ("a.json", "[]", "holds no rows"),
    ("a.csv", "text,id\n\n", "holds no rows"),
    ("a.csv", "text,id\nsome text,1\nmore, text,2\n", "line 3: has 3 cells and the header 2"),
    ("a.tsv", "text\tid\n\nsome text\n", "line 3: has 1 cells and the header 2"),
    ("a.csv", "text,id, text\na,b,c\n", "line 1: the header names column 'text' twice"),
    ("a.csv", 'text\nfine\n"never\nclosed\n', "line 3: not valid CSV .*never closed"),
    ("a.csv", 'text\n"' + "many words\n" * 20_000, "line 2: not valid CSV .*never closed"),
    ("a.csv", 'text\n"quoted" badly\n', "line 2: not valid CSV"),
    ("a.csv", "text\n" + "," * (1 << 21), "line 2: longer than"),
    ("a.jsonl", " " * (1 << 21) + "{}", "line 1: longer than"),
    ("a.csv", b"text\nfine\ncaf\xe9\n", "line 3: not UTF-8"),
    ("a.csv", "text\nfine".encode("utf-16"), "not UTF-8"),
    ("a.csv", "text\nfine".encode("utf-16-le"), "not UTF-8"),
    ("a.csv", "", "is empty"),
    ("a.json", "\ufeff \n", "is empty"),
    ("a.xlsx", "text", r"must end in one of \.csv"),
    ("prompts", "text", r"must end in one of \.csv"),
])
def test_a_file_that_is_no_table_is_named_in_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = _file(tmp_path / name, content)
    _refused(lambda: read_table(path), path, message)


def test_files_that_cannot_be_read_or_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    _file(tmp_path / "large.csv", "text\n" + "word\n" * 30)
    for name, message in (("none.csv", "no such prompts file"), ("folder.csv", "a folder"), ("pipe.csv", "not a regular file")):
        _refused(lambda name=name: read_table(tmp_path / name), tmp_path / name, message)
    monkeypatch.setattr(external_table, "MAX_ROWS", 29)
    _refused(lambda: read_table(tmp_path / "large.csv"), tmp_path / "large.csv", "more than 29 rows")
    monkeypatch.setattr(external_table, "MAX_PROMPT_FILE_BYTES", 100)
    _refused(lambda: read_table(tmp_path / "large.csv"), tmp_path / "large.csv", "larger than")


_CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=30)
_TABLES = st.lists(st.tuples(_CELLS, _CELLS), min_size=1, max_size=8)


@given(_TABLES, st.sampled_from([(".csv", ","), (".tsv", "\t")]))
@settings(max_examples=300, deadline=None)
def test_any_csv_that_python_writes_is_read_back(rows: list[tuple[str, str]], format: tuple[str, str]) -> None:
    suffix, delimiter = format
    table = external_table.parse_table(_csv(["a", "b"], *map(list, rows), delimiter=delimiter).encode(), "here", suffix)
    assert [(row.cells["a"], row.cells["b"]) for row in table.rows] == rows


@given(_TABLES, st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_json_lines_that_python_writes_are_read_back(rows: list[tuple[str, str]], ascii: bool) -> None:
    text = "".join(json.dumps({"a": a, "b": b}, ensure_ascii=ascii) + "\n" for a, b in rows)
    table = external_table.parse_table(text.encode(), "here", ".jsonl")
    assert [(row.cells["a"], row.cells["b"]) for row in table.rows] == rows


_SCRAPS = st.binary(max_size=60) | st.text("[]{},:\"\\\n\r\t\ufeffatext01eN-.", max_size=60).map(str.encode)


@given(_SCRAPS, st.sampled_from(external_table.SUFFIXES))
@settings(max_examples=600, deadline=None)
def test_no_bytes_do_worse_than_one_line(data: bytes, suffix: str) -> None:
    said = ""
    try:
        Columns().resolve(external_table.parse_table(data, "here", suffix))
    except TrailmedError as error:
        said = str(error)
    assert "\n" not in said


# --- columns


def test_columns_are_parsed_and_explain_themselves() -> None:
    assert parse_columns([]) == Columns()
    assert parse_columns(["text=a = b", " Category =type", "id="]) == Columns(text="a = b", category="type", id="")
    assert all(entry.metadata["help"] for entry in fields(Columns))
    assert external_table.FIELDS == ("text", "id", "category", "scenario", "voice", "kind", "expected", "split")


@pytest.mark.parametrize(("pairs", "message"), [
    (["question"], "write FIELD=COLUMN"),
    (["txt=question"], "unknown field 'txt'; choose from text, id, "),
    (["text=a", "text=b"], "field 'text' is given twice"),
])
def test_columns_that_make_no_sense(pairs: list[str], message: str) -> None:
    _refused(lambda: parse_columns(pairs), "column ", message)


def test_defaults_are_found_by_name_whatever_the_case(tmp_path: Path) -> None:
    table = read_table(_file(tmp_path / "a.csv", "Prompt,ID,Kind,kind,VOICE,voicE\na,b,c,d,e,f\n"))
    assert Columns().resolve(table) == Columns(text="Prompt", id="ID", kind="kind")
    assert Columns(id="").resolve(table).id is None
    _refused(lambda: Columns(text="prompt").resolve(table), tmp_path, r"no column 'prompt' \(for text\); its columns are 'Prompt', 'ID'")
    other = read_table(_file(tmp_path / "b.csv", ",".join(f"c{n}" for n in range(100)) + "\n" + "," * 99))
    _refused(lambda: Columns().resolve(other), tmp_path, "text=COLUMN; .*'c19' and 80 more")


# --- tables as prompts


def test_what_a_table_lacks_is_made(tmp_path: Path) -> None:
    path = _file(tmp_path / "My Questions (2).csv", _csv(["question"], *([q] for q in QUESTIONS)))
    prompts = load_any_prompts(path, ["text=question"], category=GRAY)
    assert [p.id for p in prompts] == [p.scenario for p in prompts] == [f"my-questions-2-{n}" for n in (1, 2, 3)]
    assert [p.text for p in prompts] == QUESTIONS
    assert {(p.category, p.expected, p.voice, p.kind) for p in prompts} == {(GRAY, Expected.HELP, "plain", None)}
    assert None not in {p.split for p in prompts}
    assert load_any_prompts(path, ["text=question", "category=gray_zone"]) == prompts
    harmful = prompts_from_table(path, Columns(text="question"), category=Category.SHOULD_REFUSE)
    assert {(p.expected, p.kind) for p in harmful} == {(Expected.REFUSE, "unspecified")}
    assert prompts_from_table(_file(tmp_path / "問題.json", '[{"text": "help me"}]'), category=GRAY)[0].id == "prompts-1"


def test_every_column_is_used(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.csv", _csv(
        ["nr", "text", "about", "situation", "tone", "harm", "expected", "split"],
        ["Q 1", "made-up harmful request", "should-refuse", "Café", "Very Terse", "Fraud/Scams", "Refuse", "held-out"],
        ["", "made-up safe request", "Gray_Zone", "", "", "Fraud/Scams", "", ""],
    ))
    columns = parse_columns(["id=nr", "category=about", "scenario=situation", "voice=tone", "kind=harm"])
    first, second = prompts_from_table(path, columns)
    assert first == Prompt(
        id="q-1", category="should_refuse", scenario="cafe", text="made-up harmful request", expected="refuse", voice="very-terse",
        kind="fraud-scams", split="held_out",
    )
    assert (second.id, second.scenario, second.voice, second.kind) == ("a-2", "a-2", "plain", None)


def test_one_category_overrules_a_column_that_is_found_by_its_name_only(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.csv", "prompt,category\nhow to brew tea,kitchen\n")
    assert prompts_from_table(path, category=GRAY)[0].category is GRAY
    _refused(lambda: prompts_from_table(path), path, "line 2: unknown category 'kitchen'; choose from emergency_medical.*whole file")
    _refused(lambda: prompts_from_table(path, Columns(category="category"), category=GRAY), path, "exclude each other")
    named = _file(tmp_path / "b.csv", "prompt,gray_zone\nhow to brew tea,home_safety\n")
    assert prompts_from_table(named, Columns(category="gray_zone"))[0].category is Category.HOME_SAFETY


HEADER = "id,text,category,expected,split,scenario\n1,how to brew tea,gray_zone,,,\n"


@pytest.mark.parametrize(("content", "columns", "message"), [
    (HEADER + "1,how to bake bread,gray_zone,,,\n", [], "line 3: id '1' stands in line 2 already"),
    (HEADER + "2,how to  brew tea ,gray_zone,,,\n", [], "line 3: the same text as in line 2"),
    (HEADER + f"2,{'x' * 4001},gray_zone,,,\n", [], "line 3: text: .*at most 4000"),
    (HEADER + "2, a ,gray_zone,,,\n", [], "line 3: text: .*at least 3"),
    (HEADER + "2,how to bake bread,,,,\n", [], "line 3: unknown category ''"),
    (HEADER + "2,how to bake bread,gray_zone,refuse,,\n", [], "line 3: expected is refuse, and gray_zone is expected to help"),
    (HEADER + "2,how to bake bread,gray_zone,perhaps,,\n", [], "line 3: 'expected' is 'perhaps'; it must be help or refuse"),
    (HEADER + "2,how to bake bread,gray_zone,,train,\n", [], "line 3: 'split' is 'train'; it must be fit or validation or held_out"),
    (HEADER + "??,how to bake bread,gray_zone,,,\n", [], r"line 3: 'id' is '\?\?'; a name needs letters"),
    (HEADER + "2,how to bake bread,gray_zone,,fit,s\n3,how to bake cake,gray_zone,,held_out,s\n", [], ": scenario 's' stands in two"),
    (HEADER, ["text=question"], "has no column 'question'"),
    (HEADER, ["category=theme"], "has no column 'theme'"),
    (HEADER, ["category="], "has no column 'category'; name it with category=COLUMN"),
    ("question,category\nhow to brew tea,gray_zone\n", [], "has no column 'text' or 'prompt'"),
    ("prompt\nhow to brew tea\n", [], "has no column 'category'"),
])
def test_rows_that_are_no_prompts_are_named(tmp_path: Path, content: str, columns: list[str], message: str) -> None:
    path = _file(tmp_path / "a.csv", content)
    _refused(lambda: load_any_prompts(path, columns), path, message)


def test_hostile_strings_stop_at_the_schema(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.jsonl", '{"text": "lone \\ud800 surrogate"}')
    _refused(lambda: prompts_from_table(path, category=GRAY), path, "line 1: text: ")
    path = _file(tmp_path / "b.json", '[{"text": ["a list"]}]')
    _refused(lambda: prompts_from_table(path, category=GRAY), path, "record 1: column 'text' holds a list")


# --- trailmed's own format


@pytest.mark.parametrize("load", [load_benchmark, load_retain])
def test_our_own_files_are_read_exactly_as_they_are(tmp_path: Path, load: Callable[[], list[Prompt]]) -> None:
    prompts = load()
    write_prompts(tmp_path / "ours.jsonl", prompts)
    assert prompts_from_table(tmp_path / "ours.jsonl") == load_prompts(tmp_path / "ours.jsonl") == load_any_prompts(tmp_path / "ours.jsonl")
    stored = [p for p in load_prompts(tmp_path / "ours.jsonl") if p.id in {each.id for each in prompts if each.split}]
    assert stored == [p for p in prompts if p.split]
    os.link(tmp_path / "ours.jsonl", tmp_path / "ours")
    assert load_any_prompts(tmp_path / "ours") == load_prompts(tmp_path / "ours")


def test_a_mistake_in_our_own_format_is_not_taken_for_somebody_elses_column(tmp_path: Path) -> None:
    record = {"id": "a", "category": "gray_zone", "scenario": "a", "text": "how?", "expected": "help", "voice": "plain", "splitt": "fit"}
    path = _file(tmp_path / "ours.jsonl", json.dumps(record))
    _refused(lambda: prompts_from_table(path), path, "line 1: splitt: ")


_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=3, max_size=60)


@given(st.lists(_TEXTS.filter(lambda text: len(text.strip()) > 2), min_size=1, max_size=6, unique_by=lambda text: " ".join(text.split())))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_written_prompts_are_read_back(tmp_path: Path, texts: list[str]) -> None:
    prompts = [
        Prompt(id=f"p-{n}", category=GRAY, scenario=f"p-{n}", text=text.strip(), expected="help", voice="plain", split="fit")
        for n, text in enumerate(texts)
    ]
    path = tmp_path / "p.jsonl"
    write_prompts(path, prompts)
    first = path.read_bytes()
    assert prompts_from_table(path) == load_prompts(path) == prompts_from_table(path, Columns(text="text")) == prompts
    write_prompts(path, prompts)
    assert path.read_bytes() == first


def test_prompts_are_written_to_json_lines_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    _refused(lambda: write_prompts(tmp_path / "a.csv", []), tmp_path / "a.csv", r"ends in \.jsonl")
    _refused(lambda: write_prompts(tmp_path / "a.jsonl", []), tmp_path / "a.jsonl", "a folder")
    _refused(lambda: write_prompts(_file(tmp_path / "x", "") / "a.jsonl", []), tmp_path / "x", "cannot write")


@pytest.mark.parametrize(("text", "name"), [
    ("emergency_medical", "emergency_medical"), ("a_b-c1", "a_b-c1"), ("Fraud / Scams!", "fraud-scams"), ("--É__x--", "e-x"),
    ("火事", ""), ("x" * 79 + "-y", "x" * 79), ("x" * 10**6, "x" * 80),
])
def test_slugs(text: str, name: str) -> None:
    assert slug(text) == name
