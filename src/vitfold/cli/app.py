"""The table of commands: a command's module is imported when that command runs."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from vitfold.cli.declaring import CONTEXT, built
from vitfold.cli.terminal import any_character, end_of_output, note
from vitfold.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A command: where it lies (`module:function` below vitfold.cli), its line in the help, its new spelling if any."""

    at: str
    panel: str
    help: str
    now: str | None = None


COMMANDS = {
    "optimize": Entry(at="optimize:optimize", panel="Make", help="Make a model fast: merge tokens, quantize, verify."),
    "sweep": Entry(at="sweep:sweep", panel="Make", help="Try many recipes, one row each; goes on where it stopped."),
    "export": Entry(at="export:export", panel="Make", help="Write a bundle for Triton, Docker or PyTorch."),
    "predict": Entry(at="predict:predict", panel="Run", help="Print the most probable labels of images."),
    "map": Entry(at="map:map_images", panel="Run", help="Label or embed millions of images; goes on where it stopped."),
    "serve": Entry(at="serve:serve", panel="Run", help="Answer requests over HTTP, within bounds; a page to try it."),
    "evaluate": Entry(at="evaluate:evaluate", panel="Run", help="Say how accurate and how faithful a bundle is."),
    "verify": Entry(at="verify:verify", panel="Run", help="Check a bundle's files, graph and outputs on this machine."),
    "demo": Entry(at="demo:demo", panel="Run", help="Optimize the bundled model; show speed beside accuracy."),
    "bench": Entry(at="bench:bench", panel="Understand", help="Time bundles and other runtimes in one run."),
    "compare": Entry(at="compare:compare", panel="Understand", help="Time a bundle beside what you could run instead."),
    "profile": Entry(at="profile:profile", panel="Understand", help="Say where the time goes, and what limits it."),
    "lengths": Entry(at="lengths:lengths", panel="Understand", help="Say which numbers of tokens kernels like."),
    "report": Entry(at="report:report", panel="Understand", help="Write one HTML page of a folder's measurements."),
    "table": Entry(at="table:table", panel="Understand", help="Print the tables of a JSON file of bench or demo."),
    "inspect": Entry(at="inspect:inspect", panel="Understand", help="Print what is in a bundle."),
    "sensitivity": Entry(at="sensitivity:sensitivity", panel="Understand", help="Rank layers by what INT8 costs."),
    "outliers": Entry(at="outliers:outliers", panel="Understand", help="Find sink tokens, and what helps."),
    "ladder": Entry(at="ladder:ladder", panel="Understand", help="Measure methods of quantization by bit width."),
    "audit": Entry(at="audit:audit", panel="Understand", help="Say what NVIDIA's compiler makes of a graph; no GPU."),
    "forecast": Entry(at="forecast:forecast", panel="Understand", help="Model on which GPUs merging pays; no GPU."),
    "doctor": Entry(
        at="doctor:doctor",
        panel="Understand",
        help="Say what is missing here, and the command that mends it.",
    ),
    "cache": Entry(at="cache:cache", panel="Understand", help="Say what is kept between commands, or remove it."),
    "diffuse": Entry(at="diffusion.sample:sample", panel="", help="", now="diffusion sample"),
}
DIFFUSION = {
    "optimize": Entry(at="diffusion.optimize:optimize", panel="Commands", help="Find or take a way to draw faster."),
    "sample": Entry(at="diffusion.sample:sample", panel="Commands", help="Draw images; compare ways to draw."),
    "bench": Entry(at="diffusion.bench:bench", panel="Commands", help="Time bundles of steps in one run."),
    "ablate": Entry(at="diffusion.ablate:ablate", panel="Commands", help="Say what TokenCache's pieces are worth."),
    "embed": Entry(at="diffusion.prompts:embed", panel="Commands", help="Write prompts as embeddings."),
}


class _Lazy(TyperCommand):
    """A line of the help, which becomes the command where it is run."""

    def __init__(self, name: str, entry: Entry) -> None:
        super().__init__(name, help=entry.help, rich_help_panel=entry.panel, hidden=entry.now is not None)
        self._entry = entry

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the command and parse its arguments."""
        if self._entry.now is not None:
            renamed(f"vitfold {self.name}", f"vitfold {self._entry.now}")
        return _loaded(str(self.name), self._entry).make_context(info_name, args, parent, **extra)


class _Table(TyperGroup):
    """A group of lazy commands."""

    entries: Mapping[str, Entry] = {}

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        groups = dict(self.commands)
        self.commands = {**{name: _Lazy(name, entry) for name, entry in self.entries.items()}, **groups}

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        """Return the names in the order of the table."""
        return list(self.commands)


class _Root(_Table):
    entries = COMMANDS

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; `optimize --reuse` is today `diffusion optimize`."""
        if args[0] == "optimize" and any(word.split("=")[0] == "--reuse" for word in args):
            renamed("vitfold optimize --reuse", "vitfold diffusion optimize")
            return "optimize", _Lazy("optimize", DIFFUSION["optimize"]), args[1:]
        return super().resolve_command(ctx, args)


class _Diffusion(_Table):
    entries = DIFFUSION


def renamed(old: str, new: str) -> None:
    """Say on stderr that a command has another name, by which the next version knows it alone."""
    note(f"{old} is now: {new}; the old spelling goes with the next version")


def _loaded(name: str, entry: Entry) -> TyperCommand:
    module, _, function = entry.at.partition(":")
    return built(name, getattr(import_module(f"vitfold.cli.{module}"), function))


_SETTINGS: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "context_settings": CONTEXT,
}
app = typer.Typer(
    name="vitfold",
    cls=_Root,
    help="Make Vision Transformers fast without retraining, and say what it cost.",
    **_SETTINGS,
)
_diffusion = typer.Typer(cls=_Diffusion, help="Draw with Diffusion Transformers in less time.", **_SETTINGS)


@_diffusion.callback()
def _draws() -> None:
    pass


app.add_typer(_diffusion, name="diffusion", rich_help_panel="Make")


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


def main() -> None:
    """Run the command line; a polite request to end (SIGTERM) cleans up as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _ended)
    any_character()
    try:
        app()
    except SystemExit as leaving:
        _leave_at_once(leaving.code)
        raise
    except OSError as error:  # --help and --version write outside any command
        try:
            end_of_output(error)
        except typer.Exit as leaving:
            raise SystemExit(leaving.exit_code) from None


def _leave_at_once(code: Any) -> None:
    """End without waiting where Daft has threads: one that is still in Python as that ends aborts the process."""
    if "daft" in sys.modules and (code is None or isinstance(code, int)):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)


def _ended(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
