"""The plots of the page, made with plotly; colours of text and lines are the page's, which knows light from dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from vitfold.report.points import OTHERS, Point, front, quality_key
from vitfold.report.tables import drop_text, number

PALETTE = ("#4c7bd9", "#e07b39", "#2f9e78", "#b45bc4", "#c79a1e", "#d1495b", "#2a9db0", "#8c6d46")
GREY = "#8a93a0"
KIND_COLOURS = {
    "linear": "#4c7bd9",
    "attention": "#8a5bd1",
    "softmax": "#c05bb8",
    "normalization": "#2a9db0",
    "activation": "#2f9e78",
    "quantize": "#c79a1e",
    "layout": "#8c6d46",
    "merging": "#e07b39",
    "other": GREY,
}
QUALITIES = {
    "top1": ("top-1 accuracy, %", 100.0, ".2f"),
    "agreement": ("agreement with the unfolded model, %", 100.0, ".2f"),
    "cosine": ("cosine to the unfolded model", 1.0, ".4f"),
}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A figure with the sentence above it; `height` in pixels."""

    title: str
    figure: go.Figure
    height: int = 380


def pareto(points: Sequence[Point]) -> list[Plot]:
    """Accuracy against latency and against throughput; the line joins what nothing else beats."""
    key = quality_key(points)
    if key is None:
        return []
    title, scale, _ = QUALITIES[key]
    best = front(points, "paired_ms", key)
    plots = []
    for measure, axis, heading in (
        ("paired_ms", "latency, ms", "Accuracy against latency"),
        ("paired_ips", "throughput, images per second", "Accuracy against throughput"),
    ):
        shown = [p for p in points if getattr(p, measure) is not None and getattr(p, key) is not None]
        if not shown:
            continue
        figure = go.Figure()
        line = [p for p in best if getattr(p, measure) is not None]
        draw_front(figure, [getattr(p, measure) for p in line], [scale * getattr(p, key) for p in line])
        for place, family in enumerate(_families(shown)):
            chosen = [p for p in shown if p.family == family]
            figure.add_scatter(
                x=[getattr(p, measure) for p in chosen],
                y=[scale * getattr(p, key) for p in chosen],
                mode="markers",
                name=escape(family),
                marker=marker(place, _colour(place, family)),
                text=[_hover(p) for p in chosen],
                hovertemplate="%{text}<extra></extra>",
            )
        plots.append(Plot(title=heading, figure=laid_out(figure, axis, title)))
    return plots


def latencies(points: Sequence[Point]) -> list[Plot]:
    """Latencies as bars, for comparisons that have no accuracy."""
    shown = [p for p in points if p.paired_ms is not None][::-1]
    if not shown:
        return []
    families = _families(points)
    figure = go.Figure()
    figure.add_bar(
        x=[p.paired_ms for p in shown],
        y=[escape(p.name) for p in shown],
        orientation="h",
        marker={"color": [_colour(families.index(p.family), p.family) for p in shown]},
        error_x={"array": [p.spread_ms or 0.0 for p in shown], "thickness": 1, "width": 3, "color": GREY},
        hovertext=[_hover(p) for p in shown],
        hovertemplate="%{hovertext}<extra></extra>",
    )
    figure = laid_out(figure, "latency, ms", None)
    figure.update_layout(bargap=0.35)
    figure.update_yaxes(type="category", showgrid=False)
    return [Plot(title="Latency", figure=figure, height=max(380, 90 + 26 * len(shown)))]


