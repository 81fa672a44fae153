"""Measured times beside modelled ones: of GPUs in the table, and of nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from vitfold.audit.gpus import find_gpu
from vitfold.audit.measured import compare_measured
from vitfold.errors import EngineError

ROOT = Path(__file__).parents[2]
LENGTHS = (197, 192, 176, 128)


def document(**environment: Any) -> dict[str, Any]:
    """Times that grow by the tokens alone."""
    names = ("qkv-fp16", "fc2-int8", "attention-fp16", "norm-fp16")
    rows = [{"tokens": n, "batch": 128, "ms": {name: 0.002 * n for name in names}} for n in LENGTHS]
    found = {"device": "cuda", "gpu": "NVIDIA H200", "multiprocessors": 132, **environment}
    return {"environment": found, "width": 768, "heads": 12, "rows": rows}


def test_ratios_are_to_the_longest_length_of_a_product():
    found = compare_measured(document())
    assert found["gpu"] == "H200"
    assert found["measured_on"] == {"gpu": "NVIDIA H200", "multiprocessors": 132}
    assert "not a measurement" in found["prediction"]
    assert [row["tokens"] for row in found["measured"]] == list(LENGTHS) * 3, "a name that is no product is left out"
    by = {(row["product"], row["tokens"]): row for row in found["measured"]}
    for product in ("qkv-fp16", "fc2-int8", "attention-fp16"):
        assert by[product, 197]["measured_ratio"] == by[product, 197]["modelled_ratio"] == 1.0
        assert by[product, 128]["measured_ratio"] == pytest.approx(128 / 197)
        assert 0.4 < by[product, 128]["modelled_ratio"] < 1
    assert 0 < found["median_error"]["tiles"] < 0.2


def test_a_model_that_is_right_has_no_error():
    given = document()
    modelled = {(row["product"], row["tokens"]): row["modelled_ms"] for row in compare_measured(given)["measured"]}
    for row in given["rows"]:
        row["ms"] = {name: 3 * ms for (name, tokens), ms in modelled.items() if tokens == row["tokens"]}
    assert compare_measured(given)["median_error"]["tiles"] == pytest.approx(0.0, abs=1e-12)


def test_one_length_has_no_ratio():
    given = document()
    del given["rows"][1:]
    assert compare_measured(given)["median_error"] == {"tiles": None, "roofline": None}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"gpu": "NVIDIA GeForce GTX 1080"}, "whose peaks are not in audit/gpus.toml"),
        ({"multiprocessors": 16}, r"a part of a GPU \(MIG\)"),
    ],
)
def test_other_gpus_are_refused(environment, told):
    with pytest.raises(EngineError, match=told):
        compare_measured(document(**environment))


def test_the_devices_of_the_table_are_told_apart():
    named = {gpu: find_gpu(gpu).devices[0] for gpu in ("L4", "L40S", "A10", "A100")}
    assert {
        compare_measured(document(gpu=n, multiprocessors=find_gpu(g).multiprocessors))["gpu"] for g, n in named.items()
    } == set(named)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("width"),
        lambda d: d.update(rows=[]),
        lambda d: d["rows"][0].update(tokens="197"),
        lambda d: d["rows"][0]["ms"].update({"qkv-fp16": -1.0}),
        lambda d: d.update(environment=[]),
    ],
)
def test_what_holds_no_lengths_is_refused(change):
    broken = document()
    change(broken)
    with pytest.raises(EngineError, match="nothing in this file to compare with"):
        compare_measured(broken)


def models(**changes: Any) -> dict[str, Any]:
    """A ViT-B/16 without merging and with, whose times go with the tokens."""
    schedules = {"r0": [0] * 12, "r8": [8] * 12}
    blocks = {"tokens": 197, "width": 768, "heads": 12, "head_width": 64, "hidden": 3072, "schedules": schedules}
    rows: list[dict[str, Any]] = [
        {"name": f"{precision}-{merging}", "batch": batch, "median_ms": 0.1 * batch * ratio}
        for batch in (1, 128)
        for precision in ("fp16", "int8", "fp8")
        for merging, ratio in (("r8", 0.8), ("r0", 1.0))
    ]
    rows += [{"name": "torch-fp16", "batch": 1, "median_ms": 1.0}, {"name": "fp8-r8", "batch": 8, "error": "no kernel"}]
    return {"environment": document()["environment"], "blocks": blocks, "rows": rows, **changes}


def test_merged_models_stand_beside_those_without_merging():
    found = compare_measured(models())["measured"]
    assert [(row["product"], row["batch"], row["tokens"]) for row in found] == [
        (f"{precision}-{merging}", batch, tokens)
        for batch in (1, 128)
        for precision in ("fp16", "int8", "fp8")
        for merging, tokens in (("r0", 197), ("r8", 101))
    ]
    by = {(row["product"], row["batch"]): row for row in found}
    assert by["int8-r8", 128]["measured_ratio"] == pytest.approx(0.8)
    assert by["int8-r8", 128]["modelled_ratio"] < 1 < by["int8-r8", 1]["modelled_ratio"], "a launch is dear at batch 1"


def test_a_report_without_blocks_is_refused():
    broken = models()
    del broken["blocks"]
    with pytest.raises(EngineError, match="width is missing"):
        compare_measured(broken)
    broken = models(blocks={**models()["blocks"], "schedules": {"r8": [8, -1]}})
    with pytest.raises(EngineError, match=r"blocks.schedules.r8\[1\] has to be an integer of 0 to 197"):
        compare_measured(broken)


def test_what_a_processor_measured_is_refused(tmp_path: Path):
    """The file as the report on a GPU writes it where there is none."""
    torch = pytest.importorskip("torch")
    from vitfold.gpu.lengths import lengths
    from vitfold.gpu.report import Report, gpu_environment

    device = torch.device("cpu")
    facts = gpu_environment(device)
    lengths(Report(tmp_path, device, time.monotonic() + 60, tmp_path, True, facts))
    written = json.loads((tmp_path / "gpu-lengths.json").read_text())
    assert len(written["rows"]) == 6
    with pytest.raises(EngineError, match=r"measured on cpu: .* run `make gpu` on one of NVIDIA H100"):
        compare_measured(written)
    written["environment"] |= {"gpu": "NVIDIA H100 80GB HBM3", "multiprocessors": 132}
    products = {name for row in written["rows"] for name in row["ms"]}
    assert {"qkv-fp16", "fc2-int8", "attention-fp16"} <= products
    assert len(compare_measured(written)["measured"]) == len(products) * 6, "every product that is timed is known"
