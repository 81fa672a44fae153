"""`vitfold verify`: what is checked of a bundle on this machine, what is not, and what fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from invoking import RANDOM, error, run, run_json

from vitfold.artifacts.bundle import open_bundle, write_bundle


@pytest.fixture(scope="module")
def merged(folder: Path) -> Path:
    run("optimize", *RANDOM, "--merge", 2, "-o", folder / "verified.fold")
    return folder / "verified.fold"


def test_outputs_are_compared_anew(merged: Path) -> None:
    values = run_json("verify", merged, "--threads", 1)
    assert values["not_compared"] is None
    assert 0 < values["verified"]["median_relative_error"] < 1e-4
    assert values["digest"] == open_bundle(merged).digest
    assert values["at_making"]["images"] == 4
    assert "computed anew" in run("verify", merged).stdout


def test_another_graph_with_fitting_digests_is_found(merged: Path, folder: Path) -> None:
    run("optimize", *RANDOM, "--merge", 2, "--seed", 1, "-o", folder / "other.fold")
    kept = open_bundle(merged).manifest

    def write(place: Path) -> object:
        for path in (folder / "other.fold").glob("model*"):
            shutil.copy(path, place)
        return kept

    write_bundle(folder / "wrong.fold", write)
    assert "differs from the reference" in error("verify", folder / "wrong.fold")


def test_a_damaged_file_is_named(merged: Path, tmp_path: Path) -> None:
    shutil.copytree(merged, tmp_path / "damaged.fold")
    graph = tmp_path / "damaged.fold" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    assert "model.onnx" in error("verify", tmp_path / "damaged.fold")


def test_what_cannot_be_compared_is_said(folder: Path, few: Path, small: tuple[str, ...]) -> None:
    quick = (
        "--method",
        "minmax",
        "--calibration-size",
        "8",
        "--quant",
        "w8a8",
        "--target",
        "portable",
        "--keep-slower",
    )
    run("optimize", *small, "-o", folder / "rounded.fold", "--images", few, *quick)
    values = run_json("verify", folder / "rounded.fold")
    assert values["verified"] is None
    assert "quantizers" in values["not_compared"]
    assert "not compared: " in run("verify", folder / "rounded.fold").stderr


def test_a_source_that_is_gone_is_said(folder: Path, small: tuple[str, ...], tmp_path: Path) -> None:
    source = tmp_path / "gone.safetensors"
    shutil.copy(small[0], source)
    run("optimize", source, *small[1:], "-o", folder / "gone.fold")
    source.unlink()
    result = run("verify", folder / "gone.fold", "--json")
    values = json.loads(result.stdout)
    assert values["verified"] is None
    assert "not at hand" in values["not_compared"]
