"""Tables of GPUs: modelled numbers of tokens, and measured times as soon as there are any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vitfold.report.audits import forecast_cells, forecast_columns, tile_cells
from vitfold.report.document import fill


def row(gpu: str, batch: int, tokens: int, **changes: Any) -> dict[str, Any]:
    ratio = tokens / 197
    return {
        "gpu": gpu, "batch": batch, "tokens": tokens, "ms": ratio, "ratio": ratio, "work_ratio": ratio**2,
        "padding": 0.12, "idle": 0.034, **changes,
    }  # fmt: skip


def filled(text: str, root: Path) -> list[str]:
    return [line for line in fill(text, root).splitlines() if line and not line.startswith("<!--")]


def test_modelled_lengths_have_a_column_per_batch(tmp_path: Path) -> None:
    rows = [row(gpu, batch, tokens) for gpu in ("H100", "A100") for batch in (1, 64) for tokens in (197, 128)]
    document = {"source": "s", "target": "t", "prediction": "a model", "lengths": rows}
    (tmp_path / "f.json").write_text(json.dumps(document))
    header, _, first, second, said = filled(
        "<!-- modelled-lengths: f.json A100 -->\n<!-- /modelled-lengths -->", tmp_path
    )
    assert header == "| tokens | work | batch 1 | batch 64 |"
    assert first == "| 197 | 1.000 | 1.000 (12 + 3) | 1.000 (12 + 3) |"
    assert second == "| 128 | 0.422 | 0.650 (12 + 3) | 0.650 (12 + 3) |"
    assert said == "s, t on A100; a model."


def test_measured_lengths_wait_for_their_file(tmp_path: Path) -> None:
    text = "<!-- measured-lengths: gpu-lengths.json -->\n<!-- /measured-lengths -->"
    assert filled(text, tmp_path)[0].startswith("Not measured yet: `make gpu`")
    rows = [{"tokens": n, "batch": 128, "ms": {"proj-int8": 0.01 * n}} for n in (197, 128)]
    document = {"environment": {"device": "cpu"}, "width": 768, "heads": 12, "rows": rows}
    (tmp_path / "gpu-lengths.json").write_text(json.dumps(document))
    assert filled(text, tmp_path)[0].startswith("Nothing to compare: measured on cpu")
    document["environment"] = {"gpu": "NVIDIA L4", "multiprocessors": 58}
    (tmp_path / "gpu-lengths.json").write_text(json.dumps(document))
    found = filled(text, tmp_path)
    assert found[0].startswith("| product | batch | tokens | measured ms | modelled |")
    assert found[3].startswith("| proj-int8 | 128 | 128 | 1.2800 |")
    assert "| 0.650 |" in found[3]
    assert found[4].startswith("measured on NVIDIA L4; ratios to the longest are off by")


def test_a_forecast_of_an_earlier_version_has_no_share_lost() -> None:
    old = {
        "gpu": "H100", "batch": 1, "like": "4", "r": [0, 0], "ms": 1.0, "ms_like": 2.0, "ms_none": 1.0, "ms_fp16": 1.5,
        "distortion": 0.0, "distortion_like": 0.1,
    }  # fmt: skip
    new = {**old, "cores": {"padding": 0.1, "idle": 0.25}}
    place = forecast_columns({"rows": [old]}).index("lost %")
    assert [cells[place] for cells in forecast_cells({"rows": [old, new]})] == ["-", "10 + 25"]


def test_a_product_in_tiles() -> None:
    product = {"matrices": 12, "rows": 197, "columns": 197, "depth": 64, "attends": True}
    found = tile_cells(
        {
            "name": "attn",
            "count": 2,
            "precision": "int8",
            "product": product,
            "tile": [64, 32],
            "splits": 3,
            "padded_ratio": 1.5,
            "waves": 4,
            "last_wave": 0.36,
            "ms": 0.0123,
        }
    )
    assert found == ["2 attn", "12 of 197x197x64", "int8", "64x32/3", "1.50x", "4", "36%", "12.3"]
