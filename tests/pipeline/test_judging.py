"""What a judge says: features before the head, classes by the head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from vitfold.errors import ImageError
from vitfold.images import ImageSet
from vitfold.model import Array, Model
from vitfold.pipeline.judging import features, open_judge


def test_features_and_classes_are_the_models_own(
    tiny_model: Callable[..., Model], run_torch: Callable[..., Array], photos: ImageSet
) -> None:
    model = tiny_model()
    images = np.random.default_rng(0).uniform(size=(5, 1, 32, 32)).astype(np.float32)
    bytes_ = np.rint(images * 255).astype(np.uint8)
    pixels = [Image.fromarray(np.repeat(image.transpose(1, 2, 0), 3, axis=2)) for image in bytes_]
    logits = run_torch(model, np.stack([model.preprocess(image) for image in pixels]))
    found = features(model, pixels)
    expected = found @ model.params["head.weight"].T + model.params["head.bias"]
    np.testing.assert_allclose(expected, logits, rtol=1e-4, atol=1e-4)
    judge = open_judge(model, photos)
    classes = logits.argmax(1)
    wrong = [*classes[:3], *((classes[3:] + 1) % 10)]
    verdict = judge(images, tuple(int(c) for c in wrong), 10)
    assert verdict.class_accuracy == pytest.approx(3 / 5)
    assert verdict.frechet > 0
    assert verdict.frechet_noise > 0
    itself, moved = verdict.rise_from(verdict), judge(images[::-1].copy(), (0,) * 5, 10)
    assert (itself.rise, itself.low, itself.high) == (0, 0, 0)
    assert moved.frechet == pytest.approx(verdict.frechet, rel=1e-5)
    assert judge(1 - images, (0,) * 5, 10).rise_from(verdict).rise != 0
    assert judge(images, (0,) * 5, 3).class_accuracy is None
    with pytest.raises(ImageError, match="at least 2 images, found 1"):
        judge(images[:1], (0,), 10)
