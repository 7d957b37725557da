"""What all commands share: options that occur in several of them, how bad input ends, and printing for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from .errors import EXIT_BAD_INPUT, TrailmedError
from .settings import RunSettings, described

EXIT_INTERRUPTED = 130

P = ParamSpec("P")

Json = Annotated[bool, typer.Option("--json", help="print JSON for programs instead of tables")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress display")]
Model = Annotated[str, typer.Argument(help="catalogue name, GGUF file, Hugging Face directory, or hub id owner/name")]


def friendly(command: Callable[P, None]) -> Callable[P, None]:
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


def print_json(value: object) -> None:
    """Print `value` as JSON on stdout; paths, enumerations and mappings as what they stand for."""
    print(json.dumps(value, indent=1, ensure_ascii=False, default=_plain))


def _plain(value: object) -> object:
    return str(value) if isinstance(value, (Path, StrEnum)) else dict(value)  # type: ignore[call-overload]


def settings_option(settings: type, name: str, *flags: str) -> Any:
    """The option for a field of `settings`, with the description it carries."""
    return typer.Option(*flags, help=described(settings, name))


Threads = Annotated[int | None, typer.Option(help=described(RunSettings, "threads"), min=1)]
