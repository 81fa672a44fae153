"""`evaluate --changed`: the images whose label changed, and their pictures on the page."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from invoking import DEMO, error, run, run_json
from PIL import Image

import vitfold
from vitfold.bench.evaluation import Outputs
from vitfold.bench.per_class import changed
from vitfold.images import ImageSet


def test_rows_by_hand() -> None:
    paths = tuple(Path(f"{i}.png") for i in range(4))
    images = ImageSet(root="x", paths=paths, classes=("a", "b"), class_index=(0, 0, 1, 1))
    odds = np.log(np.array([1, 3], np.float32))
    now = Outputs(values=np.array([odds, odds, odds[::-1]]), index=(0, 1, 3), skipped=("2.png",))
    then = Outputs(values=np.array([odds[::-1], odds, 3 * odds, 2 * odds]), index=(0, 1, 2, 3), skipped=())
    first, second = changed(now, images, labels=("a", "b"), reference=then)
    assert (first.image, first.truth, first.original, first.now) == ("3.png", "b", "b", "a")
    assert (first.original_probability, first.now_probability) == (pytest.approx(0.9), pytest.approx(0.75))
    assert (second.image, second.truth, second.original, second.now) == ("0.png", "a", "a", "b")
    bare = ImageSet(root="x", paths=paths, classes=None, class_index=None)
    rows = changed(now, bare, labels=None, reference=then)
    assert [(row.truth, row.original, row.now) for row in rows] == [(None, "1", "0"), (None, "0", "1")]


@pytest.fixture(scope="module")
def far(folder: Path) -> Path:
    """A bundle that merges so much that labels change."""
    run("optimize", "demo", "--merge", "14", "-o", folder / "changed.fold")
    return folder / "changed.fold"


def test_what_changed_is_listed_and_shown(far: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    images = DEMO / "images"
    plain = run_json("evaluate", far, "--images", images)
    found = run_json("evaluate", far, "--images", images, "--changed")
    rows = found.pop("changed")
    assert found == plain
    assert len(rows) == round((1 - plain["agreement"]) * plain["images"])
    assert rows
    with vitfold.open(far) as vit:
        for row, said in zip(rows, vit([row["image"] for row in rows]), strict=True):
            assert said.top(1)[0] == (row["now"], pytest.approx(row["now_probability"], abs=1e-4))
    assert all(row["truth"] == Path(row["image"]).parent.name for row in rows)
    shown = run("evaluate", far, "--images", images, "--changed").stdout
    assert f"{len(rows)} labels changed" in shown
    rows[0]["image"] = str(tmp_path / "gone.png")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "far.json").write_text(json.dumps({**plain, "changed": rows}))
    run("report", tmp_path / "results", "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"Of {plain['images']} images, {len(rows)} have another label" in page
    pictures = re.findall(r'<figure class="tile"><img src="data:image/jpeg;base64,([^"]*)', page)
    assert len(pictures) == min(24, len(rows))
    assert f"cannot be read here: {tmp_path / 'gone.png'}" in page
    if len(rows) > 1:
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[1]))).convert("RGB"), np.float32)
        own = Image.open(rows[1]["image"]).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        assert np.abs(drawn - np.asarray(own, np.float32)).mean() < 4


def test_a_model_without_labels_has_no_changed_ones(folder: Path, few: Path) -> None:
    run("optimize", "demo", "--outputs", "embedding", "-o", folder / "changed-encoder.fold")
    said = error("evaluate", folder / "changed-encoder.fold", "--images", few, "--changed")
    assert "--changed needs a classifier of one label per image" in said
