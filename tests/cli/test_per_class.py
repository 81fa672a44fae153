"""`evaluate --per-class`: a row for each class folder, whose mean is the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from invoking import error, run, run_json

from vitfold.bench.evaluation import Outputs
from vitfold.bench.per_class import per_class
from vitfold.images import ImageSet


def test_rows_by_hand() -> None:
    paths = tuple(Path(f"{i}.png") for i in range(6))
    images = ImageSet(root="x", paths=paths, classes=("b", "a", "c"), class_index=(0, 0, 0, 1, 1, 2))
    one_hot = np.eye(3, dtype=np.float32)
    said = Outputs(values=one_hot[[1, 1, 0, 0, 2]], index=(0, 1, 2, 3, 4), skipped=("5.png",))
    then = Outputs(values=one_hot[[1, 0, 0, 0]], index=(0, 1, 3, 4), skipped=("2.png", "5.png"))
    first, second = per_class(said, images, labels=("a", "b", "c"), reference=then)
    assert (first.name, first.images, first.top1) == ("b", 3, pytest.approx(2 / 3))
    assert (first.agreement, first.reference_top1) == (0.5, 0.5)
    assert (second.name, second.images, second.top1) == ("a", 2, 0.5)
    assert (second.agreement, second.reference_top1) == (0.5, 1.0)
    assert [row.agreement for row in per_class(said, images, labels=("a", "b", "c"), reference=None)] == [None, None]


def test_the_mean_of_the_classes_is_the_whole(folder: Path, few: Path) -> None:
    run("optimize", "demo", "--merge", "4", "-o", folder / "per-class.fold")
    plain = run_json("evaluate", folder / "per-class.fold", "--images", few)
    found = run_json("evaluate", folder / "per-class.fold", "--images", few, "--per-class")
    rows = found.pop("classes")
    assert found == plain
    assert [row["name"] for row in rows] == sorted(path.name for path in few.iterdir())
    assert [row["images"] for row in rows] == [2] * 10
    assert np.mean([row["top1"] for row in rows]) == pytest.approx(found["top1"])
    assert np.mean([row["agreement"] for row in rows]) == pytest.approx(found["agreement"])
    shown = run("evaluate", folder / "per-class.fold", "--images", few, "--per-class").stdout
    assert all(row["name"] in shown for row in rows)
    said = error("evaluate", folder / "per-class.fold", "--images", few / "cat", "--per-class")
    assert "--per-class needs a classifier, and one sub-folder" in said
