"""Exact folds leave the function unchanged."""

from __future__ import annotations

import numpy as np
import pytest

from vitfold.model import param_shapes
from vitfold.model.folds import fold_layer_scale

BIASES = [f"blocks.{i}.{layer}.bias" for i in range(3) for layer in ("attn.proj", "mlp.fc2")]


@pytest.mark.parametrize("without", [[], BIASES], ids=["biases", "no biases"])
@pytest.mark.parametrize("features", [{}, {"mlp": "swiglu", "pool": "avg"}], ids=["plain", "swiglu"])
@pytest.mark.parametrize("r", [(), (5, 3, 1)], ids=["r=0", "merging"])
def test_fold_layer_scale_is_an_identity(tiny_model, random_images, run_torch, without, features, r):
    model = tiny_model(num_layers=3, layer_scale=True, without=without, **features)
    folded = fold_layer_scale(model)
    images = random_images(model.spec, 2)
    before = run_torch(model, images, r)
    error = np.linalg.norm(run_torch(folded, images, r) - before) / np.linalg.norm(before)
    assert error < 1e-6
    assert not folded.spec.layer_scale
    assert set(folded.params) == set(model.params) - {f"blocks.{i}.ls{j}" for i in range(3) for j in (1, 2)}
    assert {array.dtype for array in folded.params.values()} == {np.dtype(np.float32)}


def test_layer_scale_matters_and_the_original_stays_untouched(tiny_model, random_images, run_torch):
    model = tiny_model(layer_scale=True)
    digest = model.digest()
    folded = fold_layer_scale(model)
    assert model.digest() == digest != folded.digest()
    images = random_images(model.spec, 1)
    dropped = {name: array for name, array in model.params.items() if ".ls" not in name}
    without = model.with_params(folded.spec, dropped)
    assert np.abs(run_torch(without, images) - run_torch(folded, images)).max() > 1e-2


def test_a_model_without_layer_scale_is_returned_as_it_is(tiny_model):
    model = tiny_model()
    assert fold_layer_scale(model) is model
    assert set(model.params) <= set(param_shapes(model.spec)[0]) | set(param_shapes(model.spec)[1])
