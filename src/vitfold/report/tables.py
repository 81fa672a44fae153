"""Terminal tables.

Owns columns, units and rounding. Every row shows a speed with its fidelity, or says that none was
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from vitfold.bench.comparison import Row


def ladder(rows: Sequence[Row], *, title: str) -> Table:
    """Return one line per row: work, fidelity, latency with spread, throughput, speed-up, size.

    It fits into 80 columns; `~` marks a noisy latency. Encoders show cosine where classifiers show top-1.
    """
    classifies = any(row.subject.fidelity is not None and row.subject.fidelity.agreement is not None for row in rows)
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("rung", overflow="fold")
    quality_name = "top-1 %" if classifies else "cosine"
    names = ("tokens", "GMACs", quality_name, "agree %", "latency ms", "img/s", "speed-up", "MB")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        fidelity, latency = row.subject.fidelity, row.measurement.latency_ms()
        if classifies:
            quality = percent(None if fidelity is None else fidelity.top1, unit="")
        else:
            quality = _or_dash(None if fidelity is None else fidelity.cosine, ".4f")
        table.add_row(
            row.subject.name,
            _or_dash(row.subject.tokens, "d"),
            _or_dash(None if row.subject.macs is None else row.subject.macs / 1e9, ".2f"),
            quality,
            percent(None if fidelity is None else fidelity.agreement, unit=""),
            f"{'~' if row.measurement.noisy else ''}{latency['median']:.1f} ±{latency['iqr'] / 2:.1f}",
            f"{row.measurement.throughput_ips()['median']:.1f}",
            f"{row.speed_up['median']:.2f}x ±{row.speed_up['iqr'] / 2:.2f}",
            _or_dash(None if row.subject.size_bytes is None else row.subject.size_bytes / 1e6, ".0f"),
        )
    return table


def percent(ratio: float | None, *, unit: str = " %") -> str:
    """Return a ratio as a percentage, or a dash."""
    return _or_dash(None if ratio is None else 100.0 * ratio, ".2f", unit=unit)


def _or_dash(value: Any, form: str, *, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def environment_line(environment: dict[str, Any]) -> str:
    """Return the processor, its instruction sets and the thread count in one line."""
    processor = environment["processor"]
    sets = " ".join(processor["instruction_sets"]) or "no known instruction sets"
    return f"{processor['name']} · {environment['threads']} threads · {sets}"
