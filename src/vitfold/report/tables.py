"""Tables for the terminal and for Markdown, from the JSON rows of `bench` and `demo`.

Every row shows a speed with its fidelity, or says that none was measured.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from rich import box
from rich.table import Table

from vitfold.model.spec import MAPS

RowDict = Mapping[str, Any]
_SHOWN_ENGINES = {"simulation": "simulated"}
SCOPES = {
    "engine": "engine only",
    "end_to_end": "end to end, file to label",
    "decoded_ahead": "end to end, images decoded ahead by threads",
}


def terminal_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    words: Sequence[str] = (),
    title: str | None = None,
    wraps: bool = False,
) -> Table:
    """Return a terminal table; columns of `words` stand left, figures right, and only these may wrap where they do."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in header:
        left = name in words
        table.add_column(
            name,
            justify="left" if left else "right",
            no_wrap=left or not wraps,
            overflow="fold" if wraps else "ellipsis",
        )
    for row in rows:
        table.add_row(*row)
    return table


def columns(rows: Sequence[RowDict]) -> list[str]:
    """Return the header; where classifiers show top-1, encoders show cosine, other heads their own errors."""
    return ["variant", "tok.", "GMACs", _quality(rows), "agree %", "latency ms", "img/s", "speed-up", "MB"]


def _quality(rows: Sequence[RowDict]) -> str:
    measured = [row["fidelity"] for row in rows if row["fidelity"] is not None]
    if measured and all(fidelity.get("probability_error") is not None for fidelity in measured):
        return "diff p %"
    if measured and all(fidelity.get("relative_error") is not None for fidelity in measured):
        return "error %"
    if measured and all(fidelity.get("miou") is not None for fidelity in measured):
        return "mIoU %"
    embeds = measured and all(fidelity["agreement"] is None for fidelity in measured)
    return "cosine" if embeds else "top-1 %"


def _quality_cell(fidelity: Mapping[str, Any], quality: str) -> str:
    if quality == "cosine":
        return number(fidelity.get("cosine"), ".4f")
    key = {"diff p %": "probability_error", "error %": "relative_error", "mIoU %": "miou"}.get(quality, "top1")
    return percent(fidelity.get(key), unit="")


def fidelity_lines(fidelity: Mapping[str, Any], *, head: str, unfolded: float | None = None) -> list[tuple[str, str]]:
    """Return names and figures of a fidelity, those that a head of this kind has."""
    lines = [("top-1", percent(fidelity["top1"])), ("top-5", percent(fidelity["top5"]))]
    if head in ("multi_label", "regression", *MAPS):
        lines = []
    if head not in ("regression", "map"):
        of = {"multi_label": " of labels", "segmentation": " of pixels"}.get(head, "")
        lines.append(("agreement", percent(fidelity["agreement"]) + of))
    if fidelity.get("miou") is not None:
        lines.append(("mIoU", f"{percent(fidelity['miou'])} with the unfolded model's classes"))
    if unfolded is not None:
        lines.append(("unfolded", f"{percent(unfolded)} top-1"))
    if fidelity.get("probability_error") is not None:
        lines.append(("diff p", f"{percent(fidelity['probability_error'])} mean difference of probabilities"))
    if fidelity.get("relative_error") is not None:
        lines.append(("error", f"{percent(fidelity['relative_error'])} of the mean absolute value"))
    if fidelity["cosine"] is not None or head in ("single_label", "features"):
        lines.append(("cosine", number(fidelity["cosine"], ".5f")))
    if head in ("multi_label", "regression", *MAPS) and fidelity["reference"] is not None:
        sqnr = fidelity["sqnr_db"]
        lines.append(("SQNR", "equal" if sqnr is None else f"{sqnr:.1f} dB"))
    return lines


