"""Lowerings of linear layers and attention products as values; the target and the quantizers say which one is used.

What quantized ones have to equal is `ops.simulate`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vitfold.errors import TargetError
from vitfold.ops.emit.codes import Placed, PlacedWeight
from vitfold.ops.emit.operands import Branch, Operands
from vitfold.ops.emit.writer import MICROSOFT, Shape, Value, Writer
from vitfold.quantizer import NORMALIZED_EXPONENT, normalized_scale
from vitfold.target import Target


class Products(ABC):
    """How the products of a model are written."""

    _writer: Writer

    @abstractmethod
    def linear(self, layer: str, site: str, x: Value, outputs: Shape) -> ir.Value:
        """X W^T + b on the last axis; `site` is that of x, `outputs` the shape of the result."""

    @abstractmethod
    def scores(self, site: str, q: ir.Value, k: ir.Value, alpha: float) -> ir.Value:
        """Alpha q k^T of an attention, on rank-4 values."""

    def biased(self, site: str, scores: ir.Value, bias: ir.Value) -> ir.Value:
        """Scores of an attention with a bias that broadcasts."""
        return self._writer.node("Add", scores, bias, site=f"{site}.bias")

    @abstractmethod
    def average(self, site: str, scores: ir.Value, v: ir.Value) -> ir.Value:
        """softmax(scores) v of an attention, on rank-4 values."""

    def linear_parts(self, layer: str, x: ir.Value, parts: int) -> list[ir.Value] | None:
        """The outputs of a linear layer in equal parts, where that takes less than splitting them; else None."""
        return None


class Float(Products):
    """Products in the graph's float type. Every engine fuses or runs decomposed attention well."""

    def __init__(self, writer: Writer, target: Target) -> None:
        self._writer, self._target = writer, target

    def linear(self, layer: str, site: str, x: Value, outputs: Shape) -> ir.Value:
        """MatMul and Add, or one Gemm on flattened rows, as the target wants it."""
        writer, rows, bias = self._writer, x.onnx, self._writer.bias(layer)
        if self._target.linear_bias == "gemm" and bias is not None:
            if len(outputs) > 2:
                rows = writer.node("Reshape", rows, writer.integers(-1, x.shape[-1]))
            y = writer.node("Gemm", rows, writer.weight(f"{layer}.weight"), bias, site=layer, transB=1)
            return y if len(outputs) == 2 else writer.node("Reshape", y, writer.integers(-1, *outputs[1:]))
        y = writer.node("MatMul", rows, writer.weight(f"{layer}.weight", transposed=True), site=layer)
        return y if bias is None else writer.node("Add", y, bias, site=f"{layer}.bias")

    def scores(self, site: str, q: ir.Value, k: ir.Value, alpha: float) -> ir.Value:
        """A product with the scale, or scaled queries."""
        return self.transposed(f"{site}.qk", q, k, 4, alpha)

    def average(self, site: str, scores: ir.Value, v: ir.Value) -> ir.Value:
        """Softmax and MatMul."""
        weights = self._writer.node("Softmax", scores, site=f"{site}.softmax", axis=-1)
        return self._writer.node("MatMul", weights, v, site=f"{site}.av")

    def transposed(self, site: str, a: ir.Value, b: ir.Value, rank: int, alpha: float | None = None) -> ir.Value:
        """Alpha a b^T on the last two axes; the transposition stays a flag where the target has one."""
        node = self._writer.node
        if self._target.contrib:
            scaled = {} if alpha is None else {"alpha": alpha}
            return node("FusedMatMul", a, b, site=site, domain=MICROSOFT, transB=1, **scaled)
        turned = node("Transpose", b, perm=[*range(rank - 2), rank - 1, rank - 2])
        if alpha is not None:
            a = node("Mul", a, self._writer.number(alpha))
        return node("MatMul", a, turned, site=site)


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """Operands of a product of codes: branches of the site `left`, and codes `right` that lie as `placed`."""

    site: str
    left: str
    branches: tuple[Branch, ...]
    right: ir.Value
    placed: Placed | PlacedWeight
    alpha: float = 1.0
    bias: ir.Value | None = None


class Quantized(Products):
    """Products of codes, one per branch of the left operand; subclasses say what a product is."""

    def __init__(self, writer: Writer, operands: Operands) -> None:
        self._writer, self._operands = writer, operands

    def _right(self, site: str, branch: Branch) -> ir.Value:
        """The right operand of a product: its codes."""
        return self._operands.codes(site, branch)

    @abstractmethod
    def _product(self, one: Product) -> ir.Value:
        """Alpha times the sum of the branches' products with the right operand, plus a bias."""

    def linear(self, layer: str, site: str, x: Value, outputs: Shape) -> ir.Value:
        """Q(x) Q(W)^T + b, one product per branch with the same weight."""
        weight, branches = self._operands.weight(layer), self._operands.left(site, x.onnx)
        bias = self._operands.bias(layer, site, weight, branches)
        codes = self._operands.weight_codes(layer, weight)
        return self._product(Product(layer, site, branches, codes, weight, bias=bias))

    def scores(self, site: str, q: ir.Value, k: ir.Value, alpha: float) -> ir.Value:
        """Alpha Q(q) Q(k)^T."""
        branches, right = self._operands.left(f"{site}.q", q), self._operands.right(f"{site}.k", k)
        turned = self._writer.node("Transpose", self._right(f"{site}.k", right), perm=[0, 1, 3, 2])
        return self._product(Product(f"{site}.qk", f"{site}.q", branches, turned, right.placed, alpha))

    def average(self, site: str, scores: ir.Value, v: ir.Value) -> ir.Value:
        """Q(softmax) Q(v)."""
        softmax = f"{site}.softmax"
        branches = self._operands.left(softmax, self._writer.node("Softmax", scores, site=softmax, axis=-1))
        right = self._operands.right(f"{site}.v", v)
        codes = self._right(f"{site}.v", right)
        return self._product(Product(f"{site}.av", softmax, branches, codes, right.placed))


