"""The rows of a sweep as its folder holds them: `rows.jsonl`, one JSON object per line.

Owns the reading and its errors, which name the line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitfold.errors import ReportError

ROWS = "rows.jsonl"
_NEEDED = ("recipe", "merge", "quant")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a sweep; the last one counts where a recipe was measured again.

    Raises:
        ReportError: naming the file and the line that is no row.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"cannot read {path}: {error}; run the sweep again") from None
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        if line.strip():
            row = _row(path, number, line)
            rows[str(row["recipe"])] = row
    if not rows:
        raise ReportError(f"{path} has no row yet; let the sweep measure one first")
    return list(rows.values())


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    cure = "remove the line, and go on with the sweep to measure it again"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}, line {number} is not JSON ({error}); {cure}") from None
    if not isinstance(row, dict):
        raise ReportError(f"{path}, line {number} is no row but {type(row).__name__}; {cure}")
    missing = [key for key in _NEEDED if key not in row]
    if missing:
        raise ReportError(f"{path}, line {number} lacks {', '.join(missing)}; {cure}")
    for key in ("latency_ns", "speedup"):
        value = row.get(key)
        if value is not None and not (isinstance(value, Mapping) and isinstance(value.get("median"), int | float)):
            raise ReportError(f"{path}, line {number}: {key} must be null or have a median, found {value!r}; {cure}")
    if not isinstance(row["merge"], list) or not all(isinstance(r, int) for r in row["merge"]):
        raise ReportError(f"{path}, line {number}: merge must be a list of r per block, found {row['merge']!r}; {cure}")
    return row
