"""Each search finds what brute force finds, and stands what real activations throw at it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitfold.quant.activations import activation_minimum
from vitfold.quant.ranges import (
    Grid,
    affine_uniform,
    best,
    code_range,
    percentile_range,
    rounded,
    search_affine,
    search_symmetric,
    search_weight,
    symmetric_uniform,
    uniform_from_scale,
)

GRID = Grid(start=0.3, stop=1.0, count=36)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def mse(x):
    return lambda q: float((rounded(x, q) - x).square().mean())


def test_a_grid_starts_with_the_widest_range():
    assert GRID.factors()[0] == 1.0
    assert GRID.factors()[-1] == pytest.approx(0.3)
    assert len(GRID.factors()) == 36
    assert GRID.factors() == sorted(GRID.factors(), reverse=True)


@pytest.mark.parametrize("bits", range(2, 9))
def test_code_ranges_use_every_code(bits):
    for is_symmetric in (True, False):
        low, high = code_range(bits, symmetric=is_symmetric)
        assert high - low + 1 == 2**bits
    assert code_range(bits, symmetric=True)[0] == -(2 ** (bits - 1))


@given(low=st.floats(-5, 5, width=32), span=st.floats(0, 10, width=32), bits=st.integers(2, 8))
def test_an_affine_range_holds_zero_and_both_ends(low, span, bits):
    ends = torch.tensor([low, low + span])
    quantizer = affine_uniform(ends[0], ends[1], bits)
    assert quantizer(np.zeros(1, np.float32))[0] == 0.0
    lost = np.abs(quantizer(ends.numpy()) - ends.numpy()).max()
    assert lost <= 1.001 * float(quantizer.scale), "half a step for the zero point, half a step to round"
    assert quantizer.high == 2**bits - 1


@given(absmax=st.floats(0, 100, width=32), bits=st.integers(2, 8))
def test_a_symmetric_range_loses_half_a_step_at_most(absmax, bits):
    x = np.array([absmax, -absmax], np.float32)
    quantizer = symmetric_uniform(torch.tensor(absmax), bits)
    assert np.abs(quantizer(x) - x).max() <= 0.5001 * float(quantizer.scale)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("tail", [1, 20], ids=["normal", "one outlier"])
def test_symmetric_search_equals_brute_force(bits, tail):
    x = normal(4000)
    x[7] *= tail
    absmax = x.abs().max()
    found = search_symmetric(absmax, bits, GRID, mse(x))
    errors = []
    for factor in np.linspace(0.3, 1.0, 36):
        scale = np.float32(np.float32(absmax) * np.float32(factor)) / (2 ** (bits - 1) - 0.5)
        codes = np.clip(np.rint(x.numpy() / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        errors.append(float(np.square(codes * scale - x.numpy()).mean()))
    assert mse(x)(found) == pytest.approx(min(errors), rel=1e-3)
    assert float(found.scale) <= float(symmetric_uniform(absmax, bits).scale)
    if bits <= 4:
        assert mse(x)(found) < 0.9 * mse(x)(symmetric_uniform(absmax, bits)), "clipping wins with few codes"


@pytest.mark.parametrize("bits", [4, 6])
def test_affine_search_is_no_worse_than_brute_force_on_the_diagonal(bits):
    """And within a few percent of the whole plane, which it does not walk."""
    x = torch.cat([normal(4000) * 0.2 - 0.1, normal(4000, seed=1).abs()])
    low, high = x.min(), x.max()
    found = mse(x)(search_affine(low, high, bits, GRID, mse(x)))
    factors = GRID.factors()[::3]
    diagonal = min(mse(x)(affine_uniform(low * f, high * f, bits)) for f in GRID.factors())
    plane = min(mse(x)(affine_uniform(low * a, high * b, bits)) for a, b in itertools.product(factors, factors))
    assert found <= diagonal
    assert found <= 1.05 * plane


@pytest.mark.parametrize("value", [0.0, 3.5, -2.0])
@pytest.mark.parametrize("bits", [2, 8])
def test_a_constant_tensor_has_a_quantizer(value, bits):
    """Zero stays a code of its own, so that the constant is one end of the range."""
    x = torch.full((10,), value)
    for found in (
        search_symmetric(x.abs().max(), bits, GRID, mse(x)),
        search_affine(x.min(), x.max(), bits, GRID, mse(x)),
    ):
        assert np.isfinite(found.scale)
        assert float((rounded(x, found) - x).abs().max()) <= 0.51 * float(found.scale)


def test_one_outlier_is_clipped_with_few_codes_and_kept_where_its_error_counts():
    x = torch.cat([normal(10_000), torch.tensor([40.0])])
    clipped = search_affine(x.min(), x.max(), 4, GRID, mse(x))
    assert float(clipped.values(np.array([clipped.high]))[0]) < 30
    share = torch.ones(len(x))
    share[-1] = 10_000
    kept = search_affine(x.min(), x.max(), 4, GRID, lambda q: float(((rounded(x, q) - x).square() * share).mean()))
    assert float(kept.values(np.array([kept.high]))[0]) > 38


def test_the_first_of_equal_candidates_wins():
    wide, narrow = (uniform_from_scale(s, -8, 7) for s in (1.0, 0.5))
    assert best([wide, narrow], lambda _: 1.0) is wide
    assert best([wide, narrow], lambda q: float(q.scale)) is narrow
    assert best([wide, narrow], lambda _: float("nan")) is wide


@settings(deadline=None)
@given(count=st.integers(1, 3000), ratio=st.sampled_from([0.9, 0.99, 0.999, 0.9999]))
def test_percentiles_are_numpys_order_statistics(count, ratio):
    x = normal(count, seed=count)
    ranked = np.sort(x.numpy())
    above = max(1, round((1 - ratio) * count))
    low, high = percentile_range(x, ratio)
    assert float(high) == ranked[-above]
    assert float(low) == ranked[above - 1]
    assert float(low) <= np.quantile(ranked, 1 - ratio) + 1e-6 or above == 1


def test_percentiles_ignore_outliers_and_shapes():
    x = normal(100, 10, 10)
    x[0, 0, 0] = 1e6
    low, high = percentile_range(x, 0.999)
    assert -4 < float(low) < float(high) < 4
    np.testing.assert_allclose([float(low), float(high)], np.quantile(x.numpy(), [0.001, 0.999]), atol=0.1)


@pytest.mark.parametrize("is_symmetric", [True, False], ids=["symmetric", "affine"])
@pytest.mark.parametrize("groups", [None, 3, 1])
def test_weight_search_equals_brute_force_per_group(is_symmetric, groups):
    weight = normal(12, 40) * torch.logspace(-1, 1, 12)[:, None]
    weight[:, 0] *= 6
    count = groups or 12

    def error(w):
        return (w - weight).square().sum(1)

    found = search_weight(weight, 4, groups=groups, symmetric=is_symmetric, grid=GRID, error=error)
    assert found.axis == 0
    assert found.scale.shape == (12,)
    assert len(set(found.scale.tolist())) == count
    total = error(rounded(weight, found)).reshape(count, -1).sum(1)
    for group, part in enumerate(weight.reshape(count, -1)):
        low, high = part.min(), part.max()
        errors = [
            float((rounded(part, q) - part).square().sum())
            for f in GRID.factors()
            for q in [
                symmetric_uniform(torch.maximum(high.abs(), low.abs()) * f, 4)
                if is_symmetric
                else affine_uniform(low * f, high * f, 4)
            ]
        ]
        assert float(total[group]) == pytest.approx(min(errors), rel=1e-4)


def test_a_scale_per_channel_is_better_than_one_per_group():
    weight = normal(12, 40) * torch.logspace(-1, 1, 12)[:, None]

    def error(w):
        return (w - weight).square().sum(1)

    each, whole = (
        error(rounded(weight, search_weight(weight, 6, groups=g, symmetric=True, grid=GRID, error=error)))
        for g in (None, 1)
    )
    assert float(each.sum()) < float(whole.sum())
    assert float(each[0]) < 0.01 * float(whole[0])


def test_a_row_of_zeros_has_a_scale():
    weight = normal(3, 8)
    weight[1] = 0
    found = search_weight(
        weight, 8, groups=None, symmetric=True, grid=GRID, error=lambda w: (w - weight).square().sum(1)
    )
    assert np.isfinite(found.scale).all()
    assert not rounded(weight, found)[1].any()


@pytest.mark.parametrize(
    ("kind", "least"),
    [("gelu_erf", -0.169971), ("gelu_tanh", -0.170041), ("quick_gelu", -0.163610), ("silu", -0.278465), ("relu", 0.0)],
)
def test_the_least_value_of_an_activation(kind, least):
    assert activation_minimum(kind) == pytest.approx(least, abs=1e-6)
