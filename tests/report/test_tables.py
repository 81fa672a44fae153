"""Tables from JSON rows: every speed with its fidelity, every missing value a dash."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import documents
import pytest
from rich.console import Console

from vitfold.report.document import fill
from vitfold.report.tables import cells, columns, diffusion_table, ladder, markdown


def row(name: str = "r8", **changes: Any) -> dict[str, Any]:
    return {
        "bundle": name,
        "engine": "onnxruntime 1",
        "batch": 1,
        "scope": "engine",
        "latency_ms": {"median": 10.04, "mean": 10.0, "std": 1.0, "p90": 11.0, "p99": 12.0, "iqr": 1.0},
        "throughput_ips": {"median": 99.6, "mean": 99.0, "std": 1.0},
        "noisy": False,
        "fidelity": {"images": 4, "top1": 0.75, "top5": None, "agreement": 0.5, "cosine": 0.99, "sqnr_db": 20.0},
        "speed_up": {"median": 1.5, "iqr": 0.2, "baseline": "r0"},
        "tokens": 101,
        "macs": 13_108_505_600,
        "size_bytes": 346_400_000,
        **changes,
    }


def test_cells_have_units_and_spread() -> None:
    assert cells([row()]) == [["r8", "101", "13.11", "75.00", "50.00", "10.0 ±0.5", "99.6", "1.50x ±0.10", "346"]]


def test_noise_and_missing_values_are_visible() -> None:
    (line,) = cells([row(noisy=True, fidelity=None, tokens=None, macs=None, size_bytes=None)])
    assert line == ["r8", "-", "-", "-", "-", "~10.0 ±0.5", "99.6", "1.50x ±0.10", "-"]


def test_a_row_that_is_not_timed_has_dashes_for_its_speed() -> None:
    untimed = {"latency_ms": None, "throughput_ips": None, "untimed": "made for TensorRT"}
    (line,) = cells([row(**untimed, speed_up={"median": None, "iqr": None, "baseline": "r0"})])
    assert line == ["r8", "101", "13.11", "75.00", "50.00", "-", "-", "-", "346"]


def test_encoders_show_cosine_instead_of_top1() -> None:
    embeds = {"images": 4, "top1": None, "top5": None, "agreement": None, "cosine": 0.98765, "sqnr_db": 1.0}
    assert columns([row(fidelity=embeds)])[3] == "cosine"
    assert cells([row(fidelity=embeds)])[0][3] == "0.9877"
    assert columns([row(fidelity=None)])[3] == "top-1 %"


def test_the_table_fits_into_eighty_columns() -> None:
    text = io.StringIO()
    Console(file=text, width=80).print(ladder([row("torch"), row("r16", noisy=True)], title="title"))
    assert "346" in text.getvalue()
    assert "…" not in text.getvalue()


def test_ways_to_sample_fit_into_eighty_columns() -> None:
    rise = {"rise": 0.5, "low": -1.25, "high": 2.25}
    rows = [
        {**row, "frechet": 131.35, "frechet_noise": 16.34, "frechet_rise": rise, "class_accuracy": 0.15}
        for row in documents.diffusion()["rows"]
    ]
    text = io.StringIO()
    Console(file=text, width=80).print(diffusion_table(documents.diffusion(rows=rows)))
    words = text.getvalue().split()
    for shown in ("sampler", "stack:2,", "w8a8", "131", "±16", "2.00x", "±0.02", "15.00", "equal"):
        assert shown in words, shown
    assert "…" not in text.getvalue()
    assert "rise" not in words, "too wide for a terminal"


def test_documents_are_filled_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"rows": [row(), row("e2e", scope="end_to_end")]}))
    (tmp_path / "acc-r2.json").write_text(json.dumps({"images": 9, "top1": 0.5, "agreement": 1.0, "cosine": 0.9}))
    text = (
        "x\n<!-- table: a.json engine -->\nold\n<!-- /table -->\ny\n<!-- accuracy: acc-*.json -->\n<!-- /accuracy -->\n"
    )
    filled = fill(text, tmp_path)
    assert markdown([row()]) in filled
    assert "e2e" not in filled
    assert "old" not in filled
    assert "| r2 | 9 | 50.00 | 100.00 | 0.9000 |" in filled
    assert fill(filled, tmp_path) == filled


def test_a_missing_result_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fill("<!-- table: none.json engine -->\n<!-- /table -->", tmp_path)
