"""The reordered lowering: matrix products take integers, dequantization stands behind them.

Owns the integer forms of linear layers and attention and the requantization between them. LayerNorm,
exp and GELU stay float. `ops.simulate` with `reordered` computes the same in float.

Source: operand reordering (2504.18547); its algebra in the reference, 4.1.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from vitfold.errors import TargetError
from vitfold.model import Array
from vitfold.ops.emit.codes import Placed, PlacedWeight, place
from vitfold.ops.emit.quantized import Branch, Quantized
from vitfold.quantizer import EXPONENTIALS, Uniform

Reader = tuple[str, Placed]
"""A layer that reads codes, and how it wants them."""

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
    """MatMulInteger everywhere; scales are multiplied into what follows."""

    @property
    def _reorders(self) -> bool:
        return self._target.quantized_product == "integer"

    def _integer_linear(
        self,
        layer: str,
        weight: PlacedWeight,
        branches: tuple[tuple[ir.Value, Placed], ...],
        bias: ir.Value | None,
    ) -> ir.Value:
        """Dx Dw (Xq - zx) Wq^T + b: codes (B, N, I) in, float (B, N, O) out.

        Branches of a twin quantizer have scales of their own and meet as floats.
        """
        parts = []
        for codes, placed in branches:
            product = self._accumulate(layer, codes, self._weight_codes(layer, weight), placed, weight)
            parts.append(self._scaled(layer, product, weight.scale * placed.scale))
        y = self._sum(layer, parts)
        return y if bias is None else self._node("Add", y, bias, site=f"{layer}.bias")

    def _quantized_linear(self, layer: str, x: ir.Value, site: str) -> ir.Value:
        """Quantize, multiply integers, dequantize."""
        if not self._reorders:
            return super()._quantized_linear(layer, x, site)
        weight, branches = self._placed_weight(layer), self._branches(site, x)
        coded = tuple((self._quantize(site, branch), branch.placed) for branch in branches)
        return self._integer_linear(layer, weight, coded, self._bias(layer, site, weight, branches))

    def _linear_of_codes(self, layer: str, codes: ir.Value, placed: Placed) -> ir.Value:
        """A linear layer whose input is codes already."""
        weight = self._placed_weight(layer)
        return self._integer_linear(layer, weight, ((codes, placed),), self._bias(layer, f"{layer}.x", weight, ()))

    def _quantized_scores(self, site: str, q: ir.Value, k: ir.Value, width: int) -> ir.Value:
        """Dq Dk / sqrt(K) (Qq - zq) (Kq - zk)^T: the scales and 1 / sqrt(K) are one multiplication."""
        if not self._reorders:
            return super()._quantized_scores(site, q, k, width)
        right = Branch(k, self._right(f"{site}.k"))
        turned = self._node("Transpose", self._quantize(f"{site}.k", right), perm=[0, 1, 3, 2])
        parts = []
        for branch in self._branches(f"{site}.q", q):
            codes, placed = self._quantize(f"{site}.q", branch), branch.placed
            product = self._accumulate(f"{site}.qk", codes, turned, placed, right.placed)
            scale = placed.scale * right.placed.scale * np.float32(1.0 / math.sqrt(width))
            parts.append(self._scaled(f"{site}.qk", product, scale))
        return self._sum(f"{site}.qk", parts)

    def _reordered_average(
        self, site: str, scores: ir.Value, v: ir.Value
    ) -> tuple[ir.Value, tuple[str, Placed] | None]:
        """out_i = Dv sum_j E_ij (Vq_j - zv) / sum_j E_ij with the codes E of exp(scores - max) on the grid 1 / 255.

        Both sums are integers. Where a quantized linear layer reads the result, it is requantized with one
        multiplier Dv / Do and one rounding (half away from zero), and returned as codes with that layer's name
        and their placement.
        """
        softmax, name = f"{site}.softmax", f"{site}.v"
        largest = self._node("ReduceMax", scores, self._integers(-1), site=softmax, keepdims=1)
        powers = self._node("Exp", self._node("Sub", scores, largest, site=softmax), site=softmax)
        placed = place(softmax, EXPONENTIALS, self._target, np.uint8, sign="positive")
        codes = self._quantize(softmax, Branch(powers, placed))
        integers = self._node("Cast", codes, site=softmax, to=int(ir.DataType.INT32))
        total = self._node("ReduceSum", integers, self._integers(-1), site=f"{softmax}.sum", keepdims=1)
        right = Branch(v, self._right(name))
        product = self._accumulate(f"{site}.av", codes, self._quantize(name, right), placed, right.placed)
        reader = self._reader(site)
        if reader is not None:
            codes = self._requantize(f"{reader[0]}.x", product, total, float(right.placed.scale), reader[1])
            return codes, reader
        rows = self._node("Cast", total, site=softmax, to=int(ir.DataType.FLOAT))
        return self._node("Div", self._scaled(f"{site}.av", product, right.placed.scale), rows, site=softmax), None

    def _reader(self, site: str) -> Reader | None:
        """Return the projection behind an attention and the codes that it wants, where those can be computed here."""
        layer = self._projection(site)
        if not self._is_quantized(layer) or not isinstance(self._quantizers[f"{layer}.x"], Uniform):
            return None
        return layer, place(f"{layer}.x", self._quantizers[f"{layer}.x"], self._target)

    def _projection(self, site: str) -> str:
        """The layer that reads an attention: `blocks.0.attn.proj`, but `pool.proj` for `pool.attn`."""
        inside = f"{site}.proj"
        return inside if f"{inside}.weight" in self._params else f"{site.rpartition('.')[0]}.proj"

    def _requantize(self, name: str, product: ir.Value, total: ir.Value, scale: float, reader: Placed) -> ir.Value:
        """clamp(round(acc m / (sum 2^e)) + z) in int64, with m 2^-e ~ Dv / Do; Div truncates towards zero.

        Raises:
            TargetError: if the two scales are too far apart to be those of one tensor.
        """
        try:
            m, shift = dyadic(scale / float(reader.scale))
        except ValueError as error:
            raise TargetError(f"{name} cannot be requantized: {error}; calibrate again") from None
        long = int(ir.DataType.INT64)
        above = self._node("Mul", self._node("Cast", product, site=name, to=long), self._long(2 * m), site=name)
        below = self._node("Mul", self._node("Cast", total, site=name, to=long), self._long(1 << shift), site=name)
        half = self._node("Mul", self._node("Sign", above, site=name), below, site=name)
        twice = self._node("Mul", below, self._long(2), site=name)
        rounded = self._node("Div", self._node("Add", above, half, site=name), twice, site=name)
        moved = self._node("Add", rounded, self._long(int(reader.zero_point)), site=name)
        bounds = np.iinfo(reader.zero_point.dtype)
        clamped = self._node("Clip", moved, self._long(int(bounds.min)), self._long(int(bounds.max)), site=name)
        kind = ir.DataType.from_numpy(reader.zero_point.dtype)
        return self._node("Cast", clamped, site=name, to=int(kind))

    def _accumulate(self, site: str, a: ir.Value, b: ir.Value, left: Placed, right: Placed | PlacedWeight) -> ir.Value:
        """(A - za) (B - zb) in int32."""
        zeros = self._constant(left.zero_point), self._constant(right.zero_point)
        return self._node("MatMulInteger", a, b, *zeros, site=site)

    def _scaled(self, site: str, product: ir.Value, scale: Array | np.float32) -> ir.Value:
        floats = self._node("Cast", product, site=f"{site}.scale", to=int(ir.DataType.FLOAT))
        return self._node("Mul", floats, self._constant(np.asarray(scale, np.float32)), site=f"{site}.scale")

    def _long(self, value: int) -> ir.Value:
        return self._constant(np.array(value, np.int64))
