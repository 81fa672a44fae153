"""Matching, merging and unmerging over `Run`: against the oracle, and by the properties that merging keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracles import tome
from vitfold.ops.run import Run
from vitfold.recipe import largest_r
from vitfold.transforms.tokens import Match, Tokens, log_size, match, merge, unmerge

WIDTH, METRIC_WIDTH = 6, 8
PREFIXES = (0, 1, 2, 5)

small = settings(max_examples=40, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(0, 6), st.integers(2, 15), st.integers(0, 2**31))


def draw(batch: int, count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((batch, count, width)).astype(np.float32))


def former_destinations(pairs: Match[torch.Tensor]) -> torch.Tensor:
    """Destinations as positions in the sequence before the merge."""
    return pairs.survivors.gather(1, pairs.into)


def merge_once(tokens: Tokens[torch.Tensor], metric: torch.Tensor, r: int, *, trace: bool = True) -> Tokens:
    ops = Run({})
    pairs = match(ops, "m", metric, count=tokens.count, prefix=tokens.prefix, r=r)
    return merge(ops, "m", tokens, pairs, r=r, trace=trace)


def assert_rows(tokens: Tokens[torch.Tensor], image: int, expected: tome.Rows) -> None:
    np.testing.assert_allclose(tokens.x[image].numpy(), expected.x, rtol=1e-5, atol=1e-6)
    assert tokens.size is not None
    assert tokens.source is not None
    np.testing.assert_array_equal(tokens.size[image, :, 0].numpy(), expected.size)
    np.testing.assert_array_equal(tokens.source[image].numpy(), expected.source)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("patches", [2, 3, 4, 7, 12, 13])
def test_match_and_merge_equal_the_oracle_for_every_r(prefix, patches):
    count = prefix + patches
    metric, x = draw(3, count, METRIC_WIDTH, seed=1), draw(3, count, WIDTH, seed=2)
    for r in range(1, largest_r(count, prefix) + 1):
        pairs = match(Run({}), "m", metric, count=count, prefix=prefix, r=r)
        merged = merge_once(Tokens(x=x, count=count, prefix=prefix), metric, r)
        into = former_destinations(pairs)
        assert merged.count == merged.x.shape[1] == count - r
        for image in range(3):
            plan = tome.plan_merge(metric[image].numpy(), r, prefix)
            assert (pairs.moved[image, :, 0].tolist(), into[image, :, 0].tolist()) == (plan.moved, plan.into)
            evens = [i for i in range(prefix, count) if i % 2 == 0 and i not in plan.moved]
            odds = [i for i in range(prefix, count) if i % 2 == 1]
            assert pairs.survivors[image, :, 0].tolist() == [*range(prefix), *evens, *odds]
            assert_rows(merged, image, tome.apply_merge(tome.fresh_rows(x[image].numpy()), plan))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("schedule", [(1, 1, 1), (5, 3, 1), (6, 3, 2, 1), (2, 4, 3)])
def test_repeated_merges_carry_sizes_like_the_oracle(prefix, schedule):
    count = prefix + 13
    x = draw(2, count, WIDTH, seed=3)
    tokens = Tokens(x=x, count=count, prefix=prefix)
    expected = [tome.fresh_rows(x[image].numpy()) for image in range(2)]
    for step, r in enumerate(schedule):
        metric = draw(2, tokens.count, METRIC_WIDTH, seed=10 + step)
        tokens = merge_once(tokens, metric, r)
        for image in range(2):
            expected[image] = tome.apply_merge(expected[image], tome.plan_merge(metric[image].numpy(), r, prefix))
            assert_rows(tokens, image, expected[image])
    if sum(schedule) > 8:
        assert tokens.size.max() > 2, "the case is too tame: no row was merged twice"


def test_several_sources_may_share_one_destination():
    # Positions 0..5, P = 0: every even row points along the first odd row, so that three merge into it.
    metric = torch.tensor([[[1.0, 0], [1, 0], [1, 0.1], [0, 1], [1, -0.1], [-1, 0]]])
    x = torch.arange(6.0).reshape(1, 6, 1)
    merged = merge_once(Tokens(x=x, count=6, prefix=0), metric, 3)
    assert merged.size[0, :, 0].tolist() == [4.0, 1.0, 1.0]
    assert merged.x[0, :, 0].tolist() == [(0 + 1 + 2 + 4) / 4, 3.0, 5.0]


def test_class_and_distillation_token_stay_where_they_were_although_they_match_best():
    # The prefix tokens equal a patch exactly; a matching without protection would merge them first.
    x = draw(1, 9, WIDTH)
    x[:, 0] = x[:, 3]
    x[:, 1] = x[:, 4]
    merged = merge_once(Tokens(x=x, count=9, prefix=2), x, 3)
    assert torch.equal(merged.x[:, :2], x[:, :2])
    assert merged.size[0, :2, 0].tolist() == [1.0, 1.0]
    assert merged.source[0, :2].argmax(1).tolist() == [0, 1]


def total_weight(x: np.ndarray, size: np.ndarray) -> dict[tuple[float, ...], float]:
    """How many originals each distinct row stands for: what merging duplicates must not change."""
    weights: dict[tuple[float, ...], float] = {}
    for row, s in zip(x, size, strict=True):
        key = tuple(np.round(row.astype(np.float64), 4) + 0.0)
        weights[key] = weights.get(key, 0.0) + float(s)
    return weights


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("copies", "r"), [(4, 1), (4, 5), (4, 6), (6, 8), (12, 6)])
def test_ties_between_duplicated_patches_keep_the_weighted_outputs(prefix, copies, r):
    # Runs of `copies` equal patches: each run has as many rows in A as in B, so r of them merge perfectly.
    groups = max(12, 2 * r) // copies + (max(12, 2 * r) % copies > 0)
    patches = draw(1, groups, WIDTH).repeat_interleave(copies, 1)
    x = torch.cat((draw(1, prefix, WIDTH, seed=5), patches), 1)
    merged = merge_once(Tokens(x=x, count=x.shape[1], prefix=prefix), x, r)
    expected = tome.apply_merge(tome.fresh_rows(x[0].numpy()), tome.plan_merge(x[0].numpy(), r, prefix))
    ours = total_weight(merged.x[0].numpy(), merged.size[0, :, 0].numpy())
    assert ours == total_weight(expected.x, expected.size)
    assert ours == total_weight(x[0].numpy(), np.ones(x.shape[1]))


def test_equal_scores_prefer_the_smaller_index():
    metric = torch.ones(1, 8, 4)
    pairs = match(Run({}), "m", metric, count=8, prefix=0, r=2)
    assert (pairs.moved[..., 0].tolist(), former_destinations(pairs)[..., 0].tolist()) == ([[0, 2]], [[1, 1]])
    assert pairs.survivors[..., 0].tolist() == [[4, 6, 1, 3, 5, 7]]


def test_zero_rows_in_the_metric_give_no_nan():
    metric = torch.zeros(1, 6, 4)
    merged = merge_once(Tokens(x=draw(1, 6, WIDTH), count=6, prefix=0), metric, 3)
    assert torch.isfinite(merged.x).all()
    assert merged.size.sum() == 6


# Properties.


@small
@given(shape=shapes, data=st.data())
def test_merging_keeps_sizes_means_prefix_and_membership(shape, data):
    prefix, patches, seed = shape
    count = prefix + patches
    x = draw(2, count, WIDTH, seed)
    tokens = Tokens(x=x, count=count, prefix=prefix)
    for step in range(data.draw(st.integers(1, 3))):
        most = largest_r(tokens.count, prefix)
        if most == 0:
            break
        r = data.draw(st.integers(1, most))
        tokens = merge_once(tokens, draw(2, tokens.count, METRIC_WIDTH, seed + step + 1), r)
    if tokens.size is None:
        return
    assert tokens.size.sum((1, 2)).tolist() == [count, count]
    weighted = (tokens.x * tokens.size).sum(1)
    torch.testing.assert_close(weighted, x.sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tokens.x[:, :prefix], x[:, :prefix], rtol=0, atol=0)
    assert (tokens.size[:, :prefix] == 1).all()
    assert set(tokens.source.unique().tolist()) <= {0.0, 1.0}
    assert (tokens.source.sum(1) == 1).all(), "every original token is held by exactly one row"
    assert torch.equal(tokens.source.sum(2, keepdim=True), tokens.size)


@small
@given(shape=shapes, data=st.data())
def test_unmerge_gives_every_original_the_row_of_its_group(shape, data):
    prefix, patches, seed = shape
    count = prefix + patches
    x = draw(2, count, WIDTH, seed)
    r = data.draw(st.integers(1, largest_r(count, prefix)))
    tokens = merge_once(Tokens(x=x, count=count, prefix=prefix), draw(2, count, METRIC_WIDTH, seed + 1), r)
    restored = unmerge(Run({}), "u", tokens)
    assert restored.shape == x.shape
    for image in range(2):
        holder = tokens.source[image].argmax(0)
        assert torch.equal(restored[image], tokens.x[image][holder])
    assert torch.equal(restored[:, :prefix], x[:, :prefix])


@small
@given(shape=shapes)
def test_unmerge_without_a_merge_changes_nothing(shape):
    prefix, patches, seed = shape
    x = draw(2, prefix + patches, WIDTH, seed)
    tokens = Tokens(x=x, count=prefix + patches, prefix=prefix)
    ops = Run({})
    assert unmerge(ops, "u", tokens) is x
    assert log_size(ops, tokens) is None


def test_trace_off_carries_no_source():
    merged = merge_once(Tokens(x=draw(1, 8, WIDTH), count=8, prefix=1), draw(1, 8, 4), 2, trace=False)
    assert merged.source is None


# Proportional attention.


def test_a_copied_row_equals_plus_log_two():
    ops = Run({})
    q, k, v = (draw(2, 4 * n, 8, seed).reshape(2, 4, n, 8) for seed, n in ((0, 3), (1, 5), (2, 5)))
    copied = ops.attention("a", q, torch.cat((k, k[:, :, 1:2]), 2), torch.cat((v, v[:, :, 1:2]), 2), None)
    size = torch.ones(2, 5, 1)
    size[:, 1] = 2
    bias = log_size(ops, Tokens(x=torch.zeros(2, 5, 4), count=5, prefix=1, size=size))
    torch.testing.assert_close(ops.attention("a", q, k, v, bias), copied, rtol=1e-6, atol=1e-6)
    assert (ops.attention("a", q, k, v, None) - copied).abs().max() > 1e-3
