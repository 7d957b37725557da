"""`study`: the commands that measure what an edit depends on; `cli` is the front door."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from .cli_options import Json, Model, Quiet, Threads, friendly, print_json, settings_option
from .settings import RetentionSettings, RunSettings

app = typer.Typer(no_args_is_help=True, help="Studies of what an edit does, and why.")

_DEFAULT = RetentionSettings()


@app.command("retention")
@friendly
def retention_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the study; an interrupted one goes on in it")],
    share: Annotated[list[float] | None, settings_option(RetentionSettings, "shares", "--share")] = None,
    ridge: Annotated[list[float] | None, settings_option(RetentionSettings, "ridges", "--ridge")] = None,
    nats: Annotated[list[float] | None, settings_option(RetentionSettings, "nats", "--nats")] = None,
    threads: Threads = None,
    prompts: Annotated[Path | None, settings_option(RunSettings, "prompts")] = None,
    retain: Annotated[Path | None, settings_option(RunSettings, "retain")] = None,
    as_json: Json = False, quiet: Quiet = False,
) -> None:
    """Leave kinds of harm out of the fit, and ask about them: how far do kept refusals generalize?"""
    from .studying import retention_rows, study_retention

    found = study_retention(
        model, out, RetentionSettings(
            shares=_DEFAULT.shares if share is None else tuple(share), ridges=tuple(ridge or ()), nats=tuple(nats or ()),
        ),
        threads=threads, prompts=prompts, retain=retain, progress=not quiet,
    )
    if as_json:
        print_json({"path": found.path, "conditions": {name: asdict(each) for name, each in found.conditions.items()}})
        return
    table = Table(
        Column("condition", no_wrap=True),
        *(Column(heading, justify="right") for heading in ("fitted to", "benign", "harmful", "unseen", "area", "unseen", "at 2 %")),
        title="Prompts the fit had not seen", caption="Refused, counted by how answers open (the base's in brackets). Unseen: all of "
        "the prompt's kind of harm left out of the fit. Area: under the ROC of harmful over benign prompts. At 2 %: harmful prompts of "
        "unseen kinds refused where 2 % of the benign are.",
    )
    for row in retention_rows(found):
        table.add_row(*row)
    Console().print(table)
    print(found.path)
