"""Numbers of tokens on GPUs: modelled times, and measured ones beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.table import Table

from vitfold.report.audits import lost, tiles_table
from vitfold.report.tables import terminal_table

Row = Mapping[str, Any]
LENGTHS_SENTENCE = (
    "{source}: work and time are shares of the longest length's, padding and idle multiprocessors shares of the tensor "
    "cores' time; {prediction}"
)


def lengths_columns(batches: Sequence[int]) -> list[str]:
    """Return the header of modelled lengths on one GPU."""
    return ["tokens", "work", *(f"batch {batch}" for batch in batches)]


def lengths_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return one row per length on one GPU: work and time, as shares of the longest one's, by batch.

    In brackets: what of the tensor cores' time goes to padding and to idle multiprocessors, in per cent.
    """
    batches, found = batches_of(rows), []
    for tokens, of in groupby(sorted(rows, key=lambda row: -row["tokens"]), key=lambda row: row["tokens"]):
        here = {row["batch"]: row for row in of}
        cells = [f"{here[batch]['ratio']:.3f} ({lost(here[batch])})" for batch in batches]
        found.append([str(tokens), f"{here[batches[0]]['work_ratio']:.3f}", *cells])
    return found


def batches_of(rows: Sequence[Row]) -> list[int]:
    """Return the batches of rows, as they come."""
    return list(dict.fromkeys(row["batch"] for row in rows))


def lengths_tables(document: Mapping[str, Any]) -> Iterator[Table]:
    """Yield a table per GPU, and of a single row the tiles of its products."""
    rows = document["lengths"]
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        of = [row for row in rows if row["gpu"] == gpu]
        title = f"{gpu}, {document['target']}: a block beside one of {of[0]['tokens']} tokens (padding + idle %)"
        yield terminal_table(lengths_columns(batches_of(of)), lengths_cells(of), words=(), title=title)
    if len(rows) == 1:
        (row,) = rows
        title = f"a block of {row['tokens']} tokens, batch {row['batch']}"
        yield tiles_table({"gpu": row["gpu"], "products": row["products"]}, document["model"], title)


MEASURED_COLUMNS = (
    "product",
    "batch",
    "tokens",
    "measured ms",
    "modelled",
    "measured ratio",
    "modelled",
    "without tiles",
)


def measured_cells(document: Mapping[str, Any]) -> list[list[str]]:
    """Return one row per product or model and length; ratios are to the longest length of the same one."""
    return [
        [
            row["product"],
            str(row["batch"]),
            str(row["tokens"]),
            f"{row['measured_ms']:.4f}",
            f"{row['modelled_ms']:.4f}",
            *(f"{row[key]:.3f}" for key in ("measured_ratio", "modelled_ratio", "roofline_ratio")),
        ]
        for row in document["measured"]
    ]


def measured_table(document: Mapping[str, Any]) -> Table:
    """Return measured times beside modelled ones."""
    table = Table(title=f"{measured_sentence(document)}; modelled: {document['prediction']}", box=box.SIMPLE_HEAD)
    for column in MEASURED_COLUMNS:
        table.add_column(column, justify="left" if column == "product" else "right")
    for row in measured_cells(document):
        table.add_row(*row)
    return table


def measured_sentence(document: Mapping[str, Any]) -> str:
    """Say on which GPU was measured, and how far the model's ratios are off with tiles and without."""
    errors = document["median_error"]
    device = document["measured_on"]["gpu"]
    if errors["tiles"] is None:
        return f"measured on {device}, at one length"
    return (
        f"measured on {device}; ratios to the longest are off by {100 * errors['tiles']:.1f} % with tiles and "
        f"waves, {100 * errors['roofline']:.1f} % without (median)"
    )
