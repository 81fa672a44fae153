"""`vitfold export` as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
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


@pytest.mark.parametrize("format", ["pt2", "aoti"])
def test_a_file_for_pytorch_runs_without_vitfold(bundle: Path, tmp_path: Path, format: str) -> None:
    """In a process of its own, to which only torch and NumPy are known."""
    from vitfold import open_bundle
    from vitfold.engines import engine_obstacle, open_session

    obstacle = engine_obstacle("torch-compile")
    if format == "aoti" and obstacle is not None:
        pytest.skip(obstacle)
    command = [
        sys.executable,
        "-m",
        "vitfold",
        "export",
        str(bundle),
        "--format",
        format,
        "-o",
        str(tmp_path),
        "--batch",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    opened = open_bundle(bundle)
    pixels = np.random.default_rng(0).standard_normal((2, 3, *opened.manifest.spec.image_size)).astype(np.float32)
    np.save(tmp_path / "pixels.npy", pixels)
    script = (
        "import sys, numpy, torch\n"
        "sys.modules['vitfold'] = None\n"
        "folder, how = sys.argv[1:]\n"
        "path = folder + '/vit.pt2'\n"
        "call = torch.export.load(path).module() if how == 'pt2' else torch._inductor.aoti_load_package(path)\n"
        "with torch.no_grad():\n"
        "    y = call(torch.from_numpy(numpy.load(folder + '/pixels.npy')))\n"
        "numpy.save(folder + '/y.npy', (y[0] if isinstance(y, (tuple, list)) else y).numpy())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), format], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with open_session(opened, engine="onnxruntime", threads=1) as session:
        expected = session(pixels)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert "--overwrite" in error("export", bundle, "--format", format, "-o", tmp_path)
