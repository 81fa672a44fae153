"""The whole forward pass over `Run`: against the oracle, and identities of merging."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracles import tome
from vitfold.architectures.programs import forward
from vitfold.errors import RecipeError
from vitfold.ops.run import Run
from vitfold.recipe import MergeRecipe, tokens_per_block

PREFIXES = {
    "class": {},
    "class+dist": {"dist_token": True},
    "class+registers": {"registers": 4},
    "class+dist+registers": {"dist_token": True, "registers": 3},
}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("prop_attn", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("r", [(0, 0, 0), (3, 2, 1), (8, 4, 2), (0, 5, 0)])
def test_forward_equals_the_oracle(tiny_model, random_images, run_torch, prefix, r, prop_attn):
    model = tiny_model(num_layers=3, **PREFIXES[prefix])
    spec = model.spec
    images = random_images(spec, 2)
    found = run_torch(model, images, r, prop_attn=prop_attn)
    for image, logits in zip(images, found, strict=True):
        expected = tome.forward(
            model.params,
            image,
            patch=spec.patch_size,
            heads=spec.num_heads,
            prefix=spec.prefix,
            r=r,
            prop_attn=prop_attn,
        )
        assert relative_error(logits, expected) < 1e-5


def test_observed_tokens_equal_the_oracle_after_every_block(tiny_model, random_images):
    model = tiny_model(num_layers=3)
    image = random_images(model.spec, 1)
    expected: list[tome.Rows] = []
    spec = model.spec
    arguments = {"patch": spec.patch_size, "heads": spec.num_heads, "prefix": spec.prefix}
    tome.forward(model.params, image[0], r=(4, 3, 2), observe=expected.append, **arguments)
    seen = []
    recipe = MergeRecipe(r=(4, 3, 2))
    with torch.inference_mode():
        forward(
            Run(model.params),
            spec,
            recipe,
            torch.from_numpy(image),
            sources=True,
            observe=lambda boundary, tokens: seen.append((boundary, tokens)),
        )
    assert [boundary for boundary, _ in seen] == [0, 1, 2, 3]
    assert [tokens.count for _, tokens in seen] == list(tokens_per_block(spec, recipe.r))
    for (_, tokens), rows in zip(seen[1:], expected, strict=True):
        assert relative_error(tokens.x[0].numpy(), rows.x) < 1e-5
        np.testing.assert_array_equal(tokens.size[0, :, 0].numpy(), rows.size)
        np.testing.assert_array_equal(tokens.source[0].numpy(), rows.source)


POOLS = {
    "token": {},
    "avg": {"pool": "avg", "class_token": False},
    "avg with prefix": {"pool": "avg", "pool_prefix": True},
    "map": {"pool": "map", "class_token": False, "map_heads": 4, "map_mlp_width": 24},
    "map, class token": {"pool": "map", "map_heads": 2},
    "token_avg": {"pool": "token_avg"},
    "token_dist": {"pool": "token_dist", "dist_token": True},
    "none": {"pool": "none", "outputs": 0, "output": "last_hidden_state"},
}


@pytest.mark.parametrize("pool", POOLS)
def test_r_zero_changes_nothing(tiny_model, random_images, run_torch, pool):
    model = tiny_model(**POOLS[pool])
    images = random_images(model.spec, 2)
    plain = run_torch(model, images)
    np.testing.assert_array_equal(run_torch(model, images, (0, 0)), plain)
    np.testing.assert_array_equal(run_torch(model, images, (0, 0), prop_attn=False), plain)
    assert relative_error(run_torch(model, images, (4, 2)), plain) > 1e-4, "merging must do something"


@pytest.mark.parametrize("pool", ["avg", "avg with prefix"])
def test_average_pooling_counts_every_row_by_its_size(tiny_model, random_images, pool):
    model = tiny_model(**POOLS[pool], final_norm=False, outputs=0, output="image_embeds")
    images, seen = torch.from_numpy(random_images(model.spec, 2)), {}
    recipe = MergeRecipe(r=(4, 2))
    found = forward(
        Run(model.params), model.spec, recipe, images, observe=lambda block, tokens: seen.update({block: tokens})
    )
    tokens = seen[2]
    first = 0 if model.spec.pool_prefix else tokens.prefix
    x, size = tokens.x[:, first:], tokens.size[:, first:]
    assert float(size.max()) > 1
    torch.testing.assert_close(found, (x * size).sum(1) / size.sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", POOLS)
def test_merging_identical_patches_changes_nothing(tiny_model, random_images, run_torch, pool):
    """Duplicated tokens and + log size are the same thing, in the blocks and in every pooling."""
    model = tiny_model(num_layers=3, pos_embed="none", **POOLS[pool])
    tile = random_images(model.spec, 2)[:, :, :8, :8]
    images = np.tile(tile, (1, 1, 4, 4))
    plain = run_torch(model, images)
    assert relative_error(run_torch(model, images, (7, 3, 2)), plain) < 1e-5
    if model.spec.prefix:
        without = run_torch(model, images, (7, 3, 2), prop_attn=False)
        assert relative_error(without, plain) > 1e-4, "without prop_attn the duplicates must lose weight"


def test_merging_two_kinds_of_patches_keeps_the_class_output(tiny_model, random_images, run_torch):
    """Duplicates of several kinds: ties everywhere, yet each kind keeps its weight."""
    model = tiny_model(pos_embed="none")
    a, b = random_images(model.spec, 2)[:, :, :8, :8]
    row = [np.concatenate([a, a, b, b], 2)] * 4
    images = np.concatenate(row, 1)[None]
    assert relative_error(run_torch(model, images, (6, 3)), run_torch(model, images)) < 1e-5


def test_images_of_a_batch_merge_independently(tiny_model, random_images, run_torch):
    model = tiny_model()
    images = random_images(model.spec, 4)
    together = run_torch(model, images, (6, 3))
    alone = np.concatenate([run_torch(model, images[i : i + 1], (6, 3)) for i in range(4)])
    assert relative_error(together, alone) < 1e-6


def test_unmerging_returns_one_row_per_original_token(tiny_model, random_images, run_torch):
    model = tiny_model(**POOLS["none"], registers=2)
    found = run_torch(model, random_images(model.spec, 2), (8, 4))
    assert found.shape == (2, 1 + 2 + 16, 32)
    distinct = len(np.unique(np.round(found[0], 5), axis=0))
    assert distinct == 3 + 16 - 12


def test_gradients_reach_the_image_through_a_merge(tiny_model, random_images):
    model = tiny_model()
    image = torch.from_numpy(random_images(model.spec, 1)).requires_grad_(True)
    forward(Run(model.params), model.spec, MergeRecipe(r=(4, 4)), image).square().sum().backward()
    assert torch.isfinite(image.grad).all()
    assert (image.grad.abs().amax((0, 1)) > 0).all(), "every pixel counts, merged or not"


def test_a_recipe_that_does_not_fit_is_refused_before_anything_runs(tiny_model, random_images, run_torch):
    model = tiny_model()
    with pytest.raises(RecipeError, match=r"block 1: 9 tokens enter it, 1 of them protected, so at most 4"):
        run_torch(model, random_images(model.spec, 1), (8, 5))


@pytest.mark.parametrize("pool", ["token", "none"])
def test_a_run_from_given_tokens_sees_what_stands_behind_them_alone(tiny_model, random_images, pool):
    """Nothing in front of the block runs again, so it needs no image."""
    model = tiny_model(num_layers=3, **POOLS[pool])
    spec, merge, seen = model.spec, MergeRecipe(r=(4, 3, 2)), []
    image = torch.from_numpy(random_images(spec, 2))
    with torch.inference_mode():
        whole = forward(Run(model.params), spec, merge, image, observe=lambda at, tokens: seen.append((at, tokens)))
        again = []
        rest = forward(
            Run(model.params), spec, merge, None, given=seen[2], observe=lambda at, tokens: again.append((at, tokens))
        )
    torch.testing.assert_close(rest, whole)
    assert [at for at, _ in again] == [3]
    torch.testing.assert_close(again[0][1].x, seen[3][1].x)
