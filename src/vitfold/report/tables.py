"""Tables for the terminal and for Markdown, from the JSON rows of `bench` and `demo`.

Owns columns, units and rounding. Every row shows a speed with its fidelity, or says that none was
measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

RowDict = Mapping[str, Any]
SCOPES = {"engine": "engine only", "end_to_end": "end to end, file to label"}


def columns(rows: Sequence[RowDict]) -> list[str]:
    """Return the header; encoders show cosine where classifiers show top-1."""
    return ["rung", "tok.", "GMACs", _quality(rows), "agree %", "latency ms", "img/s", "speed-up", "MB"]


def _quality(rows: Sequence[RowDict]) -> str:
    measured = [row["fidelity"] for row in rows if row["fidelity"] is not None]
    embeds = measured and all(fidelity["agreement"] is None for fidelity in measured)
    return "cosine" if embeds else "top-1 %"


def cells(rows: Sequence[RowDict]) -> list[list[str]]:
    """Return the formatted cells: medians, with half the interquartile range; `~` marks a noisy latency."""
    embeds = _quality(rows) == "cosine"
    result = []
    for row in rows:
        fidelity = row["fidelity"] or {}
        latency, speed_up = row["latency_ms"], row["speed_up"]
        quality = number(fidelity.get("cosine"), ".4f") if embeds else percent(fidelity.get("top1"), unit="")
        result.append(
            [
                str(row["bundle"]),
                number(row["tokens"], "d"),
                number(row["macs"], ".2f", scale=1e-9),
                quality,
                percent(fidelity.get("agreement"), unit=""),
                f"{'~' if row['noisy'] else ''}{latency['median']:.1f} ±{latency['iqr'] / 2:.1f}",
                f"{row['throughput_ips']['median']:.1f}",
                f"{speed_up['median']:.2f}x ±{speed_up['iqr'] / 2:.2f}",
                number(row["size_bytes"], ".0f", scale=1e-6),
            ]
        )
    return result


def ladder(rows: Sequence[RowDict], *, title: str) -> Table:
    """Return a terminal table that fits into 80 columns where names are short."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns(rows):
        left = name == "rung"
        table.add_column(name, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for row in cells(rows):
        table.add_row(*row)
    return table


def markdown(rows: Sequence[RowDict]) -> str:
    """Return the same table in Markdown."""
    header = columns(rows)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in cells(rows)]
    return "\n".join(lines)


def sensitivity_table(rows: Sequence[RowDict], *, title: str) -> Table:
    """Return the terminal table of `vitfold sensitivity`, the costliest site first."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("#", "site", "SQNR dB", "noise %", "agree %", "MACs %"):
        table.add_column(name, justify="left" if name == "site" else "right", no_wrap=True)
    for rank, row in enumerate(rows, start=1):
        table.add_row(
            str(rank),
            row["site"],
            number(row["sqnr_db"], ".1f"),
            percent(row["noise_ratio"], unit=""),
            percent(row["agreement"], unit=""),
            percent(row["macs_ratio"], unit=""),
        )
    return table


def percent(ratio: int | float | None, *, unit: str = " %") -> str:
    """Return a ratio as a percentage, or a dash."""
    return number(ratio, ".2f", scale=100.0) + (unit if ratio is not None else "")


def number(value: int | float | None, form: str, *, scale: int | float = 1) -> str:
    """Return a scaled number, or a dash where it was not measured."""
    return "-" if value is None else f"{value * scale:{form}}"


def environment_line(environment: Mapping[str, Any]) -> str:
    """Return the processor, its instruction sets and the thread count in one line."""
    processor = environment["processor"]
    sets = " ".join(processor["instruction_sets"]) or "no known instruction sets"
    return f"{processor['name']}, {environment['threads']} threads, {sets}"
