"""`vitfold export` as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from invoking import RANDOM, error, run, run_json


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "vit.fold"
    run("optimize", *RANDOM, "--merge", "1", "-o", path)
    return path


def test_export_writes_a_model_and_says_how_to_go_on(bundle: Path, tmp_path: Path) -> None:
    said = run("export", bundle, "--format", "triton", "-o", tmp_path / "repository", "--name", "vit").stdout
    assert (tmp_path / "repository/vit/config.pbtxt").is_file()
    assert "README.md" in said
    assert "trtexec" not in said


def test_export_as_json(bundle: Path, tmp_path: Path) -> None:
    found = run_json("export", bundle, "-o", tmp_path, "--instances", 2, "--max-batch", 4)
    assert found == {
        "path": str(tmp_path / "vit"),
        "name": "vit",
        "backend": "onnxruntime",
        "trtexec": None,
        "files": ["1/model.onnx", "README.md", "client.py", "config.pbtxt"],
    }
    config = (tmp_path / "vit/config.pbtxt").read_text()
    assert "count: 2" in config
    assert "max_batch_size: 4" in config


def test_export_for_tensorrt_prints_the_line_that_builds(tmp_path: Path) -> None:
    run("optimize", *RANDOM, "--target", "tensorrt-fp16", "-o", tmp_path / "half.fold")
    said = run("export", tmp_path / "half.fold", "-o", tmp_path / "repository").stdout
    assert "trtexec --onnx=model.onnx --stronglyTyped" in said


def test_export_replaces_only_when_told(bundle: Path, tmp_path: Path) -> None:
    run("export", bundle, "-o", tmp_path)
    assert "--overwrite" in error("export", bundle, "-o", tmp_path)
    run("export", bundle, "-o", tmp_path, "--overwrite")


def test_export_refuses_what_it_cannot_serve(bundle: Path, tmp_path: Path) -> None:
    assert "no such bundle" in error("export", tmp_path / "absent.fold", "-o", tmp_path)
    error("export", bundle, "--format", "torchserve", "-o", tmp_path, code=2)
    error("export", bundle, "-o", tmp_path, "--instances", 0, code=2)
    assert "does not suit" in error("export", bundle, "-o", tmp_path, "--name", "a b")
