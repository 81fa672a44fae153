"""Codes that are handed from product to product: what stands between them works on integers too.

A float value that is `scale (code - zero_point)` of codes which are there is *handed*: who quantizes it to the same
grid takes the codes. A function of 8-bit codes is a table, a LayerNorm of codes is made of integer sums, an integer
square root and one rounded division. Float forms are written beside them, and vanish where nobody reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vitfold.errors import TargetError
from vitfold.model import Array
from vitfold.model.spec import sigmoid
from vitfold.ops.emit.codes import Placed
from vitfold.ops.emit.writer import Writer
from vitfold.quantizer import EXPONENTIALS, STREAM_LIMIT, Quantizer, Uniform

_LONG, _DOUBLE, _INT = (int(one) for one in (ir.DataType.INT64, ir.DataType.DOUBLE, ir.DataType.INT32))
_BITS, _LARGEST_SHIFT = 30, 40
_ROOT_BITS, _AFFINE_BITS = 6, 16
"""Fractional bits of a standard deviation in steps of the stream, and of a norm's affine in steps of what it writes."""
_MOST = 2**61
_ERF = np.vectorize(math.erf, otypes=[np.float64])
_FUNCTIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu_erf": lambda x: 0.5 * x * (1.0 + _ERF(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "silu": lambda x: x * sigmoid(x),
    "relu": lambda x: np.maximum(x, 0.0),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
}


def fixed_point(multipliers: Array, bits: int = _BITS) -> tuple[Array, int]:
    """Return integers m of at most `bits` bits and one shift e <= 40 with multipliers ~ m 2^-e.

    A product of m with a sum of 32 bits fits int64.

    Raises:
        ValueError: if the largest is not in (0, 2^bits).
    """
    largest = float(np.max(multipliers))
    exponent = math.frexp(largest)[1]
    if not 0 < largest < np.inf or exponent > bits:
        raise ValueError(f"{largest} is no ratio of two scales")
    shift = min(bits - exponent, _LARGEST_SHIFT)
    return np.asarray(np.rint(np.ldexp(np.asarray(multipliers, np.float64), shift)), np.int64), shift


@dataclass(frozen=True, slots=True, eq=False)
class _Norm:
    """A LayerNorm of codes."""

    layer: str
    eps: float
    codes: ir.Value
    scale: float


