"""Sweeps and searches by hand: rows, resuming, and what every mistake says."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from invoking import ROOT, error, run, run_json

from specs import vit_base
from vitfold.artifacts.bundle import open_bundle
from vitfold.cli.sweep import SweepArgs, sweep_of
from vitfold.pipeline.sweep import Sweep
from vitfold.pipeline.trial import SHORT

SWEEP = ("--merge", "0,1", "--quant", "none,w8a8,w4a4", "--methods", "minmax", "--target", "cpu-vnni")
NAMES = ["r0", "r0-w8a8-minmax", "r0-w4a4-minmax", "r1", "r1-w8a8-minmax", "r1-w4a4-minmax"]
TIMINGS = ("latency_ns", "throughput_ips", "speedup", "noisy")


@pytest.fixture(scope="module")
def sweep(folder: Path, few: Path, small: tuple[str, ...]):
    """Return a function that runs the sweep in a folder of this name and returns its document."""

    def sweep(name: str, *more: object):
        return run_json("sweep", *small, *SWEEP, "--images", few, "--calibration-size", 8, "-o", folder / name, *more)

    return sweep


@pytest.fixture(scope="module")
def swept(sweep):
    return sweep("whole")


def without_timings(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def test_every_combination_has_a_row_and_failures_say_why(swept: dict, folder: Path) -> None:
    rows = {row["recipe"]: row for row in swept["rows"]}
    assert list(rows) == NAMES
    for name, row in rows.items():
        if "w4a4" in name:
            assert "no engine of target cpu-vnni executes activations of fewer than 8 bits" in row["error"]
            assert row["speedup"] is row["top1"] is None
            continue
        assert row["error"] is None
        assert row["images"] == 12
        assert row["speedup"]["low"] <= row["speedup"]["median"] <= row["speedup"]["high"]
        assert len(row["latency_ns"]["trials"]) == SHORT.trials
        bundle = open_bundle(folder / "whole" / row["bundle"])
        assert list(bundle.manifest.recipe.merge.r) == row["merge"]
    assert rows["r0"]["top1_agreement"] == 1.0
    assert rows["r0"]["drop"]["drop"] == 0.0
    words = shlex.split(rows["r1-w8a8-minmax"]["commands"][0])
    given = {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}
    assert (given["--merge"], given["--quant"], given["--method"]) == ("1,1,1,0,0,0", "w8a8", "minmax")
    assert given["--target"] == "cpu-vnni"


def test_a_killed_sweep_goes_on_and_measures_nothing_twice(swept: dict, sweep, folder: Path, few, small) -> None:
    first = folder / "killed"
    run("sweep", *small, "--merge", "0", *SWEEP[2:], "--images", few, "--calibration-size", 8, "-o", first)
    lines = (first / "rows.jsonl").read_text().splitlines()
    (first / "rows.jsonl").write_text(lines[0] + "\n" + lines[1][: len(lines[1]) // 2])
    rows = sweep("killed")["rows"]
    assert rows[0] == json.loads(lines[0])
    assert without_timings(rows) == without_timings(swept["rows"])
    before = (first / "rows.jsonl").read_bytes()
    sweep("killed")
    assert (first / "rows.jsonl").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(swept: dict, sweep, folder: Path, few: Path, small) -> None:
    said = error("sweep", *small, *SWEEP, "--images", few, "--calibration-size", 4, "-o", folder / "whole")
    assert "holds a sweep with another images_digest" in said
    assert "error: " in error("sweep", *small, *SWEEP, "--images", few, "--calibration-size", 4, "-o", few)
    with (folder / "whole" / "rows.jsonl").open("a") as file:
        file.write("no row\n")
    said = error("sweep", *small, *SWEEP, "--images", few, "--calibration-size", 8, "-o", folder / "whole")
    assert "line 7 is not JSON" in said
    assert "remove the line" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--merge", "0,0"), "the sweep has r0 twice"),
        (("--merge", "nine"), "r = 'nine' is not understood"),
        (("--quant", "w8a8", "--methods", "ptq4it"), "ptq4vit"),
        (("--rules", "tomme"), "no merging rule is called 'tomme'; did you mean tome"),
        (("--calibration-size", "19"), "too few are left to report on"),
        (("--merge", "1", "--compensate", "maybe"), "compensate is no, yes or both, no,yes, found 'maybe'"),
        (("--merge", "1", "--compensate", "no,yes"), "give at least 256, better 2000, by --calibration-images DIR"),
    ],
)
def test_mistakes_are_said(few: Path, small, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in error("sweep", *small, "--images", few, "-o", tmp_path / "s", *arguments)


def test_rules_are_swept_over_where_something_merges(few: Path, small, tmp_path: Path) -> None:
    line = ("sweep", *small, "--merge", "0,1", "--rules", "tome,evit", "--images", few, "--calibration-size", 8)
    rows = run_json(*line, "-o", tmp_path / "s")["rows"]
    assert [(row["recipe"], row["rule"]) for row in rows] == [("r0", "tome"), ("r1", "tome"), ("r1-evit", "evit")]
    assert open_bundle(tmp_path / "s" / "r1-evit.fold").manifest.recipe.merge.rule == "evit"
    assert "--merge-rule evit" in rows[2]["commands"][0]


def test_a_plan_with_an_unknown_key_is_named(few: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text('merges = ["0"]')
    said = error("sweep", "demo", "--images", few, "--plan", tmp_path / "plan.toml", "-o", tmp_path / "s")
    assert "unknown key merges; did you mean merge" in said


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_the_sweeps_that_come_along_can_be_carried_out(path: Path) -> None:
    values = SweepArgs(plan=path).chosen()
    merging = sum(merge != "0" for merge in values["merge"])
    ways = merging * len(values["rules"]) * len(values["compensate"]) + len(values["merge"]) - merging
    floats = values["quant"].count("none")
    each = floats + (len(values["quant"]) - floats) * len(values["methods"])
    assert len(sweep_of(values).attempts(vit_base())) == ways * each


def test_recipes_are_named_by_their_schedules() -> None:
    attempts = Sweep(merges=("0", "8", "4:-1", "align"), quants=("none", "w8a8")).attempts(vit_base())
    assert [one.name for one in attempts if one.quant == "none"] == ["r0", "r8", "r4~-1", "align"]
    assert attempts[-1].name == "align-w8a8"
    assert attempts[-1].r == (5, *(0,) * 11)


def test_a_search_writes_a_bundle_and_says_what_it_tried(few: Path, small, tmp_path: Path) -> None:
    arguments = (
        "optimize",
        *small,
        "--images",
        few,
        "--calibration-size",
        4,
        "--max-drop",
        60,
        "-o",
        tmp_path / "a.fold",
    )
    found = run_json(*arguments, "--target", "cpu")
    assert found["images"] == {"calibration": 4, "search": 8, "held_out": 8, "refitting": 0}
    bundle = open_bundle(tmp_path / "a.fold")
    if found["winner"] is None:
        assert bundle.manifest.recipe.is_lossless
    else:
        row = next(row for row in found["rows"] if row["recipe"] == found["winner"])
        assert list(bundle.manifest.recipe.merge.r) == row["merge"]
        assert row["speedup"]["low"] > 1
        assert found["held_out"]["drop"] <= 0.6
        assert bundle.manifest.fidelity is not None
        assert bundle.manifest.fidelity["images"] == 8
    again = run_json(*arguments, "--target", "cpu", "--overwrite")
    kept = {row["recipe"]: row for row in found["rows"]}
    assert all(kept[row["recipe"]] == row for row in again["rows"] if row["recipe"] in kept)


def test_a_bound_that_nothing_meets_shows_the_nearest_miss(few: Path, small, tmp_path: Path) -> None:
    said = error(
        "optimize", *small, "--images", few, "--calibration-size", 4, "--max-latency-ms", 0.0001, "--target", "cpu",
        "--quant", "none", "-o", tmp_path / "a.fold",
    )  # fmt: skip
    assert "nothing takes 0.0001 ms or less: the nearest miss is none-cpu-r" in said
    assert not (tmp_path / "a.fold").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--max-drop", "1"), 1, "8 images cannot tell a drop of 1 points"),
        (("--max-drop", "1", "--max-latency-ms", "5"), 2, "give one of both"),
        (("--max-drop", "1", "--merge", "4"), 2, "a search chooses --merge"),
        (("--max-drop", "1", "--compensate"), 2, "a search chooses --merge"),
    ],
)
def test_a_search_that_cannot_be_is_refused(few, small, tmp_path, arguments, code, message) -> None:
    line = ("optimize", *small, "--images", few, "--calibration-size", 4, "-o", tmp_path / "a.fold", *arguments)
    assert message in error(*line, code=code)


@pytest.mark.parametrize(
    ("classes", "message"), [(0, "this model gives features"), (7, "no top-1, because the class folders of")]
)
def test_a_search_needs_classes_that_fit(few, tmp_path, classes, message) -> None:
    source = ("timm:test_vit", "--weights", "random", "--image-size", 32, "--num-classes", classes)
    assert message in error("optimize", *source, "--images", few, "--max-drop", 60, "-o", tmp_path / "a.fold")


def test_the_reports_protocol_can_be_as_long_as_the_machine_allows(folder: Path, few: Path, small) -> None:
    shorter = ("--calibration-size", 8, "--protocol", "report", "--batch", 2, "--iterations", 3)
    swept = run_json("sweep", *small, "--merge", "1", "--images", few, *shorter, "-o", folder / "protocol")
    assert (swept["protocol"], swept["batch"], swept["iterations"]) == ("report", 2, 3)
    (row,) = swept["rows"]
    assert len(row["latency_ns"]["trials"]) == 5
    assert row["decoded_ahead"]["throughput_ips"]["mean"] > 0
    text = error("sweep", *small, "--merge", "1", "--images", few, *shorter[:4], "-o", folder / "protocol")
    assert "holds a sweep with another batch, iterations" in text
