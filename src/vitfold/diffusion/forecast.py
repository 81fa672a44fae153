"""What a tensor will be at a step, from what it was at earlier ones: weights of a sum.

Every forecast is linear in the tensors, so its weights depend on positions alone and the sum is one part of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import factorial

import numpy as np

Weights = tuple[float, ...]
Place = int | float
"""A step's number, or what its sampler counts by, such as sigma."""


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
        total += columns[-1] * x**i / factorial(i)
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
