"""The command table."""

from __future__ import annotations

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


app.command("optimize")(optimize.optimize)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("outliers")(outliers.outliers)
app.command("ladder")(ladder.ladder)
app.command("sweep")(sweep.sweep)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("compare")(compare.compare)
app.command("table")(bench.table)
app.command("profile")(profile.profile)
app.command("report")(report.report)
app.command("inspect")(inspect.inspect)
app.command("export")(export.export)
app.command("audit")(audit.audit)
app.command("forecast")(forecast.forecast)
app.command("doctor")(doctor.doctor)
app.command("cache")(cache.cache)
app.command("diffuse")(diffuse.diffuse)
app.command("demo")(demo.demo)


def main() -> None:
    """Run the command line."""
    app()
