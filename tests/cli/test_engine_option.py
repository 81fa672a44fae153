"""`--engine`: a bundle for TensorRT is judged and used on any machine, and timed on none but its own kind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from invoking import RANDOM, error, run, run_json


@pytest.fixture(scope="module", autouse=True)
def without_cuda() -> Iterator[None]:
    """A GPU that happens to be here changes nothing: the package that finds it cannot be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings", None)
        yield


@pytest.fixture(scope="module")
def int8(folder: Path, few: Path, small: tuple[str, ...]) -> Path:
    path = folder / "int8.fold"
    quick = ("--method", "minmax", "--calibration-size", "8")
    values = run_json("optimize", *small, "-o", path, "--target", "tensorrt-int8", "--images", few, *quick)
    assert values["race"] is None
    return path


@pytest.fixture(scope="module")
def half(folder: Path, small: tuple[str, ...]) -> Path:
    run("optimize", *small, "-o", folder / "half.fold", "--target", "tensorrt-fp16", "--batch", "2,4,8")
    return folder / "half.fold"


@pytest.fixture(scope="module")
def portable(folder: Path) -> Path:
    run("optimize", *RANDOM, "-o", folder / "portable.fold", "--target", "portable")
    return folder / "portable.fold"


def test_evaluate_runs_a_bundle_for_tensorrt_on_another_engine(int8: Path, few: Path) -> None:
    values = run_json("evaluate", int8, "--images", few, "--engine", "onnxruntime")
    assert values["cosine"] > 0.9
    assert values["engine"].startswith("onnxruntime ")
    assert "engine     onnxruntime" in run("evaluate", int8, "--images", few, "--engine", "onnxruntime").stdout
    assert "--engine onnxruntime" in error("evaluate", int8, "--images", few)


def test_predict_runs_a_bundle_for_tensorrt_on_another_engine(int8: Path, few: Path) -> None:
    photo = next((few / "cat").iterdir())
    (found,) = run_json("predict", int8, photo, "--engine", "onnxruntime")
    assert len(found["top"]) == 5
    assert "--engine onnxruntime" in error("predict", int8, photo)


def test_half_precision_is_compared_with_the_model_in_float32(
    half: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITFOLD_CACHE", str(tmp_path))
    values = run_json("evaluate", half, "--images", few, "--engine", "onnxruntime")
    assert 0.99 < values["cosine"] < 1.0
    assert values["sqnr_db"] is not None


def test_a_reference_for_tensorrt_needs_no_gpu(
    int8: Path, half: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VITFOLD_CACHE", str(tmp_path))
    arguments = ("evaluate", int8, "--images", few, "--engine", "onnxruntime", "--reference", half)
    assert run_json(*arguments)["agreement"] is not None
    assert not (tmp_path / "reference").exists(), "half precision is not kept as the model's outputs"


def test_bench_times_a_bundle_for_tensorrt_on_no_other_engine(int8: Path) -> None:
    said = error("bench", int8, "--engine", "onnxruntime")
    for cure in ("NVIDIA GPU", f"vitfold audit {int8}", "--engine onnxruntime"):
        assert cure in said
    assert "vitfold[tensorrt]" in error("bench", int8)


def test_bench_runs_bundles_on_the_engine_that_is_asked_for(portable: Path) -> None:
    pytest.importorskip("openvino")
    result = run_json("bench", portable, "--engine", "openvino", "--trials", 1, "--seconds", 0.1)
    assert {row["engine"].split()[0] for row in result["rows"]} == {"openvino"}


@pytest.mark.parametrize("command", ["evaluate", "predict", "bench"])
def test_an_unknown_engine_is_a_usage_error(command: str, portable: Path, few: Path) -> None:
    arguments = {"evaluate": ("--images", few), "predict": (next((few / "cat").iterdir()),), "bench": ()}[command]
    said = error(command, portable, *arguments, "--engine", "trt", code=2)
    for name in ("onnxruntime", "openvino", "tensorrt"):
        assert name in said


def test_inspect_has_the_line_that_builds_the_engine(half: Path, portable: Path) -> None:
    line = run_json("inspect", half)["target"]["trtexec"]
    assert line.startswith("trtexec --onnx=model.onnx --stronglyTyped")
    assert "--optShapes=pixel_values:4x3x32x32" in line
    assert f"trtexec    {line}" in run("inspect", half).stdout
    assert "trtexec" not in run_json("inspect", portable)["target"]
    assert "trtexec" not in run("inspect", portable).stdout