def cells(rows: Sequence[RowDict]) -> list[list[str]]:
    """Return the formatted cells: medians, with half the interquartile range; `~` marks a noisy latency.

    A row that was not timed has dashes for its speed.
    """
    shown = _quality(rows)
    result = []
    for row in rows:
        fidelity = row["fidelity"] or {}
        latency, rate, speed_up = row["latency_ms"], row["throughput_ips"], row["speed_up"]
        quality = _quality_cell(fidelity, shown)
        result.append(
            [
                str(row["bundle"]),
                number(row["tokens"], "d"),
                number(row["macs"], ".2f", scale=1e-9),
                quality,
                percent(fidelity.get("agreement"), unit=""),
                *(
                    ("-", "-", "-")
                    if latency is None
                    else (
                        f"{'~' if row['noisy'] else ''}{latency['median']:.1f} ±{latency['iqr'] / 2:.1f}",
                        f"{rate['median']:.1f}",
                        f"{speed_up['median']:.2f}x ±{speed_up['iqr'] / 2:.2f}",
                    )
                ),
                number(row["size_bytes"], ".0f", scale=1e-6),
            ]
        )
    return result


def ladder(rows: Sequence[RowDict], *, title: str) -> Table:
    """Return a terminal table; where 80 columns are too few, figures wrap and names do not."""
    return terminal_table(columns(rows), cells(rows), words=("variant",), title=title, wraps=True)


def markdown(rows: Sequence[RowDict]) -> str:
    """Return the same table in Markdown."""
    header = columns(rows)
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in cells(rows)]
    return "\n".join(lines)


def sensitivity_table(rows: Sequence[RowDict], *, title: str) -> Table:
    """Return the terminal table of `vitfold sensitivity`, the costliest site first."""
    header = ("#", "site", "SQNR dB", "noise %", "agree %", "MACs %")
    body = [
        (
            str(rank),
            row["site"],
            number(row["sqnr_db"], ".1f"),
            percent(row["noise_ratio"], unit=""),
            percent(row["agreement"], unit=""),
            percent(row["macs_ratio"], unit=""),
        )
        for rank, row in enumerate(rows, start=1)
    ]
    return terminal_table(header, body, words=("site",), title=title)


SWEEP_COLUMNS = ["recipe", "top-1 %", "agree %", "drop, points", "latency ms", "over float", "MB"]


def sweep_cells(rows: Sequence[RowDict]) -> list[list[str]]:
    """Return the cells of a sweep or a search: accuracy, its drop, speed-up over float with its interval."""
    return [
        [
            row["recipe"],
            percent(row["top1"], unit=""),
            percent(row["top1_agreement"], unit=""),
            "failed" if row["error"] else "-" if row["drop"] is None else drop_text(row["drop"]),
            "-" if row["latency_ns"] is None else _latency_text(row),
            "-" if row["speedup"] is None else ratio_text(row["speedup"]),
            "-" if row["size_bytes"] is None else f"{row['size_bytes'] / 1e6:.0f}",
        ]
        for row in rows
    ]


def sweep_table(rows: Sequence[RowDict]) -> Table:
    """Return the terminal table of a sweep or a search; throughput with images decoded ahead where it was timed."""
    header, body = list(SWEEP_COLUMNS), sweep_cells(rows)
    if any(row.get("decoded_ahead") for row in rows):
        header += ["ahead img/s", "ahead over float"]
        body = [[*cells, *_ahead_cells(row.get("decoded_ahead"))] for cells, row in zip(body, rows, strict=True)]
    return terminal_table(header, body, words=("recipe",), wraps=True)


def _ahead_cells(ahead: Mapping[str, Any] | None) -> list[str]:
    if ahead is None:
        return ["-", "-"]
    rate = ahead["throughput_ips"]
    return [f"{rate['mean']:.1f} ±{rate['std']:.1f}", ratio_text(ahead["speedup"])]


def _latency_text(row: RowDict) -> str:
    return f"{'~' if row['noisy'] else ''}{row['latency_ns']['median'] / 1e6:.1f}"


def ratio_text(ratio: Mapping[str, float]) -> str:
    """Return a speed-up with its 95 % interval."""
    return f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def drop_text(drop: Mapping[str, Any]) -> str:
    """Return a drop in points with its 95 % interval."""
    return f"{100 * drop['drop']:+.2f} [{100 * drop['low']:+.2f}, {100 * drop['high']:+.2f}]"