def against_r(points: Sequence[Point]) -> list[Plot]:
    """Accuracy and speed against the tokens merged per block, a line per quantization."""
    merged = [p for p in points if p.r is not None]
    if len({p.r for p in merged}) < 2:
        return []
    key = quality_key(merged)
    measures = [] if key is None else [(key, *QUALITIES[key][:2], "Accuracy against merging")]
    measures.append(("paired_ms", "latency, ms", 1.0, "Latency against merging"))
    plots = []
    for name, axis, scale, heading in measures:
        figure = go.Figure()
        for place, family in enumerate(_families(merged)):
            chosen = sorted(
                (p for p in merged if p.family == family and getattr(p, name) is not None), key=lambda p: p.r or 0.0
            )
            if chosen:
                figure.add_scatter(
                    x=[p.r for p in chosen],
                    y=[scale * getattr(p, name) for p in chosen],
                    mode="lines+markers",
                    name=escape(family),
                    line={"color": _colour(place, family), "width": 2},
                    marker={"size": 8, "symbol": SYMBOLS[place % len(SYMBOLS)]},
                    text=[_hover(p) for p in chosen],
                    hovertemplate="%{text}<extra></extra>",
                )
        if figure.data:
            plots.append(Plot(title=heading, figure=laid_out(figure, "r, tokens merged per block (mean)", axis)))
    for plot in plots:
        if plot.title.startswith("Latency"):
            plot.figure.update_yaxes(rangemode="tozero")
    return plots


def blocks(profile: Mapping[str, Any]) -> Plot:
    """Milliseconds of every block, stacked by kind of operation."""
    figure = go.Figure()
    ends = {"embed": "in", "head": "out"}
    names = [ends.get(row["block"], row["block"].removeprefix("blocks.")) for row in profile["blocks"]]
    for row in profile["kinds"]:
        kind = row["kind"]
        values = [block["ms"].get(kind, 0.0) for block in profile["blocks"]]
        if any(values):
            figure.add_bar(
                x=names,
                y=values,
                name=kind,
                marker={"color": KIND_COLOURS[kind], "line": {"width": 0}},
                hovertemplate=f"block %{{x}}, {kind}: %{{y:.3f}} ms<extra></extra>",
            )
    figure.update_layout(barmode="stack", bargap=0.15)
    title = f"Time per block: {profile['bundle']}, {profile['engine']}, batch {profile['batch']}"
    plot = Plot(
        title=title,
        figure=laid_out(figure, "block (in: embedding, out: head)", "ms"),
        height=400,
    )
    figure.update_xaxes(type="category", tickangle=0, tickfont={"size": 11}, showgrid=False)
    figure.update_layout(legend={"traceorder": "normal"})
    return plot


def sensitivity(document: Mapping[str, Any], *, most: int = 24) -> Plot:
    """The sites whose quantization alone makes most of the noise."""
    sites = list(document["sites"])[:most][::-1]
    figure = go.Figure()
    figure.add_bar(
        x=[100 * site["noise_ratio"] for site in sites],
        y=[site["site"] for site in sites],
        orientation="h",
        marker={"color": [KIND_COLOURS["linear" if not _of_attention(s["site"]) else "attention"] for s in sites]},
        text=[
            f"{site['site']}<br>{100 * site['noise_ratio']:.1f} % of the noise, "
            f"{100 * site['macs_ratio']:.1f} % of the MACs<br>SQNR {number(site['sqnr_db'], '.1f')} dB"
            for site in sites
        ],
        textposition="none",
        hovertemplate="%{text}<extra></extra>",
    )
    title = f"Sensitivity: {document['source']}, the {len(sites)} costliest of {len(document['sites'])} sites"
    figure = laid_out(figure, "share of the noise of all sites, %", None)
    figure.update_yaxes(tickfont={"size": 11}, showgrid=False)
    return Plot(title=title, figure=figure, height=90 + 20 * len(sites))


def ladder(document: Mapping[str, Any]) -> Plot | None:
    """Accuracy of every quantization method at every bit width, the mean over seeds."""
    rows = [row for row in document["rows"] if row["fidelity"] is not None]
    key = next((k for k in ("top1", "sqnr_db") if any(row["fidelity"].get(k) is not None for row in rows)), None)
    if key is None:
        return None
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = go.Figure()
    for place, scheme in enumerate(dict.fromkeys(row["scheme"] for row in rows)):
        heights, spreads = zip(*(_over_seeds(rows, method, scheme, key) for method in methods), strict=True)
        figure.add_bar(
            x=methods,
            y=heights,
            name=scheme,
            error_y={"array": spreads, "thickness": 1, "width": 2, "color": GREY},
            marker={"color": PALETTE[place % len(PALETTE)]},
            hovertemplate=f"%{{x}}, {scheme}: %{{y:.2f}}<extra></extra>",
        )
    figure.update_layout(barmode="group", bargap=0.25)
    title = f"Quantization methods: {document['source']}, {document['images']} images"
    return Plot(title=title, figure=laid_out(figure, None, "top-1, %" if key == "top1" else "SQNR, dB"))


