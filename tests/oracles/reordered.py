"""Operand reordering in int64, element by element where it rounds (2504.18547; reference 4.1)."""

from __future__ import annotations

import math
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


def fixed_point(multipliers: np.ndarray, bits: int = 30) -> tuple[list[int], int]:
    """Integers and one shift, by the largest multiplier: m of at most `bits` bits, the shift at most 40."""
    exact = [Fraction(float(one)) for one in np.ravel(multipliers)]
    largest, exponent = max(exact), 0
    while largest >= Fraction(2) ** exponent:
        exponent += 1
    while largest < Fraction(2) ** (exponent - 1):
        exponent -= 1
    shift = min(bits - exponent, 40)
    return [round(one * 2**shift) for one in exact], shift


def rounded_quotient(above: int, below: int) -> int:
    """above / below to the nearest integer, half away from zero."""
    magnitude = (2 * abs(above) + below) // (2 * below)
    return magnitude if above >= 0 else -magnitude


def handed(
    accumulated: np.ndarray, multipliers: np.ndarray, offsets: np.ndarray, zero_point: int, low: int, high: int
) -> np.ndarray:
    """clamp(round((acc m + b) 2^-e) + z) for a layer whose channels are the last axis."""
    m, shift = fixed_point(multipliers)
    b = [round(Fraction(float(one)) * 2**shift) for one in np.ravel(offsets)]
    out = np.empty(accumulated.shape, np.int64)
    for place in np.ndindex(*accumulated.shape):
        channel = place[-1]
        out[place] = rounded_quotient(int(accumulated[place]) * m[channel] + b[channel], 2**shift) + zero_point
    return np.clip(out, low, high)


def norm(
    codes: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, scale: float, step: float, zero_point: int
) -> np.ndarray:
    """A LayerNorm of integers: codes of the stream in, codes 0..255 out, row by row in Python's integers."""
    gains, offsets = ([round(Fraction(float(one)) / Fraction(step) * 2**16) for one in side] for side in (weight, bias))
    least, width = max(1, round(eps / scale**2 * 4096)), codes.shape[-1]
    rows = []
    for row in codes.reshape(-1, width).tolist():
        mean = rounded_quotient(sum(row), width)
        apart = [one - mean for one in row]
        root = math.isqrt(sum(one * one for one in apart) // width * 4096 + least)
        written = [
            rounded_quotient(64 * one * gain + root * offset, 2**16 * root)
            for one, gain, offset in zip(apart, gains, offsets, strict=True)
        ]
        rows.append([min(max(one + zero_point, 0), 255) for one in written])
    return np.array(rows).reshape(codes.shape)


def exponentials(scores: np.ndarray, scale: float, step: float, last: int) -> np.ndarray:
    """Codes of exp(scale (scores - their largest)) out of 255, the exponent rounded to `step`, `last` at most."""
    (m,), shift = fixed_point(np.array(scale / step), 24)
    below = scores.max(-1, keepdims=True).astype(object) - scores.astype(object)
    index = np.vectorize(lambda one: min(rounded_quotient(one * m, 2**shift), last), otypes=[np.int64])(below)
    return np.rint(255 * np.exp(-step * index)).astype(np.int64)


def gelu(codes: np.ndarray, scale: float, zero_point: int, step: float, into: int) -> np.ndarray:
    """Codes 0..255 of GELU of codes, element by element."""

    def one(code: int) -> int:
        x = scale * (code - zero_point)
        return min(max(round(0.5 * x * (1 + math.erf(x / math.sqrt(2))) / step) + into, 0), 255)

    return np.vectorize(one, otypes=[np.int64])(codes)
