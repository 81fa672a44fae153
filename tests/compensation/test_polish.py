"""Polishing: behind compensation, never worse on held-out images, the same every time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compensation_cases import compensated, drawn

from vitfold.compensation import compensate, polish
from vitfold.errors import RecipeError
from vitfold.model.folds import fold_layer_scale
from vitfold.recipe import MergeRecipe, parse_recipe, recipe_from_dict

MERGE = MergeRecipe(r=(0, 6, 0), order="index", compensate=True, polish=3)
MODELS: dict[str, dict[str, Any]] = {
    "class token": {},
    "attention pooling": {"pool": "map", "class_token": False, "pos_embed": "patches", "map_heads": 4},
    "dense": {"pool": "none", "outputs": 0, "output": "last_hidden_state"},
}


@pytest.mark.parametrize("kind", MODELS)
def test_it_brings_the_output_nearer_than_refitting_alone(
    kind: str, tiny_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = 1e-4 if kind == "class token" else 5e-4  # there hardly anything is wrong
    monkeypatch.setattr("vitfold.compensation.polishing.RATE", rate)
    model = fold_layer_scale(tiny_model(num_layers=3, **MODELS[kind]))
    found = compensated(model, MERGE)
    done = polish(model, found, MERGE, drawn(512))
    assert done.polished
    assert done.error_after < found.error_after
    changed = {name for name, array in done.model.params.items() if array is not found.model.params.get(name)}
    assert any("qkv" in name for name in changed)
    assert not any(name.startswith(("blocks.0", "patch_embed")) for name in changed)


def test_held_out_images_are_those_of_refitting(tiny_model) -> None:
    model = tiny_model(num_layers=3)
    found = compensated(model, MERGE)
    done = polish(model, found, MERGE, drawn(512))
    again = compensate(done.model, MERGE, drawn(512))
    assert done.held_out == found.held_out == again.held_out == 64


def test_it_is_the_same_every_time(tiny_model) -> None:
    model = tiny_model(num_layers=3)
    found = compensated(model, MERGE)
    first, second = (polish(model, found, MERGE, drawn(256)) for _ in range(2))
    for name, array in first.model.params.items():
        np.testing.assert_array_equal(array, second.model.params[name])


def test_what_gets_worse_is_left_out(tiny_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(num_layers=3)
    found = compensated(model, MERGE)
    monkeypatch.setattr("vitfold.compensation.polishing.RATE", 1.0)
    assert polish(model, found, MERGE, drawn(256)) is found


def test_no_passes_change_nothing(tiny_model) -> None:
    model, merge = tiny_model(num_layers=3), MergeRecipe(r=(0, 6, 0), order="index", compensate=True)
    found = compensated(model, merge)
    assert polish(model, found, merge, drawn(8)) is found


def test_recipes_name_passes_and_refuse_them_without_compensation() -> None:
    read = parse_recipe("[merge]\nr = [0, 6, 0]\ncompensate = true\npolish = 2\n", name="a.toml")
    assert recipe_from_dict(read, name="a.toml").merge.polish == 2
    assert recipe_from_dict(read, name="a.toml").to_dict()["merge"]["polish"] == 2
    with pytest.raises(RecipeError, match="merge.polish goes on from compensated merging"):
        MergeRecipe(r=(6,), polish=1)
    with pytest.raises(RecipeError, match="merge.polish is a number of passes"):
        MergeRecipe(r=(6,), compensate=True, polish=-1)
