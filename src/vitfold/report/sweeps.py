"""A sweep's folder as a page shows it: what it swept over, and its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vitfold.artifacts.journal import read_rows
from vitfold.errors import ReportError

_NEEDED = ("recipe", "merge", "quant")


def read_sweep_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a sweep's folder.

    Raises:
        JournalError: naming the line that is no JSON object.
        ReportError: as `check_sweep_rows`.
    """
    return check_sweep_rows(path, read_rows(path))


def check_sweep_rows(path: Path, found: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that were found in this file; the last one counts where a recipe was measured again.

    Raises:
        ReportError: naming the row that cannot be shown.
    """
    rows: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(found, start=1):
        wrong = _wrong(row)
        if wrong is not None:
            raise ReportError(f"{path}, row {number} {wrong}; remove it, and go on with the sweep to measure it again")
        rows[str(row["recipe"])] = dict(row)
    if not rows:
        raise ReportError(f"{path} has no row yet; let the sweep measure one first")
    return list(rows.values())


def _wrong(row: Mapping[str, Any]) -> str | None:
    """What keeps a row from being shown."""
    missing = [key for key in _NEEDED if key not in row]
    if missing:
        return f"lacks {', '.join(missing)}"
    for key in ("latency_ns", "speedup"):
        value = row.get(key)
        if value is not None and not (isinstance(value, Mapping) and isinstance(value.get("median"), int | float)):
            return f"has {key} {value!r}, which must be null or have a median"
    if not isinstance(row["merge"], list) or not all(isinstance(r, int) for r in row["merge"]):
        return f"has merge {row['merge']!r}, which must be a list of r per block"
    return None
