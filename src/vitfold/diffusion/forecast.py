"""What a tensor will be at a step, from what it was at earlier ones: weights of a sum.

Every forecast is linear in the tensors, so its weights depend on positions alone and the sum is one part of a graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Weights = tuple[float, ...]
Place = int | float
"""A step's number, or what its sampler counts by, such as sigma."""
_RIDGE = 0.1


def hold(places: Sequence[Place], _: Place) -> Weights:
    """Return the weights of the newest value."""
    return (*(0.0,) * (len(places) - 1), 1.0)


def taylor(places: Sequence[Place], at: Place, *, order: int) -> Weights:
    """Return the weights of a Taylor series whose derivatives are repeated differences of the newest values.

    Equation: D_0 = F; D_(i+1) = (D_i - D_i') / d, d the distance to the place before; F(x) = sum_i D_i x^i / i!.

    With fewer values than an order needs, the orders that they allow are taken.

    Source: TaylorSeer (2503.06923).
    """
    reach = min(order, len(places) - 1)
    columns = list(np.eye(len(places)))  # D_0 at every place, as weights of the values
    total = np.zeros(len(places))
    x = at - places[-1]
    for i in range(reach + 1):
        total += columns[-1] * x**i / math.factorial(i)
        gaps = np.diff(places)[i:]
        columns = [(b - a) / gap for a, b, gap in zip(columns[:-1], columns[1:], gaps, strict=True)]
    return tuple(float(w) for w in total)


def chebyshev(places: Sequence[Place], at: Place, *, degree: int) -> Weights:
    """Return the weights of the least-squares polynomial through all values, in Chebyshev's basis.

    Equation: w = t(x) T^+, T_(k, i) = T_i(x_k), with places moved to [-1, 1] where the last one asked for is 1.

    More values than `degree` + 1 average out what changes from step to step.
    """
    low, high = places[0], max(at, places[-1])
    scaled = 2 * (np.array([*places, at], float) - low) / max(high - low, 1) - 1
    basis = np.polynomial.chebyshev.chebvander(scaled, min(degree, len(places) - 1))
    return tuple(float(w) for w in basis[-1] @ np.linalg.pinv(basis[:-1]))


def ridge_chebyshev(places: Sequence[int], at: int, *, steps: int, degree: int) -> Weights:
    """Return the weights of a ridge regression onto Chebyshev polynomials of time, half and half with a line.

    Equation: w = (t(x) (T^T T + 0.1 I)^-1 T^T + w_line) / 2, T_(k, i) = T_i(x_k), with all steps on [-1, 1].

    Source: Spectrum (2603.01623), by the ridge and the share that its code comes with.
    """
    scaled = 2 * np.array([*places, at], float) / max(steps - 1, 1) - 1
    basis = np.polynomial.chebyshev.chebvander(scaled, degree)
    known = basis[:-1]
    spread = basis[-1] @ np.linalg.solve(known.T @ known + _RIDGE * np.eye(degree + 1), known.T)
    return tuple(float(w) for w in (spread + np.array(taylor(places, at, order=1))) / 2)


def corrected(places: Sequence[Place], at: Place) -> Weights:
    """Return the weights of a predictor of second order, corrected by the trapezoidal rule from the last full step.

    Equation, step by step from the newest full step c, p the one before: Y = 2 F_k - F_(k-1); F_(k+1) = F_c + m / 2
    ((F_c - F_p) / (c - p) + Y - F_k), m the steps since c; F_(c-1) by the polynomial through the last three full steps.

    Source: FoCa (2508.16211), in the form of methods that take one evaluation a step.
    """
    count = len(places)
    if count == 1:
        return (1.0,)
    unit = np.eye(count)
    now, slope = unit[-1], (unit[-1] - unit[-2]) / (places[-1] - places[-2])
    before = np.array(_through(places[-3:], places[-1] - 1, count))
    for m in range(1, round(at - places[-1]) + 1):
        predicted = 2 * now - before
        before, now = now, unit[-1] + m / 2 * (slope + predicted - now)
    return tuple(float(w) for w in now)


def _through(places: Sequence[Place], at: Place, count: int) -> Weights:
    """Weights of the polynomial through the newest places, with zeros for the older ones of `count`."""
    found = [math.prod((at - q) / (p - q) for q in places if q != p) for p in places]
    return (*(0.0,) * (count - len(places)), *found)
