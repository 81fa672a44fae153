"""Tables of `vitfold profile`, from its JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from vitfold.report.tables import environment_line, number, terminal_table


def profile_heading(result: Mapping[str, Any]) -> str:
    """What ran where, the time of a run with and without the profiler, and the machine's ceiling."""
    latency, ceiling = result["latency_ms"], result["ceiling"]
    lines = [
        environment_line(result["environment"]),
        f"{result['bundle']} on {result['engine']}, batch {result['batch']}: {latency['plain']:.2f} ms a run; "
        f"{latency['profiled']:.2f} ms with the profiler ({100 * result['overhead_ratio']:+.0f} %), of which nodes "
        f"{result['nodes_ms']:.2f} ms",
    ]
    if ceiling is not None:
        lines.append(
            f"this machine reaches {ceiling['float_gmacs_per_s']:.0f} GMAC/s in float, "
            f"{ceiling['integer_gmacs_per_s']:.0f} in integers, and copies {ceiling['copy_gbytes_per_s']:.1f} GB/s"
        )
    return "\n".join(lines)


def kind_table(result: Mapping[str, Any]) -> Table:
    """One row per kind of operation that ran."""
    header = ("kind", "ms", "%", "nodes", "GMACs", "int %", "GMAC/s", "GB/s", "of ceiling")
    rows = [
        (
            row["kind"],
            f"{row['ms']:.2f}",
            f"{100 * row['ratio']:.1f}",
            str(row["nodes"]),
            number(row["macs"] or None, ".2f", scale=1e-9),
            number(row["integer_macs"] / row["macs"] if row["macs"] else None, ".0f", scale=100),
            number(row["gmacs_per_s"], ".0f"),
            number(row["gbytes_per_s"], ".1f"),
            "-" if row["ceiling_ratio"] is None else f"{100 * min(1.0, row['ceiling_ratio']):.0f} %",
        )
        for row in result["kinds"]
        if row["nodes"]
    ]
    return terminal_table(header, rows, words=("kind",))


def block_table(result: Mapping[str, Any]) -> Table:
    """One row per block, milliseconds by kind."""
    kinds = [row["kind"] for row in result["kinds"] if row["nodes"]]
    short = {"normalization": "norm", "attention": "attn", "activation": "act", "quantize": "q/dq"}
    rows = [
        (
            row["block"].removeprefix("blocks."),
            *(number(row["ms"].get(kind), ".2f") for kind in kinds),
            f"{sum(row['ms'].values()):.2f}",
        )
        for row in result["blocks"]
    ]
    return terminal_table(["block", *(short.get(kind, kind) for kind in kinds), "ms"], rows, words=("block",))
