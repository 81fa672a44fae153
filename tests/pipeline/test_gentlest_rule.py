"""Which merging rule a search takes: the dearer one where it turns the output clearly less, found again here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from vitfold.images import ImageSet, find_images
from vitfold.model import Model
from vitfold.pipeline.solving import CONSIDERED_RULES, gentlest_rule, measure_merging


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(8):
        coarse = draw.integers(0, 256, (4, 4, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((32, 32)).save(folder / f"{i}.png")
    return find_images(folder)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_rule_that_turns_the_output_clearly_less_is_taken(
    tiny_model: Callable[..., Model], pictures: ImageSet, seed: int
) -> None:
    model = tiny_model(seed=seed)
    half = (model.spec.tokens // 4,) * 2
    turned = {
        rule: measure_merging(model, pictures, order="index", rule=rule).measure(half) for rule in CONSIDERED_RULES
    }
    assert len(set(turned.values())) == len(turned)
    assert gentlest_rule(model, pictures) == ("nearest" if turned["nearest"] <= 0.8 * turned["tome"] else "tome")
