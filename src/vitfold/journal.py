"""Rows appended to a file one by one, as JSON lines: whoever is killed loses at most the row being written.

Owns the file, how a sweep's folder calls it, and what can be wrong with it. What a row holds is the caller's choice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitfold.errors import JournalError

HEAD = "sweep.json"
"""What was swept over, beside the rows."""
ROWS = "rows.jsonl"
_CURE = "remove the line to have it measured again, or give another folder"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, none if there is no file; a last line that was cut short counts as not written.

    Raises:
        JournalError: naming the line that is no row.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise JournalError(f"cannot read {path}: {error}; give another folder") from None
    whole = text[: text.rfind("\n") + 1]
    return [_row(path, number, line) for number, line in enumerate(whole.splitlines(), start=1) if line.strip()]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row, behind what is left of one that was cut short.

    Raises:
        JournalError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            content = file.read()
            if content and not content.endswith(b"\n"):
                file.truncate(content.rfind(b"\n") + 1)
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise JournalError(f"cannot write {path}: {error}; choose another folder") from None


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise JournalError(f"{path}, line {number} is not JSON ({error}); {_CURE}") from None
    if not isinstance(row, dict):
        raise JournalError(f"{path}, line {number} is no row but {type(row).__name__}; {_CURE}")
    return row
