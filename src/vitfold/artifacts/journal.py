"""Rows appended to a file one by one, as JSON lines: whoever is killed loses at most the row being written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from vitfold.errors import JournalError
from vitfold.storage.locks import held
from vitfold.storage.ordinary import check_ordinary, read_ordinary

HEAD = "sweep.json"
"""What was swept over, beside the rows."""
ROWS = "rows.jsonl"
MOST_BYTES = 2**30
_CURE = "remove the line to have it measured again, or give another folder"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, none if there is no file; a last line that was cut short counts as not written.

    Raises:
        JournalError: naming the line that is no row.
    """
    if not path.exists():
        return []
    try:
        content = read_ordinary(path, MOST_BYTES)
        # What was cut short may end within a character.
        whole = content[: content.rfind(b"\n") + 1].decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JournalError(f"cannot read {path}: {error}; give another folder") from None
    return [_row(path, number, line) for number, line in enumerate(whole.split("\n"), start=1) if line.strip()]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row, behind what is left of one that was cut short.

    Raises:
        JournalError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            check_ordinary(path)
        with path.open("a+b") as file:
            file.seek(0)
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise JournalError(f"cannot write {path}: {error}; choose another folder") from None


@contextmanager
def alone(rows: Path) -> Iterator[None]:
    """Be the only command that works in the folder of these rows.

    Raises:
        JournalError: if another one does, or the folder cannot be written.
    """
    busy = f"another command works in {rows.parent}; wait for it: the same command goes on from its rows"
    with ExitStack() as stack:
        try:
            stack.enter_context(held(rows, busy))
        except BlockingIOError:
            raise JournalError(busy) from None
        except OSError as error:
            raise JournalError(f"cannot write {rows}: {error}; choose another folder") from None
        yield


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise JournalError(f"{path}, line {number} is not JSON ({error}); {_CURE}") from None
    if not isinstance(row, dict):
        raise JournalError(f"{path}, line {number} is no row but {type(row).__name__}; {_CURE}")
    return row
