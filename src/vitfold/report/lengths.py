"""What lengths of a sequence take, as a table and a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from vitfold.report.tables import terminal_table

WORTH_IT = 0.01
"""By how much of its time a length has to lie below the line to be named."""


def length_cell(row: Mapping[str, Any]) -> str:
    """Return a length's share of the longest one's time, and by how many per cent it lies beside the line."""
    return f"{row['ratio']:.3f} ({100 * row['beside_line']:+.1f}{'*' if row['stands_out'] else ''})"


def lengths_table(result: Mapping[str, Any]) -> Table:
    """Return the terminal table of `vitfold lengths`, the longest first; `*` marks what stands out."""
    rows = result["lengths"]
    body = [
        (
            str(row["tokens"]),
            f"{row['ratio']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{100 * row['beside_line']:+.1f}{'*' if row['stands_out'] else ' '}",
        )
        for row in rows
    ]
    title = (
        f"{result['source']}, {result['quant']} on {result['target']}, batch {result['batch']}: time as a share of "
        f"that with {rows[0]['tokens']} tokens"
    )
    return terminal_table(("tokens", "time", "95 %", "% beside line"), body, words=(), title=title)


def lengths_sentence(result: Mapping[str, Any]) -> str:
    """Return what follows: which lengths are better than their neighbours say, if any."""
    rows = result["lengths"]
    good = [row for row in rows if row["stands_out"] and row["beside_line"] <= -WORTH_IT]
    spread = max(abs(row["beside_line"]) for row in rows)
    if not good:
        return (
            f"no length is surely cheaper than the line through all says; the largest distance from it is "
            f"{100 * spread:.1f} %: kernels round nothing up that could be seen here"
        )
    named = ", ".join(f"{row['tokens']} ({100 * row['beside_line']:+.1f} %)" for row in good)
    return f"cheaper than the line through all lengths says: {named}; a schedule may end there (--merge R,0,0,...)"
