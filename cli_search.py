"""The commands that search for edits; `cli` is the front door."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .cli_options import Json, Model, Quiet, Threads, friendly, print_json, settings_option
from .eval.prompts import parse_categories
from .settings import Method, RunSettings, SearchSettings

app = typer.Typer()

_SEARCH = SearchSettings()


@app.command()
@friendly
def search(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for everything the search writes; started again it goes on in it")],
    remove: Annotated[list[str] | None, settings_option(SearchSettings, "remove", "--remove")] = None,
    keep: Annotated[list[str] | None, settings_option(SearchSettings, "keep", "--keep")] = None,
    method: Annotated[list[Method] | None, settings_option(SearchSettings, "methods", "--method")] = None,
    trials: Annotated[int, settings_option(SearchSettings, "trials")] = _SEARCH.trials,
    seed: Annotated[int, settings_option(SearchSettings, "seed")] = _SEARCH.seed,
    storage: Annotated[str | None, settings_option(SearchSettings, "storage")] = None,
    study: Annotated[str, settings_option(SearchSettings, "study")] = _SEARCH.study,
    calibrate: Annotated[int, settings_option(SearchSettings, "calibrate")] = _SEARCH.calibrate,
    calibrate_tokens: Annotated[int, settings_option(SearchSettings, "calibrate_tokens")] = _SEARCH.calibrate_tokens,
    threads: Threads = None,
    prompts: Annotated[Path | None, settings_option(RunSettings, "prompts", "--prompts")] = None,
    retain: Annotated[Path | None, settings_option(RunSettings, "retain", "--retain")] = None,
    as_json: Json = False, quiet: Quiet = False,
) -> None:
    """Try many edits by a cheap proxy, and show the best trade-offs of refusals and damage (needs the extra `search`)."""
    from .search_results import calibration_table, front_table
    from .searching import search

    found = search(
        model, out, SearchSettings(
            remove=parse_categories(remove) if remove else _SEARCH.remove, keep=parse_categories(keep or ()),
            methods=tuple(method or _SEARCH.methods), trials=trials, seed=seed, storage=storage, study=study, calibrate=calibrate,
            calibrate_tokens=calibrate_tokens,
        ),
        threads=threads, prompts=prompts, retain=retain, progress=not quiet,
    )
    results = found.results
    if as_json:
        print_json({
            "results": found.path, "page": found.page, "seconds_per_trial": found.seconds_per_trial,
            "base": results.base.model_dump(), "front": [results.trial(number).model_dump() for number in results.front],
            "calibration": [each.model_dump() for each in results.calibration],
        })
        return
    console = Console()
    console.print(front_table(results))
    if results.calibration:
        console.print(calibration_table(results.calibration))
    if found.seconds_per_trial is not None:
        print(f"seconds a trial: {found.seconds_per_trial:.1f} (median)")
    print(found.path)
    print(found.page)


@app.command()
@friendly
def pick(
    model: Model,
    searched: Annotated[Path, typer.Argument(help="folder of a search of this model")],
    trial: Annotated[int, typer.Option(help="number of the trial")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the edit file to write (safetensors)")],
    prompts: Annotated[Path | None, settings_option(RunSettings, "prompts", "--prompts")] = None,
    retain: Annotated[Path | None, settings_option(RunSettings, "retain", "--retain")] = None,
    as_json: Json = False, quiet: Quiet = False,
) -> None:
    """Make the edit of one trial of a search, for `bake`."""
    from .searching import pick

    made = pick(model, searched, trial, out, prompts=prompts, retain=retain, progress=not quiet)
    if as_json:
        print_json({
            "path": out, "sha256": made.sha256, "tensors": len(made.factors), "parameters": made.size, "recipe": dict(made.recipe),
        })
    else:
        print(f"{out}: {made.recipe['method']} edit of trial {trial}, {len(made.factors)} tensors, sha256 {made.sha256}")
