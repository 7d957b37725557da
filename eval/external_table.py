"""Other people's tables of prompts (CSV, TSV, JSON, JSON Lines) as rows of plain text cells, and which column holds what.

A file is decided on by its suffix and read whole, up to a bound. Nothing is guessed about its content: text that is not UTF-8, a row with
too few cells or a name that occurs twice is refused, and the line is named. CSV is that of RFC 4180.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from ..errors import TrailmedError
from .prompts import MAX_PROMPT_FILE_BYTES

MAX_ROWS = 500_000
"""Rows of a table, at most: the largest published set has some 80,000."""
MAX_LINE_CHARACTERS = 1 << 20
"""Characters of one line of CSV, TSV or JSON Lines, at most; it bounds the number of cells before any are made."""

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
SUFFIXES = (*_DELIMITERS, ".json", *_JSON_LINES)
"""The file names that `read_table` reads, by their ends."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its file or address, its `place` in it ("line 7"), its cells by column. A cell that is a list or an object is None."""

    source: str
    place: str
    cells: Mapping[str, str | None]

    @property
    def where(self) -> str:
        """Source and place, as error messages begin."""
        return f"{self.source}, {self.place}"

    def text(self, column: str) -> str:
        """The cell without the white space around it, empty when the row has none; raises `TrailmedError` for a list or an object."""
        cell = self.cells.get(column, "")
        if cell is None:
            raise TrailmedError(f"{self.where}: column {column!r} holds a list or an object; it must hold plain text")
        return cell.strip()


@dataclass(frozen=True, slots=True)
class Table:
    """A file's rows in their order. `source` names it in error messages; `columns` are all that occur, the header's order first."""

    source: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def find(self, name: str) -> str | None:
        """The column called `name`, or the only one that differs from it in case; None when there is none."""
        if name in self.columns:
            return name
        alike = [column for column in self.columns if column.casefold() == name.casefold()]
        return alike[0] if len(alike) == 1 else None

    def listed(self) -> str:
        """The columns' names for an error message, in one line and cut when there are many."""
        shown = ", ".join(repr(column[:40]) for column in self.columns[:20])
        return shown + (f" and {len(self.columns) - 20} more" if len(self.columns) > 20 else "")


def read_table(path: Path) -> Table:
    """The rows of a CSV, TSV, JSON or JSON Lines file (by its suffix), up to `MAX_PROMPT_FILE_BYTES` and `MAX_ROWS`.

    CSV and TSV have a header row. JSON is an array of objects, or an object with one such array in it. A UTF-8 byte-order mark is left
    out, blank lines too. Numbers keep their spelling, `null` is an empty cell.

    Raises `TrailmedError` with the file, the line where there is one, and what is wrong.
    """
    suffix = suffix_of(str(path))
    return parse_table(read_bounded(path), str(path), suffix)


def suffix_of(name: str) -> str:
    """The suffix that decides how the file `name` is read; raises `TrailmedError` for one that is not in `SUFFIXES`."""
    suffix = Path(name).suffix.lower()
    if suffix not in SUFFIXES:
        raise TrailmedError(f"{name}: cannot tell its format from its name; it must end in one of {', '.join(SUFFIXES)}")
    return suffix


def read_bounded(path: Path) -> bytes:
    """The bytes of a regular file of at most `MAX_PROMPT_FILE_BYTES`; raises `TrailmedError` otherwise, or when it cannot be read."""
    try:
        if path.is_dir():
            raise TrailmedError(f"{path}: a folder; name the file in it")
        if path.exists() and not path.is_file():
            # A pipe would block, a device never end.
            raise TrailmedError(f"{path}: not a regular file; name a file")
        with path.open("rb") as source:
            data = source.read(MAX_PROMPT_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise TrailmedError(f"{path}: no such prompts file; check the path") from error
    except (OSError, ValueError) as error:
        raise TrailmedError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); name another file") from error
    if len(data) > MAX_PROMPT_FILE_BYTES:
        raise TrailmedError(f"{path}: larger than {MAX_PROMPT_FILE_BYTES >> 20} MiB; split it into smaller files")
    return data


