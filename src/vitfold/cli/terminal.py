"""What commands share with the terminal: results on stdout, everything else on stderr.

Owns exit codes (0 done, 1 the user can mend it, 2 usage, 3 a gate failed), progress bars and JSON.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from vitfold.errors import GateError, ImageWarning, VitfoldError
from vitfold.ordinary import write_whole

if TYPE_CHECKING:
    from vitfold.quant import Progress as Report

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_GATE = 3
EXIT_INTERRUPTED = 130

out = Console()
log = Console(stderr=True)

F = TypeVar("F", bound=Callable[..., Any])


class _Notes(logging.Handler):
    """Shows what the library warns of as remarks, each once."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._shown:
            self._shown.add(message)
            note(message)


def command(function: F) -> F:
    """Turn errors that the user can mend into one message and an exit code, without a traceback."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        notes = _Notes()
        logging.getLogger("vitfold").addHandler(notes)
        try:
            with _remarks_on_images():
                return function(*args, **kwargs)
        except GateError as error:
            fail(str(error), EXIT_GATE)
        except VitfoldError as error:
            fail(str(error), EXIT_ERROR)
        except KeyboardInterrupt:
            fail("interrupted; nothing was left half-written", EXIT_INTERRUPTED)
        except BrokenPipeError:
            sys.stderr.close()
            raise typer.Exit(EXIT_ERROR) from None
        finally:
            logging.getLogger("vitfold").removeHandler(notes)

    return wrapped  # type: ignore[return-value]


@contextmanager
def _remarks_on_images() -> Iterator[None]:
    """Print what is odd about images as remarks, each once, and not as Python prints warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", ImageWarning)
        usual, said = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
            if issubclass(category, ImageWarning):
                if str(message) not in said:
                    note(f"warning: {message}")
                said.add(str(message))
            else:
                usual(message, category, *args, **kwargs)

        warnings.showwarning = show
        yield


def fail(message: str, code: int) -> None:
    """Print an error and leave with this code."""
    log.print(f"[bold red]error:[/] {_escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(code)


def note(message: str) -> None:
    """Print a remark on stderr."""
    log.print(f"[dim]{_escape(message)}[/]", soft_wrap=True, highlight=False)


def skipped(message: str) -> None:
    """Say that an image was left out."""
    note(f"skipped: {message}")


def _escape(message: str) -> str:
    return message.replace("[", "\\[")


def print_json(value: Any) -> None:
    """Print one JSON document on stdout, and nothing else."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document.

    Raises:
        VitfoldError: if the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, and the folder that it lies in.

    Raises:
        VitfoldError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        raise VitfoldError(f"cannot write {path}: {error}; choose another file") from None


@contextmanager
def steps(title: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner with the current step and the time it takes; hand out the function that names it."""
    with _naming(title, SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()) as (say, _):
        yield say


@contextmanager
def working(title: str) -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """Like `steps`, with a bar for steps that count: hand out the function that names the step, and one for the bar.

    The second takes how many items are done and of how many.
    """
    with _naming(title, SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as both:
        yield both


@contextmanager
def _naming(title: str, *columns: ProgressColumn) -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    with Progress(*columns, console=log, transient=True, disable=not log.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        last = [""]

        def say(step: str) -> None:
            progress.update(task, description=f"{title}: {step}", total=None)
            kind = re.sub(r" \d+/\d+$", "", step.partition(": ")[0])
            if not log.is_terminal and kind != last[0]:
                last[0] = kind
                note(f"{title}: {kind}")

        yield say, lambda done, total: progress.update(task, completed=done, total=total)


def counted(say: Callable[[str], None], bar: Callable[[int, int], None], total: int) -> Report:
    """Return where calibration reports to: steps by name, images on the bar."""
    from vitfold.quant import Progress as Report

    done = [0]

    def step(text: str) -> None:
        done[0] = 0
        say(text)

    def advance(count: int) -> None:
        done[0] += count
        bar(done[0], total)

    return Report(step=step, advance=advance)


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what foreign code prints on stdout (download notices) to stderr: stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar over `total` items; hand out the function that advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=log, transient=True, disable=not log.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
