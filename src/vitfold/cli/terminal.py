"""What commands share with the terminal: results on stdout, everything else on stderr.

Exit codes are 0 (done), 1 (the user can mend it), 2 (usage) and 3 (a gate failed). Text is printed as it is: nothing
in it is markup, and what a terminal would act on is shown as an escape.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from vitfold.cli.lines import Lines
from vitfold.errors import GateError, ImageWarning, VitfoldError
from vitfold.progress import Advance, Say
from vitfold.storage.ordinary import write_whole
from vitfold.visible import visible

if TYPE_CHECKING:
    from vitfold.quant import Progress as Report

EXIT_ERROR = 1
EXIT_GATE = 3
EXIT_INTERRUPTED = 130

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class PlainConsole(Console):
    """A console that prints text as it is, without markup, and what is no printable character as an escape."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **kwargs: Any) -> Text:
        """Return one line of text; called for all strings, those in tables and titles too."""
        shown = visible(text).encode(self.encoding, "backslashreplace").decode(self.encoding)
        return super().render_str(shown, **kwargs)


out = PlainConsole()
log = PlainConsole(stderr=True)

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


def guarded(function: F) -> F:
    """Turn errors that the user can mend into one message and an exit code, without a traceback."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        any_character()
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
        except OSError as error:
            end_of_output(error)
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


def any_character() -> None:
    """Let stdout and stderr take text that their encoding lacks: it is written as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def end_of_output(error: OSError) -> NoReturn:
    """Leave where output cannot be written: quietly if nobody reads it, with one line if there is no room.

    Raises:
        OSError: the given error, if it is of another kind.
    """
    unread = isinstance(error, BrokenPipeError)
    if not unread and (error.errno not in FULL or error.filename is not None):
        raise error
    for stream in (sys.stdout, sys.stderr) if unread else (sys.stdout,):
        _drop(stream)
    if not unread:
        fail(f"cannot write: {error.strerror}; free space, or send the output elsewhere", EXIT_ERROR)
    raise typer.Exit(EXIT_ERROR)


def _drop(stream: Any) -> None:
    """Send what a stream still holds to nowhere: Python would fail once more at the end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def fail(message: str, code: int) -> NoReturn:
    """Print an error on one line and leave with this code."""
    try:
        log.print(Text.assemble(("error:", "bold red"), " ", visible(message)), soft_wrap=True)
    except OSError:  # nobody can be told
        _drop(sys.stderr)
    raise typer.Exit(code)


def note(message: str) -> None:
    """Print a remark of one line on stderr."""
    log.print(Text(visible(message), style="dim"), soft_wrap=True)


def heading(name: str, rest: str = "", *, style: str = "bold") -> None:
    """Print a line on stdout whose beginning stands out."""
    out.print(Text.assemble((visible(name), style), visible(rest)), soft_wrap=True)


def skipped(message: str) -> None:
    """Say that an image was left out."""
    note(f"skipped: {message}")


def print_json(value: Any) -> None:
    """Print one JSON document on stdout, and nothing else."""
    sys.stdout.write(json.dumps(value, indent=1, allow_nan=False) + "\n")
    sys.stdout.flush()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON document.

    Raises:
        VitfoldError: if the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_samples(path: Path | None, value: Any) -> None:
    """Write a JSON document with raw samples where a file is named, and say so.

    Raises:
        VitfoldError: if the file cannot be written.
    """
    if path is not None:
        write_json(path, value)
        note(f"raw samples: {path}")


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
def steps(title: str) -> Iterator[Say]:
    """Show a spinner with the current step and the time it takes; hand out the function that names it."""
    with _naming(title, SpinnerColumn(), _described(), TimeElapsedColumn()) as (say, _):
        yield say


@contextmanager
def working(title: str) -> Iterator[tuple[Say, Callable[[int, int], None]]]:
    """Like `steps`, with a bar for steps that count: hand out the function that names the step, and one for the bar.

    The second takes how many items are done and of how many.
    """
    columns = (SpinnerColumn(), _described(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with _naming(title, *columns) as both:
        yield both


@contextmanager
def _naming(title: str, *columns: ProgressColumn) -> Iterator[tuple[Say, Callable[[int, int], None]]]:
    with Progress(*columns, console=log, transient=True, disable=not log.is_terminal) as progress:
        task = progress.add_task(visible(title), total=None)
        lines = None if log.is_terminal else Lines(title, say=note)

        def say(step: str) -> None:
            progress.update(task, description=visible(f"{title}: {step}"), total=None)
            if lines is not None:
                lines.step(step)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)
            if lines is not None:
                lines.advance(done, total)

        yield say, advance


def _described() -> TextColumn:
    return TextColumn("{task.description}", markup=False)


def counted(say: Say, bar: Callable[[int, int], None], total: int) -> Report:
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


class _Rate(ProgressColumn):
    """Items a second, of the last while."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self._unit}/s")


@contextmanager
def counting(title: str, total: int, *, unit: str | None = None) -> Iterator[Advance]:
    """Show a bar over `total` items, with their rate if they have a unit; hand out the function that advances it."""
    columns = (_described(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    rate = () if unit is None else (_Rate(unit),)
    with Progress(*columns, *rate, console=log, transient=True, disable=not log.is_terminal) as progress:
        task = progress.add_task(visible(title), total=total)
        lines, done = None if log.is_terminal else Lines(title, say=note, unit=unit), [0]

        def advance(count: int) -> None:
            progress.advance(task, count)
            done[0] += count
            if lines is not None:
                lines.advance(done[0], total)

        yield advance
