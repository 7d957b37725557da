"""Prompts from other people's files: tables of the user's own, and published sets by name.

A table becomes prompts by saying which column holds what (`Columns`); what it lacks is made or assumed. A published set (`IMPORTERS`) is
fetched, or read from a file the user has, and written as trailmed's own JSON Lines. All its prompts are held out: nobody fits on them.
"""

from __future__ import annotations

import difflib
import http.client
import json
import re
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .. import __version__
from ..errors import TrailmedError
from ..files import write_text_atomically
from ..progress import progress_bar
from .external_sets import IMPORTERS, UNSPECIFIED_KIND, Importer, Sample, SetFile, Skipped, slug
from .external_table import SUFFIXES, Columns, Row, Table, parse_columns, parse_table, read_table, suffix_of
from .prompts import MAX_PROMPT_FILE_BYTES, Category, Expected, Prompt, Split, assign_splits, load_prompts, parse_categories

__all__ = [
    "IMPORTERS", "Columns", "Imported", "Importer", "find_importer", "import_prompts", "load_any_prompts", "parse_columns",
    "prompts_from_table", "read_set", "read_table", "write_prompts",
]

_OUR_SUFFIXES = (".jsonl", ".ndjson")
_OUR_FIELDS = {name for name, entry in Prompt.model_fields.items() if entry.is_required()}
_BREAKS = re.compile("[\x85\u2028\u2029]")
"""Line breaks to `str.splitlines`, which JSON leaves in a string as they are."""
_TIMEOUT_SECONDS = 30.0
_LONGEST_FETCH_SECONDS = 300.0
_PIECE = 1 << 16


def load_any_prompts(path: Path, columns: Sequence[str] = (), *, category: Category | None = None) -> list[Prompt]:
    """The prompts of any file trailmed can read: its own JSON Lines, or a table, with `columns` as for `parse_columns`.

    A file whose suffix says nothing, given without `columns` and `category`, is taken for trailmed's own. Raises `TrailmedError`.
    """
    chosen = parse_columns(columns)
    if path.suffix.lower() not in SUFFIXES and not columns and category is None:
        return load_prompts(path)
    return prompts_from_table(path, chosen, category=category)


