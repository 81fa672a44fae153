"""Ways to sample as points, their plots and their table: what stands for what, and nothing that was not measured."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import documents
import numpy as np
import pytest
from PIL import Image

from vitfold.errors import ReportError
from vitfold.report.loading import Document
from vitfold.report.points import front
from vitfold.report.samplers import FEWER, UNACCELERATED, Sampler, fewer_steps, methods, samplers_of
from vitfold.report.sheet import sheet_url
from vitfold.report.tables import diffusion_rows

pytest.importorskip("plotly")
from vitfold.report import curves


def samplers(**changes: Any) -> list[Sampler]:
    return samplers_of(Document(name="diffuse", kind="diffusion", content=documents.diffusion(**changes)))


def without(key: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != key} for row in documents.diffusion()["rows"]]


def test_a_family_is_the_method_and_what_it_is_compressed_with() -> None:
    found = samplers()
    assert [one.family for one in found] == [
        UNACCELERATED, "w8a8", "stack, w8a8", FEWER, "stack, w8a8", FEWER, "first-block, w8a8",
    ]  # fmt: skip
    assert [one.full_steps for one in fewer_steps(found)] == [11, 7]
    assert [one.name for one in methods(found)] == [
        "none, w8a8", "stack:2, w8a8", "stack:4, w8a8", "first-block:0.01, w8a8",
    ]  # fmt: skip


def test_a_bundle_is_compressed_as_its_plan_says() -> None:
    rows = [
        documents.diffusion_row("found, every step", 20, 0.3, None, reuse="none"),
        documents.diffusion_row("found, again", 11, 0.2, 33.0, reuse="taylor:2:1"),
        documents.diffusion_row("none, 11 steps", 11, 0.2, 23.0, steps=11),
        documents.diffusion_row("none, 11 steps, w8a8", 11, 0.15, 22.5, steps=11),
    ]
    plans = {"found, again": {"merge": 4, "quant": "w8a8"}, "found": {"merge": 0, "quant": "none"}}
    found = samplers(rows=rows, bundles=plans)
    assert [one.family for one in found] == [UNACCELERATED, "taylor, r=4, w8a8", FEWER, "fewer steps, w8a8"]
    plot = curves.likeness(found)
    assert plot is not None
    assert [trace.name for trace in plot.figure.data if trace.mode == "lines+markers"] == ["fewer steps, w8a8", FEWER]


def test_equal_images_are_infinitely_near() -> None:
    found = samplers()
    assert [math.isinf(one.psnr_db) for one in found] == [True, *[False] * 5, True]
    assert [line[5] for line in diffusion_rows(documents.diffusion())[1]][::6] == ["-", "equal"]


def test_the_front_ends_in_the_unaccelerated_sampler() -> None:
    best = front(samplers(), "paired_seconds", "psnr_db")
    assert [one.name for one in best] == ["stack:4, w8a8", "stack:2, w8a8", "none, w8a8", "none"]


def test_rows_timed_apart_are_placed_by_their_paired_speed_up() -> None:
    rows = documents.diffusion()["rows"]
    rows[2] |= {"seconds_per_image": 0.9, "speedup": 2.0}
    plot = curves.likeness(samplers(rows=rows))
    assert plot is not None
    traces = {trace.name: trace for trace in plot.figure.data}
    assert traces["stack, w8a8"].x[1] == pytest.approx(0.2)
    assert "0.900 s per image<br>speed-up 2.00x" in traces["stack, w8a8"].text[1]


def test_quality_against_time() -> None:
    plot = curves.likeness(samplers())
    assert plot is not None
    traces = {trace.name: trace for trace in plot.figure.data}
    assert list(traces) == ["nothing is better", "w8a8", "stack, w8a8", FEWER]
    assert list(traces["nothing is better"].y) == [28.0, 33.25, 41.0]
    assert list(traces[FEWER].x) == pytest.approx([0.14, 0.22])
    assert list(traces[FEWER].y) == [18.0, 24.5]
    assert (traces[FEWER].mode, traces["w8a8"].mode) == ("lines+markers", "markers")
    hover = traces["stack, w8a8"].text[0]
    assert hover.startswith("<b>stack:4, w8a8</b><br>7 steps in full, 13 reused<br>0.125 s per image, noisy<br>")
    (line,) = plot.figure.layout.shapes
    assert (line.x0, line.x1, line.label.text) == (0.4, 0.4, UNACCELERATED)


def test_distance_against_time_has_its_noise() -> None:
    plot = curves.distance(samplers())
    assert plot is not None
    traces = {trace.name: trace for trace in plot.figure.data}
    assert list(traces) == ["w8a8", "stack, w8a8", "first-block, w8a8", FEWER, UNACCELERATED]
    assert list(traces["stack, w8a8"].y) == [22.5], "stack:4 was not measured"
    assert list(traces[UNACCELERATED].error_y.array) == [0.5]
    assert traces[FEWER].error_y.array is None
    assert "Frechet distance 22.50 ± 0.50" in traces["stack, w8a8"].text[0]
    first = curves.likeness(samplers())
    assert first is not None
    colours = {trace.name: trace.marker.color for trace in first.figure.data}
    assert colours["stack, w8a8"] == traces["stack, w8a8"].marker.color, "one colour in both plots"
    assert colours[FEWER] == traces[FEWER].marker.color


def test_what_was_not_measured_is_not_drawn() -> None:
    bare = samplers(rows=without("frechet"))
    assert curves.distance(bare) is None
    assert curves.likeness(bare) is not None
    assert curves.likeness(bare[:1]) is None, "nothing is compared"
    header, body = diffusion_rows(documents.diffusion(rows=without("frechet_noise")))
    assert header == ["sampler", "full", "reused", "s/image", "speed-up", "PSNR dB", "SSIM", "Frechet", "kept MB"]
    assert body[2] == ["stack:2, w8a8", "11", "9", "0.200", "2.00x ±0.02", "33.2", "0.9000", "22.50", "1.7"]


def test_a_plot_is_drawn_where_every_method_was_slower_than_the_unaccelerated_sampler() -> None:
    found = [replace(one, paired_seconds=1e-6) if one.family == UNACCELERATED else one for one in samplers()]
    plot = curves.likeness(found)
    assert plot is not None
    assert any(len(trace.x) for trace in plot.figure.data if trace.mode == "lines")


def test_columns_that_only_some_documents_fill() -> None:
    rows = documents.diffusion()["rows"]
    rows[2] |= {"class_accuracy": 0.875, "frechet_rise": {"rise": 1.0, "low": -0.25, "high": 2.25}}
    header, body = diffusion_rows(documents.diffusion(rows=rows))
    assert header[7:10] == ["Frechet", "Frechet rise", "class %"]
    assert body[2][7:10] == ["22.50 ±0.50", "+1.00 [-0.25, +2.25]", "87.50"]
    assert body[3][7:10] == ["30.00", "-", "-"]


def test_a_row_that_lacks_something_is_refused() -> None:
    with pytest.raises(
        ReportError, match="diffuse is not what vitfold diffusion sample writes .*full_steps.*; measure again"
    ):
        samplers(rows=without("full_steps"))


def test_small_sheets_stay_as_they_are_and_large_ones_are_scaled(tmp_path: Path) -> None:
    path = documents.write_sheet(tmp_path)
    kind, _, data = sheet_url(path).partition(",")
    assert (kind, base64.b64decode(data)) == ("data:image/png;base64", path.read_bytes())
    pixels = np.random.default_rng(0).integers(0, 255, (2000, 3000, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    kind, _, data = sheet_url(path).partition(",")
    with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
        assert (kind, shown.size) == ("data:image/jpeg;base64", (2121, 1414))
    assert len(data) < 3_000_000, "noise, which is the worst to compress"
    path.write_bytes(b"nothing")
    with pytest.raises(ReportError, match=r"sheet.png cannot be shown .*; write it again"):
        sheet_url(path)
