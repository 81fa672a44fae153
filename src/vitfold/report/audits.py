"""Tables of audits, from their JSON documents: kernels by block, by kind, and modelled time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from vitfold.report.tables import terminal_table

Audit = Mapping[str, Any]
_MB = 1e-6
_NONE = "-"
GPUS = ("H100", "A100", "L4", "T4")


def summary_table(audits: Sequence[Audit]) -> Table:
    """One row per property, one column per audit."""
    rows: list[tuple[str, Callable[[Audit], str]]] = [
        ("kernels", lambda a: f"{a['kernels']}"),
        ("in a middle block", lambda a: _middle(a, "kernels_per_block", ".0f", 1.0)),
        ("by kind", lambda a: ", ".join(f"{count} {kind}" for kind, count in a["kinds"].items())),
        ("linear layers", lambda a: _counts(a["gemms"])),
        ("attention", _attention),
        ("copies", lambda a: f"{a['copies']}"),
        ("activations moved", lambda a: f"{a['bytes_moved'] * _MB:.1f} MB"),
        ("in a middle block", lambda a: f"{_middle(a, 'bytes_per_block', '.1f', _MB)} MB"),
        ("weights read", lambda a: f"{a['weight_bytes'] * _MB:.1f} MB"),
        ("work", lambda a: f"{a['macs'] * 1e-9:.1f} GMACs"),
        ("engine", lambda a: f"{a['engine_bytes'] * _MB:.1f} MB"),
    ]
    first = audits[0]
    table = Table(title=f"{first['compiler']}, {first['gpu']}, batch {first['batch']}", box=box.SIMPLE_HEAD)
    table.add_column("")
    for audit in audits:
        table.add_column(audit["name"], overflow="fold")
    for name, cell in rows:
        table.add_row(name, *(cell(audit) for audit in audits))
    return table


def overview_columns(gpus: Sequence[str]) -> list[str]:
    """Return the header of the table with one row per audit."""
    return [
        "graph",
        "kernels",
        "a block",
        "linear",
        "attention",
        "copies",
        "MB",
        "engine MB",
        *(f"{g} ms" for g in gpus),
        f"{gpus[0]} lost %",
    ]


def overview_cells(audits: Sequence[Audit], gpus: Sequence[str]) -> list[list[str]]:
    """Return one row per audit: its kernels, what they move, and modelled milliseconds per batch.

    `lost` is what of the tensor cores' time goes to padding and to idle multiprocessors.
    """
    rows = []
    for audit in audits:
        times = [audit["predicted_ms"].get(gpu) for gpu in gpus]
        rows.append(
            [
                audit["name"],
                str(audit["kernels"]),
                _middle(audit, "kernels_per_block", ".0f", 1.0),
                _counts(audit["gemms"]),
                _attention(audit),
                str(audit["copies"]),
                f"{audit['bytes_moved'] * _MB:.0f}",
                f"{audit['engine_bytes'] * _MB:.0f}",
                *(_NONE if ms is None else f"{ms:.2f}" for ms in times),
                lost(audit.get("tensor_cores", {}).get(gpus[0])),
            ]
        )
    return rows


def overview_table(audits: Sequence[Audit], gpus: Sequence[str] = GPUS) -> Table:
    """One row per audit."""
    first = audits[0]
    title = f"{first['compiler']}, {first['gpu']}, batch {first['batch']}; times: {first['prediction']}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in overview_columns(gpus):
        table.add_column(
            column, justify="left" if column in ("graph", "linear", "attention") else "right", overflow="fold"
        )
    for row in overview_cells(audits, gpus):
        table.add_row(*row)
    return table


def block_table(audit: Audit) -> Table:
    """One row per run of equal blocks."""
    table = Table(title=f"{audit['name']}: kernels per block", box=box.SIMPLE_HEAD)
    for column in ("blocks", "kernels", "activations MB"):
        table.add_column(column, justify="right")
    runs: list[tuple[list[str], int, int]] = []
    for block, kernels in audit["kernels_per_block"].items():
        moved = audit["bytes_per_block"][block]
        if runs and runs[-1][1:] == (kernels, moved):
            runs[-1][0].append(block)
        else:
            runs.append(([block], kernels, moved))
    for blocks, kernels, moved in runs:
        name = blocks[0] if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"
        table.add_row(name, str(kernels), f"{moved * _MB:.1f}")
    return table


def prediction_table(audits: Sequence[Audit]) -> Table:
    """One row per GPU: modelled milliseconds, what bounds them, and the ratio to the first audit.

    `padding` and `idle` are shares of the tensor cores' time.
    """
    table = Table(title=f"{audits[0]['prediction']}: ms per batch", box=box.SIMPLE_HEAD)
    table.add_column("GPU")
    for index, audit in enumerate(audits):
        table.add_column(audit["name"], justify="right", overflow="fold")
        table.add_column("bound by")
        table.add_column("padding", justify="right")
        table.add_column("idle", justify="right")
        if index:
            table.add_column("speed-up", justify="right")
    for gpu in dict.fromkeys(gpu for audit in audits for gpu in audit["predicted_ms"]):
        cells, first = [], audits[0]["predicted_ms"].get(gpu)
        for index, audit in enumerate(audits):
            ms = audit["predicted_ms"].get(gpu)
            shares = audit["predicted_bound"].get(gpu, {})
            bound = max(shares, key=shares.__getitem__) if shares else "type not run"
            cells += [_NONE if ms is None else f"{ms:.3f}", f"{bound} {100 * shares[bound]:.0f} %" if shares else bound]
            cores = audit["tensor_cores"].get(gpu)
            cells += [_NONE if cores is None else f"{100 * cores[what]:.1f} %" for what in ("padding", "idle")]
            if index:
                cells.append(_NONE if ms is None or first is None else f"{first / ms:.2f}x")
        table.add_row(gpu, *cells)
    return table


TILE_COLUMNS = ("product", "rows x cols x depth", "type", "tile", "padded", "waves", "last", "us")


def tiles_table(tiles: Mapping[str, Any], model: Mapping[str, Any], title: str) -> Table:
    """One row per product: the tile taken, work padded over work, waves, how much of the GPU the last one fills.

    A tile "64x32/3" shares its depth among three multiprocessors.

    Args:
        tiles: of a document, with its GPU.
        model: the constants that the document names.
    """
    chips = model["gpus"][tiles["gpu"]]["multiprocessors"]
    title = f"{title}: {tiles['gpu']}, {chips} multiprocessors; tiles are assumed, times modelled"
    return terminal_table(TILE_COLUMNS, map(tile_cells, tiles["products"]), words=("product", "type"), title=title)


def tile_cells(row: Mapping[str, Any]) -> list[str]:
    """Return the cells of a product in tiles."""
    product, (rows, columns) = row["product"], row["tile"]
    many = "" if product["matrices"] == 1 else f"{product['matrices']} of "
    shared = "" if row["splits"] == 1 else f"/{row['splits']}"
    return [
        row["name"] if row["count"] == 1 else f"{row['count']} {row['name']}",
        f"{many}{product['rows']}x{product['columns']}x{product['depth']}",
        row["precision"],
        f"{rows}x{columns}{shared}",
        f"{row['padded_ratio']:.2f}x",
        str(row["waves"]),
        f"{100 * row['last_wave']:.0f}%",
        f"{1e3 * row['ms']:.1f}",
    ]


def forecast_columns(document: Mapping[str, Any]) -> list[str]:
    """Return the header of a forecast."""
    like = f"r = {document['rows'][0]['like']}"
    return ["GPU", "batch", "FP16 ms", "unmerged", like, "solved", "over FP16", "lost %", "distortion", "schedule"]


def forecast_cells(document: Mapping[str, Any]) -> list[list[str]]:
    """Return one row per GPU and batch: the solved schedule beside FP16, no merging and the constant schedule.

    `lost` is what of the tensor cores' time goes to padding and to idle multiprocessors.
    """
    from vitfold.schedule import describe_r

    rows = []
    for row in document["rows"]:
        numbers = [f"{row[key]:.3f}" for key in ("ms_fp16", "ms_none", "ms_like", "ms")]
        kept = f"{row['distortion']:.2g} of {row['distortion_like']:.2g}"
        ratio = f"{row['ms_fp16'] / row['ms']:.2f}x"
        wasted = lost(row.get("cores"))
        rows.append([row["gpu"], str(row["batch"]), *numbers, ratio, wasted, kept, describe_r(row["r"])])
    return rows


def forecast_table(document: Mapping[str, Any]) -> Table:
    """One row per GPU and batch."""
    title = f"{document['source']}, {document['target']}: {document['prediction']}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in forecast_columns(document):
        table.add_column(column, justify="left" if column in ("GPU", "schedule") else "right", overflow="fold")
    for row in forecast_cells(document):
        table.add_row(*row)
    return table


def lost(cores: Mapping[str, Any] | None) -> str:
    """Return the shares of the tensor cores' time that padding and idle multiprocessors take, in per cent."""
    if cores is None:
        return _NONE
    return f"{100 * cores['padding']:.0f} + {100 * cores['idle']:.0f}"


def _attention(audit: Audit) -> str:
    found = dict(audit["attention"])
    fused, unfused = found.pop("fused"), found.pop("unfused")
    types = f" ({_counts(found)})" if found else ""
    return f"{fused} fused{types}, {unfused} not"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "none"


def _middle(audit: Audit, key: str, form: str, scale: float) -> str:
    values = list(audit[key].values())
    if not values:
        return _NONE
    value = sorted(values)[len(values) // 2]
    return format(value * scale, form)
