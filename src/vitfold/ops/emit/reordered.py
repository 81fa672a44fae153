"""The reordered lowering: matrix products take integers, dequantization stands behind them.

Where outputs are rounded, codes are handed on (`chain`): a linear layer writes what its reader wants, and LayerNorm,
exp, GELU and the residual stream are integers too. Else they stay float. `ops.simulate` with `reordered` computes the
same in float.

Source: operand reordering (2504.18547).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from vitfold.errors import TargetError
from vitfold.model import Array
from vitfold.ops.emit.chain import stream_placed
from vitfold.ops.emit.codes import Placed, PlacedWeight, place
from vitfold.ops.emit.operands import Branch, Operands
from vitfold.ops.emit.products import Product, Quantized
from vitfold.ops.emit.writer import Shape, Value, Writer
from vitfold.quantizer import EXPONENTIALS, NARROW_BITS, Uniform

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
        self._chain = operands.chain
        self._sums: dict[ir.Value, tuple[ir.Value, float]] = {}

    def linear(self, layer: str, site: str, x: Value, outputs: Shape) -> ir.Value:
        """Floats; or the codes that what reads them wants, where `{layer}.out` has a grid per tensor."""
        if self._hands(layer, None):
            return self._handed(layer, site, x.onnx, 0, None)
        y = super().linear(layer, site, x, outputs)
        grid = self._operands.quantizers.get(f"{layer}.out")
        if isinstance(grid, Uniform) and grid.axis is None and grid.bits <= NARROW_BITS:
            y = self._operands.grid(f"{layer}.out", Branch(y, self._operands.place(f"{layer}.out")))
        return y

    def linear_parts(self, layer: str, x: ir.Value, parts: int) -> list[ir.Value] | None:
        """Codes of queries, keys and values, where `{layer}.out` has a grid for each."""
        if not self._hands(layer, -1):
            return None
        size = len(self._writer.params[f"{layer}.weight"]) // parts
        starts = range(0, parts * size, size)
        return [self._handed(layer, f"{layer}.x", x, start, start + size) for start in starts]

    def _hands(self, layer: str, axis: int | None) -> bool:
        grid, inputs = (self._operands.quantizers.get(f"{layer}.{end}") for end in ("out", "x"))
        return isinstance(grid, Uniform) and isinstance(inputs, Uniform) and grid.axis == axis

    def _handed(self, layer: str, site: str, x: ir.Value, start: int, stop: int | None) -> ir.Value:
        """Requantize the output channels start:stop, all of which have one grid."""
        operands, name = self._operands, f"{layer}.out"
        grid, whole, (branch,) = operands.quantizers[name], operands.weight(layer), operands.left(site, x)
        assert isinstance(grid, Uniform)
        if grid.axis is not None:
            (scale,), (zero,) = (np.unique(one[start:stop]) for one in (grid.scale, grid.zero_point))
            grid = Uniform(scale=np.array(scale), zero_point=np.array(zero), low=grid.low, high=grid.high)
        weight = whole if stop is None else whole.rows(start, stop)
        codes = operands.weight_codes(layer, weight, start, stop)
        product = self._accumulate(layer, operands.codes(site, branch), codes, branch.placed, weight)
        scales = branch.placed.scale * weight.scale.astype(np.float64) / float(grid.scale)
        params = self._writer.params
        bias = params.get(f"{layer}.bias", np.zeros(len(params[f"{layer}.weight"])))[start:stop].astype(np.float64)
        placed = stream_placed(grid) if grid.bits > NARROW_BITS else place(name, grid, operands.target)
        return self._chain.hand(
            name, self._chain.requantize(name, product, scales, bias / float(grid.scale), placed), placed
        )

    def _product(self, one: Product) -> ir.Value:
        """D alpha (A - za) (B - zb) + b: one multiplication by all scales; branches of a twin meet as floats."""
        parts = []
        for branch in one.branches:
            codes = self._operands.codes(one.left, branch)
            scale = branch.placed.scale * one.placed.scale * np.float32(one.alpha)
            product = self._accumulate(one.site, codes, one.right, branch.placed, one.placed)
            parts.append(self._scaled(one.site, product, scale))
        y = self._writer.total(one.site, parts)
        if len(parts) == 1 and one.bias is None and np.ndim(scale) == 0:
            self._sums[y] = product, float(scale)
        return y if one.bias is None else self._writer.node("Add", y, one.bias, site=f"{one.site}.bias")

    def biased(self, site: str, scores: ir.Value, bias: ir.Value) -> ir.Value:
        """The sum; where integers go on, the bias in steps of the product, too."""
        y = super().biased(site, scores, bias)
        if scores in self._sums and f"{site}.logits" in self._operands.quantizers:
            product, scale = self._sums[scores]
            node, name = self._writer.node, f"{site}.bias"
            steps = node("Round", node("Div", bias, self._writer.number(scale), site=name), site=name)
            ends = (self._writer.number(end) for end in (-(2.0**31), 2.0**31))
            steps = node("Clip", steps, *ends, site=name)
            both = (node("Cast", one, site=name, to=int(ir.DataType.INT64)) for one in (product, steps))
            self._sums[y] = node("Add", *both, site=name), scale
        return y

    def _exponentials(self, site: str, scores: ir.Value) -> ir.Value:
        """Codes of exp(scores - their largest): by a table, or rounded."""
        writer, softmax = self._writer, f"{site}.softmax"
        grid = self._operands.quantizers.get(f"{site}.logits")
        if isinstance(grid, Uniform) and scores in self._sums:
            product, scale = self._sums[scores]
            long = writer.node("Cast", product, site=softmax, to=int(ir.DataType.INT64))
            return self._chain.exponentials(softmax, long, scale, grid)
        largest = writer.node("ReduceMax", scores, writer.integers(-1), site=softmax, keepdims=1)
        powers = writer.node("Exp", writer.node("Sub", scores, largest, site=softmax), site=softmax)
        return self._operands.codes(softmax, Branch(powers, self._unit_interval(softmax)))

    def _unit_interval(self, softmax: str) -> Placed:
        return place(softmax, EXPONENTIALS, self._operands.target, np.uint8, sign="positive")

    def average(self, site: str, scores: ir.Value, v: ir.Value) -> ir.Value:
        """out_i = Dv sum_j E_ij (Vq_j - zv) / sum_j E_ij with the codes E of exp(scores - max) on the grid 1 / 255.

        Both sums are integers. Where a quantized linear layer reads the result, it is requantized with one
        multiplier Dv / Do and one rounding (half away from zero), and returned as that layer's codes.
        """
        writer, softmax, name = self._writer, f"{site}.softmax", f"{site}.v"
        placed, codes = self._unit_interval(softmax), self._exponentials(site, scores)
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
        above = node("Mul", node("Cast", product, site=name, to=long), self._writer.long(2 * m), site=name)
        below = node("Mul", node("Cast", total, site=name, to=long), self._writer.long(1 << shift), site=name)
        twice = node("Mul", below, self._writer.long(2), site=name)
        return self._chain.clamped(name, self._chain.quotient(name, above, twice, below), reader)

    def _accumulate(self, site: str, a: ir.Value, b: ir.Value, left: Placed, right: Placed | PlacedWeight) -> ir.Value:
        """(A - za) (B - zb) in int32."""
        zeros = self._writer.constant(left.zero_point), self._writer.constant(right.zero_point)
        return self._writer.node("MatMulInteger", a, b, *zeros, site=site)

    def _scaled(self, site: str, product: ir.Value, scale: Array | np.float32) -> ir.Value:
        name, factor = f"{site}.scale", np.asarray(scale, np.float32)
        floats = self._writer.node("Cast", product, site=name, to=int(ir.DataType.FLOAT))
        return self._writer.node("Mul", floats, self._writer.constant(factor), site=name)
