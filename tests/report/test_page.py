"""The page: everything within it, every figure on it, and every plot drawn in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import documents
import numpy as np
import pytest

from vitfold.errors import ReportError
from vitfold.report.loading import load_folder
from vitfold.report.mosaic import Traced

pytest.importorskip("plotly")
pytest.importorskip("jinja2")
from vitfold.report import figures, page
from vitfold.report.points import points_of_sweep

PLOTS = 4 + 4 + 2 + 1 + 1 + 1
"""Of a sweep, a bench, step reuse, a profile, a sensitivity and a ladder."""


def traced() -> Traced:
    rng = np.random.default_rng(0)
    return Traced(
        title="r4", names=("cat.jpg",), photos=rng.integers(0, 255, (1, 224, 224, 3), dtype=np.uint8),
        groups=np.minimum(np.arange(16), 12)[None, None], grid=(4, 4), tokens=(17, 14), flops=(10**9,),
    )  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    found = load_folder(documents.fill(folder / "results"))
    text = page.render_page(found, title="ViT <on> two cores", command="vitfold report results", traced=[traced()])
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder / "report.html"


def test_nothing_is_loaded_from_elsewhere(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|\#)""", outside)
    assert "http" not in outside
    assert "@import" not in outside
    assert len(text.encode()) < 5_000_000


def test_everything_is_shown_and_escaped(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    for shown in (
        "ViT &lt;on&gt; two cores", "RecipeError: &lt;b&gt;block 8&lt;/b&gt;", "r4-w8a8", "87.40", "6.20 ±0.10",
        "The bottleneck is linear layers", "A processor", "vitfold report results", "onnxruntime",
        "vitfold optimize demo --merge 2 --quant w8a8 -o r2-w8a8.fold", "block 0", "14 tokens", "2.00 GFLOPs"[-6:],
        "blocks.11.mlp.fc1", "89.18", "Step reuse: steps", "~0.125", "21.50 ±0.50", "equal", "no Inception FID",
        "integer %", "96.00", "MB moved", ">101<", "mJ (model)", "6.51", "Horowitz",
        'src="data:image/png;base64,', 'alt="Generated images, a line per sampler: none; none, w8a8; stack:2, w8a8;',
    ):  # fmt: skip
        assert shown in text, shown
    assert "<b>block 8" not in text
    specs = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])
    assert len(specs) == PLOTS
    hovers = [text for spec in specs for trace in spec["data"] for text in trace.get("text") or ()]
    assert any("<b>r4-w8a8</b>" in hover and "speed-up 2.58x" in hover for hover in hovers)


def test_the_headline_is_the_fastest_within_one_point(tmp_path: Path) -> None:
    sweep, bench, _ = page.headlines(load_folder(documents.fill(tmp_path)))
    assert bench["figure"] == "2.58x"
    assert "demo: r4-w8a8 against r0, top-1 \N{MINUS SIGN}0.60 points on 436 images" in bench["text"]
    assert sweep["figure"] == "2.29x"
    assert "r2-w8a8 against r0" in sweep["text"]
    assert "+0.48 [+0.38, +0.58] points lost on 5000 images" in sweep["text"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(documents.sweep_row(0, "none", 16.0, 0.89)) + "\n")
    assert "nothing within one point is faster" in page.headlines(load_folder(tmp_path))[0]["text"]


@pytest.mark.parametrize(
    ("changes", "figure", "text"),
    [
        ({}, "2.00x", "diffuse: stack:2, w8a8, 33.2 dB to the unaccelerated images; no fewer steps measured come so"),
        ({"chosen": "stack:4"}, "3.20x", "stack:4, w8a8 (chosen), 28.0 dB to the unaccelerated images; no fewer"),
        ({"chosen": "none"}, "1.25x", "none, w8a8 (chosen), 41.0 dB"),
        ({"chosen": "none", "rows": documents.diffusion()["rows"][:1]}, "1.00x", "nothing good enough is faster"),
        (
            documents.held_out(),
            "1.90x",
            "stack:2, w8a8 (chosen), 32.0 dB to the unaccelerated images on 64 held-out seeds;",
        ),
        (documents.held_out(winner=None), "1.00x", "nothing good enough is faster"),
        ({"rows": documents.diffusion()["rows"][:1]}, "1.00x", "nothing within 30 dB is faster than the unaccelerated"),
    ],
)
def test_the_headline_of_step_reuse(tmp_path: Path, changes: dict[str, Any], figure: str, text: str) -> None:
    (tmp_path / "diffuse.json").write_text(json.dumps(documents.diffusion(**changes)))
    (card,) = page.headlines(load_folder(tmp_path))
    assert card["figure"] == figure
    assert text in card["text"]


