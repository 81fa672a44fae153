"""Forecasts against slow loops, and what they must reproduce exactly."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitfold.diffusion.forecast import chebyshev, hold, taylor

PLACES = st.lists(st.integers(0, 60), min_size=1, max_size=5, unique=True).map(sorted)


@given(PLACES, st.integers(1, 9), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_a_constant_stays_what_it_is(places: list[int], ahead: int, order: int) -> None:
    at = places[-1] + ahead
    for weights in (hold(places, at), taylor(places, at, order=order), chebyshev(places, at, degree=order)):
        assert len(weights) == len(places)
        assert sum(weights) == pytest.approx(1, abs=1e-6)


@given(st.integers(2, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_taylor_is_the_series_of_repeated_differences(count: int, gap: int, ahead: int, order: int) -> None:
    places = [3 + gap * i for i in range(count)]
    values = np.random.default_rng(count).standard_normal(count)
    derivatives, total, factor = list(values), 0.0, 1.0
    for i in range(min(order, count - 1) + 1):
        total += derivatives[-1] * factor
        factor *= ahead / (i + 1)
        derivatives = [(b - a) / gap for a, b in pairwise(derivatives)]
    assert np.dot(taylor(places, places[-1] + ahead, order=order), values) == pytest.approx(total, rel=1e-6, abs=1e-9)


@given(PLACES, st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_chebyshev_goes_on_with_a_polynomial(places: list[int], ahead: int, degree: int) -> None:
    degree = min(degree, len(places) - 1)
    polynomial = np.polynomial.Polynomial(np.linspace(1, 2, degree + 1), domain=[0, 70], window=[-1, 1])
    at = places[-1] + ahead
    weights = chebyshev(places, at, degree=degree)
    scale = 1 + float(np.abs(weights).sum())
    assert np.dot(weights, polynomial(np.array(places))) == pytest.approx(polynomial(at), abs=1e-6 * scale)


def test_orders_that_history_does_not_allow_yet_are_left_out() -> None:
    assert taylor([4], 6, order=3) == (1.0,)
    assert taylor([4, 5], 6, order=3) == pytest.approx((-1.0, 2.0))
    assert chebyshev([4, 5], 6, degree=3) == pytest.approx((-1.0, 2.0))
