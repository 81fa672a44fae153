"""The command table."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Annotated

import typer

from vitfold.cli import (
    audit,
    bench,
    cache,
    compare,
    demo,
    diffuse,
    doctor,
    evaluate,
    export,
    forecast,
    inspect,
    ladder,
    optimize,
    outliers,
    predict,
    profile,
    report,
    sensitivity,
    sweep,
)
from vitfold.cli.terminal import any_character, end_of_output
from vitfold.version import __version__

app = typer.Typer(
    name="vitfold",
    help="Make pretrained Vision Transformers fast without retraining, and say what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool | None) -> None:
    if value:
        typer.echo(f"vitfold {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = None,
) -> None:
    pass


_PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Make": (
        optimize.optimize,
        sweep.sweep,
        export.export,
    ),
    "Run": (
        predict.predict,
        evaluate.evaluate,
        diffuse.diffuse,
        demo.demo,
    ),
    "Measure": (
        bench.bench,
        compare.compare,
        profile.profile,
        report.report,
        bench.table,
    ),
    "Understand": (
        inspect.inspect,
        sensitivity.sensitivity,
        outliers.outliers,
        ladder.ladder,
        audit.audit,
        forecast.forecast,
    ),
    "Mend": (
        doctor.doctor,
        cache.cache,
    ),
}
for _panel, _commands in _PANELS.items():
    for _command in _commands:
        app.command(_command.__name__, rich_help_panel=_panel)(_command)


def main() -> None:
    """Run the command line; a polite request to end (SIGTERM) cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _ended)
    any_character()
    try:
        app()
    except OSError as error:  # --help and --version write outside any command
        try:
            end_of_output(error)
        except typer.Exit as leaving:
            raise SystemExit(leaving.exit_code) from None


def _ended(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