def test_fewer_steps_that_come_as_near_stand_beside_the_headline(tmp_path: Path) -> None:
    rows = [*documents.diffusion()["rows"], documents.diffusion_row("none, 16 steps", 16, 0.32, 30.5, steps=16)]
    (tmp_path / "diffuse.json").write_text(json.dumps(documents.diffusion(rows=rows)))
    assert page.headlines(load_folder(tmp_path))[0]["text"].endswith("; 1.25x by 16 plain steps at 30.5 dB")


def test_a_page_that_is_too_large_says_so(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="fewer --photos"):
        page.render_page(load_folder(documents.fill(tmp_path)), title="x", command="y", most_bytes=1000)


def test_what_was_not_measured_is_not_drawn() -> None:
    untimed = points_of_sweep([documents.sweep_row(r, "none", None, 0.8) for r in (0, 2)])
    assert figures.pareto(untimed) == []
    assert [plot.title for plot in figures.against_r(untimed)] == ["Accuracy against merging"]
    unmeasured = points_of_sweep([documents.sweep_row(r, "none", 5.0 - r, None) for r in (0, 2)])
    assert figures.pareto(unmeasured) == []
    (bars,) = figures.latencies(unmeasured)
    assert list(bars.figure.data[0].x) == [3.0, 5.0]
    assert figures.latencies(untimed) == []
    assert [plot.title for plot in figures.against_r(unmeasured)] == ["Latency against merging"]
    failed = documents.ladder()
    assert figures.ladder({**failed, "rows": [{**row, "fidelity": None} for row in failed["rows"]]}) is None


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(written: Path, browser: Any, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = context.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else said.append(request.url)
    )
    opened.goto(written.as_uri())
    opened.wait_for_selector("body[data-ready]", state="attached", timeout=60_000)
    assert said == []
    sheet = opened.eval_on_selector(
        ".sheet img",
        "one => [one.naturalWidth, one.getBoundingClientRect().width, one.parentElement.getBoundingClientRect().width]",
    )
    assert sheet[1] == sheet[0], "a small sheet is shown at its own size, on narrow screens too"
    assert sheet[2] <= width
    drawn = opened.eval_on_selector_all(
        ".plot",
        "plots => plots.map(p => [p.querySelectorAll('.point, .js-line').length, p.getBoundingClientRect().width, "
        "p.querySelector('.main-svg').getBoundingClientRect().width])",
    )
    assert len(drawn) == PLOTS
    for marks, room, taken in drawn:
        assert marks > 0
        assert taken <= room + 1
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.eval_on_selector_all("img", "all => all.every(one => one.complete && one.naturalWidth > 0)")
    back, text = (opened.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    shades = [sum(int(n) for n in re.findall(r"\d+", colour)[:3]) for colour in (back, text)]
    assert (shades[0] < shades[1]) == (scheme == "dark")
    labels = opened.eval_on_selector(".xtick text", "label => getComputedStyle(label).fill")
    assert labels == text, "labels of plots take the page's colour"
    context.close()


def test_plots_follow_a_change_of_scheme(written: Path, browser: Any) -> None:
    opened = browser.new_page(color_scheme="light")
    opened.goto(written.as_uri())
    opened.wait_for_selector("body[data-ready]", state="attached", timeout=60_000)

    def colours() -> tuple[str, str]:
        label = opened.eval_on_selector(".xtick text", "label => getComputedStyle(label).fill")
        return label, opened.evaluate("getComputedStyle(document.body).color")

    light = colours()
    opened.emulate_media(color_scheme="dark")
    opened.wait_for_function(
        "before => getComputedStyle(document.querySelector('.xtick text')).fill !== before", arg=light[0]
    )
    dark = colours()
    assert light[0] == light[1], "labels take the page's colour"
    assert dark[0] == dark[1], "after the change too"
    assert light[1] != dark[1]
    opened.close()