class Chain:
    """Which float values on a writer have codes, or are functions of such."""

    def __init__(self, writer: Writer, quantizers: Mapping[str, Quantizer]) -> None:
        self._writer, self._quantizers = writer, quantizers
        self._handed: dict[ir.Value, tuple[ir.Value, Placed]] = {}
        self._functions: dict[ir.Value, tuple[str, ir.Value, Placed]] = {}
        self._norms: dict[ir.Value, _Norm] = {}

    def hand(self, site: str, codes: ir.Value, placed: Placed) -> ir.Value:
        """Return the float form of codes, which whoever wants them finds behind it."""
        zero = [] if placed.zero_point.dtype == np.int32 else [self._writer.constant(placed.zero_point)]
        scale = self._writer.number(float(placed.scale))
        floats = self._writer.node("DequantizeLinear", codes, scale, *zero, site=site)
        self._handed[floats] = codes, placed
        return floats

    def add(self, a: ir.Value, b: ir.Value) -> ir.Value | None:
        """Return a sum of two values on one grid without an offset, which is one of integers; None of others."""
        if a not in self._handed or b not in self._handed:
            return None
        (first, placed), (second, other) = self._handed[a], self._handed[b]
        if not (_is_stream(placed) and _is_stream(other) and placed.scale == other.scale):
            return None
        return self.hand(self._writer.scope, self._writer.node("Add", first, second), placed)

    def pick(self, value: ir.Value, move: Callable[[ir.Value], ir.Value]) -> ir.Value:
        """Return rows of a value, of its codes where it has such."""
        if value not in self._handed:
            return move(value)
        codes, placed = self._handed[value]
        return self.hand(self._writer.scope, move(codes), placed)

    def activation(self, kind: str, x: ir.Value, y: ir.Value) -> None:
        """Take notice of a function of single elements."""
        if x in self._handed and kind in _FUNCTIONS and not _is_stream(self._handed[x][1]):
            self._functions[y] = (kind, *self._handed[x])

    def norm(self, layer: str, eps: float, x: ir.Value, y: ir.Value) -> None:
        """Take notice of a LayerNorm whose input has a grid; a float input is rounded to it."""
        grid = self._quantizers.get(f"{layer}.x")
        if grid is None:
            return
        assert isinstance(grid, Uniform)
        scale, node, site = float(grid.scale), self._writer.node, f"{layer}.x"
        if x not in self._handed:
            steps = node("Round", node("Div", x, self._writer.number(scale), site=site), site=site)
            ends = (self._writer.number(float(end)) for end in (grid.low, grid.high))
            codes = node("Cast", node("Clip", steps, *ends, site=site), site=site, to=_INT)
            self._handed[x] = codes, stream_placed(grid)
        self._norms[y] = _Norm(layer, eps, self._handed[x][0], scale)

    def codes(self, site: str, value: ir.Value, placed: Placed) -> ir.Value | None:
        """Return the codes of a value on a grid, made of integers; None where a float has to be rounded."""
        if placed.shift:
            return None
        if value in self._handed:
            codes, there = self._handed[value]
            return codes if _same(there, placed) else None
        if value in self._functions:
            return self._table(site, *self._functions[value], placed)
        return self._normed(site, self._norms[value], placed) if value in self._norms else None

    def requantize(self, site: str, product: ir.Value, multipliers: Array, offsets: Array, placed: Placed) -> ir.Value:
        """clamp(round((acc m + b) 2^-e) + z) in int64, m 2^-e ~ `multipliers` and b 2^-e ~ `offsets`; half away from 0.

        Raises:
            TargetError: if the scales are too far apart to be those of one tensor.
        """
        m, shift = self._fixed_point(site, multipliers)
        b = np.rint(np.ldexp(np.asarray(offsets, np.float64), shift))
        if np.abs(b).max() > _MOST:
            raise TargetError(f"{site} cannot be requantized: its bias is beyond its range; calibrate again")
        node, long = self._writer.node, self._writer.long
        above = node("Mul", node("Cast", product, site=site, to=_LONG), long(m), site=site)
        if b.any():
            above = node("Add", above, long(b), site=site)
        if shift:
            above = self.quotient(site, above, long(1 << shift), long(1 << (shift - 1)))
        return self.clamped(site, above, placed)

    def quotient(self, site: str, above: ir.Value, below: ir.Value, half: ir.Value) -> ir.Value:
        """round(above / below) of integers, half away from zero: Div truncates towards zero."""
        node = self._writer.node
        moved = node("Add", above, node("Mul", node("Sign", above, site=site), half, site=site), site=site)
        return node("Div", moved, below, site=site)

    def clamped(self, site: str, value: ir.Value, placed: Placed) -> ir.Value:
        """Codes of a grid from int64, in their type."""
        node, long, kind = self._writer.node, self._writer.long, placed.zero_point.dtype
        low, high = np.iinfo(kind).min, np.iinfo(kind).max
        if _is_stream(placed):
            low, high = -STREAM_LIMIT, STREAM_LIMIT - 1
        if placed.zero_point.any():
            value = node("Add", value, long(placed.zero_point), site=site)
        value = node("Clip", value, long(low), long(high), site=site)
        return node("Cast", value, site=site, to=int(ir.DataType.from_numpy(kind)))

    def exponentials(self, site: str, scores: ir.Value, scale: float, grid: Uniform) -> ir.Value:
        """Return the codes of exp(scale (scores - their largest)) on `EXPONENTIALS`, by a table of `grid`'s steps.

        Args:
            scores: sums of integers (int64).

        Raises:
            TargetError: if the scale of the scores is that of no logits.
        """
        node, long = self._writer.node, self._writer.long
        m, shift = self._fixed_point(site, np.array(scale / float(grid.scale)), bits=24)
        largest = node("ReduceMax", scores, self._writer.integers(-1), site=site, keepdims=1)
        steps = node("Mul", node("Sub", largest, scores, site=site), long(m), site=site)
        half, whole = long(1 << shift >> 1), long(1 << shift)
        index = node("Div", node("Add", steps, half, site=site), whole, site=site)
        index = node("Min", index, long(-grid.low), site=site)
        table = EXPONENTIALS.codes(np.exp(-float(grid.scale) * np.arange(1 - grid.low))).astype(np.uint8)
        return node("Gather", self._writer.constant(table), index, site=site, axis=0)

    def _table(self, site: str, kind: str, codes: ir.Value, there: Placed, placed: Placed) -> ir.Value:
        """Codes of a function of 256 codes."""
        least, most = np.iinfo(there.zero_point.dtype).min, np.iinfo(there.zero_point.dtype).max
        y = _FUNCTIONS[kind](float(there.scale) * (np.arange(least, most + 1) - float(there.zero_point)))
        bounds = np.iinfo(placed.zero_point.dtype)
        rounded = np.rint(y / float(placed.scale)) + float(placed.zero_point)
        table = np.clip(rounded, bounds.min, bounds.max).astype(placed.zero_point.dtype)
        index = self._writer.node("Cast", codes, site=site, to=_INT)
        if least:
            index = self._writer.node("Sub", index, self._writer.constant(np.array(least, np.int32)), site=site)
        return self._writer.node("Gather", self._writer.constant(table), index, site=site, axis=0)

    def _normed(self, site: str, norm: _Norm, placed: Placed) -> ir.Value:
        """round((64 d G + B r) / (2^16 r)) + z: d the codes less their rounded mean, r the root of 4096 (var + eps).

        G and B are the norm's weight and bias in steps of what it writes, with 16 fractional bits.
        """
        node, long, params = self._writer.node, self._writer.long, self._writer.params
        weight, bias = (params[f"{norm.layer}.{name}"].astype(np.float64) for name in ("weight", "bias"))
        gains, offsets = (np.rint(np.ldexp(one / float(placed.scale), _AFFINE_BITS)) for one in (weight, bias))
        if max(np.abs(gains).max(), np.abs(offsets).max()) > 2**31:
            raise TargetError(f"{site} is too fine for integers behind {norm.layer}; calibrate again")
        width, name, axis = weight.size, norm.layer, self._writer.integers(-1)
        limit = (long(-STREAM_LIMIT), long(STREAM_LIMIT - 1))
        x = node("Clip", node("Cast", norm.codes, site=name, to=_LONG), *limit, site=name)
        total = node("ReduceSum", x, axis, site=f"{name}.sum", keepdims=1)
        mean = self.quotient(name, self._times(name, total, 2), long(2 * width), long(width))
        d = node("Sub", x, mean, site=name)
        squares = node("ReduceSum", node("Mul", d, d, site=name), axis, site=f"{name}.squares", keepdims=1)
        variance = self._times(name, node("Div", squares, long(width), site=name), 1 << 2 * _ROOT_BITS)
        least = max(1, round(norm.eps / norm.scale**2 * (1 << 2 * _ROOT_BITS)))
        r = self._root(name, node("Add", variance, long(least), site=name))
        above = node("Mul", d, long(gains * (1 << _ROOT_BITS)), site=name)
        if offsets.any():
            above = node("Add", above, node("Mul", r, long(offsets), site=name), site=name)
        below, half = (self._times(name, r, 1 << bits) for bits in (_AFFINE_BITS, _AFFINE_BITS - 1))
        return self.clamped(site, self.quotient(site, above, below, half), placed)

    def _fixed_point(self, site: str, multipliers: Array, bits: int = _BITS) -> tuple[Array, int]:
        try:
            return fixed_point(multipliers, bits)
        except ValueError as error:
            raise TargetError(f"{site} cannot be requantized: {error}; calibrate again") from None

    def _times(self, site: str, value: ir.Value, factor: int) -> ir.Value:
        return self._writer.node("Mul", value, self._writer.long(factor), site=site)

    def _root(self, site: str, value: ir.Value) -> ir.Value:
        """floor(sqrt(value)) of integers below 2^62: the root of a double is off by one at most, which is mended."""
        node, one = self._writer.node, self._writer.long(1)
        root = node("Cast", node("Sqrt", node("Cast", value, site=site, to=_DOUBLE), site=site), site=site, to=_LONG)
        above = node("Greater", node("Mul", root, root, site=site), value, site=site)
        root = node("Sub", root, node("Cast", above, site=site, to=_LONG), site=site)
        following = node("Add", root, one, site=site)
        fits = node("LessOrEqual", node("Mul", following, following, site=site), value, site=site)
        return node("Add", root, node("Cast", fits, site=site, to=_LONG), site=site)


def stream_placed(grid: Uniform) -> Placed:
    """Return how the codes of a residual stream are stored: as int32 with the zero point 0."""
    return Placed(scale=np.float32(grid.scale), zero_point=np.zeros((), np.int32), shift=np.float32(0))


def _is_stream(placed: Placed) -> bool:
    return placed.zero_point.dtype == np.int32


def _same(first: Placed, second: Placed) -> bool:
    kinds = first.zero_point.dtype == second.zero_point.dtype
    return kinds and first.scale == second.scale and bool(first.zero_point == second.zero_point)
