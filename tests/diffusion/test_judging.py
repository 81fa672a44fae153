"""What a judge says: features before the head, classes by the head."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from vitfold.bench.pictures import moments
from vitfold.diffusion.judge import Judge, features, open_judge
from vitfold.errors import ImageError
from vitfold.images import ImageSet
from vitfold.model import Array, Model


def test_features_and_classes_are_the_models_own(
    tiny_model: Callable[..., Model], run_torch: Callable[..., Array], photos: ImageSet, tmp_path: Path
) -> None:
    model = tiny_model()
    images = np.random.default_rng(0).uniform(size=(30, 1, 32, 32)).astype(np.float32)
    bytes_ = np.rint(images * 255).astype(np.uint8)
    pixels = [Image.fromarray(np.repeat(image.transpose(1, 2, 0), 3, axis=2)) for image in bytes_]
    logits = run_torch(model, np.stack([model.preprocess(image) for image in pixels]))
    found = features(model, pixels)
    expected = found @ model.params["head.weight"].T + model.params["head.bias"]
    np.testing.assert_allclose(expected, logits, rtol=1e-4, atol=1e-4)
    folder = tmp_path / "real"
    folder.mkdir()
    for i in range(30):
        shutil.copy(photos.paths[i % len(photos.paths)], folder / f"{i}.png")
    judge = open_judge(model, folder)
    classes = logits.argmax(1)
    wrong = [*classes[:18], *((classes[18:] + 1) % 10)]
    verdict = judge(images, tuple(int(c) for c in wrong), 10)
    assert verdict.class_accuracy == pytest.approx(18 / 30)
    assert verdict.frechet is not None
    assert verdict.frechet > 0
    assert verdict.frechet_noise is not None
    assert verdict.frechet_noise > 0
    itself, moved = verdict.rise_from(verdict), judge(images[::-1].copy(), (0,) * 30, 10)
    assert (itself.rise, itself.low, itself.high) == (0, 0, 0)
    assert moved.frechet == pytest.approx(verdict.frechet, rel=1e-5)
    assert judge(1 - images, (0,) * 30, 10).rise_from(verdict).rise != 0
    assert judge(images, (0,) * 30, 3).class_accuracy is None
    few = judge(images[:10], tuple(int(c) for c in classes[:10]), 10)
    assert (few.frechet, few.frechet_noise, few.rise_from(verdict)) == (None, None, None), "ten are left out"
    assert few.class_accuracy == 1.0


def test_statistics_stand_for_the_real_images_of_one_model(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    real = moments(np.random.default_rng(0).standard_normal((9, 32)))
    judge, kept = Judge(model=tiny_model(), real=real), tmp_path / "real.safetensors"
    judge.save(kept)
    found = open_judge(judge.model, kept).real
    assert found.count == 9
    np.testing.assert_array_equal(found.mean, real.mean)
    np.testing.assert_array_equal(found.covariance, real.covariance)
    with pytest.raises(ImageError, match="features by another model than tests:tiny; give"):
        open_judge(tiny_model(seed=1), kept)
    with pytest.raises(ImageError, match="cannot write"):
        judge.save(tmp_path / "nowhere" / "real.safetensors")
    save_file({"mean": real.mean}, kept)
    with pytest.raises(ImageError, match="holds no features of real images"):
        open_judge(judge.model, kept)
    kept.write_bytes(b"no tensors")
    with pytest.raises(ImageError, match="holds no features of real images"):
        open_judge(judge.model, kept)


def test_too_few_real_images(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    with pytest.raises(ImageError, match="holds 1 images; a Frechet distance needs at least 30"):
        open_judge(tiny_model(), tmp_path)
