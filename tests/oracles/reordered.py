"""Operand reordering in int64, element by element where it rounds (2504.18547; reference 4.1)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def codes(x: np.ndarray, scale: float, zero_point: int, low: int, high: int) -> np.ndarray:
    """clamp(round(x / scale) + zero_point, low, high), half to even, from float32 numbers."""
    steps = np.asarray(x, np.float32) / np.float32(scale)
    return np.clip(np.rint(steps).astype(np.int64) + zero_point, low, high)


def product(a: np.ndarray, b: np.ndarray, a_zero: int, b_zero: np.ndarray | int) -> np.ndarray:
    """sum_k (a_k - za) (b_k - zb), multiplied out so that no code is shifted before it is multiplied."""
    a, b = a.astype(np.int64), b.astype(np.int64)
    depth = a.shape[-1]
    rows, columns = a.sum(-1, keepdims=True), b.sum(-2, keepdims=True)
    return a @ b - a_zero * columns - rows * b_zero + depth * a_zero * np.asarray(b_zero, np.int64)


def scaled(accumulated: np.ndarray, scale: np.ndarray, bias: np.ndarray | float = 0.0) -> np.ndarray:
    """The dequantization behind a product, in float32."""
    return accumulated.astype(np.float32) * np.asarray(scale, np.float32) + np.float32(bias)


def requantized(
    accumulated: np.ndarray, sums: np.ndarray, multiplier: Fraction, zero_point: int, low: int, high: int
) -> np.ndarray:
    """clamp(round(acc M / sum) + z), half away from zero, in exact fractions."""
    out = np.empty(accumulated.shape, np.int64)
    sums = np.broadcast_to(sums, accumulated.shape)
    for place in np.ndindex(*accumulated.shape):
        exact = multiplier * int(accumulated[place]) / int(sums[place])
        magnitude = int(abs(exact) + Fraction(1, 2))
        out[place] = magnitude if exact >= 0 else -magnitude
    return np.clip(out + zero_point, low, high)
