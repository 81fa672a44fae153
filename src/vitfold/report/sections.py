"""The sections of the page: per document its words, its plots and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitfold.bench.environment import busy_remark
from vitfold.ops.energy import SOURCE
from vitfold.report import curves, figures
from vitfold.report.changes import MOST_PICTURES, change_strip
from vitfold.report.loading import Document, Folder
from vitfold.report.maps import Mapped, map_strips
from vitfold.report.mosaic import Traced, strips
from vitfold.report.points import Point, points_of, quality_key
from vitfold.report.samplers import Sampler, samplers_of
from vitfold.report.sheet import COLUMNS, sheet_url
from vitfold.report.tables import accuracy_rows, diffusion_rows, drop_text, environment_line, number, percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of the page; columns that hold words are named, the others hold numbers."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A contact sheet as a data URL, what it shows in words, and what its lines are."""

    url: str
    alt: str
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of the page."""

    title: str
    text: Sequence[str] = ()
    plots: Sequence[Any] = ()
    table: Table | None = None
    sheet: Sheet | None = None
    details: Sequence[tuple[str, Table]] = ()
    strips: Sequence[Any] = ()
    commands: Sequence[str] = ()


def build_sections(folder: Folder, traced: Sequence[Traced | Mapped], command: str) -> list[Section]:
    """Return all sections in their order: comparisons, pictures, where time goes, methods, and how it was measured."""
    sections: list[Section | None] = [_comparison(document) for document in (*folder.of("sweep"), *folder.of("bench"))]
    sections += [_diffusion(document) for document in folder.of("diffusion")]
    sections += [_maps(one) if isinstance(one, Mapped) else _pictures(one) for one in traced]
    sections += [_profile(document) for document in folder.of("profile")]
    sections += [_sensitivity(document) for document in folder.of("sensitivity")]
    sections += [_ladder(document) for document in folder.of("ladder")]
    sections.append(_evaluations(folder.of("evaluate")))
    sections += [_changes(document) for document in folder.of("evaluate") if document.content.get("changed")]
    sections.append(_environment(folder))
    sections.append(_commands(folder, command))
    return [section for section in sections if section is not None]


def _comparison(document: Document) -> Section:
    points = points_of(document)
    timing = "Each recipe took turns with the float model" if document.kind == "sweep" else "All rows took turns"
    text = [
        f"{timing}: speed-ups are paired, trial by trial, with 95 % intervals in brackets; latencies are medians with "
        "half their spread, ~ marks a noisy row. Plots place a row at the baseline's time over its speed-up. The "
        "dotted line joins what nothing else beats."
    ]
    compared = figures.pareto(points)
    if quality_key(points) is None:
        compared = figures.latencies(points)
        text = ["No fidelity was measured here (random weights or no images): times only."]
    failed = sum(point.error is not None for point in points)
    if failed:
        text.append(f"{failed} of {len(points)} rows have no speed or failed; the table says why.")
    if any(point.energy_uj is not None for point in points):
        text.append(
            "Of one image: which share of the multiply-accumulates is integer, the megabytes of weights and "
            f"activations that are moved, and millijoules by a published table ({SOURCE})."
        )
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
        "integer %",
        "MB moved",
        "mJ (model)",
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
        percent(point.integer_ratio, unit=""),
        number(point.moved_bytes, ".0f", scale=1e-6),
        number(point.energy_uj, ".2f", scale=1e-3),
        number(point.images, "d"),
        point.error or "",
    ]


def _diffusion(document: Document) -> Section:
    content, samplers = document.content, samplers_of(document)
    text = [
        f"{content['source']}: {len(content['classes'])} images, {content['steps']} steps of {content['sampler']}, "
        f"guidance {content['guidance']:g}, {content['engine']}. All took turns with the unaccelerated sampler at "
        "equal seeds; speed-ups are medians of paired trials with half their interquartile range, ~ marks a noisy row. "
        "Plots place a row at the unaccelerated sampler's time over its speed-up. PSNR and SSIM compare with the "
        "unaccelerated images: they punish what is different and as good. The dashed line is the plain alternative, "
        "fewer steps; the dotted line joins what nothing else beats."
    ]
    if any(one.frechet is not None for one in samplers):
        text.append(
            f"The Frechet distance is taken in the features of {content['features']}, to real images: no Inception "
            "FID, and to compare within this section only. Bars are one standard deviation over resampled seeds; its "
            "rise over the unaccelerated sampler has a 95 % interval of paired resamples."
        )
    if "held_out" in content:
        text.append(f"The search's answer: {content['winner'] or 'none'}, {content['reason']}.")
    header, body = diffusion_rows(content)
    return Section(
        title="Step reuse" if document.name == "diffuse" else f"Step reuse: {document.name.removesuffix('/diffuse')}",
        text=text,
        plots=[plot for plot in (curves.likeness(samplers), curves.distance(samplers)) if plot is not None],
        table=Table(header=header, rows=body, words=("sampler",)),
        sheet=None if document.sheet is None else _sheet(document.sheet, samplers, content["classes"]),
    )


def _sheet(path: Path, samplers: Sequence[Sampler], classes: Sequence[int]) -> Sheet:
    lines = "; ".join(one.name for one in samplers)
    columns = f"seed and class ({', '.join(map(str, classes[:COLUMNS]))})"
    return Sheet(
        url=sheet_url(path),
        alt=f"Generated images, a line per sampler: {lines}; a column per {columns}",
        caption=f"A column is one {columns}; the lines from the top: {lines}.",
    )


def _maps(mapped: Mapped) -> Section:
    kind = "A colour is a class." if mapped.head == "segmentation" else "From dark to bright: from least to most."
    return Section(
        title=f"Maps: {mapped.title}",
        text=[
            f"What the original and the bundle make of the same pictures, in the same colours. {kind} The last picture "
            "shows where they differ."
        ],
        strips=map_strips(mapped),
    )


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
            "-" if row["ceiling_ratio"] is None else f"{100 * min(1.0, row['ceiling_ratio']):.0f}",
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


def _changes(document: Document) -> Section:
    rows, images = document.content["changed"], document.content["images"]
    worse = sum(row["truth"] is not None and row["original"] == row["truth"] for row in rows)
    better = sum(row["truth"] is not None and row["now"] == row["truth"] for row in rows)
    judged = f" By their folders' names, {worse} were right before, and {better} are now." if worse or better else ""
    shown = "" if len(rows) <= MOST_PICTURES else f" The {MOST_PICTURES} that the original was surest of are shown."
    return Section(
        title=f"Changed labels: {document.name}",
        text=[f"Of {images} images, {len(rows)} have another label than the original gave them.{judged}{shown}"],
        strips=[change_strip(rows)],
    )


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
            busy = busy_remark(environment)
            found.setdefault(line, []).append(document.name if busy is None else f"{document.name} ({busy})")
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
