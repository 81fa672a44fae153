"""Commands that are interrupted, that miss their gate, and that are given pipes and threads that make no sense."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from vitfold.artifacts.bundle import open_bundle
from vitfold.cli.app import app
from vitfold.cores import most_threads


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model in a file: its weights count as trained."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_file(timm.create_model("test_vit", img_size=64, num_classes=10).state_dict(), path)
    return [str(path), "--arch", "test_vit", "--image-size", "64", "--num-classes", "10"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def good(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.fold"
    run("optimize", *small, "-o", path)
    return path


@pytest.fixture
def former(good: Path, tmp_path: Path) -> Path:
    shutil.copytree(good, tmp_path / "a.fold")
    return tmp_path / "a.fold"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def said(result: Result) -> str:
    return " ".join(result.stderr.split())


MERGED = ("--merge", "4", "--min-agreement", "1.0")


def test_a_bundle_that_misses_its_gate_replaces_nothing(small: list[str], pictures: Path, former: Path) -> None:
    before = open_bundle(former).digest
    result = run("optimize", *small, "--images", pictures, *MERGED, "-o", former, "--overwrite", "--json", code=3)
    assert f"{former} is as it was" in said(result)
    values = json.loads(result.stdout)
    assert values["bundle"] is None
    assert values["fidelity"]["agreement"] < 1.0
    assert open_bundle(former).digest == before
    assert [path.name for path in former.parent.iterdir()] == ["a.fold"]


def test_a_new_bundle_that_misses_its_gate_is_not_written(small: list[str], pictures: Path, tmp_path: Path) -> None:
    result = run("optimize", *small, "--images", pictures, *MERGED, "-o", tmp_path / "deep" / "a.fold", code=3)
    assert "is below --min-agreement 1.0" in said(result)
    assert said(result).endswith("nothing was written")
    assert "fidelity" in result.stdout
    assert "predict" not in said(result)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_passes_its_gate_replaces_the_former(small: list[str], pictures: Path, former: Path) -> None:
    before = open_bundle(former).digest
    (former / "notes.txt").write_text("mine")
    result = run("optimize", *small, "--images", pictures, "--min-agreement", "1.0", "-o", former, "--overwrite")
    assert open_bundle(former).digest != before
    assert (former / "notes.txt").read_text() == "mine"
    assert "not vitfold's, and left in the bundle: notes.txt" in said(result)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("moment", ["loading", "verifying", "racing"])
def test_a_command_that_is_interrupted_leaves_the_former_bundle(
    small: list[str], pictures: Path, former: Path, number: signal.Signals, code: int, moment: str
) -> None:
    before = open_bundle(former).digest
    command = [sys.executable, "-m", "vitfold", "optimize", *small, "--images", pictures, "--quant", "w8a8"]
    command += ["--calibration-size", "8", "--method", "minmax", "-o", former, "--overwrite"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if moment in line:
                process.send_signal(number)
                break
        rest = process.stderr.read()
    assert process.returncode == code, (seen, rest)
    assert open_bundle(former).digest == before
    assert [path.name for path in former.parent.iterdir()] == ["a.fold"]


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def pipe_in(folder: Path, name: str) -> Path:
    folder.mkdir()
    pipe(folder / name)
    return folder


Build = Callable[[Path, Path, Path], list[object]]
PIPES: tuple[tuple[str, Build, str], ...] = (
    ("a manifest", lambda t, g, p: ["predict", pipe_in(t / "a.fold", "manifest.json"), p / "00.png"], "cannot read"),
    ("a manifest to look at", lambda t, g, p: ["inspect", pipe_in(t / "a.fold", "manifest.json")], "cannot read"),
    ("a bundle", lambda t, g, p: ["inspect", pipe(t / "a.fold")], "is not a bundle"),
    ("a graph", lambda t, g, p: ["audit", pipe(t / "a.onnx")], "is not a bundle"),
    ("weights", lambda t, g, p: ["optimize", pipe(t / "a.safetensors"), "--arch", "test_vit", "--dry-run"], "no file"),
    (
        "a recipe",
        lambda t, g, p: [
            *("optimize", "timm:test_vit", "--weights", "random", "--image-size", "32", "--dry-run", "--recipe"),
            pipe(t / "r.toml"),
        ],
        "cannot read the recipe",
    ),
    (
        "a plan of a sweep",
        lambda t, g, p: ["sweep", "timm:test_vit", "--images", p, "-o", t / "s", "--plan", pipe(t / "plan.toml")],
        "cannot read the sweep",
    ),
    (
        "what is swept over",
        lambda t, g, p: [
            *("sweep", "timm:test_vit", "--weights", "random", "--image-size", "32", "--num-classes", "10"),
            *("--images", p, "--calibration-size", "4", "-o", pipe_in(t / "s", "sweep.json")),
        ],
        "cannot read",
    ),
    ("a table", lambda t, g, p: ["table", pipe(t / "bench.json")], "cannot read"),
    ("measurements", lambda t, g, p: ["report", pipe_in(t / "m", "bench.json"), "-o", t / "r.html"], "cannot be read"),
    ("rows", lambda t, g, p: ["report", pipe_in(t / "m", "rows.jsonl"), "-o", t / "r.html"], "cannot read"),
    (
        "embeddings of texts",
        lambda t, g, p: ["evaluate", g, "--images", p, "--zero-shot", pipe(t / "texts.npy")],
        "error:",
    ),
    (
        "the bundle to make again",
        lambda t, g, p: ["optimize", "--from", pipe(t / "a.fold"), "--dry-run"],
        "not a bundle",
    ),
)


@pytest.mark.parametrize(("build", "words"), [case[1:] for case in PIPES], ids=[case[0] for case in PIPES])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(
    good: Path, pictures: Path, tmp_path: Path, build: Build, words: str
) -> None:
    assert words in said(run(*build(tmp_path, good, pictures), code=1))


THREADS = (
    ("predict", "0", 2),
    ("predict", "-1", 2),
    ("predict", "two", 2),
    ("predict", "1.5", 2),
    ("predict", "100000", 1),
    ("predict", str(most_threads() + 1), 1),
    ("evaluate", "100000", 1),
    ("evaluate", "0", 2),
    ("bench", "100000", 1),
    ("profile", "100000", 1),
)


@pytest.mark.parametrize(("command", "threads", "code"), THREADS)
def test_threads_beyond_reason_are_refused_at_once(
    good: Path, pictures: Path, command: str, threads: str, code: int
) -> None:
    extra = {"predict": [pictures / "00.png"], "evaluate": ["--images", pictures]}
    result = run(command, good, *extra.get(command, []), "--threads", threads, code=code)
    if code == 1:
        assert f"threads has to be a whole number of 1 to {most_threads()} on this machine" in said(result)
