"""Targets of TensorRT, the audit and the forecast, as a user meets them without a GPU."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from invoking import error, run, run_json

from vitfold.architectures.programs import deployed_program, whole_in
from vitfold.artifacts.bundle import open_bundle
from vitfold.model import Model
from vitfold.pipeline import count_costs, optimize
from vitfold.program import program_from_dict
from vitfold.program.queries import attention_of
from vitfold.recipe import QuantRecipe

pytest.importorskip("tensorrt_rtx", reason="NVIDIA's compiler is not installed: pip install 'vitfold[audit]'")


@pytest.fixture(scope="module")
def bundles(folder: Path, small: tuple[str, ...], few: Path) -> dict[str, Path]:
    """The small model for every target, three images of merging in two blocks."""
    made = {}
    for name, *more in (
        ("fp16",),
        ("int8", "--images", few, "--calibration-size", 8, "--batch", "1,2,8"),
        ("fp8", "--images", few, "--calibration-size", 8),
    ):
        made[name] = folder / f"{name}.fold"
        run("optimize", *small, "--target", f"tensorrt-{name}", "--merge", "0,2,0,1", *more, "-o", made[name])
    return made


@pytest.fixture(scope="module")
def cpu(folder: Path, small: tuple[str, ...]) -> Path:
    run("optimize", *small, "-o", folder / "cpu.fold")
    return folder / "cpu.fold"


def test_targets_imply_their_precision(bundles: dict[str, Path]) -> None:
    recipes = {name: open_bundle(path).manifest.recipe for name, path in bundles.items()}
    assert recipes["fp16"].quant is None
    assert recipes["int8"].quant is not None
    assert (recipes["int8"].quant.scheme, recipes["int8"].quant.calibration_size) == ("W8A8", 8)
    assert recipes["fp8"].quant is not None
    assert recipes["fp8"].quant.scheme == "FP8"
    assert {recipe.merge.order for recipe in recipes.values()} == {"score"}
    target = open_bundle(bundles["int8"]).manifest.target
    assert target["batch"] == [1, 2, 8]
    assert "--minShapes=pixel_values:1x3x32x32" in target["trtexec"]


@pytest.mark.parametrize(("name", "whole"), [("fp16", False), ("int8", True), ("fp8", False)])
def test_a_bundle_says_which_attentions_keep_all_their_queries(
    bundles: dict[str, Path], name: str, whole: bool
) -> None:
    manifest = open_bundle(bundles[name]).manifest
    spec, blocks = manifest.spec, range(manifest.spec.num_layers)
    assert whole_in(manifest) == (frozenset(f"blocks.{block}.attn" for block in blocks) if whole else frozenset())
    program = program_from_dict(run_json("inspect", bundles[name], "--program"))
    assert program == deployed_program(spec, manifest.recipe.merge, whole_in(manifest))
    assert manifest.macs == sum(c.macs for c in count_costs(spec, manifest.recipe.merge, whole=whole_in(manifest)))
    earlier = replace(manifest, target={key: value for key, value in manifest.target.items() if "whole" not in key})
    assert whole_in(earlier) == frozenset(), "a bundle of a version before computes those that are read, and says so"


@pytest.mark.parametrize(
    ("target", "queries"), [("tensorrt-int8", 17), ("tensorrt-fp16", 1), ("tensorrt-fp8", 1), ("cpu-vnni", 1)]
)
def test_the_last_attention_has_the_queries_that_the_target_wants(
    tiny_model: Callable[..., Model], target: str, queries: int
) -> None:
    plan = optimize(tiny_model(head_dim=32), target=target)
    program = deployed_program(plan.folded.spec, plan.recipe.merge, plan.whole_attentions)
    last = attention_of(program, 1)
    assert last is not None
    assert last.shapes[0][2] == queries


def test_two_ranges_of_the_softmax_leave_one_query(tiny_model: Callable[..., Model]) -> None:
    for method, whole in (("minmax", True), ("ptq4vit", False)):
        plan = optimize(tiny_model(head_dim=32), target="tensorrt-int8", quant=QuantRecipe(method=method))
        assert bool(plan.whole_attentions) == whole == plan.target.whole_attention
    kept = QuantRecipe(method="minmax", sites={"blocks.1.attn": "float"})
    assert optimize(tiny_model(head_dim=32), target="tensorrt-int8", quant=kept).whole_attentions == {"blocks.0.attn"}
    assert not optimize(tiny_model(head_dim=8), target="tensorrt-int8").whole_attentions, "no width that INT8 fuses"


def test_an_audit_counts_explains_and_prices(bundles: dict[str, Path], tmp_path: Path) -> None:
    found = run_json("audit", bundles["int8"], "--batch", 2, "--picture", tmp_path / "a.svg", "-o", tmp_path / "a.json")
    for key in ("gpu", "kernels", "kernels_per_block", "gemms", "attention", "copies", "bytes_moved", "engine_bytes"):
        assert key in found
    assert set(found["gemms"]) == {"int8", "fp8", "fp16", "fp32"}
    assert found["gemms"]["int8"] > 0
    assert set(found["attention"]) >= {"fused", "unfused"}
    assert set(found["predicted_ms"]) >= {"H100", "H200", "A100", "L40S", "L4", "T4"}
    assert all(ms > 0 for ms in found["predicted_ms"].values())
    assert found["prediction"].endswith("not a measurement")
    assert sum(found["kinds"].values()) == found["kernels"]
    picture = ElementTree.fromstring((tmp_path / "a.svg").read_text())
    bars = picture.findall(".//{http://www.w3.org/2000/svg}rect")
    assert len(bars) == 1 + len(found["middle_block"])
    assert set(found["tensor_cores"]) == set(found["predicted_ms"]) == set(found["model"]["gpus"])
    assert all(0 <= cores[what] < 1 for cores in found["tensor_cores"].values() for what in ("padding", "idle"))
    assert all(ms <= found["predicted_ms"][gpu] * (1 + 1e-9) for gpu, ms in found["predicted_roofline_ms"].items())
    assert found["tiles"]["gpu"] == "A10", "the first of the table with the capability compiled for"
    products = found["tiles"]["products"]
    assert sum(row["count"] for row in products) == sum(
        found["kinds"].get(kind, 0) for kind in ("gemm", "product", "attention", "convolution")
    )
    macs = [row["count"] * math.prod(list(row["product"].values())[:4]) for row in products]
    attention = [row["product"]["attends"] for row in products]
    assert sum(n * (1 + twice) for n, twice in zip(macs, attention, strict=True)) == found["macs"]


def test_an_audit_that_was_written_is_priced_again_without_a_compiler(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    found = run_json("audit", bundles["int8"], bundles["fp16"], "-o", path)["audits"]
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert run_json("audit", path)["audits"] == found
    shown = " ".join(run("audit", path, "--tiles", "H100").stdout.split())
    assert "H100, 132 multiprocessors; tiles are assumed, times modelled" in shown
    assert "did you mean" in error("audit", path, "--tiles", "H101")
    (tmp_path / "other.json").write_text('{"rows": []}')
    assert "is no audit" in error("audit", tmp_path / "other.json")
    (tmp_path / "noise.json").write_text("{")
    assert "cannot read" in error("audit", tmp_path / "noise.json")
    assert "cannot read" in error("audit", tmp_path / "none.json")


def test_audits_stand_side_by_side(bundles: dict[str, Path]) -> None:
    two = run("audit", bundles["fp16"], bundles["int8"])
    assert "fp16" in two.stdout
    assert "not a measurement" in two.stdout
    three = run_json("audit", bundles["fp16"], bundles["int8"], bundles["fp8"], "--gpu", "sm89")
    assert [audit["name"] for audit in three["audits"]] == ["fp16", "int8", "fp8"]
    assert "H200" not in three["audits"][0]["name"]
    assert run("audit", *bundles.values(), "--gpu", "sm89").stdout.count("fused") >= 3


def test_what_cannot_be_audited_says_why(bundles: dict[str, Path], cpu: Path, tmp_path: Path) -> None:
    assert "did you mean sm8" in error("audit", bundles["int8"], "--gpu", "sm88")
    assert "no such bundle" in error("audit", tmp_path / "none")
    (tmp_path / "noise.onnx").write_bytes(b"no graph at all")
    assert "no ONNX file" in error("audit", tmp_path / "noise.onnx")
    old = error("audit", bundles["fp8"], "--gpu", "sm86")
    assert "8-bit floats need sm89 or sm120" in old
    assert "FusedMatMul" in (rejected := error("audit", cpu))
    assert "--target tensorrt-fp16 or portable" in rejected
    assert "blocks.0.attn" in rejected, "the node's name is the site"


def test_a_missing_compiler_is_named_with_its_cure(bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert "pip install 'vitfold[audit]'" in error("audit", bundles["int8"])


def test_a_crash_of_the_compiler_is_no_crash_of_ours(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "dies.sh"
    script.write_text("#!/bin/sh\necho 'Segmentation fault' >&2\nexit 139\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert "crashed" in (message := error("audit", bundles["int8"]))
    assert "Segmentation fault" in message


def test_a_forecast_solves_every_gpu_and_batch(small: tuple[str, ...], few: Path, tmp_path: Path) -> None:
    found = run_json(
        "forecast",
        *small,
        "--images",
        few,
        "--like",
        1,
        "--gpus",
        "A100,T4",
        "--batches",
        "1,64",
        "-o",
        tmp_path / "f.json",
    )
    assert [(row["gpu"], row["batch"]) for row in found["rows"]] == [("A100", 1), ("A100", 64), ("T4", 1), ("T4", 64)]
    for row in found["rows"]:
        assert row["distortion"] <= row["distortion_like"]
        assert row["ms"] <= row["ms_none"], "never slower than merging nothing"
        assert row["ms_roofline"] <= row["ms"]
        assert 0 <= row["cores"]["padding"] < 1
        assert 0 < row["cores_none"]["idle"] < 1
    assert found["prediction"].endswith("assumed tiles and waves, not a measurement")
    assert list(found["model"]["gpus"]) == ["A100", "T4"]
    assert (tmp_path / "f.json").exists()
    assert "A100" in run("forecast", *small, "--images", few, "--like", 1, "--gpus", "A100", "--batches", 8).stdout
    left = run_json(
        "forecast",
        *small,
        "--images",
        few,
        "--like",
        1,
        "--gpus",
        "A100,L4",
        "--batches",
        8,
        "--target",
        "tensorrt-fp8",
    )
    assert left["left_out"] == ["A100"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--merge", "auto", "--target", "simulation", "--quant", "w8a8"), "has no time to solve for"),
        (("--merge", "auto", "--target", "tensorrt-int8", "--gpu", "A101"), "no peaks are known of the GPU 'A101'"),
        (("--merge", "auto:0", "--target", "tensorrt-fp16"), "auto:0 distorts nothing"),
        (("--merge", "auto", "--target", "tensorrt-fp8", "--gpu", "A100"), "does not multiply fp8"),
        (("--target", "tensorrt-int8", "--quant", "none"), "leave --quant out"),
        (("--target", "tensorrt-fp16", "--quant", "w8a8"), "does not quantize"),
        (("--target", "tensorrt-fp8", "--quant", "w8a8"), "give --quant fp8"),
        (("--target", "cpu", "--quant", "fp8"), "runs no 8-bit floats"),
        (("--target", "cpu", "--batch", "1,2,4"), "runs any batch"),
    ],
)
def test_what_a_target_cannot_do_is_said_before_the_work(
    small: tuple[str, ...], few: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert message in error("optimize", *small, "--images", few, "--dry-run", *arguments)


def test_merging_by_the_model_of_a_gpu_is_reported(small: tuple[str, ...], few: Path) -> None:
    arguments = ("--merge", "auto:1", "--target", "tensorrt-fp16", "--images", few, "--dry-run")
    alone = run("optimize", *small, *arguments, "--gpu", "H100", "--batch", 1)
    assert "merging cannot pay" in " ".join(alone.stderr.split())
    assert "roofline model" in " ".join(alone.stderr.split())
    busy = run("optimize", *small, *arguments, "--gpu", "T4", "--batch", 4096)
    assert "4096" in busy.stderr


def test_a_repeated_bundle_keeps_its_batches(folder: Path, few: Path, bundles: dict[str, Path]) -> None:
    run("optimize", "--from", bundles["int8"], "-o", folder / "again.fold")
    again, first = open_bundle(folder / "again.fold").manifest, open_bundle(bundles["int8"]).manifest
    assert again.target == first.target
    assert again.calibration is not None
    assert first.calibration is not None
    assert again.calibration["quantizers"] == first.calibration["quantizers"]


def test_raw_outputs_are_rounded_where_a_recipe_asks(
    folder: Path, small: tuple[str, ...], few: Path, bundles: dict[str, Path]
) -> None:
    recipe = folder / "outputs.toml"
    recipe.write_text('[merge]\nr = "0,2,0,1"\n[quant]\noutputs = true\ncalibration_size = 8\n')
    run("optimize", *small, "--target", "tensorrt-int8", "--recipe", recipe, "--images", few, "-o", folder / "oq.fold")
    plain, rounded = (run_json("audit", path) for path in (bundles["int8"], folder / "oq.fold"))
    assert rounded["kernels"] == plain["kernels"]
    assert rounded["bytes_moved"] < 0.9 * plain["bytes_moved"]
    assert "rounds no outputs" in error(
        "optimize", *small, "--target", "portable", "--recipe", recipe, "--images", few, "--dry-run"
    )
