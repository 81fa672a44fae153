"""One self-contained HTML page from the documents of a folder.

Owns the order of sections, their words and the assembly; needs the extra `report`. Nothing is loaded from a network:
plotly's script, compressed, and all pictures lie within the page.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import jinja2

from vitfold.errors import ReportError
from vitfold.report import figures
from vitfold.report.loading import Document, Folder
from vitfold.report.mosaic import Traced, strips
from vitfold.report.points import Point, baseline, points_of_bench, points_of_sweep, quality_key
from vitfold.report.tables import accuracy_rows, drop_text, environment_line, number, percent
from vitfold.version import __version__

MOST_BYTES = 5_000_000
DROP = 0.01
"""The headline names the fastest recipe that loses at most one point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of the page; columns that hold words are named, the others hold numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of the page."""

    title: str
    text: Sequence[str] = ()
    plots: Sequence[Any] = ()
    table: Table | None = None
    details: Sequence[tuple[str, Table]] = ()
    strips: Sequence[Any] = ()
    commands: Sequence[str] = ()


@dataclass(slots=True)
class _Figures:
    """The figures of the page, numbered as they are placed."""

    specs: list[dict[str, Any]] = field(default_factory=list)

    def place(self, plot: Any) -> dict[str, Any]:
        spec = json.loads(plot.figure.to_json(remove_uids=True))
        self.specs.append({"id": f"plot-{len(self.specs)}", "data": spec["data"], "layout": spec["layout"]})
        return {"id": self.specs[-1]["id"], "title": plot.title, "height": plot.height}


def render_page(folder: Folder, *, title: str, command: str, traced: Sequence[Traced] = ()) -> str:
    """Return the page.

    Raises:
        ReportError: if it would be larger than 5 MB: then there are too many pictures.
    """
    sections = [section for section in _sections(folder, traced, command) if section is not None]
    found = _Figures()
    placed = [
        {"section": section, "plots": [found.place(plot) for plot in section.plots], "id": f"s{i}"}
        for i, section in enumerate(sections)
    ]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(_asset("page.html.j2"))
    page: str = template.render(
        title=title,
        version=__version__,
        headline=headlines(folder),
        sections=placed,
        specs=_safe_json(found.specs),
        style=_asset("page.css"),
        script=_asset("page.js"),
        plotly=_packed_plotly() if found.specs else "",
    )
    size = len(page.encode("utf-8"))
    if size > MOST_BYTES:
        raise ReportError(f"the page would have {size / 1e6:.1f} MB, more than 5; give fewer --photos")
    return page


def headlines(folder: Folder) -> list[dict[str, str]]:
    """Return what to say first: per measured comparison, the fastest recipe that loses at most one point."""
    found = []
    for document in (*folder.of("sweep"), *folder.of("bench")):
        points = _points(document)
        key, start = quality_key(points), baseline(points)
        if key is None or start is None or start.latency_ms is None or getattr(start, key) is None:
            continue
        floor = getattr(start, key) - DROP
        fit = [p for p in points if p.latency_ms is not None and p.r is not None and (getattr(p, key) or 0.0) >= floor]
        best = max(fit, key=lambda p: _ratio(p, start))
        ratio = _ratio(best, start)
        text = f"nothing within one point is faster than {start.name}"
        if best is not start and ratio > 1:
            text = f"{best.name} against {start.name}, {_change(key, best, start)} on {best.images} images"
        found.append({"figure": f"{max(1.0, ratio):.2f}x", "text": f"{document.name}: {text}"})
    return found


def _ratio(point: Point, start: Point) -> float:
    """How many times faster than another point: from paired speed-ups, where both have one."""
    if point.speed_up is not None and start.speed_up:
        return point.speed_up / start.speed_up
    assert point.latency_ms is not None
    assert start.latency_ms is not None
    return start.latency_ms / point.latency_ms


def _change(key: str, best: Point, start: Point) -> str:
    """What was lost, with its interval where image by image was compared."""
    if best.drop is not None:
        return f"{drop_text(best.drop)} points lost"
    change = getattr(best, key) - getattr(start, key)
    if key == "cosine":
        return f"cosine {change:+.4f}"
    name = {"top1": "top-1", "agreement": "agreement"}[key]
    return f"{name} {100 * change:+.2f} points".replace("-0", "\N{MINUS SIGN}0").replace(" -", " \N{MINUS SIGN}")


def _points(document: Document) -> list[Point]:
    if document.kind == "sweep":
        return points_of_sweep(document.content["rows"])
    return points_of_bench(document.content, document.name)


def _sections(folder: Folder, traced: Sequence[Traced], command: str) -> list[Section | None]:
    sections: list[Section | None] = [_comparison(document) for document in (*folder.of("sweep"), *folder.of("bench"))]
    sections += [_pictures(one) for one in traced]
    sections += [_profile(document) for document in folder.of("profile")]
    sections += [_sensitivity(document) for document in folder.of("sensitivity")]
    sections += [_ladder(document) for document in folder.of("ladder")]
    sections.append(_evaluations(folder.of("evaluate")))
    sections.append(_environment(folder))
    sections.append(_commands(folder, command))
    return sections


def _comparison(document: Document) -> Section:
    points = _points(document)
    timing = "Each recipe took turns with the float model" if document.kind == "sweep" else "All rows took turns"
    text = [
        f"{timing}: speed-ups are paired, trial by trial, with 95 % intervals in brackets; latencies are medians with "
        "half their spread. ~ marks a noisy row. The dotted line joins what nothing else beats."
    ]
    compared = figures.pareto(points)
    if quality_key(points) is None:
        compared = figures.latencies(points)
        text = ["No fidelity was measured here (random weights or no images): times only."]
    failed = sum(point.error is not None for point in points)
    if failed:
        text.append(f"{failed} of {len(points)} rows have no speed or failed; the table says why.")
    kind = "Sweep" if document.kind == "sweep" else "Comparison"
    return Section(
        title=kind if document.name == document.kind else f"{kind}: {document.name}",
        text=text,
        plots=[*compared, *figures.against_r(points)],
        table=_points_table(points),
    )


def _points_table(points: Sequence[Point]) -> Table:
    """One row per recipe; columns that nothing fills are left out."""
    header = [
        "recipe",
        "top-1 %",
        "drop, points",
        "agree %",
        "cosine",
        "latency ms",
        "img/s",
        "speed-up",
        "MB",
        "images",
    ]
    header.append("remark")
    rows = [_cells(point) for point in points]
    kept = [place for place in range(len(header)) if any(row[place] not in ("-", "") for row in rows)]
    shown = [[row[place] for place in kept] for row in rows]
    return Table(header=[header[place] for place in kept], rows=shown, words=("recipe", "remark"))


def _cells(point: Point) -> list[str]:
    latency = "-"
    if point.latency_ms is not None:
        spread = "" if point.spread_ms is None else f" ±{point.spread_ms:.2f}"
        latency = f"{'~' if point.noisy else ''}{point.latency_ms:.2f}{spread}"
    speed_up = "-"
    if point.speed_up is not None:
        within = "" if point.speed_range is None else " [{:.2f}, {:.2f}]".format(*point.speed_range)
        speed_up = f"{point.speed_up:.2f}x{within}"
    return [
        point.name,
        percent(point.top1, unit=""),
        "-" if point.drop is None else drop_text(point.drop),
        percent(point.agreement, unit=""),
        number(point.cosine, ".4f"),
        latency,
        number(point.throughput_ips, ".1f"),
        speed_up,
        number(point.size_bytes, ".0f", scale=1e-6),
        number(point.images, "d"),
        point.error or "",
    ]


def _pictures(traced: Traced) -> Section:
    return Section(
        title=f"Merged tokens: {traced.title}",
        text=[
            "Patches that share a token have the mean colour of all of them and a border; the others are as "
            "they were. Under each picture: tokens that leave the block, prefix tokens included, and the block's work "
            "(two operations per multiply-accumulate). The float model decides what merges."
        ],
        strips=strips(traced),
    )


def _profile(document: Document) -> Section:
    content = document.content
    latency = content["latency_ms"]
    rows = [
        [
            row["kind"],
            f"{row['ms']:.2f}",
            f"{100 * row['ratio']:.1f}",
            str(row["nodes"]),
            number(row["macs"] or None, ".2f", scale=1e-9),
            number(row["gmacs_per_s"], ".0f"),
            "-" if row["ceiling_ratio"] is None else f"{100 * row['ceiling_ratio']:.0f}",
        ]
        for row in content["kinds"]
        if row["nodes"]
    ]
    ceiling = content["ceiling"]
    reached = (
        ""
        if ceiling is None
        else (
            f" This machine reached {ceiling['float_gmacs_per_s']:.0f} GMAC/s in float and "
            f"{ceiling['integer_gmacs_per_s']:.0f} in integers, and copied {ceiling['copy_gbytes_per_s']:.1f} GB/s."
        )
    )
    return Section(
        title=f"Where the time goes: {content['bundle']}",
        text=[
            *content["advice"],
            f"A run takes {latency['plain']:.2f} ms, with the profiler {latency['profiled']:.2f} ms "
            f"({100 * content['overhead_ratio']:+.0f} %)." + reached,
        ],
        plots=[figures.blocks(content)],
        table=Table(
            header=["kind", "ms", "%", "nodes", "GMACs", "GMAC/s", "of ceiling, %"], rows=rows, words=("kind",)
        ),
    )


def _sensitivity(document: Document) -> Section:
    content = document.content
    rows = [
        [s["site"], number(s["sqnr_db"], ".1f"), percent(s["noise_ratio"], unit=""), percent(s["agreement"], unit=""),
         percent(s["macs_ratio"], unit="")]
        for s in content["sites"]
    ]  # fmt: skip
    header = ["site", "SQNR dB", "noise %", "agree %", "MACs %"]
    return Section(
        title=f"Sensitivity per site: {document.name}",
        text=[
            f"Each site quantized alone, on {content['images']} images: what to keep in float first (--keep-float N)."
        ],
        plots=[figures.sensitivity(content)],
        details=[("All sites", Table(header=header, rows=rows, words=("site",)))],
    )


def _ladder(document: Document) -> Section:
    plot = figures.ladder(document.content)
    header, body = accuracy_rows(document.content)
    return Section(
        title=f"Ladder of methods: {document.name}",
        text=["Mean over calibration seeds with half the range; figures in brackets are the papers'."],
        plots=[] if plot is None else [plot],
        table=Table(header=header, rows=body, words=("method", "run by")),
    )


def _evaluations(documents: Sequence[Document]) -> Section | None:
    if not documents:
        return None
    rows = [
        [d.name, str(d.content["images"]), percent(d.content.get("top1"), unit=""),
         percent(d.content["agreement"], unit=""), number(d.content["cosine"], ".4f")]
        for d in documents
    ]  # fmt: skip
    table = Table(header=["evaluation", "images", "top-1 %", "agree %", "cosine"], rows=rows, words=("evaluation",))
    return Section(title="Evaluations", table=table)


def _environment(folder: Folder) -> Section | None:
    found: dict[str, list[str]] = {}
    packages: dict[str, str] = {}
    for document in folder.documents:
        environment = document.content.get("environment")
        if environment is not None:
            line = (
                f"{environment_line(environment)}; {environment['cores']} cores, {environment['system']}, "
                f"Python {environment['python']}"
            )
            found.setdefault(line, []).append(document.name)
            packages.update(environment["packages"])
    if not found:
        return None
    rows = [[line, ", ".join(names)] for line, names in found.items()]
    pair = ("package", "version")
    return Section(
        title="Environment",
        table=Table(header=["machine", "measured there"], rows=rows, words=("machine", "measured there")),
        details=[("Packages", Table(header=list(pair), rows=[[*one] for one in packages.items()], words=pair))],
    )


def _commands(folder: Folder, command: str) -> Section:
    """The exact commands that rows state, and the one that made this page."""
    stated: dict[str, None] = {}
    for document in folder.documents:
        rows = document.content.get("rows", ()) if document.kind == "sweep" else ()
        for holder in (document.content, *rows):
            stated.update(dict.fromkeys(str(line) for line in holder.get("commands") or ()))
    left_out = [f"Not shown: {', '.join(folder.left_out)}."] if folder.left_out else []
    return Section(title="Commands", text=left_out, commands=[*stated, command])


def _safe_json(value: Any) -> str:
    """JSON that may stand in a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("</", "<\\/")


def _asset(name: str) -> str:
    return resources.files("vitfold.report").joinpath(name).read_text(encoding="utf-8")


def _packed_plotly() -> str:
    """plotly.js of the basic charts, gzipped, in base64; the page unpacks it.

    It starts four times as fast as the whole library, which plotly's Python package carries.
    """
    packed = resources.files("vitfold.report").joinpath("plotly-basic.min.js.gz").read_bytes()
    return base64.b64encode(packed).decode("ascii")
