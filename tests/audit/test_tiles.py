"""Tiles and waves against sums done by hand, and what holds of every product."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitfold.audit.canonical import BlockShape, block_kernels
from vitfold.audit.gpus import Ceilings, TileRules, ceilings, find_gpu, gpus, tile_rules
from vitfold.audit.kernels import Product
from vitfold.audit.roofline import predict
from vitfold.audit.tiles import tile

PLAIN = Ceilings(compute=1.0, memory=1.0, launch_us=0.0)
ONE = TileRules(
    shapes=((128, 128),), attention=((64, 64),), step_bytes=64, edge=0.0, splits=(1,), source="one shape, for sums"
)
A100 = find_gpu("A100")
VIT_B = BlockShape(width=768, heads=12, head_width=64, hidden=3072, inner=3072)


def linear(rows: int, columns: int = 768, depth: int = 768) -> Product:
    return Product(matrices=1, rows=rows, columns=columns, depth=depth)


def test_197_rows_fill_two_tiles_of_128_at_batch_1():
    found = tile(linear(197), "fp16", A100, 0, PLAIN, ONE)
    assert (found.rows, found.columns, found.splits, found.tiles) == (128, 128, 1, 2 * 6)
    assert found.padded_ratio == pytest.approx(256 / 197)
    assert (found.waves, found.last_wave) == (1, 12 / 108)
    assert found.arithmetic == pytest.approx(2 * 128 * 128 * 768 * 108 / 312e12), "as long as 108 tiles would take"
    full = 197 * 768 * 768 / (108 * 128 * 128 * 768)
    assert found.padding == pytest.approx(12 / 108 - full)
    assert found.idle == pytest.approx(96 / 108)


@pytest.mark.parametrize(("tiles", "waves", "last"), [(107, 1, 107 / 108), (108, 1, 1.0), (109, 2, 1 / 108)])
def test_108_multiprocessors_take_108_tiles_a_wave(tiles, waves, last):
    found = tile(linear(128 * tiles, columns=128), "fp16", A100, 0, PLAIN, ONE)
    assert (found.tiles, found.waves) == (tiles, waves)
    assert found.last_wave == pytest.approx(last)
    assert found.padding == pytest.approx(0.0)
    assert found.idle == pytest.approx(1 - tiles / (waves * 108))


def test_the_depth_is_padded_to_what_a_type_takes_at_once():
    half, codes = (tile(linear(128, 128, 96), kind, A100, 0, PLAIN, ONE).tile_macs for kind in ("fp16", "int8"))
    assert (half, codes) == (128 * 128 * 96, 128 * 128 * 128)


def test_a_tile_of_queries_meets_all_keys():
    attention = Product(matrices=12, rows=197, columns=197, depth=64, attends=True)
    found = tile(attention, "fp16", A100, 0, PLAIN, ONE)
    assert found.tiles == 12 * 4
    assert found.tile_macs == 2 * 64 * 256 * 64
    assert found.padded_ratio == pytest.approx((256 / 197) ** 2)


def test_a_split_depth_busies_more_multiprocessors_and_moves_partial_sums():
    split = replace(ONE, splits=(1, 3))
    alone, shared = (tile(linear(197, 768, 3072), "fp16", A100, 0, PLAIN, rules) for rules in (ONE, split))
    assert (alone.tiles, alone.traffic) == (12, 0.0)
    assert (shared.splits, shared.tiles) == (3, 36)
    assert shared.arithmetic == pytest.approx(alone.arithmetic / 3)
    assert shared.traffic == pytest.approx(2 * 4 * 3 * 197 * 768 / 2039e9)
    slow = replace(A100, bandwidth=1e9)
    assert tile(linear(197, 768, 3072), "fp16", slow, 0, PLAIN, split).splits == 1, "not where the sums cost more"


def test_small_tiles_have_a_lower_rate_and_are_taken_where_they_pad_less():
    rules = tile_rules()
    rates = [rules.rate(*shape) for shape in rules.shapes]
    assert rates == sorted(rates, reverse=True)
    assert max(rates) == 1.0
    large = tile(linear(128 * 196, 3072), "fp16", A100, 0, ceilings(), rules)
    small = tile(linear(33, 768), "fp16", A100, 0, ceilings(), rules)
    assert large.rows * large.columns > small.rows * small.columns


def test_hopper_multiplies_64_rows_at_once():
    """One side of a tile has them, whichever: a product can be turned."""
    few = linear(8, 10)
    for name, least in (("H100", 64), ("A100", 32)):
        found = tile(few, "int8", find_gpu(name), 0, PLAIN, tile_rules())
        assert max(found.rows, found.columns) == least


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 3000), columns=st.integers(1, 4000), depth=st.integers(1, 4000), moved=st.integers(0, 10**8))
def test_one_row_more_never_takes_less_time(rows, columns, depth, moved):
    for gpu in (A100, find_gpu("H100")):
        less, more = (
            tile(linear(rows + extra, columns, depth), "int8", gpu, moved, ceilings(), tile_rules()) for extra in (0, 1)
        )
        assert less.seconds <= more.seconds


def test_time_is_level_up_to_the_border_of_a_tile():
    times = [tile(linear(rows), "fp16", A100, 0, PLAIN, ONE).arithmetic for rows in (129, 197, 256, 128 * 18, 2305)]
    assert times[0] == times[1] == times[2] == times[3] < times[4], "18 rows of 6 tiles are a wave of 108"


@settings(max_examples=60, deadline=None)
@given(
    matrices=st.integers(1, 50),
    rows=st.integers(1, 3000),
    columns=st.integers(1, 3000),
    depth=st.integers(1, 3000),
    attends=st.booleans(),
)
def test_work_padding_and_idle_time_are_all_there_is(matrices, rows, columns, depth, attends):
    product = Product(matrices=matrices, rows=rows, columns=columns, depth=depth, attends=attends)
    found = tile(product, "fp16", A100, 0, ceilings(), tile_rules())
    slots = found.waves * found.multiprocessors * found.tile_macs
    assert product.macs / slots + found.padding + found.idle == pytest.approx(1.0)
    assert found.padded_ratio >= 1.0
    assert 0 < found.last_wave <= 1


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_tiles_and_waves_never_take_less_than_the_roofline(precision, batch):
    for gpu in gpus():
        if precision not in gpu.peak:
            continue
        for tokens in (197, 192, 101, 49):
            kernels = block_kernels(VIT_B, precision, batch=batch, tokens=tokens, merged=16, sizes=True)
            found = predict(kernels, gpu)
            assert found.ms * (1 + 1e-12) >= found.roofline_ms > 0
            assert 0 <= found.padding < 1
            assert 0 <= found.idle < 1
