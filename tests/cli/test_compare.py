"""`vitfold compare`: what is there is measured, what is not is listed with its cure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from invoking import error, run

from vitfold.bench import peers
from vitfold.cli.compare import TIMED

QUICK = ("--trials", "1", "--seconds", "0.1", "--threads", "1", "--limit", "4")


@pytest.fixture(scope="module")
def bundle(folder: Path, small: tuple[str, ...]) -> Path:
    run("optimize", *small, "-o", folder / "compared.fold", "--merge", "2")
    return folder / "compared.fold"


def test_missing_peers_are_listed_and_the_others_measured(
    bundle: Path, few: Path, folder: Path, hide_packages: Callable[..., None]
) -> None:
    hide_packages("openvino", "nncf")
    file = folder / "compare.json"
    result = run("compare", bundle, "--peers", "torch,openvino,nncf", "--images", few, "-o", file, *QUICK)
    said = " ".join(result.stdout.split())
    for name in ("openvino", "nncf"):
        assert f"not compared: {name}; the peer {name} needs the package openvino" in said
    assert said.count("pip install 'vitfold[peers]'") == 2
    rows = [row for row in json.loads(file.read_text())["rows"] if row["scope"] == "engine"]
    assert [row["bundle"] for row in rows] == ["torch", "compared"]
    assert all(row["fidelity"]["images"] == 4 for row in rows), "on the same images"


def test_quantized_peers_without_images_say_what_they_need(bundle: Path) -> None:
    result = run("compare", bundle, "--peers", "onnxruntime-int8", "--json", *QUICK)
    assert [row["bundle"] for row in json.loads(result.stdout)["rows"]] == ["compared"]
    assert "not compared: onnxruntime-int8" in " ".join(result.stderr.split())
    assert "--calibration-images DIR" in " ".join(result.stderr.split())


def test_an_unknown_peer_is_an_error(bundle: Path) -> None:
    assert "did you mean" in error("compare", bundle, "--peers", "torch,onnxruntim")
    assert "no such bundle" in error("compare", bundle.with_name("absent.fold"), "--peers", "torch")


def test_every_peer_is_known() -> None:
    assert set(TIMED.split(",")) < set(peers.PEERS)
