"""Blocks at numbers of tokens, and schedules, by the model of GPUs: no image, no compiler."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vitfold.errors import RecipeError, TargetError
from vitfold.model import Architecture, Model
from vitfold.pipeline import ON_GPUS, forecast_lengths, solve_merge
from vitfold.pipeline.solving import MergeDistortion
from vitfold.schedule.solve import Space


@pytest.fixture
def spec(tiny_model: Callable[..., Model]) -> Architecture:
    """65 tokens, four blocks of a ViT-S."""
    return tiny_model(
        image_size=(128, 128), patch_size=(16, 16), embed_dim=384, num_heads=6, head_dim=64, mlp_dim=1536, num_layers=4
    ).spec


def by_count(spec: Architecture) -> MergeDistortion:
    """Every merged token distorts as much."""
    single = [{1.0: float(spec.tokens)}] * spec.num_layers
    space = Space(depth=spec.num_layers, tokens=spec.tokens, prefix=spec.fixed, single=single, **ON_GPUS)
    return MergeDistortion(spec=spec, space=space, measure=lambda r: float(sum(r)), images=1)


def test_lengths_stand_beside_the_longest(spec: Architecture) -> None:
    rows = forecast_lengths(spec, [48, 65, 64, 48], target="tensorrt-int8", gpu="A100", batch=8)
    assert [row.tokens for row in rows] == [65, 64, 48]
    assert (rows[0].ratio, rows[0].roofline_ratio, rows[0].work_ratio) == (1.0, 1.0, 1.0)
    assert rows[0].ratio > rows[1].ratio >= rows[2].ratio
    linear, attention = 384 * 384 * 12, 2 * 384
    assert rows[1].work_ratio == pytest.approx((64 * linear + 64**2 * attention) / (65 * linear + 65**2 * attention))
    one_token = [row.ratio for row in rows[:2]]
    assert one_token[1] < rows[1].roofline_ratio < 1, "a full tile of keys is worth more than a token's work"
    assert [product["tile"] for product in rows[1].products][1][0] == 64


def test_schedules_lead_to_multiples_of_four(spec: Architecture) -> None:
    for like, batch in (("1", 64), ("4", 64), ("8", 8)):
        found = solve_merge(by_count(spec), target="tensorrt-fp16", gpu="A100", batch=batch, like=like)
        lengths = spec.tokens - np.cumsum(found.r)
        assert all(length in (spec.tokens,) or length % 4 == 0 for length in lengths)
        assert found.ms <= min(found.ms_none, found.ms_like)
        assert found.ms_roofline is not None
        assert found.ms_roofline <= found.ms
        assert found.cores is not None
        assert found.cores_none is not None
        assert found.to_dict()["cores"] == dict(found.cores)
    assert any(found.r)


def test_what_cannot_be_forecast_is_said(spec: Architecture) -> None:
    with pytest.raises(RecipeError, match="from 1 to 65, which this model has; found 66"):
        forecast_lengths(spec, [64, 66], target="tensorrt-int8", gpu="A100", batch=8)
    with pytest.raises(RecipeError, match="found none"):
        forecast_lengths(spec, [], target="tensorrt-int8", gpu="A100", batch=8)
    with pytest.raises(TargetError, match="cpu is none; choose tensorrt-fp16"):
        forecast_lengths(spec, [64], target="cpu", gpu="A100", batch=8)
    with pytest.raises(TargetError, match="A100 .* does not multiply fp8"):
        forecast_lengths(spec, [64], target="tensorrt-fp8", gpu="A100", batch=8)
