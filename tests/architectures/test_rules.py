"""Merging rules over `Run`: against oracles, and by what each rule promises."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from oracles import rules as oracle
from vitfold import recipe
from vitfold.architectures.programs import forward
from vitfold.ops.run import Run
from vitfold.recipe import MergeRecipe
from vitfold.transforms.rules import RULES, Reduction, reduce_tokens
from vitfold.transforms.tokens import Tokens

HEADS, HEAD_WIDTH, WIDTH, COUNT = 3, 8, 6, 14


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def reduction(r: int, *, prefix: int = 1, depth_ratio: float = 0.75, batch: int = 2, **more: object) -> Reduction:
    return Reduction(
        tokens=Tokens(x=draw(batch, COUNT, WIDTH, seed=0), count=COUNT, prefix=prefix, **more),
        q=draw(batch, HEADS, COUNT, HEAD_WIDTH, seed=1),
        k=draw(batch, HEADS, COUNT, HEAD_WIDTH, seed=2),
        r=r,
        width=WIDTH,
        head_width=HEAD_WIDTH,
        originals=COUNT,
        depth_ratio=depth_ratio,
        order="index",
        trace=True,
    )


def assert_reduced(found: Tokens, image: int, expected: oracle.Reduced) -> None:
    rows, members = expected
    np.testing.assert_allclose(found.x[image].numpy(), np.stack(rows), rtol=1e-4, atol=1e-5)
    assert [set(np.flatnonzero(row)) for row in found.source[image].numpy()] == members


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("r", [1, 3, 5])
@pytest.mark.parametrize("depth_ratio", [0.0, 0.75])
def test_every_rule_takes_r_rows_and_no_prefix_away(rule, prefix, r, depth_ratio):
    here = reduction(r, prefix=prefix, depth_ratio=depth_ratio)
    found = reduce_tokens(Run({}), rule, "m", here)
    assert found.count == found.x.shape[1] == COUNT - r
    assert torch.equal(found.x[:, :prefix], here.tokens.x[:, :prefix])
    held = found.source.sum(1)
    assert torch.equal(held, torch.ones_like(held))


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("depth_ratio", [0.0, 0.5])
def test_pitome_equals_the_oracle(r, prefix, depth_ratio):
    here = reduction(r, prefix=prefix, depth_ratio=depth_ratio)
    found = reduce_tokens(Run({}), "pitome", "m", here)
    for image in range(2):
        x, keys = here.tokens.x[image].double().numpy(), here.k[image].double().mean(0).numpy()
        assert_reduced(found, image, oracle.pitome(x, keys, r, prefix, depth_ratio))


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("prefix", [1, 2])
def test_nearest_equals_the_oracle(r, prefix):
    here = reduction(r, prefix=prefix)
    found = reduce_tokens(Run({}), "nearest", "m", here)
    for image in range(2):
        assert_reduced(found, image, oracle.nearest(here.tokens.x[image].double().numpy(), r, prefix))


@pytest.mark.parametrize("r", [1, 3, 6])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("suffix", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_equals_the_oracle(r, prefix, suffix, seed):
    here = reduction(min(r, (COUNT - prefix - suffix) // 2), prefix=prefix, suffix=suffix)
    here = replace(here, tokens=replace(here.tokens, x=draw(2, COUNT, WIDTH, seed=10 + seed)))
    found = reduce_tokens(Run({}), "greedy", "m", here)
    for image in range(2):
        x = here.tokens.x[image].double().numpy()
        assert_reduced(found, image, oracle.greedy(x, here.r, prefix, suffix))


@pytest.mark.parametrize("seed", range(8))
def test_greedy_pairs_share_no_token_where_enough_are_named(seed):
    x = draw(1, COUNT, WIDTH, seed=seed)
    rows = torch.nn.functional.normalize(x[0], dim=-1)
    named = set((rows[0::2] @ rows[1::2].T).argmax(1).tolist())
    here = reduction(len(named), prefix=0, batch=1)
    found = reduce_tokens(Run({}), "greedy", "m", replace(here, tokens=replace(here.tokens, x=x)))
    assert found.source.sum(-1).max() == 2
    assert {len(set(np.flatnonzero(row) % 2)) for row in found.source[0].numpy() if row.sum() == 2} == {2}


@pytest.mark.parametrize("r", [1, 4])
@pytest.mark.parametrize("prefix", [1, 2])
def test_evit_equals_the_oracle(r, prefix):
    here = reduction(r, prefix=prefix)
    found = reduce_tokens(Run({}), "evit", "m", here)
    for image in range(2):
        parts = (here.tokens.x[image], here.q[image], here.k[image])
        x, q, k = (part.double().numpy() for part in parts)
        assert_reduced(found, image, oracle.evit(x, q, k, r, prefix))


def test_tofu_prunes_early_what_tome_would_merge():
    here = reduction(4, depth_ratio=0.25)
    merged, pruned = (reduce_tokens(Run({}), rule, "m", here) for rule in ("tome", "tofu"))
    assert torch.equal(pruned.source, merged.source)
    originals = {tuple(row) for row in here.tokens.x[0].numpy().tolist()}
    assert all(tuple(row) in originals for row in pruned.x[0].numpy().tolist())
    alone = merged.size[0, :, 0] == 1
    assert torch.allclose(pruned.x[0][alone], merged.x[0][alone])


def test_tofu_merges_late_in_the_direction_of_the_mean_and_keeps_the_norm():
    here = reduction(4, depth_ratio=0.5, size=torch.arange(1.0, COUNT + 1)[None, :, None].repeat(2, 1, 1))
    mean, kept = (reduce_tokens(Run({}), rule, "m", here) for rule in ("tome", "tofu"))
    assert torch.allclose(torch.cosine_similarity(mean.x, kept.x, dim=-1), torch.ones(2, COUNT - 4), atol=1e-5)
    assert torch.equal(mean.size, kept.size)
    weights = kept.source * here.tokens.size.transpose(1, 2)
    norms = (weights @ here.tokens.x.norm(dim=-1, keepdim=True)) / weights.sum(-1, keepdim=True)
    assert torch.allclose(kept.x.norm(dim=-1, keepdim=True), norms, rtol=1e-4)


def test_pruning_leaves_the_mean_over_patches_a_mean(tiny_model):
    """With equal tokens everywhere the mean is that token, however many were pruned and merged."""
    model = tiny_model(pool="avg", class_token=False, pos_embed="none", num_layers=4)
    image = torch.full((1, 3, 32, 32), 0.3)
    with torch.inference_mode():
        plain, pruned = (
            forward(Run(model.params), model.spec, MergeRecipe(r=r, rule="tofu"), image) for r in ((), (3, 2, 2, 1))
        )
    torch.testing.assert_close(pruned, plain, rtol=1e-4, atol=1e-5)


def test_an_unknown_rule_is_refused(without_type_checks):
    from vitfold.errors import RecipeError

    assert set(RULES) == set(recipe.RULES)
    with pytest.raises(RecipeError, match=r"merge\.rule is tome, nearest, greedy, tofu, pitome, evit"):
        MergeRecipe(r=(1,), rule="dynamic")  # type: ignore[arg-type]