def accuracy_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of a ladder: one line per method, mean and spread of top-1 over seeds per bit width.

    Encoders show SQNR in decibels. Published figures stand in brackets where the model has some.
    """
    rows = [row for row in result["rows"] if row["fidelity"] is not None]
    schemes = list(dict.fromkeys(row["scheme"] for row in rows))
    named = [(_variant(row), row["engine"], row["scheme"]) for row in rows]
    lines = list(dict.fromkeys((name, engine) for name, engine, scheme in named if scheme == "W8A8"))
    lines += [(name, "simulation") for name in dict.fromkeys(name for name, _, _ in named)]
    published = published_figures(result["source"])
    body = []
    for method, engine in dict.fromkeys(lines):
        shown = []
        for scheme in schemes:
            chosen = [
                row["fidelity"]
                for row in rows
                if (_variant(row), row["scheme"], row["engine"]) == (method, scheme, engine)
            ]
            figure = published.get(scheme, {}).get(method)
            shown.append(_spread(chosen) + (f" [{figure:.2f}]" if figure is not None and chosen else ""))
        if any(cell != "-" for cell in shown):
            body.append([method, _SHOWN_ENGINES.get(engine, engine), *shown])
    return ["method", "run by", *schemes], body


def _variant(row: RowDict) -> str:
    """The method, the remedy against sinks and the minutes of polishing where there are some."""
    name = f"{row['method']} + {row['registers']}" if "registers" in row else str(row["method"])
    return f"{name} + polish {row['polish']:g} min" if "polish" in row else name


def _spread(fidelities: Sequence[Mapping[str, Any]]) -> str:
    """Mean and half the range over seeds, of top-1 in percent or SQNR in decibels."""
    if not fidelities:
        return "-"
    top1 = [fidelity["top1"] for fidelity in fidelities]
    if None in top1:
        values = [math.inf if fidelity["sqnr_db"] is None else fidelity["sqnr_db"] for fidelity in fidelities]
        mean_db = f"{sum(values) / len(values):.1f} dB"
        if None in [fidelity["cosine"] for fidelity in fidelities]:
            return mean_db
        return f"{mean_db}, {sum(fidelity['cosine'] for fidelity in fidelities) / len(fidelities):.4f}"
    mean = 100 * sum(top1) / len(top1)
    return f"{mean:.2f} ±{50 * (max(top1) - min(top1)):.2f}" if len(top1) > 1 else f"{mean:.2f}"


def published_figures(source: str) -> dict[str, dict[str, float]]:
    """Return top-1 figures from the papers for this architecture: scheme -> method -> percent."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = resources.files("vitfold.report").joinpath("published.toml").read_text(encoding="utf-8")
    name = source.partition(":")[2].partition(".")[0]
    found: dict[str, Any] = tomllib.loads(text).get(name, {})
    return {scheme: dict(figures) for scheme, figures in found.items() if scheme != "float"}


def accuracy_table(result: Mapping[str, Any]) -> Table:
    """Return the terminal table of a ladder."""
    header, body = accuracy_rows(result)
    title = f"{result['source']}, {result['images']} images, mean ± half range over seeds"
    return terminal_table(header, body, words=("method", "run by"), title=title)


def describe_registers(registers: Mapping[str, Any] | None) -> str:
    """Return the section [registers] of a recipe in a line."""
    if registers is None:
        return "none"
    settings = {name: value for name, value in registers.items() if name != "remedy"}
    shown = ", ".join(f"{name} {_setting(value)}" for name, value in settings.items())
    return f"{registers['remedy']} ({shown})" if shown else str(registers["remedy"])


def describe_steps_fidelity(fidelity: Mapping[str, Any]) -> str:
    """Return what quantized steps cost, in words."""
    db, count = fidelity["psnr_db"], fidelity["images"]
    near = "equal" if db is None else f"{db:.1f} dB"
    return f"{near} to float steps, {fidelity['of']} of {count} held-out seeds"


