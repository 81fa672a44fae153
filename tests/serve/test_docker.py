"""The context of a container image: what it holds runs from there, and nothing else is replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from vitfold import pipeline
from vitfold.artifacts.bundle import open_bundle
from vitfold.errors import BundleError, TargetError
from vitfold.model import Model
from vitfold.serve.docker import export_context
from vitfold.serve.predictor import open_predictor


@pytest.fixture(scope="module")
def bundle(tiny_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docker")
    return pipeline.save(pipeline.optimize(replace(tiny_model(), labels=tuple("abcdefghij"))), folder / "a b.fold").path


def lines_of(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (folder / "Dockerfile").read_text().splitlines():
        word, _, rest = line.partition(" ")
        found.setdefault(word, []).append(rest)
    return found


def test_what_the_image_holds_runs_from_there(bundle: Path, tmp_path: Path) -> None:
    folder = export_context(open_bundle(bundle), tmp_path / "image", threads=1)
    lines = lines_of(folder)
    command = json.loads(lines["CMD"][0])
    assert command[:5] == ["python", "-m", "vitfold", "serve", "a_b.fold"]
    assert command[-2:] == ["--threads", "1"]
    for copied in lines["COPY"]:
        assert (folder / copied.split()[0]).exists()
    assert "--only-binary :all:" in lines["RUN"][0]
    assert json.loads(lines["HEALTHCHECK"][0].removeprefix("CMD "))[0] == "python"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    script = (
        "import json, sys, vitfold\n"
        f"found = vitfold.open('a_b.fold', threads=1)({str(tmp_path / 'a.png')!r})[0].top(3)\n"
        "print(json.dumps([vitfold.__file__, found]))\n"
        "import vitfold.serve.server.app\n"
        "assert vitfold.serve.server.app._PAGE.is_file() and 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    at, found = json.loads(done.stdout)
    assert Path(at).parent == folder / "vitfold"
    with open_predictor(bundle, threads=1) as vit:
        assert [label for label, _ in found] == [label for label, _ in vit(tmp_path / "a.png")[0].top(3)]


def test_versions_are_those_that_are_installed(bundle: Path, tmp_path: Path) -> None:
    import onnxruntime

    folder = export_context(open_bundle(bundle), tmp_path / "image")
    found = [Requirement(line) for line in (folder / "requirements.txt").read_text().splitlines()]
    versions = {one.name: str(one.specifier) for one in found}
    assert versions["onnxruntime"] == f"=={onnxruntime.__version__}"
    assert versions["numpy"] == f"=={np.__version__}"
    assert "torch" not in versions


def test_only_what_was_exported_is_replaced(bundle: Path, tmp_path: Path) -> None:
    folder = export_context(open_bundle(bundle), tmp_path / "image")
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(BundleError, match="--overwrite"):
        export_context(open_bundle(bundle), folder)
    export_context(open_bundle(bundle), folder, overwrite=True)
    assert (folder / "mine.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "Dockerfile").write_text("FROM scratch\n")
    with pytest.raises(BundleError, match="was not written by"):
        export_context(open_bundle(bundle), tmp_path / "other", overwrite=True)


def test_a_bundle_for_a_gpu_is_refused(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    made = pipeline.save(pipeline.optimize(tiny_model(), target="tensorrt-fp16"), tmp_path / "gpu.fold")
    with pytest.raises(TargetError, match="runs on tensorrt, and the server has CPUs only; take --format triton"):
        export_context(open_bundle(made.path), tmp_path / "image")
