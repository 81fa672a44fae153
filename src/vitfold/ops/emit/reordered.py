"""The reordered lowering: matrix products take integers, dequantization stands behind them.

LayerNorm, exp and GELU stay float. `ops.simulate` with `reordered` computes the same in float.

Source: operand reordering (2504.18547).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from vitfold.errors import TargetError
from vitfold.model import Array
from vitfold.ops.emit.codes import Placed, PlacedWeight, place
from vitfold.ops.emit.operands import Branch, Operands
from vitfold.ops.emit.products import Product, Quantized
from vitfold.ops.emit.writer import Writer
from vitfold.quantizer import EXPONENTIALS, Uniform

_MULTIPLIER_BITS = 24
_SMALLEST = -14


def dyadic(multiplier: float) -> tuple[int, int]:
    """Return m and e with multiplier ~ m 2^-e, m in [2^23, 2^24] and e in [0, 38].

    So 2 m acc of an int32 accumulator and 2^(e + 1) times a row sum below 2^23 (32 thousand tokens) fit
    int64. The relative error is at most 2^-24, that of a float32.

    Raises:
        ValueError: if the multiplier is not in [2^-14, 2^24).
    """
    exponent = math.frexp(multiplier)[1]
    if multiplier <= 0 or not _SMALLEST < exponent <= _MULTIPLIER_BITS:
        raise ValueError(f"{multiplier} is no ratio of two activation scales")
    shift = _MULTIPLIER_BITS - exponent
    return round(math.ldexp(multiplier, shift)), shift


class Reordered(Quantized):
    """MatMulInteger everywhere; scales are multiplied into what follows.

    An attention whose result a quantized linear layer reads hands on that layer's codes, which only move in between:
    `projections` names the layer by the attention's site.
    """

    def __init__(self, writer: Writer, operands: Operands, projections: Mapping[str, str]) -> None:
        super().__init__(writer, operands)
        self._projections = projections

    def _product(self, one: Product) -> ir.Value:
        """D alpha (A - za) (B - zb) + b: one multiplication by all scales; branches of a twin meet as floats."""
        parts = []
        for branch in one.branches:
            codes, scale = self._operands.codes(one.left, branch), branch.placed.scale * one.placed.scale
            product = self._accumulate(one.site, codes, one.right, branch.placed, one.placed)
            parts.append(self._scaled(one.site, product, scale * np.float32(one.alpha)))
        y = self._writer.total(one.site, parts)
        return y if one.bias is None else self._writer.node("Add", y, one.bias, site=f"{one.site}.bias")

    def average(self, site: str, scores: ir.Value, v: ir.Value) -> ir.Value:
        """out_i = Dv sum_j E_ij (Vq_j - zv) / sum_j E_ij with the codes E of exp(scores - max) on the grid 1 / 255.

        Both sums are integers. Where a quantized linear layer reads the result, it is requantized with one
        multiplier Dv / Do and one rounding (half away from zero), and returned as that layer's codes.
        """
        writer, softmax, name = self._writer, f"{site}.softmax", f"{site}.v"
        largest = writer.node("ReduceMax", scores, writer.integers(-1), site=softmax, keepdims=1)
        powers = writer.node("Exp", writer.node("Sub", scores, largest, site=softmax), site=softmax)
        placed = place(softmax, EXPONENTIALS, self._operands.target, np.uint8, sign="positive")
        codes = self._operands.codes(softmax, Branch(powers, placed))
        integers = writer.node("Cast", codes, site=softmax, to=int(ir.DataType.INT32))
        total = writer.node("ReduceSum", integers, writer.integers(-1), site=f"{softmax}.sum", keepdims=1)
        right = self._operands.right(name, v)
        product = self._accumulate(f"{site}.av", codes, self._operands.codes(name, right), placed, right.placed)
        layer = self._projections.get(site)
        if (
            layer
            and self._operands.quantized(f"{layer}.x", f"{layer}.w")
            and isinstance(self._operands.quantizers[f"{layer}.x"], Uniform)
        ):
            wanted = self._operands.place(f"{layer}.x")
            result = self._requantize(f"{layer}.x", product, total, float(right.placed.scale), wanted)
            self._operands.hand_on(f"{layer}.x", result, wanted)
            return result
        rows = writer.node("Cast", total, site=softmax, to=int(ir.DataType.FLOAT))
        return writer.node("Div", self._scaled(f"{site}.av", product, right.placed.scale), rows, site=softmax)

    def _requantize(self, name: str, product: ir.Value, total: ir.Value, scale: float, reader: Placed) -> ir.Value:
        """clamp(round(acc m / (sum 2^e)) + z) in int64, with m 2^-e ~ Dv / Do; Div truncates towards zero.

        Raises:
            TargetError: if the two scales are too far apart to be those of one tensor.
        """
        try:
            m, shift = dyadic(scale / float(reader.scale))
        except ValueError as error:
            raise TargetError(f"{name} cannot be requantized: {error}; calibrate again") from None
        node, long = self._writer.node, int(ir.DataType.INT64)
        above = node("Mul", node("Cast", product, site=name, to=long), self._long(2 * m), site=name)
        below = node("Mul", node("Cast", total, site=name, to=long), self._long(1 << shift), site=name)
        half = node("Mul", node("Sign", above, site=name), below, site=name)
        twice = node("Mul", below, self._long(2), site=name)
        rounded = node("Div", node("Add", above, half, site=name), twice, site=name)
        moved = node("Add", rounded, self._long(int(reader.zero_point)), site=name)
        bounds = np.iinfo(reader.zero_point.dtype)
        clamped = node("Clip", moved, self._long(int(bounds.min)), self._long(int(bounds.max)), site=name)
        return node("Cast", clamped, site=name, to=int(ir.DataType.from_numpy(reader.zero_point.dtype)))

    def _accumulate(self, site: str, a: ir.Value, b: ir.Value, left: Placed, right: Placed | PlacedWeight) -> ir.Value:
        """(A - za) (B - zb) in int32."""
        zeros = self._writer.constant(left.zero_point), self._writer.constant(right.zero_point)
        return self._writer.node("MatMulInteger", a, b, *zeros, site=site)

    def _scaled(self, site: str, product: ir.Value, scale: Array | np.float32) -> ir.Value:
        name, factor = f"{site}.scale", np.asarray(scale, np.float32)
        floats = self._writer.node("Cast", product, site=name, to=int(ir.DataType.FLOAT))
        return self._writer.node("Mul", floats, self._writer.constant(factor), site=name)

    def _long(self, value: int) -> ir.Value:
        return self._writer.constant(np.array(value, np.int64))