def parse_table(data: bytes, source: str, suffix: str) -> Table:
    """As `read_table`, from bytes at hand: `source` names them in errors, `suffix` (one of `SUFFIXES`) is their format."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TrailmedError(f"{source}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    if "\0" in text:
        # UTF-16 without a byte-order mark is valid UTF-8 with zeros in between.
        raise TrailmedError(f"{source}: not UTF-8 text (it has zero bytes); save the file as UTF-8")
    if not text.strip():
        raise TrailmedError(f"{source}: is empty; it needs at least one prompt")
    if suffix in _DELIMITERS:
        table = _parse_delimited(text, source, _DELIMITERS[suffix])
    else:
        table = _table_of_objects(source, _json_lines(text, source) if suffix in _JSON_LINES else _json_array(text, source))
    if not table.rows:
        raise TrailmedError(f"{source}: holds no rows; it needs at least one prompt")
    return table


def _parse_delimited(text: str, source: str, delimiter: str) -> Table:
    reader = csv.reader(_bounded_lines(io.StringIO(text, newline=""), source), delimiter=delimiter, strict=True)
    columns: tuple[str, ...] | None = None
    rows: list[Row] = []
    start = 1  # of the record: a quoted cell may hold line breaks, so a record may span lines
    try:
        for record in reader:
            place, start = f"line {start}", reader.line_num + 1
            if not record:
                continue
            if columns is None:
                columns = _header(record, f"{source}, {place}")
                continue
            if len(record) != len(columns):
                raise TrailmedError(
                    f"{source}, {place}: has {len(record)} cells and the header {len(columns)}; quote cells that hold {delimiter!r}"
                )
            _check_count(rows, source)
            rows.append(Row(source, place, dict(zip(columns, record, strict=True))))
    except csv.Error as error:
        what = "a quote that is never closed, or a cell too long" if "limit" in str(error) or "end of data" in str(error) else str(error)
        raise TrailmedError(f"{source}, line {start}: not valid CSV ({what}); quotes inside a quoted cell are doubled") from error
    return Table(source, columns or (), tuple(rows))


def _header(record: list[str], where: str) -> tuple[str, ...]:
    columns = tuple(name.strip() for name in record)
    seen: set[str] = set()
    for name in columns:
        if name in seen:
            raise TrailmedError(f"{where}: the header names column {name[:40]!r} twice; rename one")
        seen.add(name)
    return columns


def _bounded_lines(lines: Iterable[str], source: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE_CHARACTERS:
            raise TrailmedError(f"{source}, line {number}: longer than {MAX_LINE_CHARACTERS} characters; a line holds one prompt")
        yield line


def _check_count(rows: list[Any], source: str) -> None:
    if len(rows) >= MAX_ROWS:
        raise TrailmedError(f"{source}: has more than {MAX_ROWS} rows; split it into smaller files")


def _json_lines(text: str, source: str) -> Iterator[tuple[str, Any]]:
    # Only "\n" ends a line of JSON Lines: str.splitlines would also cut at a U+2028 inside a string.
    for number, line in enumerate(_bounded_lines(io.StringIO(text, newline="\n"), source), start=1):
        if line.strip():
            place = f"line {number}"
            yield place, _parse_json(line, f"{source}, {place}")


def _json_array(text: str, source: str) -> Iterator[tuple[str, Any]]:
    value = _parse_json(text, source)
    if isinstance(value, dict):
        lists = {name: inside for name, inside in value.items() if isinstance(inside, list) and inside}
        arrays = [name for name, inside in lists.items() if all(isinstance(entry, dict) for entry in inside)]
        if len(arrays) != 1:
            found = ", ".join(repr(name[:40]) for name in arrays[:20]) or "none"
            raise TrailmedError(f"{source}: a JSON object must hold one array of objects (found: {found}); make it a plain array")
        value = value[arrays[0]]
    if not isinstance(value, list):
        raise TrailmedError(f"{source}: must be a JSON array of objects; put the prompts into [ … ]")
    for number, record in enumerate(value, start=1):
        yield f"record {number}", record


def _parse_json(text: str, where: str) -> Any:
    try:
        # Numbers stay as they are spelt: an id 007 or 1e400 keeps its look, and none is long enough to be slow.
        return json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse_constant, object_pairs_hook=_unique_names)
    except json.JSONDecodeError as error:
        spot = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise TrailmedError(f"{where}: not valid JSON ({error.msg}, {spot}); mend it or export it anew") from error
    except RecursionError as error:
        raise TrailmedError(f"{where}: not usable JSON (nested too deeply); a prompt is a flat object") from error
    except ValueError as error:
        raise TrailmedError(f"{where}: not usable JSON ({error}); mend it or export it anew") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"an object names {name[:40]!r} twice")
        found[name] = value
    return found


def _table_of_objects(source: str, records: Iterable[tuple[str, Any]]) -> Table:
    columns: dict[str, None] = {}
    rows: list[Row] = []
    for place, record in records:
        if not isinstance(record, dict):
            raise TrailmedError(f"{source}, {place}: not a JSON object; each prompt is one, like {{\"text\": …}}")
        _check_count(rows, source)
        rows.append(Row(source, place, {name: _cell(value) for name, value in record.items()}))
        columns.update(dict.fromkeys(record))
    return Table(source, tuple(columns), tuple(rows))


def _cell(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    return None if isinstance(value, (list, dict)) else str(value).lower()  # only true and false are left


def _help(text: str) -> Any:
    return field(default=None, metadata={"help": text})


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column holds what. None: the column of the field's own name if there is one; empty: no column, even if there is one."""

    text: str | None = _help("the user's message (default: text, else prompt)")
    id: str | None = _help("unique name of the prompt; made from the file's name and the row's number when absent")
    category: str | None = _help("one of trailmed's eight categories; or give one category for the whole file")
    scenario: str | None = _help("the situation, shared by paraphrases; the id when absent")
    voice: str | None = _help("how it is said; plain when absent")
    kind: str | None = _help("kind of harm, read for should_refuse prompts only; unspecified when absent")
    expected: str | None = _help("help or refuse; it follows from the category, and must agree with it when given")
    split: str | None = _help("fit, validation or held_out; assigned by scenario when absent")

    def resolve(self, table: Table) -> Columns:
        """The same with every default decided on for `table`: a name of one of its columns, or None for no column.

        Raises `TrailmedError` naming the table's columns when a chosen one is not there, or none holds the text.
        """
        found: dict[str, str | None] = {}
        for name in FIELDS:
            chosen = getattr(self, name)
            if chosen is None:
                tries = ("text", "prompt") if name == "text" else (name,)
                found[name] = next((column for each in tries if (column := table.find(each)) is not None), None)
            elif chosen and chosen not in table.columns:
                raise TrailmedError(f"{table.source}: has no column {chosen[:40]!r} (for {name}); its columns are {table.listed()}")
            else:
                found[name] = chosen or None
        if found["text"] is None:
            raise TrailmedError(
                f"{table.source}: has no column 'text' or 'prompt'; say which one holds the text with text=COLUMN; "
                f"its columns are {table.listed()}"
            )
        return Columns(**found)


FIELDS = tuple(entry.name for entry in fields(Columns))
"""What a column can be used for."""


def parse_columns(pairs: Iterable[str]) -> Columns:
    """`Columns` from what the user typed, like `["text=question", "category=type"]`; `split=` means: use no column for it.

    Raises `TrailmedError` for a pair without "=", an unknown field (naming those there are), or a field given twice. Whether a column
    exists is known only with the file: `Columns.resolve` checks that.
    """
    chosen: dict[str, str] = {}
    for pair in pairs:
        name, equals, column = pair.partition("=")
        name = name.strip().lower()
        if not equals:
            raise TrailmedError(f"column {pair!r}: write FIELD=COLUMN, for example text=question")
        if name not in FIELDS:
            raise TrailmedError(f"column {pair!r}: unknown field {name!r}; choose from {', '.join(FIELDS)}")
        if name in chosen:
            raise TrailmedError(f"column {pair!r}: field {name!r} is given twice; leave one out")
        chosen[name] = column.strip()
    return Columns(**chosen)
