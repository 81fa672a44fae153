"""`vitfold profile` by hand: what comes back, and what every mistake says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from invoking import RANDOM, error, run, run_json

QUICK = ("--method", "minmax", "--calibration-size", "8")


@pytest.fixture(scope="module")
def merged(folder: Path, few: Path, small: tuple[str, ...]) -> Path:
    path = folder / "profiled.fold"
    run("optimize", *small, "-o", path, "--quant", "w8a8", "--merge", "2", "--images", few, "--keep-slower", *QUICK)
    return path


def test_a_profile_adds_up(merged: Path, few: Path, folder: Path) -> None:
    file = folder / "profile.json"
    values = run_json("profile", merged, "--images", few, "--batch", "2", "--runs", "3", "--threads", "1", "-o", file)
    assert json.loads(file.read_text()) == values
    kinds = {row["kind"]: row for row in values["kinds"]}
    assert sum(row["ms"] for row in kinds.values()) == pytest.approx(values["nodes_ms"])
    assert sum(row["ratio"] for row in kinds.values()) == pytest.approx(1)
    assert [row["block"] for row in values["blocks"]] == ["embed", *(f"blocks.{i}" for i in range(6)), "head"]
    assert kinds["linear"]["integer_macs"] > 0.7 * kinds["linear"]["macs"], "all but the patches"
    assert kinds["linear"]["ceiling_ratio"] > 0
    assert kinds["layout"]["ceiling_ratio"] is None
    assert kinds["merging"]["nodes"] > 50
    assert kinds["quantize"]["nodes"] >= 6 * 4
    assert values["unnamed_ms"] < 0.2 * values["nodes_ms"]
    assert values["batch"] == 2
    assert values["advice"][0].startswith("The bottleneck is")
    assert any(sentence.startswith("Merging costs") for sentence in values["advice"])
    assert values["environment"]["threads"] == 1


def test_tables_are_printed(merged: Path) -> None:
    result = run("profile", merged, "--runs", "1", "--no-ceiling")
    for word in ("linear", "q/dq", "embed", "The bottleneck is", "with the profiler"):
        assert word in " ".join(result.stdout.split()), word


def test_mistakes(merged: Path, folder: Path, few: Path, small: tuple[str, ...]) -> None:
    assert "no such bundle" in error("profile", folder / "absent.fold")
    assert str(folder / "absent") in error("profile", merged, "--images", folder / "absent")
    run("optimize", *small, "-o", folder / "w4.fold", "--quant", "w4a4", "--images", few, *QUICK)
    assert "is simulated: no engine executes it" in error("profile", folder / "w4.fold")
    run("profile", merged, "--runs", "0", code=2)


def test_float_models_without_merging_have_less_to_say(folder: Path) -> None:
    run("optimize", *RANDOM, "-o", folder / "plain.fold")
    values = run_json("profile", folder / "plain.fold", "--runs", "1", "--no-ceiling")
    assert values["ceiling"] is None
    assert values["merging"] == {"costs_ms": 0.0, "saves_ms": None}
    assert not any("Conversions" in sentence or "Merging" in sentence for sentence in values["advice"])