def prompts_from_table(path: Path, columns: Columns = Columns(), *, category: Category | None = None) -> list[Prompt]:
    """The rows of a CSV, TSV, JSON or JSON Lines file as prompts, in their order, each with a split.

    What a row does not say is made: the id from the file's name and the row's number; the scenario is the id, the voice "plain", the kind
    of a should_refuse prompt "unspecified"; `expected` follows the category; the split is assigned by scenario. Cells that are names (id,
    scenario, voice, kind) are turned into names by `slug`. A kind is read for should_refuse prompts only. One `category` holds for the
    whole file, over a column of that name; `columns.category` may name a category too, where no column is called so.

    JSON Lines in trailmed's own format, read without `columns` and `category`, are exactly what `load_prompts` makes of them.

    Raises `TrailmedError`, with the file and the line, for anything unreadable, a chosen column that is not there, no text, no category,
    values that are none of those there are, and ids or texts that occur twice.
    """
    table = read_table(path)
    if category is None and columns == Columns() and path.suffix.lower() in _OUR_SUFFIXES and set(table.rows[0].cells) >= _OUR_FIELDS:
        return load_prompts(path)
    if category is not None and columns.category:
        raise TrailmedError(f"{path}: category {category} for all and category={columns.category} exclude each other; leave one out")
    if columns.category in tuple(Category) and columns.category not in table.columns:
        category = Category(columns.category)
    if category is not None:
        columns = replace(columns, category="")
    chosen = columns.resolve(table)
    if category is None and chosen.category is None:
        raise TrailmedError(
            f"{path}: has no column 'category'; name it with category=COLUMN, or give one for the whole file, like category=gray_zone; "
            f"its columns are {table.listed()}"
        )
    prompts = []
    ids: dict[str, Row] = {}
    texts: dict[str, Row] = {}
    for number, row in enumerate(table.rows, start=1):
        prompt = _prompt_of(row, chosen, category, f"{slug(path.stem, limit=60) or 'prompts'}-{number}")
        if (before := ids.setdefault(prompt.id, row)) is not row:
            raise TrailmedError(f"{row.where}: id {prompt.id!r} stands in {before.place} already; ids must be unique")
        if (before := texts.setdefault(_key(prompt.text), row)) is not row:
            raise TrailmedError(f"{row.where}: the same text as in {before.place}; leave one of them out")
        prompts.append(prompt)
    try:
        return assign_splits(prompts)
    except TrailmedError as error:
        raise TrailmedError(f"{path}: {error}") from error


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write `prompts` as trailmed's own JSON Lines, whole or not at all: the same prompts, the same bytes, and `load_prompts` reads them.

    Raises `TrailmedError` when `path` does not end in .jsonl (its suffix decides how it is read), or cannot be written.
    """
    _check_output(path)
    lines = (json.dumps(prompt.model_dump(mode="json", exclude_none=True), ensure_ascii=False) + "\n" for prompt in prompts)
    write_text_atomically(path, _BREAKS.sub(lambda found: f"\\u{ord(found.group()):04x}", "".join(lines)))


@dataclass(frozen=True, slots=True)
class Imported:
    """A published set as prompts, all of them held out, and how many of its rows were left out for which reason."""

    prompts: tuple[Prompt, ...]
    skipped: Mapping[str, int]


def find_importer(name: str) -> Importer:
    """The published set called `name`; raises `TrailmedError` for an unknown one, with those that look like it or all there are."""
    importer = IMPORTERS.get(name.strip().lower())
    if importer is None:
        close = difflib.get_close_matches(name.lower(), IMPORTERS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(IMPORTERS)}"
        raise TrailmedError(f"{name[:80]!r}: no such prompt set; {hint}")
    return importer


def import_prompts(name: str, source: Path | None, out: Path, *, progress: bool = True) -> list[Prompt]:
    """Read the published set `name` (see `read_set`) and write it to `out`, whole or not at all; with `progress`, say what was left out.

    Raises `TrailmedError` as `read_set` and `write_prompts` do, and when `out` would replace the source.
    """
    find_importer(name)
    _check_output(out)
    if source is not None and out.resolve() == source.resolve():
        raise TrailmedError(f"{out}: is the source itself; choose another output")
    found = read_set(name, source, progress=progress)
    write_prompts(out, found.prompts)
    if progress:
        for reason, count in found.skipped.items():
            print(f"{name}: left out {count} {'row' if count == 1 else 'rows'} {reason}", file=sys.stderr)
    return list(found.prompts)


def read_set(name: str, source: Path | None = None, *, progress: bool = True) -> Imported:
    """The published set `name` as prompts: from `source` (its file, or a folder with its files), or fetched when that is None.

    Safe prompts become gray_zone; unsafe ones should_refuse, with the set's own category as their kind. Every prompt is held out. Rows that
    repeat a text, or are longer than a prompt may be, are left out and counted: the user cannot mend a published file.

    Raises `TrailmedError` for an unknown name, a file that is not of the set, no network, an answer that is broken or too large.
    """
    importer = find_importer(name)
    prompts: list[Prompt] = []
    skipped: Counter[str] = Counter()
    seen: dict[str, tuple[Row, Category]] = {}
    for file, table in _tables(importer, source, progress):
        for column in file.columns:
            if column not in table.columns:
                raise TrailmedError(
                    f"{table.source}: has no column {column!r}, so it is not {file.name} of {importer.name} ({importer.home}); "
                    f"its columns are {table.listed()}"
                )
        prefix = importer.name if len(importer.files) == 1 else f"{importer.name}-{slug(Path(file.name).stem)}"
        for number, row in enumerate(table.rows, start=1):
            sample = file.read(row)
            found = _held_out(sample, row, f"{prefix}-{number}") if isinstance(sample, Sample) else sample
            if isinstance(found, Skipped):
                skipped[found.reason] += 1
                continue
            before, category = seen.setdefault(_key(found.text), (row, found.category))
            if category is not found.category:
                raise TrailmedError(f"{row.where}: the same text stands in {before.where} as {category}; one of the two is wrong, mend it")
            if before is row:
                prompts.append(found)
            else:
                skipped["with the text of an earlier one"] += 1
    if not prompts:
        raise TrailmedError(f"{source or importer.name}: holds no prompts of {importer.name}; name another file")
    return Imported(tuple(prompts), dict(skipped))


def _tables(importer: Importer, source: Path | None, progress: bool) -> Iterator[tuple[SetFile, Table]]:
    names = " and ".join(file.name for file in importer.files)
    if source is None:
        urls = [file.url for file in importer.files if file.url is not None]
        if len(urls) < len(importer.files):
            raise TrailmedError(f"{importer.name}: cannot be fetched by its name; get {names} from {importer.home} and give the file")
        with progress_bar(f"fetching {importer.name} (files)", len(urls), enabled=progress) as advance:
            for file, url in zip(importer.files, urls, strict=True):
                yield file, parse_table(_fetch(url), url, suffix_of(file.name))
                advance(1)
    elif source.is_dir():
        present = [file for file in importer.files if (source / file.name).exists()]
        if not present:
            raise TrailmedError(f"{source}: a folder without {names}; name the file of {importer.name}")
        for file in present:
            yield file, read_table(source / file.name)
    else:
        fits = [file for file in importer.files if len(importer.files) == 1 or file.name == source.name]
        if not fits:
            raise TrailmedError(f"{source}: {importer.name} is {names}; give the file its own name, or name the folder with both")
        yield fits[0], read_table(source)


def _held_out(sample: Sample, row: Row, made_id: str) -> Prompt | Skipped:
    try:
        return Prompt(
            id=made_id, category=sample.category, scenario=sample.scenario or made_id, text=sample.text,
            expected=_expected(sample.category), voice="plain", kind=sample.kind, split=Split.HELD_OUT,
        )
    except ValidationError as error:
        if error.errors()[0]["type"] == "string_too_long":
            return Skipped("longer than a prompt may be")
        raise _explain(error, row) from error


def _prompt_of(row: Row, columns: Columns, category: Category | None, made_id: str) -> Prompt:
    """One row as a prompt; `columns` are resolved, `category` is that of the whole file or None."""
    about = category or _category(row, columns.category)
    name = _name(row, columns.id, made_id)
    values: dict[str, Any] = {
        "id": name, "category": about, "scenario": _name(row, columns.scenario, name), "text": row.text(columns.text or ""),
        "expected": _expected(about), "voice": _name(row, columns.voice, "plain"),
    }
    if about is Category.SHOULD_REFUSE:
        values["kind"] = _name(row, columns.kind, UNSPECIFIED_KIND)
    if (expected := _one_of(row, columns.expected, tuple(Expected))) and expected != values["expected"]:
        raise TrailmedError(f"{row.where}: expected is {expected}, and {about} is expected to {values['expected']}; mend one of them")
    if split := _one_of(row, columns.split, tuple(Split)):
        values["split"] = split
    try:
        return Prompt.model_validate(values)
    except ValidationError as error:
        raise _explain(error, row) from error


def _category(row: Row, column: str | None) -> Category:
    try:
        return parse_categories([row.text(column or "")[:80]])[0]
    except TrailmedError as error:
        raise TrailmedError(f"{row.where}: {error}; or give one for the whole file") from error


def _expected(category: Category) -> Expected:
    return Expected.REFUSE if category is Category.SHOULD_REFUSE else Expected.HELP


def _name(row: Row, column: str | None, default: str) -> str:
    typed = row.text(column) if column else ""
    if typed and not slug(typed):
        raise TrailmedError(f"{row.where}: {column!r} is {typed[:40]!r}; a name needs letters a to z or digits")
    return slug(typed) or default


def _one_of(row: Row, column: str | None, values: Sequence[str]) -> str | None:
    typed = row.text(column).casefold().replace("-", "_") if column else ""
    if typed and typed not in values:
        raise TrailmedError(f"{row.where}: {column!r} is {typed[:40]!r}; it must be {' or '.join(values)}, or empty")
    return typed or None


def _explain(error: ValidationError, row: Row) -> TrailmedError:
    first = error.errors()[0]
    return TrailmedError(f"{row.where}: {'.'.join(map(str, first['loc'])) or 'row'}: {first['msg']}; mend the row or leave it out")


def _key(text: str) -> str:
    """What two texts have in common that are the same but for white space."""
    return " ".join(text.split())


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise TrailmedError(f"{path}: a folder; name the file to write")
    if path.suffix.lower() not in _OUR_SUFFIXES:
        raise TrailmedError(f"{path}: prompts are written as JSON Lines; name a file that ends in .jsonl")


def _fetch(url: str) -> bytes:
    """The file at `url` over HTTP(S), in memory: complete, at most `MAX_PROMPT_FILE_BYTES`, within a few minutes. The environment's proxies
    are used.

    Raises `TrailmedError` when there is no network, the server has no such file, or the answer breaks off, is too large or never ends.
    """
    by_hand = "or download it by hand and name the file"
    opener = urllib.request.OpenerDirector()
    # The usual handlers but those of ftp:, file: and data:, to which a server must not redirect us.
    for handler in (
        urllib.request.ProxyHandler, urllib.request.UnknownHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    opener.addheaders = [("User-Agent", f"trailmed/{__version__}")]
    too_large = TrailmedError(f"{url}: sends more than {MAX_PROMPT_FILE_BYTES >> 20} MiB; it is not the file it should be")
    started = time.monotonic()
    data = bytearray()
    try:
        with opener.open(url, timeout=_TIMEOUT_SECONDS) as response:
            announced = response.length
            if announced is not None and announced > MAX_PROMPT_FILE_BYTES:
                raise too_large
            # read1 returns what has come, so that a server that drips cannot hold us in one call.
            while piece := response.read1(_PIECE):
                data += piece
                if len(data) > MAX_PROMPT_FILE_BYTES:
                    raise too_large
                if time.monotonic() - started > _LONGEST_FETCH_SECONDS:
                    raise TrailmedError(f"{url}: takes longer than {_LONGEST_FETCH_SECONDS:.0f} s; try again later, {by_hand}")
    except urllib.error.HTTPError as error:
        error.close()
        raise TrailmedError(f"{url}: the server answers {error.code} ({_one_line(error.reason)}); try again later, {by_hand}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        # A ValueError is an address, of a redirection, that makes no sense.
        reason = _one_line(getattr(error, "reason", None) or error) or type(error).__name__
        raise TrailmedError(f"{url}: cannot be fetched ({reason}); connect to the network, {by_hand}") from error
    if announced is not None and len(data) != announced:
        raise TrailmedError(f"{url}: broke off after {len(data)} of {announced} bytes; try again, {by_hand}")
    return bytes(data)


def _one_line(reason: object) -> str:
    return " ".join(str(reason).split())[:200]
