"""Statistics of paired data: against brute force, simulation and known values."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitfold.bench.measurement import Measurement
from vitfold.bench.statistics import paired_drop, paired_rise, ratio_interval, resampled_places, share_interval


def right(count: int, of: int) -> np.ndarray:
    return np.arange(of) < count


def test_a_drop_is_counted_image_by_image() -> None:
    before, after = right(80, 100), ~right(25, 100) & right(83, 100)
    found = paired_drop(before, after)
    assert (found.lost, found.gained, found.images) == (25, 3, 100)
    assert found.drop == pytest.approx(0.22)
    assert found.low < 0.22 < found.high
    assert not found.is_noise


def test_the_same_images_right_is_no_drop() -> None:
    found = paired_drop(right(5, 9), right(5, 9))
    assert (found.drop, found.p_value) == (0, 1)
    assert found.is_noise
    assert found.low == pytest.approx(-found.high)


@given(lost=st.integers(0, 7), gained=st.integers(0, 7))
def test_p_is_the_share_of_sign_patterns_at_least_as_uneven(lost: int, gained: int) -> None:
    before = np.array([True] * lost + [False] * gained + [True])
    after = np.array([False] * lost + [True] * gained + [True])
    signs = np.array(list(product((-1, 1), repeat=lost + gained))).reshape(2 ** (lost + gained), -1)
    expected = float(np.mean(np.abs(signs.sum(1)) >= abs(lost - gained)))
    assert paired_drop(before, after).p_value == pytest.approx(expected)


def test_many_images_do_not_overflow() -> None:
    found = paired_drop(np.ones(5000, bool), np.arange(5000) % 2 == 0)
    assert found.p_value == pytest.approx(0.0)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        kind = rng.choice(4, 300, p=[0.85, 0.05, 0.03, 0.07])
        found = paired_drop((kind == 0) | (kind == 1), (kind == 0) | (kind == 2))
        covered += found.low <= 0.02 <= found.high
    assert 0.93 < covered / 1000 < 0.98


def test_there_must_be_images() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        paired_drop(right(0, 0), right(0, 0))


def measured(*trials: int) -> Measurement:
    return Measurement(
        subject="a", engine="fake", batch=1, scope="engine", trials_ns=tuple((trial,) for trial in trials)
    )


def test_a_ratio_has_an_interval_that_slow_spells_do_not_widen() -> None:
    calm, busy = measured(100, 100, 100, 100, 100, 100, 100), measured(50, 50, 50, 50, 50, 50, 50)
    assert ratio_interval(calm, busy) == {"median": 2.0, "low": 2.0, "high": 2.0}
    spells = ratio_interval(measured(100, 900, 100, 500, 100, 100, 100), measured(50, 450, 50, 250, 50, 50, 50))
    assert spells == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_uneven_ratios_widen_it() -> None:
    found = ratio_interval(measured(100, 110, 120, 130, 140, 150, 160), measured(*[100] * 7))
    assert found["median"] == pytest.approx(1.3)
    assert found["low"] < 1.3 < found["high"]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=60))
def test_a_resample_takes_images_of_the_same_class(labels: list[int]) -> None:
    chosen, classes = resampled_places(labels), np.array(labels)
    assert chosen.shape == (100, len(labels))
    few = {label for label in labels if labels.count(label) < 5}
    for place, label in enumerate(labels):
        assert set(classes[chosen[:, place]]) <= (few if label in few else {label})
    np.testing.assert_array_equal(chosen, resampled_places(labels))
    assert len(labels) == 1 or len(few) == 1 or np.ptp(chosen, axis=0).min() > 0


def test_resamples_vary_as_other_seeds_would() -> None:
    """The spread of a mean whose classes are far apart is that within classes alone."""
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1], 100)
    fresh = [np.mean(10 * labels + draw.standard_normal(200)) for _ in range(2000)]
    one = 10 * labels + draw.standard_normal(200)
    assert np.std(one[resampled_places(labels.tolist())].mean(1)) == pytest.approx(np.std(fresh), rel=0.2)


def test_a_rise_of_the_same_images_is_sharper_than_their_noise() -> None:
    draw = np.random.default_rng(1)
    before = draw.standard_normal(100)
    found = paired_rise(5.0, 5.5, before, before + 0.4 + 0.01 * draw.standard_normal(100))
    assert found.rise == pytest.approx(0.5)
    assert found.high - 0.5 == pytest.approx(0.5 - found.low)
    assert found.high - 0.5 == pytest.approx(0.0196, rel=0.2)
    assert paired_rise(5.0, 5.0, before, before).to_dict() == {"rise": 0.0, "low": 0.0, "high": 0.0}


@given(st.integers(0, 50), st.integers(1, 50))
def test_the_bounds_of_a_share_are_where_it_would_be_just_unlikely(count: int, of: int) -> None:
    count = min(count, of)
    found = share_interval(right(count, of))
    for bound in found.values():
        assert abs(bound - count / of) == pytest.approx(1.959964 * np.sqrt(bound * (1 - bound) / of), abs=1e-6)
    assert 0 <= found["low"] <= count / of + 1e-12
    assert count / of - 1e-12 <= found["high"] <= 1
