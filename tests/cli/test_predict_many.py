"""`vitfold predict` on folders and patterns, behind broken images, into files."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from invoking import RANDOM, error, run, run_json

from vitfold.serve.predictor import open_predictor


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    run("optimize", *RANDOM, "-o", folder / "many.fold")
    return folder / "many.fold"


@pytest.fixture
def mixed(few: Path, tmp_path: Path) -> list[Path]:
    """A folder of five images, of which the first and the fourth are broken."""
    paths = [tmp_path / "mixed" / f"{i}.png" for i in range(5)]
    paths[0].parent.mkdir()
    for path, source in zip(paths, sorted(few.glob("*/*")), strict=False):
        shutil.copy(source, path)
    for i in (0, 3):
        paths[i].write_bytes(b"no image")
    return paths


def test_folders_class_folders_and_patterns_stand_for_their_images(bundle: Path, few: Path) -> None:
    names = [one["image"] for one in run_json("predict", bundle, few, "--top", 1)]
    assert names == [str(path) for path in sorted(few.glob("*/*"))]
    for given in (few / "*" / "*.jpg", few / "**" / "*.jpg", few / "*"):
        assert [one["image"] for one in run_json("predict", bundle, given, "--top", 1)] == names
    both = run_json("predict", bundle, few / "cat", names[0], "--batch", 3)
    assert [one["image"] for one in both] == [*(str(path) for path in sorted((few / "cat").iterdir())), names[0]]
    assert "nothing matches" in error("predict", bundle, few / "*.absent")


def test_a_broken_image_is_a_row(bundle: Path, mixed: list[Path]) -> None:
    said = error("predict", bundle, mixed[0].parent)
    assert "0.png is not an image" in said
    assert "--skip-bad" in said
    rows = run_json("predict", bundle, mixed[0].parent, "--skip-bad", "--batch", 2)
    assert [sorted(row) for row in rows] == [["error", "image"] if i in (0, 3) else ["image", "top"] for i in range(5)]
    shown = run("predict", bundle, mixed[0].parent, "--skip-bad")
    assert "error: " in shown.stdout
    assert shown.stderr.count("skipped: ") == 2
    assert "none of the 2 images" in run("predict", bundle, mixed[0], mixed[3], "--skip-bad", code=1).stderr


def test_rows_are_written_as_lines(bundle: Path, mixed: list[Path], tmp_path: Path) -> None:
    expected = run_json("predict", bundle, mixed[0].parent, "--skip-bad", "--top", 2)
    said = run_json("predict", bundle, mixed[0].parent, "--skip-bad", "--top", 2, "-o", tmp_path / "a" / "rows.jsonl")
    assert said == {"output": str(tmp_path / "a" / "rows.jsonl"), "images": 5, "unread": 2}
    assert [json.loads(line) for line in (tmp_path / "a" / "rows.jsonl").read_text().splitlines()] == expected
    run("predict", bundle, mixed[0].parent, "--skip-bad", "--top", 2, "-o", tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "label_1", "probability_1", "label_2", "probability_2", "error"]
    assert [row["error"] for row in rows] == [one.get("error", "") for one in expected]
    assert float(rows[1]["probability_2"]) == expected[1]["top"][1]["probability"]


def test_outputs_are_one_array_or_none(bundle: Path, mixed: list[Path], tmp_path: Path) -> None:
    run("predict", bundle, mixed[0].parent, "--skip-bad", "-o", tmp_path / "rows.npy", "--threads", 1)
    found = np.load(tmp_path / "rows.npy")
    with open_predictor(bundle) as vit:
        expected = np.stack([one.output for one in vit([mixed[i] for i in (1, 2, 4)])])
    np.testing.assert_allclose(found[[1, 2, 4]], expected, rtol=1e-5, atol=1e-6)
    assert np.isnan(found[[0, 3]]).all()
    assert "exists already" in error("predict", bundle, mixed[1], "-o", tmp_path / "rows.npy")
    assert "3.png is not an image" in error("predict", bundle, *mixed[1:], "-o", tmp_path / "rows.npy", "--overwrite")
    np.testing.assert_array_equal(np.load(tmp_path / "rows.npy"), found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mixed", "rows.npy"]
    assert ".jsonl" in error("predict", bundle, mixed[1], "-o", tmp_path / "rows.txt")


def _started(bundle: Path, images: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "vitfold", "predict", str(bundle), str(images), "-o", str(output), "--batch", "2"]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_rows_are_whole(bundle: Path, few: Path, tmp_path: Path, number: signal.Signals) -> None:
    first = tmp_path / "images" / "00000.png"
    first.parent.mkdir()
    shutil.copy(next(few.glob("*/*")), first)
    for i in range(1, 30_000):
        os.link(first, first.with_name(f"{i:05}.png"))
    output = tmp_path / "rows.jsonl"
    running = _started(bundle, tmp_path / "images", output)
    while not output.exists() or output.stat().st_size < 20_000:
        assert running.poll() is None
        time.sleep(0.02)
    running.send_signal(number)
    running.communicate()
    assert running.returncode != 0
    text = output.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert text.endswith("\n")
    assert 0 < len(rows) < 30_000
    assert [row["image"][-9:] for row in rows] == [f"{i:05}.png" for i in range(len(rows))]


def test_a_full_disk_leaves_whole_rows(bundle: Path, few: Path, tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from vitfold.cli import main\n"
        f"sys.argv = ['vitfold', 'predict', {str(bundle)!r}, {str(few)!r}, '-o', {str(tmp_path / 'rows.jsonl')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cannot write" in done.stderr
    rows = (tmp_path / "rows.jsonl").read_text()
    assert rows.endswith("\n")
    assert 0 < len([json.loads(line) for line in rows.splitlines()]) < 20
