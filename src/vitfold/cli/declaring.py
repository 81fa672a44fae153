"""How a command is declared: a function whose groups of options are dataclasses, and a help of one screen."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from vitfold.cli.terminal import guarded

CONTEXT = {"help_option_names": ["-h", "--help"]}


class Shown(TyperCommand):
    """A command whose `--help` shows some of its options and examples, and whose `--help-all` shows all options."""

    short: frozenset[str] = frozenset()
    brief: Mapping[str, str] = {}
    examples: tuple[str, ...] = ()
    everything = False
    _helping = False

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse arguments; `--help-all` is the help with everything in it."""
        if "--help-all" in args:
            self.everything, args = True, ["--help"]
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters to parse, or, while help is printed, those to show."""
        found: list[Any] = super().get_params(ctx)
        if not self._helping or self.everything or not self.short:
            return found
        always = {"help", "help_all"}
        chosen = [one for one in found if one.param_type_name == "argument" or one.name in self.short | always]
        return [self._brief(one) for one in chosen]

    def _brief(self, parameter: Any) -> Any:
        """Return a parameter for the short help: on no panel of its own, explained in some words."""
        shown = copy(parameter)
        shown.rich_help_panel = None
        shown.help = self.brief.get(parameter.name, parameter.help)
        return shown

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then examples."""
        self._helping = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._helping = False
        if self.examples:
            typer.echo("Examples:")
            for line in self.examples:
                typer.echo(f"  {line}")


_HelpAll = Annotated[bool, typer.Option("--help-all", help="Show every option, by topic.")]


def command(
    *, shown: str = "", brief: Mapping[str, str] | None = None, examples: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declare a command.

    A parameter whose type is a dataclass stands for one option per field, annotated as options are; the function gets
    the dataclass. `shown` names the options of a short help, separated by spaces, and `brief` explains some of them
    in fewer words; without `shown` the help shows all.
    Errors that the user can mend become one message and an exit code.
    """

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
        parameters: list[inspect.Parameter] = []
        for one in inspect.signature(function).parameters.values():
            if one.name in groups:
                parameters += _options(groups[one.name])
            else:
                parameters.append(one.replace(annotation=hints[one.name], kind=inspect.Parameter.KEYWORD_ONLY))
        if shown:
            kind = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter("help_all", kind, default=False, annotation=_HelpAll))

        @guarded
        def run(**given: Any) -> None:
            given.pop("help_all", None)
            for name, group in groups.items():
                given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
            function(**given)

        functools.update_wrapper(run, function)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        run.__shown__ = frozenset(shown.split()), brief or {}, examples  # type: ignore[attr-defined]
        return run

    return declare


def _options(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        kind = inspect.Parameter.KEYWORD_ONLY
        yield inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name])


def built(name: str, function: Callable[..., None]) -> TyperCommand:
    """Return the command of a declared function, as typer runs it."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name, cls=Shown, context_settings=CONTEXT)(function)
    made = typer.main.get_command(app)
    assert isinstance(made, Shown)
    made.short, made.brief, made.examples = getattr(function, "__shown__", (frozenset(), {}, ()))
    return made
