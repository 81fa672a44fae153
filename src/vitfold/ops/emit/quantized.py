"""The lowering of quantized linear layers and attention products.

Owns their nodes for every form that a target may want but the reordered one. What they have to
equal is `ops.simulate`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vitfold.errors import TargetError
from vitfold.model import Array
from vitfold.ops.emit.codes import Placed, PlacedWeight, Sign, place, place_weight
from vitfold.ops.emit.writer import Writer
from vitfold.products import computed_type
from vitfold.quantizer import NORMALIZED_EXPONENT, Quantizer, Shifted, Twin, normalized_scale
from vitfold.target import Target

MICROSOFT = "com.microsoft"
OPERANDS = ("q", "k", "v", "softmax")


@dataclass(frozen=True, slots=True)
class Branch:
    """A float value and how its codes are stored; a quantized operand is the sum of its branches."""

    onnx: ir.Value
    placed: Placed


class Quantized(Writer):
    """Integer products for the sites that have quantizers."""

    def __init__(
        self, params: Mapping[str, Array], target: Target, quantizers: Mapping[str, Quantizer] | None = None
    ) -> None:
        super().__init__(params, target)
        self._quantizers = quantizers or {}
        self._weight_of: dict[tuple[str, int], ir.Value] = {}
        self._codes_of: dict[tuple[ir.Value, float, str, int], ir.Value] = {}

    def _both(self, first: str, second: str) -> bool:
        """Say whether a product runs in integers: both operands are quantized.

        Raises:
            TargetError: if only one of them is, unless it is a weight: that is on its grid already.
        """
        found = [site in self._quantizers for site in (first, second)]
        if found == [True, False] or (found == [False, True] and not second.endswith(".w")):
            there, missing = (first, second) if found[0] else (second, first)
            raise TargetError(f"{there} is quantized and {missing} is not; a product needs both operands in integers")
        return all(found)

    def _is_quantized(self, layer: str) -> bool:
        return self._both(f"{layer}.x", f"{layer}.w")

    def _branches(self, site: str, x: ir.Value, *, nonnegative: bool = False) -> tuple[Branch, ...]:
        """One branch for a uniform quantizer, two for a twin one: each element is zero in one of them.

        The offset of a shifted quantizer of a linear layer's input is added here, and taken off in `_bias`.
        """
        quantizer = self._quantizers[site]
        if isinstance(quantizer, Shifted) and site.endswith(".x"):
            x = self._node("Add", x, self._constant(quantizer.offset), site=site)
            return (Branch(x, place(site, quantizer.inner, self._target)),)
        if not isinstance(quantizer, Twin):
            sign: Sign = "positive" if nonnegative else "any"
            return (Branch(x, place(site, quantizer, self._target, sign=sign)),)
        if quantizer.rule == "sign":
            outer = self._node("Relu", x, site=site)
            inner = self._node("Min", x, self._number(0.0), site=site)
            lower = place(site, quantizer.inner, self._target, sign="negative")
        else:
            small = self._node("Less", x, self._number(quantizer.threshold), site=site)
            inner = self._node("Where", small, x, self._number(0.0), site=site)
            outer = self._node("Where", small, self._number(0.0), x, site=site)
            lower = place(site, quantizer.inner, self._target, sign="positive")
        upper = place(site, quantizer.outer, self._target, sign="positive")
        return Branch(inner, lower), Branch(outer, upper)

    def _quantize(self, site: str, branch: Branch) -> ir.Value:
        """QuantizeLinear, behind the shift that a symmetric target needs; made once for equal branches.

        Codes are smaller to move than floats: where nothing has to recognize the pairs, quantize first.
        """
        placed, x = branch.placed, branch.onnx
        key = (x, float(placed.scale), placed.zero_point.dtype.str, int(placed.zero_point))
        if key in self._codes_of:
            return self._codes_of[key]
        moves: list[ir.Node] = []
        if self._target.quantized_product != "qdq":
            x, moves = _before_moves(x)
        if placed.shift:
            x = self._node("Sub", x, self._number(float(placed.shift)), site=site)
        scale = self._number(float(placed.scale))
        codes = self._node("QuantizeLinear", x, scale, self._constant(placed.zero_point), site=site)
        for move in moves:
            attributes = {name: attribute.value for name, attribute in move.attributes.items()}
            codes = self._node(move.op_type, codes, *move.inputs[1:], site=site, **attributes)
        self._codes_of[key] = codes
        return codes

    def _placed_weight(self, layer: str) -> PlacedWeight:
        return place_weight(f"{layer}.w", self._quantizers[f"{layer}.w"], self._target)

    def _weight_codes(self, layer: str, placed: PlacedWeight, start: int = 0, stop: int | None = None) -> ir.Value:
        """Int8 codes (I, O) of the output channels start:stop as an initializer, computed only while it is written."""
        key = (layer, start)
        if key not in self._weight_of:
            weight = self._params[f"{layer}.weight"][start:stop]
            label = f"{layer}.weight.codes" if stop is None else f"{layer}.weight.codes.{start}"

            def codes() -> ir.Tensor:
                return ir.tensor(np.ascontiguousarray(placed.codes(weight).T), name=label)

            shape = ir.Shape((weight.shape[1], weight.shape[0]))
            kind = ir.DataType.from_numpy(placed.zero_point.dtype)
            tensor = ir.LazyTensor(codes, kind, shape, name=label)
            self._weight_of[key] = self.tape.initializer(tensor)
        return self._weight_of[key]

    def _integer_linear_parts(self, layer: str, x: ir.Value, parts: int) -> list[ir.Value]:
        """The layer's outputs in equal parts, one integer product each, from the same codes."""
        whole, branches = self._placed_weight(layer), self._branches(f"{layer}.x", x)
        bias = self._moved_bias(layer, f"{layer}.x", whole, branches)
        if bias is None:
            bias = self._params.get(f"{layer}.bias")
        size = len(self._params[f"{layer}.weight"]) // parts
        results = []
        for start in range(0, parts * size, size):
            weight, stop = whole.rows(start, start + size), start + size
            codes = self._weight_codes(layer, weight, start, stop)
            part = None if bias is None else self._constant(bias[start:stop])
            results.append(self._integer_products(layer, f"{layer}.x", branches, codes, weight, np.float32(1), part))
        return results

    def _bias(self, layer: str, site: str, weight: PlacedWeight, branches: tuple[Branch, ...]) -> ir.Value | None:
        """The bias, moved for the input `site` or as it is; None where there is nothing to add."""
        moved, name = self._moved_bias(layer, site, weight, branches), f"{layer}.bias"
        if moved is not None:
            return self._constant(moved)
        return self._weight(name) if name in self._params else None

    def _moved_bias(self, layer: str, site: str, weight: PlacedWeight, branches: tuple[Branch, ...]) -> Array | None:
        """b + W c - W n where a symmetric target shifted the input by c and its quantizer by n; None if neither did.

        Source: reference 2.5, option 2, for c; NoisyQuant (2211.16056), equation 4, for n.
        """
        quantizer = self._quantizers[site]
        shift = np.float64(sum(float(branch.placed.shift) for branch in branches))
        if isinstance(quantizer, Shifted):
            moved = shift - quantizer.offset.astype(np.float64)
        elif shift:
            moved = np.full(self._params[f"{layer}.weight"].shape[1], shift)
        else:
            return None
        rounded = weight.quantizer(self._params[f"{layer}.weight"]).astype(np.float64)
        bias: Array = (self._params.get(f"{layer}.bias", np.float64(0)) + rounded @ moved).astype(np.float32)
        return bias

    def _quantized_linear(self, layer: str, x: ir.Value, site: str) -> ir.Value:
        """Q(x) Q(W)^T + b, one product per branch with the same integer weight; `site` is that of x.

        Raises:
            TargetError: naming the site that this target cannot execute.
        """
        weight, branches = self._placed_weight(layer), self._branches(site, x)
        if len(branches) > 1 and any(branch.placed.shift for branch in branches):
            raise TargetError(f"{site}: {self._target.name} has no zero points for this twin quantizer")
        bias = self._bias(layer, site, weight, branches)
        if self._target.quantized_product == "matmul_integer_to_float":
            codes = self._weight_codes(layer, weight)
            return self._integer_products(layer, site, branches, codes, weight, np.float32(1), bias)
        normalized = self._target.weight_scale == "normalized" and weight.scale.ndim > 0
        right = self._normalized_weight(layer, weight) if normalized else self._dequantized_weight(layer, weight)
        y = self._float_products(layer, site, branches, right)
        output = self._quantizers.get(f"{layer}.y")
        if output is not None and not normalized:
            raise TargetError(f"{layer}.y: {self._target.name} has no normalized weights; set quant.outputs = false")
        if output is not None:
            y = self._grid(f"{layer}.y", Branch(y, place(f"{layer}.y", output, self._target)))
        if normalized:
            y = self._node("Mul", y, self._constant(normalized_scale(weight.quantizer)), site=f"{layer}.scale")
        return y if bias is None else self._node("Add", y, bias, site=f"{layer}.bias")

    def _dequantized_weight(self, layer: str, weight: PlacedWeight) -> ir.Value:
        """DequantizeLinear on the constant codes (I, O), per column where the weight has an axis."""
        inputs = [self._weight_codes(layer, weight), self._constant(weight.scale), self._constant(weight.zero_point)]
        return self._node("DequantizeLinear", *inputs, site=f"{layer}.w", axis=1)

    def _normalized_weight(self, layer: str, weight: PlacedWeight) -> ir.Value:
        """The codes (I, O) times one power of two: what is left of a column's scale is multiplied into the product.

        With a scale per column, TensorRT stores int32 accumulators as FP16, which overflow; one scale it applies in
        FP32. Source: reference on NVIDIA's compiler, section 3.
        """
        one = self._number(2.0**NORMALIZED_EXPONENT)
        zero = self._constant(np.zeros((), weight.zero_point.dtype))
        return self._node("DequantizeLinear", self._weight_codes(layer, weight), one, zero, site=f"{layer}.w")

    def _grid(self, site: str, branch: Branch) -> ir.Value:
        """Quantize and dequantize."""
        codes, placed = self._quantize(site, branch), branch.placed
        scale = self._number(float(placed.scale))
        return self._node("DequantizeLinear", codes, scale, self._constant(placed.zero_point), site=site)

    def _float_products(self, site: str, left: str, branches: tuple[Branch, ...], right: ir.Value) -> ir.Value:
        """MatMul on Q/DQ pairs, which engines turn into integer kernels."""
        return self._sum(site, [self._node("MatMul", self._grid(left, b), right, site=site) for b in branches])

    def _integer_products(
        self,
        site: str,
        left: str,
        branches: tuple[Branch, ...],
        right: ir.Value,
        placed: Placed | PlacedWeight,
        alpha: np.float32,
        bias: ir.Value | None = None,
    ) -> ir.Value:
        """ONNX Runtime's MatMulIntegerToFloat: int32 products, scaled by alpha, the bias added as they are stored."""
        parts = []
        for index, branch in enumerate(branches):
            zero = branch.placed.zero_point
            inputs: list[ir.Value | None] = [
                self._quantize(left, branch),
                right,
                self._number(float(branch.placed.scale * alpha)),
                self._constant(np.asarray(placed.scale)),
                self._constant(zero) if zero.any() else None,
                self._constant(placed.zero_point) if placed.zero_point.any() else None,
                bias if index == 0 else None,
            ]
            while inputs[-1] is None:
                inputs.pop()
            parts.append(self._node("MatMulIntegerToFloat", *inputs, site=site, domain=MICROSOFT))
        return self._sum(site, parts)

    def _sum(self, site: str, parts: list[ir.Value]) -> ir.Value:
        total = parts[0]
        for part in parts[1:]:
            total = self._node("Add", total, part, site=f"{site}.sum")
        return total

    def _attention_is_quantized(self, site: str) -> tuple[bool, bool]:
        """Say which of its two products run in integers: scores, weighted sum."""
        q, k, v, softmax = (f"{site}.{operand}" for operand in OPERANDS)
        return self._both(q, k), self._both(softmax, v)

    def _right(self, site: str) -> Placed:
        """Place the codes of k or v, the second operand of a product, which x86 wants signed.

        Where 8-bit signed operands saturate, both sides are unsigned: slower, but exact.
        """
        kind = np.dtype(computed_type(self._target.to_dict()))
        return place(site, self._quantizers[site], self._target, kind.type)

    def _quantized_scores(self, site: str, q: ir.Value, k: ir.Value, width: int) -> ir.Value:
        """Q(q) Q(k)^T / sqrt(K) on rank-4 values."""
        branches, right = self._branches(f"{site}.q", q), Branch(k, self._right(f"{site}.k"))
        self._refuse_shifts((f"{site}.q", branches), (f"{site}.k", (right,)))
        alpha = np.float32(1.0 / math.sqrt(width))
        if self._target.quantized_product == "matmul_integer_to_float":
            turned = self._node("Transpose", self._quantize(f"{site}.k", right), perm=[0, 1, 3, 2])
            return self._integer_products(f"{site}.qk", f"{site}.q", branches, turned, right.placed, alpha)
        turned = self._node("Transpose", self._grid(f"{site}.k", right), perm=[0, 1, 3, 2])
        scores = self._float_products(f"{site}.qk", f"{site}.q", branches, turned)
        return self._node("Mul", scores, self._number(float(alpha)))

    def _quantized_average(self, site: str, weights: ir.Value, v: ir.Value) -> ir.Value:
        """Q(A) Q(v) on rank-4 values."""
        left = f"{site}.softmax"
        branches, right = self._branches(left, weights, nonnegative=True), Branch(v, self._right(f"{site}.v"))
        self._refuse_shifts((left, branches), (f"{site}.v", (right,)))
        if self._target.quantized_product == "matmul_integer_to_float":
            codes = self._quantize(f"{site}.v", right)
            return self._integer_products(f"{site}.av", left, branches, codes, right.placed, np.float32(1))
        return self._float_products(f"{site}.av", left, branches, self._grid(f"{site}.v", right))

    def _refuse_shifts(self, *operands: tuple[str, tuple[Branch, ...]]) -> None:
        for site, branches in operands:
            if any(branch.placed.shift for branch in branches):
                raise TargetError(
                    f"{site} has a zero point, which {self._target.name} cannot multiply; quantize it symmetrically"
                )


def _before_moves(x: ir.Value) -> tuple[ir.Value, list[ir.Node]]:
    """Return the value that Reshape and Transpose nodes moved to `x`, and these nodes in order."""
    moves: list[ir.Node] = []
    node = x.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose") and node.inputs[0] is not None:
        moves.insert(0, node)
        x = node.inputs[0]
        node = x.producer()
    return x, moves
