"""Compensated merging: nothing without merging, never worse on held-out images, for every kind of model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compensation_cases import compensated, drawn

from vitfold.architectures.programs import UNMERGED, forward
from vitfold.compensation import compensate
from vitfold.errors import CalibrationError, RecipeError
from vitfold.model import Model
from vitfold.model.folds import fold_layer_scale
from vitfold.ops.run import Run
from vitfold.recipe import MergeRecipe

MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean of patches": {"pool": "avg", "class_token": False, "pos_embed": "patches"},
    "attention pooling": {"pool": "map", "class_token": False, "pos_embed": "patches", "map_heads": 4},
    "gated": {"mlp": "swiglu"},
}
MERGE = MergeRecipe(r=(4, 4), order="index")


def errors(model: Model, merge: MergeRecipe, other: Model) -> float:
    """The relative squared error of `other`, merged, against `model`, unmerged, on images that nobody has seen."""
    (pixels,) = drawn(64, seed=7).arrays
    images = torch.from_numpy(pixels)
    with torch.inference_mode():
        exact = forward(Run(model.params), model.spec, UNMERGED, images)
        found = forward(Run(other.params), other.spec, merge, images)
    return float((found - exact).square().sum() / exact.square().sum())


def test_without_merging_the_model_is_the_same(tiny_model) -> None:
    model = tiny_model()
    done = compensate(model, MergeRecipe(r=(0, 0)), drawn(8))
    assert done.model is model
    assert done.refits == ()


@pytest.mark.parametrize("kind", MODELS)
def test_unseen_images_come_nearer_to_the_unmerged_model(kind: str, tiny_model) -> None:
    model = fold_layer_scale(tiny_model(**MODELS[kind]))
    done = compensated(model, MERGE)
    assert done.error_after < done.error_before
    assert errors(model, MERGE, done.model) < errors(model, MERGE, model)


def test_dense_outputs_get_no_worse(tiny_model) -> None:
    """No weight gives back what tokens lose by sharing a row."""
    model = tiny_model(pool="none", outputs=0, output="last_hidden_state")
    done = compensated(model, MERGE)
    assert done.error_after <= done.error_before
    assert errors(model, MERGE, done.model) <= errors(model, MERGE, model)


@pytest.mark.parametrize("rule", ["tome", "nearest", "greedy", "tofu", "pitome", "evit"])
def test_no_rule_gets_worse_on_held_out_images(rule: str, tiny_model) -> None:
    model = tiny_model()
    done = compensated(model, MergeRecipe(r=(0, 6), order="index", rule=rule))
    assert done.error_after <= done.error_before
    changed = {name for name, array in done.model.params.items() if array is not model.params.get(name)}
    assert all(name.startswith(("blocks.1.mlp.fc2", "head")) for name in changed)


def test_layers_without_a_bias_get_one(tiny_model) -> None:
    model = tiny_model(without=["blocks.0.mlp.fc2.bias", "blocks.1.mlp.fc2.bias"])
    done = compensated(model, MERGE)
    assert "blocks.0.mlp.fc2.bias" in done.model.params


def test_what_does_not_fit_memory_goes_through_files_and_gives_the_same(tiny_model) -> None:
    model = tiny_model()
    inside, outside = (compensate(model, MERGE, drawn(256), limit_bytes=limit) for limit in (1 << 30, 100_000))
    assert inside.to_dict() == outside.to_dict()
    for name, array in inside.model.params.items():
        np.testing.assert_array_equal(array, outside.model.params[name])


def test_few_images_are_refused_with_the_number_that_is_enough(tiny_model) -> None:
    with pytest.raises(CalibrationError, match="12 images are too few to refit weights; give at least 256"):
        compensate(tiny_model(), MERGE, drawn(12))


def test_a_model_whose_layers_do_not_write_to_the_stream_is_refused(tiny_model) -> None:
    with pytest.raises(RecipeError, match="no layer of this model writes straight"):
        compensate(tiny_model(layer_scale=True), MERGE, drawn(256))
