"""A bundle as a function of images."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitfold import pipeline
from vitfold.errors import BundleError, ImageError
from vitfold.model import Array, Model
from vitfold.predictor import Prediction, open_predictor

LABELS = tuple("abcdefghij")


@pytest.fixture
def bundle(tiny_model: Callable[..., Model], tmp_path: Path) -> Path:
    model = replace(tiny_model(), labels=LABELS)
    return pipeline.save(pipeline.optimize(model, merge=2), tmp_path / "a.fold").path


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_paths_and_pillow_images_give_the_same(bundle: Path, photo: Path) -> None:
    with open_predictor(bundle) as vit:
        (by_path,) = vit(photo)
        (by_image,) = vit(Image.open(photo))
        several = vit([str(photo), photo, Image.open(photo)], batch=2)
    np.testing.assert_array_equal(by_path.output, by_image.output)
    assert len(several) == 3
    np.testing.assert_allclose(several[2].output, by_path.output, rtol=1e-5, atol=1e-5)


def test_the_output_is_that_of_the_reference(
    bundle: Path, photo: Path, tiny_model: Callable[..., Model], run_torch: Callable[..., Array]
) -> None:
    model = tiny_model()
    expected = run_torch(model, model.preprocess(Image.open(photo))[None], (2, 2))[0]
    with open_predictor(bundle) as vit:
        np.testing.assert_allclose(vit(photo)[0].output, expected, rtol=1e-4, atol=1e-5)


def test_top_is_sorted_and_sums_to_one(bundle: Path, photo: Path) -> None:
    with open_predictor(bundle) as vit:
        ranked = vit(photo)[0].top(10)
    probabilities = [p for _, p in ranked]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1.0)
    assert {label for label, _ in ranked} == set(LABELS)


def test_without_labels_positions_are_named() -> None:
    prediction = Prediction(output=np.array([0.0, 2.0, 1.0], np.float32), labels=None)
    assert [label for label, _ in prediction.top(2)] == ["1", "2"]


def test_no_image_gives_no_prediction(bundle: Path) -> None:
    with open_predictor(bundle) as vit:
        assert vit([]) == []


def test_what_cannot_be_read_is_named(bundle: Path, tmp_path: Path) -> None:
    with open_predictor(bundle) as vit, pytest.raises(ImageError, match=r"absent\.png"):
        vit(tmp_path / "absent.png")
    with pytest.raises(BundleError, match="no such bundle"):
        open_predictor(tmp_path / "absent.fold")


def test_serving_imports_no_torch(bundle: Path, photo: Path) -> None:
    script = (
        "import sys, vitfold\n"
        f"with vitfold.open({str(bundle)!r}) as vit: print(vit({str(photo)!r})[0].top(1)[0][0])\n"
        "heavy = {'torch', 'timm', 'transformers', 'onnx_ir', 'onnx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in LABELS
