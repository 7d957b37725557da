"""The commands that put prompts to a model and judge, score, compare and validate; `cli` is the front door."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from .cli_options import Json, Quiet, Threads, friendly, print_json, settings_option
from .errors import TrailmedError
from .eval.labelled import Half
from .eval.prompts import SplitChoice, parse_categories
from .settings import EngineName, EvalSettings

app = typer.Typer()
prompts_app = typer.Typer(no_args_is_help=True, help="Published prompt sets for `eval --prompts`. None comes with trailmed.")
app.add_typer(prompts_app, name="prompts")

_EVAL = EvalSettings()


@app.command("eval")
@friendly
def eval_command(
    model: Annotated[str, typer.Argument(
        help="catalogue name, GGUF file, Hugging Face directory, or hub id owner/name; with --endpoint, the name it is served under",
    )] = "",
    out: Annotated[Path | None, typer.Option(
        "--out", "-o", help="folder for the judged answers, for `compare` and `triage`; an interrupted evaluation goes on in it",
    )] = None,
    split: Annotated[SplitChoice, typer.Option(help="which prompts")] = SplitChoice.ALL,
    category: Annotated[list[str] | None, typer.Option("--category", help="only these categories")] = None,
    limit: Annotated[int | None, typer.Option(help="at most so many prompts, spread over the categories")] = None,
    phrasings: Annotated[bool, typer.Option("--phrasings", help="ask the further phrasings of every scenario as well")] = False,
    challenge: Annotated[bool, typer.Option("--challenge", help="ask the challenge set instead: by authors who saw nothing else")] = False,
    prompts: Annotated[Path | None, typer.Option(help="prompts of your own: JSON Lines, JSON, CSV or TSV")] = None,
    column: Annotated[list[str] | None, typer.Option(
        "--column", help="with --prompts: which column holds a field, FIELD=COLUMN (text=question); repeat it",
    )] = None,
    engine: Annotated[EngineName | None, settings_option(EvalSettings, "engine")] = None,
    endpoint: Annotated[str | None, settings_option(EvalSettings, "endpoint")] = None,
    max_tokens: Annotated[int, settings_option(EvalSettings, "max_tokens")] = _EVAL.max_tokens,
    slots: Annotated[int, settings_option(EvalSettings, "slots")] = _EVAL.slots,
    threads: Threads = None,
    exact: Annotated[bool, settings_option(EvalSettings, "exact", "--exact")] = False,
    concurrency: Annotated[int, settings_option(EvalSettings, "concurrency")] = _EVAL.concurrency,
    timeout: Annotated[float, settings_option(EvalSettings, "timeout")] = _EVAL.timeout,
    retries: Annotated[int, settings_option(EvalSettings, "retries")] = _EVAL.retries,
    as_json: Json = False, quiet: Quiet = False,
) -> None:
    """Put the benchmark to any model: what it refuses, and how well its answers triage."""
    from .eval.tables import run_table
    from .evaluating import eval

    found = eval(
        model, out, EvalSettings(
            engine=engine, endpoint=endpoint, max_tokens=max_tokens, slots=slots, threads=threads or _EVAL.threads, exact=exact,
            concurrency=concurrency, timeout=timeout, retries=retries,
        ),
        split=split.chosen, categories=parse_categories(category or ()), limit=limit, phrasings=phrasings, challenge=challenge,
        prompts=prompts, columns=column or (), progress=not quiet,
    )
    if found.edit_sha256 and prompts is None and not challenge and split is not SplitChoice.HELD_OUT and not quiet:
        print("trailmed: this model carries an edit that was fitted on part of these prompts; claim figures of --split held_out only",
              file=sys.stderr)
    if as_json:
        print_json(asdict(found))
    else:
        Console().print(run_table(found))


@app.command()
@friendly
def triage(
    run: Annotated[Path, typer.Argument(help="folder of `eval --out`, or a file of a run's eval folder")],
    explain: Annotated[str | None, typer.Option(help="show this prompt's answer item by item (its id)")] = None, as_json: Json = False,
) -> None:
    """Score how well the answers of an evaluation triage: critical actions named, less dangerous advice given."""
    from .eval.run_folder import load_run
    from .eval.tables import triage_answer_table, triage_table
    from .eval.triage import triage

    found = triage(load_run(run))
    chosen = [each for each in found.answers if explain in (None, each.answer.id)]
    if not chosen:
        wanted = "any prompt" if explain is None else repr(explain)
        raise TrailmedError(f"{run}: no answer to {wanted} that there is a rubric for; choose another run or id")
    if as_json:
        print_json({"run": found.run, "groups": [asdict(group) for group in found.groups], "answers": [
            {"id": each.answer.id, "score": each.score.value, **{
                kind: [
                    {"item": finding.item.id, "weight": finding.item.weight, "span": finding.span}
                    for finding in getattr(each.score, kind)
                ] for kind in ("critical", "dangerous")
            }} for each in chosen
        ]})
    else:
        Console().print(triage_answer_table(chosen[0]) if explain else triage_table(found))


@app.command()
@friendly
def validate(
    half: Annotated[Half, typer.Option(help="which labelled answers: figures are claimed on held_out only")] = Half.HELD_OUT,
    wrong: Annotated[bool, typer.Option("--wrong", help="list the answers that the judge got wrong")] = False, as_json: Json = False,
) -> None:
    """Hold the judge against labelled answers, and the triage rubric against good, partial and dangerous ones."""
    from .eval.validate import validate_judge, validate_rubric
    from .eval.validation_tables import judge_tables, rubric_table, wrong_table

    judged, ranked = validate_judge(half), validate_rubric()
    if as_json:
        wrongly = [{"id": answer.id, "label": answer.label, "verdict": verdict} for answer, verdict in judged.wrong]
        print_json({"judge": asdict(judged) | {"wrong": wrongly}, "rubric": [asdict(each) for each in ranked]})
        return
    console = Console()
    for table in (*judge_tables(judged), *([wrong_table(judged)] if wrong else []), rubric_table(ranked)):
        console.print(table)


@app.command()
@friendly
def judge(
    run: Annotated[Path, typer.Argument(help="folder of `eval --out`, or a file of a run's eval folder")],
    model: Annotated[str, typer.Argument(help="the second judge: as MODEL of `eval`; with --endpoint, the name it is served under")] = "",
    endpoint: Annotated[str | None, settings_option(EvalSettings, "endpoint")] = None,
    threads: Threads = None, as_json: Json = False, quiet: Quiet = False,
) -> None:
    """Let a language model judge a run's answers too, and say how far it agrees with the judge (Cohen's κ)."""
    from .eval.run_folder import load_run
    from .eval.second_judge import second_judge
    from .eval.validation_tables import agreement_table
    from .evaluating import open_engine

    answered = load_run(run)
    with open_engine(
        model, EvalSettings(endpoint=endpoint, max_tokens=8, threads=threads or _EVAL.threads), progress=not quiet,
    ) as engine:
        found = second_judge(answered, engine, progress=not quiet)
    if as_json:
        print_json(asdict(found))
        return
    Console().print(agreement_table(found.agreement, f"second judge, {found.model}", f"{found.run}: the judge (rows) and {found.model}"))
    if found.unreadable:
        print(f"no verdict on {len(found.unreadable)} answers")


@app.command()
@friendly
def compare(
    runs: Annotated[list[Path], typer.Argument(
        help="two or more evaluations of the same prompts: folders of `eval --out`, or files of a run's eval folder; all are held against "
        "the first",
    )],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder for compare.html and compare.md")] = None,
    flips: Annotated[int, typer.Option(help="flips listed of each comparison")] = 20, as_json: Json = False,
) -> None:
    """Compare evaluations prompt by prompt: intervals, exact McNemar, flips in both directions, equivalence, phrasing."""
    from .eval.compare_report import SideBySide
    from .eval.run_folder import load_run
    from .eval.tables import comparison_table, flips_table, phrasing_table

    found = SideBySide([load_run(run) for run in runs])
    written = found.write(out) if out is not None else ()
    if as_json:
        print_json(found.document())
        return
    console = Console()
    for comparison in found.comparisons:
        console.print(comparison_table(comparison))
        if comparison.flips and flips:
            console.print(flips_table(comparison, limit=flips))
    if found.phrasing[0].groups:
        console.print(phrasing_table(found.phrasing))
    for path in written:
        print(path)


@prompts_app.command("list")
@friendly
def prompts_list(as_json: Json = False) -> None:
    """The published prompt sets that can be imported by name."""
    from .eval.external import IMPORTERS

    if as_json:
        print_json([
            {"name": each.name, "description": each.what, "licence": each.licence, "citation": each.citation, "home": each.home}
            for each in IMPORTERS.values()
        ])
        return
    table = Table(Column("name", no_wrap=True), "what", "licence", show_lines=True)
    for each in IMPORTERS.values():
        table.add_row(each.name, f"{each.what}\n{each.citation}\n{each.home}", each.licence)
    Console().print(table)


@prompts_app.command("import")
@friendly
def prompts_import(
    name: Annotated[str, typer.Argument(help="a name of `prompts list`")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the JSON Lines file to write")],
    source: Annotated[Path | None, typer.Option("--from", help="your copy of the set: file or folder; left out, it is fetched")] = None,
    as_json: Json = False, quiet: Quiet = False,
) -> None:
    """Read a published prompt set, yours or fetched, and write it for `eval --prompts`; all of it counts as held out."""
    from .eval.external import import_prompts

    found = import_prompts(name, source, out, progress=not quiet)
    counts = {category: sum(prompt.category is category for prompt in found) for category in {prompt.category for prompt in found}}
    if as_json:
        print_json({"path": out, "prompts": len(found), "categories": counts})
    else:
        print(f"{out}: {len(found)} prompts ({', '.join(f'{count} {category}' for category, count in sorted(counts.items()))})")