def _setting(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)


DISTANCES = ("Frechet", "Frechet rise", "class %")
"""Columns of what a judge says."""
_BEYOND = ("reused", "SSIM", "Frechet rise", "kept MB")
"""Columns that eighty characters have no room for beside a distance; the JSON and the page hold them."""


def diffusion_table(result: Mapping[str, Any]) -> Table:
    """Return the table of `vitfold diffusion sample`: time per image beside likeness to the unaccelerated images."""
    title = f"{len(result['classes'])} images, {result['steps']} steps of {result['sampler']}, {result['engine']}"
    header, body = diffusion_rows(result)
    beyond = _BEYOND if "Frechet" in header else ()
    shown = [place for place, name in enumerate(header) if name not in beyond]
    lines = [[line[place] for place in shown] for line in body]
    return terminal_table([header[place] for place in shown], lines, words=("sampler",), title=title, wraps=True)


def diffusion_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of ways to sample, without the columns that no row fills.

    Where all pixels are equal to the unaccelerated images, PSNR is infinite, and the cell says so.
    """
    header = ["sampler", "full", "reused", "s/image", "speed-up", "PSNR dB", "SSIM"]
    header += [*DISTANCES, "kept MB"]
    body = [
        [
            row["name"],
            str(row["full_steps"]),
            str(row["reused_steps"]),
            f"{'~' if row['noisy'] else ''}{row['seconds_per_image']:.3f}",
            _ratio_text(row["speedup"], row["speedup_iqr"]),
            "equal" if place and row["psnr_db"] is None else number(row["psnr_db"], ".1f"),
            number(row["ssim"], ".4f"),
            _distance_text(row.get("frechet"), row.get("frechet_noise")),
            _rise_text(row.get("frechet_rise")),
            percent(row.get("class_accuracy"), unit=""),
            number(row["kept_bytes"], ".1f", scale=1e-6),
        ]
        for place, row in enumerate(result["rows"])
    ]
    filled = [place for place in range(len(header)) if any(line[place] != "-" for line in body)]
    return [header[place] for place in filled], [[line[place] for place in filled] for line in body]


def _ratio_text(ratio: float, spread: float | None) -> str:
    """A paired speed-up with half its interquartile range, where there is more than one trial."""
    return f"{ratio:.2f}x" + ("" if spread is None else f" ±{spread / 2:.2f}")


def _distance_text(distance: float | None, noise: float | None) -> str:
    """A distance with its standard deviation; decimals only where they say something."""
    form = ".2f" if distance is None or distance < 100 else ".0f"
    return number(distance, form) + ("" if noise is None else f" ±{noise:{form}}")


def _rise_text(rise: Mapping[str, float] | None) -> str:
    return "-" if rise is None else f"{rise['rise']:+.2f} [{rise['low']:+.2f}, {rise['high']:+.2f}]"


def percent(ratio: int | float | None, *, unit: str = " %") -> str:
    """Return a ratio as a percentage, or a dash."""
    return number(ratio, ".2f", scale=100.0) + (unit if ratio is not None else "")


def number(value: int | float | None, form: str, *, scale: int | float = 1) -> str:
    """Return a scaled number, or a dash where it was not measured."""
    return "-" if value is None else f"{value * scale:{form}}"


def describe_integer(integer: Mapping[str, Any]) -> str:
    """Return in words how much of a graph's work is integer."""
    return (
        f"{percent(integer['macs_ratio'])} of the multiply-accumulates, "
        f"{integer['dequantized_operands']} operands dequantized before a product"
    )


def environment_line(environment: Mapping[str, Any]) -> str:
    """Return the processor, its instruction sets and the thread count in one line."""
    processor = environment["processor"]
    sets = " ".join(processor["instruction_sets"]) or "no known instruction sets"
    settings = "".join(f", {name}={value}" for name, value in processor.get("settings", {}).items())
    return f"{processor['name']}, {environment['threads']} threads, {sets}{settings}"