class Pairs(Quantized):
    """MatMul on Q/DQ pairs, which engines turn into integer kernels; weights normalized where the target wants it."""

    def linear(self, layer: str, site: str, x: Value, outputs: Shape) -> ir.Value:
        """Q(x) Q(W)^T + b, one product per branch with the same weight."""
        writer, operands = self._writer, self._operands
        weight, branches = operands.weight(layer), operands.left(site, x.onnx)
        bias = operands.bias(layer, site, weight, branches)
        normalized = operands.target.weight_scale == "normalized" and weight.scale.ndim > 0
        codes = self._weight(layer, weight, normalized=normalized)
        y = self._product(Product(layer, site, branches, codes, weight))
        if f"{layer}.y" in operands.quantizers:
            if not normalized:
                raise TargetError(
                    f"{layer}.y: {operands.target.name} has no normalized weights; set quant.outputs = false"
                )
            y = operands.grid(f"{layer}.y", Branch(y, operands.place(f"{layer}.y")))
        if normalized:
            y = writer.node("Mul", y, writer.constant(normalized_scale(weight.quantizer)), site=f"{layer}.scale")
        return y if bias is None else writer.node("Add", y, bias, site=f"{layer}.bias")

    def _weight(self, layer: str, weight: PlacedWeight, *, normalized: bool) -> ir.Value:
        """DequantizeLinear on the constant codes (I, O), per column where the weight has an axis.

        Normalized, they are the codes times one power of two, and what is left of a column's scale is multiplied into
        the product: with a scale per column, TensorRT stores int32 accumulators as FP16, which overflow; one scale it
        applies in FP32 (docs/nvidia.md).
        """
        writer, site = self._writer, f"{layer}.w"
        if not normalized:
            codes = self._operands.weight_codes(layer, weight)
            scale, zero = writer.constant(weight.scale), writer.constant(weight.zero_point)
            return writer.node("DequantizeLinear", codes, scale, zero, site=site, axis=1)
        if weight.zero_point.any():
            same = writer.constant(np.full(weight.zero_point.shape, 2.0**NORMALIZED_EXPONENT, np.float32))
            zeros, codes = writer.constant(weight.zero_point), self._operands.weight_codes(layer, weight)
            return writer.node("DequantizeLinear", codes, same, zeros, site=site, axis=1)
        one = writer.number(2.0**NORMALIZED_EXPONENT)
        zero = writer.constant(np.zeros((), weight.zero_point.dtype))
        return writer.node("DequantizeLinear", self._operands.weight_codes(layer, weight), one, zero, site=site)

    def _right(self, site: str, branch: Branch) -> ir.Value:
        return self._operands.grid(site, branch)

    def _product(self, one: Product) -> ir.Value:
        node, grid = self._writer.node, self._operands.grid
        products = [node("MatMul", grid(one.left, b), one.right, site=one.site) for b in one.branches]
        y = self._writer.total(one.site, products)
        return y if one.alpha == 1.0 else node("Mul", y, self._writer.number(float(np.float32(one.alpha))))


class Fused(Quantized):
    """ONNX Runtime's MatMulIntegerToFloat: int32 products, scaled, the bias added as they are stored."""

    def linear_parts(self, layer: str, x: ir.Value, parts: int) -> list[ir.Value]:
        """One integer product each, from the same codes.

        On ViT-B/16 with cpu-vnni the products take the same time as one and a Split, and the model 4.5 % less.
        """
        operands, params, site = self._operands, self._writer.params, f"{layer}.x"
        whole, branches = operands.weight(layer), operands.left(site, x)
        bias = operands.moved_bias(layer, site, whole, branches)
        if bias is None:
            bias = params.get(f"{layer}.bias")
        size = len(params[f"{layer}.weight"]) // parts
        results = []
        for start in range(0, parts * size, size):
            stop = start + size
            weight, codes = whole.rows(start, stop), operands.weight_codes(layer, whole.rows(start, stop), start, stop)
            part = None if bias is None else self._writer.constant(bias[start:stop])
            results.append(self._product(Product(layer, site, branches, codes, weight, bias=part)))
        return results

    def _product(self, one: Product) -> ir.Value:
        writer, parts = self._writer, []
        for index, branch in enumerate(one.branches):
            zero = branch.placed.zero_point
            inputs: list[ir.Value | None] = [
                self._operands.codes(one.left, branch),
                one.right,
                writer.number(float(branch.placed.scale * np.float32(one.alpha))),
                writer.constant(np.asarray(one.placed.scale)),
                writer.constant(zero) if zero.any() else None,
                writer.constant(one.placed.zero_point) if one.placed.zero_point.any() else None,
                one.bias if index == 0 else None,
            ]
            while inputs[-1] is None:
                inputs.pop()
            parts.append(writer.node("MatMulIntegerToFloat", *inputs, site=one.site, domain=MICROSOFT))
        return writer.total(one.site, parts)