def _over_seeds(rows: Sequence[Mapping[str, Any]], method: str, scheme: str, key: str) -> tuple[float | None, float]:
    """Mean and half the range, of rows that an engine ran where there are any, else of simulated ones."""
    found = [row for row in rows if (row["method"], row["scheme"]) == (method, scheme)]
    executed = [row for row in found if row["engine"] != "simulation"]
    scale = 100.0 if key == "top1" else 1.0
    values = [scale * row["fidelity"][key] for row in executed or found if row["fidelity"].get(key) is not None]
    return (sum(values) / len(values), (max(values) - min(values)) / 2) if values else (None, 0.0)


def _of_attention(site: str) -> bool:
    return site.endswith(".attn") or (".attn.q" in site and ".attn.qkv" not in site)


def _families(points: Sequence[Point]) -> list[str]:
    """In order of appearance, others last."""
    found = dict.fromkeys(point.family for point in points)
    return sorted(found, key=lambda family: family == OTHERS)


def _colour(place: int, family: str) -> str:
    return GREY if family == OTHERS else PALETTE[place % len(PALETTE)]


def _hover(point: Point) -> str:
    lines = [f"<b>{escape(point.name)}</b>"]
    for key, label in (("top1", "top-1"), ("agreement", "agreement")):
        value = getattr(point, key)
        if value is not None:
            lines.append(f"{label} {100 * value:.2f} %")
    if point.cosine is not None:
        lines.append(f"cosine {point.cosine:.4f}")
    if point.latency_ms is not None:
        spread = "" if point.spread_ms is None else f" ± {point.spread_ms:.2f}"
        lines.append(f"measured {point.latency_ms:.2f}{spread} ms{', noisy' if point.noisy else ''}")
    if point.throughput_ips is not None:
        lines.append(f"{point.throughput_ips:.1f} images per second")
    if point.speed_up is not None:
        within = "" if point.speed_range is None else " [{:.2f}, {:.2f}]".format(*point.speed_range)
        lines.append(f"speed-up {point.speed_up:.2f}x{within}")
    if point.drop is not None:
        lines.append(f"{drop_text(point.drop)} points lost")
    if point.size_bytes is not None:
        lines.append(f"{point.size_bytes / 1e6:.0f} MB")
    if point.images is not None:
        lines.append(f"{point.images} images")
    return "<br>".join(lines)


def draw_front(figure: go.Figure, x: Sequence[float], y: Sequence[float]) -> None:
    """Draw the line that joins what nothing else beats."""
    line = {"color": GREY, "width": 1.5, "dash": "dot"}
    figure.add_scatter(x=x, y=y, mode="lines", name="nothing is better", line=line, hoverinfo="skip")


def marker(place: int, colour: str) -> dict[str, Any]:
    """Return how the points of a family look: shapes differ too, not colours alone."""
    edge = {"width": 1, "color": "rgba(255,255,255,0.7)"}
    return {"size": 11, "symbol": SYMBOLS[place % len(SYMBOLS)], "color": colour, "line": edge}


def laid_out(figure: go.Figure, x: str | None, y: str | None) -> go.Figure:
    """The layout that all plots share."""
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 8, "r": 8, "t": 8, "b": 8},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "font": {"size": 12}},
        hoverlabel={"align": "left"},
        dragmode=False,
    )
    figure.update_xaxes(title={"text": x, "standoff": 8}, automargin=True, zeroline=False, ticks="outside", ticklen=4)
    figure.update_yaxes(title={"text": y, "standoff": 8}, automargin=True, zeroline=False, ticks="outside", ticklen=4)
    return figure
