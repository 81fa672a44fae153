"""`vitfold report` by hand: documents that the commands wrote, one page, and what every mistake says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from invoking import DEMO, error, run

from diffusing import write_folder
from vitfold.artifacts.bundle import open_bundle

pytest.importorskip("plotly")
pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def merged(folder: Path, small: tuple[str, ...]) -> Path:
    run("optimize", *small, "-o", folder / "r2.fold", "--merge", "2")
    run("optimize", *small, "-o", folder / "r0.fold", "--merge", "none")
    return folder / "r2.fold"


@pytest.fixture(scope="module")
def results(folder: Path, merged: Path, few: Path, small: tuple[str, ...]) -> Path:
    made = folder / "results"
    quick = ("--trials", "2", "--seconds", "0.1", "--threads", "1", "--images", few)
    run("bench", folder / "r0.fold", merged, *quick, "-o", made / "bench.json")
    run("profile", merged, "--runs", "1", "--no-ceiling", "-o", made / "profile.json")
    run("sweep", *small, "-o", made / "few", "--merge", "0,2", "--images", few, "--calibration-images", few)
    (made / "accuracy.json").write_text(run("evaluate", merged, "--images", few, "--json").stdout)
    return made


def test_what_the_commands_write_becomes_a_page(results: Path, merged: Path, folder: Path) -> None:
    page = folder / "deep" / "report.html"
    said = run("report", results, "-o", page, "--title", "A page", "--pictures", merged, "--images", DEMO / "images")
    assert f"{page} (" in said.stdout.replace("\n", "")
    text = page.read_text(encoding="utf-8")
    for shown in (
        "A page",
        "Comparison</h2>",
        "Sweep: few",
        "vitfold optimize",
        "Where the time goes: r2",
        "Merged tokens: r2",
        "GFLOPs",
        "Evaluations",
    ):
        assert shown in text, shown
    tokens = open_bundle(merged).manifest.tokens
    assert text.count("data:image/jpeg") == 3 * len(set(tokens)), (
        "three photos, before and behind each block that merges"
    )
    assert len(text) < 5e6


def test_what_diffuse_writes_becomes_a_section(tmp_path: Path) -> None:
    source = f"hf:{write_folder(tmp_path / 'dit')}"
    quick = ("--steps", "5", "--trials", "1", "--classes", "2,0", "--engine", "torch", "--reuse", "stack:2")
    run("diffuse", source, *quick, "-o", tmp_path / "results" / "drawn")
    run("report", tmp_path / "results", "-o", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for shown in (
        "Step reuse: drawn",
        "none, 4 steps",
        "2 images, 5 steps of ddim",
        "PSNR to the unaccelerated images",
    ):
        assert shown in text, shown
    assert text.count("data:image/png") == 1, "the contact sheet"
    assert "Frechet" not in text.partition('id="plotly"')[0], "nothing was given to measure it with"


def test_without_pictures_no_torch_is_needed(results: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    run("report", results, "-o", folder / "plain.html")
    assert "results" in (folder / "plain.html").read_text(encoding="utf-8")


def test_mistakes(results: Path, folder: Path, merged: Path, few: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert "holds nothing to report" in error("report", tmp_path, "-o", page)
    assert "drawn on photos" in error("report", results, "-o", page, "--pictures", merged, code=2)
    assert "are for --pictures" in error("report", results, "-o", page, "--images", few, code=2)
    assert "no such folder" in error("report", results, "-o", page, "--pictures", merged, "--images", tmp_path / "no")
    assert "no such bundle" in error("report", results, "-o", page, "--pictures", tmp_path / "x.fold", "--images", few)
    plain = error("report", results, "-o", page, "--pictures", folder / "r0.fold", "--images", few)
    assert "merges nothing, so there is nothing to draw" in plain
    assert "is a folder" in error("report", results, "-o", tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"recipe": "r0"\n')
    assert "rows.jsonl, line 1 is not JSON" in error("report", tmp_path, "-o", page)
    assert not page.exists()


def test_what_is_not_shown_is_said(results: Path, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text((results / "bench.json").read_text())
    (tmp_path / "audit.json").write_text(json.dumps({"audits": []}))
    said = run("report", tmp_path, "-o", tmp_path / "page.html")
    assert "not shown: audit (audit)" in said.stderr


def test_a_missing_extra_is_named(results: Path, tmp_path: Path, hide_packages: Callable[..., None]) -> None:
    hide_packages("jinja2")
    assert "pip install 'vitfold[report]'" in error("report", results, "-o", tmp_path / "page.html")
