"""Which patches share a row, block by block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vitfold.model import Array, Model
from vitfold.pipeline.tracing import trace_groups
from vitfold.recipe import MergeRecipe, tokens_per_block


@pytest.mark.parametrize("features", [{}, {"registers": 3}, {"class_token": False, "pool": "avg"}, {"pool": "none"}])
def test_rows_are_the_tokens_and_never_part_again(
    tiny_model: Callable[..., Model], random_images: Callable[..., Array], features: dict[str, object]
) -> None:
    if features.get("pool") == "none":
        features = {**features, "outputs": 0, "output": "last_hidden_state"}
    model = tiny_model(**features)
    r = (4, 3)
    groups = trace_groups(model, MergeRecipe(r=r), random_images(model.spec, 3))
    assert groups.shape == (2, 3, model.spec.patches)
    tokens = tokens_per_block(model.spec, r)
    for image in range(3):
        for block in range(2):
            rows = set(groups[block, image].tolist())
            assert len(rows) == tokens[block + 1] - model.spec.prefix, "every row behind the prefix holds a patch"
            assert min(rows) == model.spec.prefix
        first, second = groups[:, image]
        for row in set(first.tolist()):
            assert len(set(second[first == row].tolist())) == 1, "what is merged stays merged"


def test_without_merging_every_patch_is_its_own(
    tiny_model: Callable[..., Model], random_images: Callable[..., Array]
) -> None:
    model = tiny_model()
    groups = trace_groups(model, MergeRecipe(r=(0, 2)), random_images(model.spec, 2))
    np.testing.assert_array_equal(groups[0], np.broadcast_to(np.arange(16) + 1, (2, 16)))


def test_equal_patches_merge_first(tiny_model: Callable[..., Model], random_images: Callable[..., Array]) -> None:
    model = tiny_model(pos_embed="none")
    pixels = random_images(model.spec, 1)
    pixels[..., :8, 8:16] = pixels[..., :8, :8]
    (groups,) = trace_groups(model, MergeRecipe(r=(1, 0)), pixels)[0]
    assert groups[0] == groups[1]
    assert len(set(groups.tolist())) == 15
