"""The interpreter that lowers each operation to ONNX for one target.

Owns which nodes an operation becomes; picking token rows is `rows`', quantized products are `quantized`'s and
`reordered`'s. Naming and writing them is `writer`'s business.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from vitfold.model import Array
from vitfold.ops.emit.quantized import MICROSOFT
from vitfold.ops.emit.rows import Codes, Rows, Value
from vitfold.ops.emit.writer import Shape


class Emit(Rows):
    """ONNX values on a tape; shapes come from `Count`, so both agree by construction.

    Sites that have no quantizer stay float; the weights of those that have one lie on its grid.
    """

    def scope(self, site: str, block: int | None = None, role: str | None = None) -> None:
        """Name the nodes that follow."""
        self._scope = site
        self.count.scope(site)

    def enter(self, image: ir.Value, shape: Shape) -> Value:
        """Take the float32 input over into the graph's float type."""
        if self._real_type == ir.DataType.FLOAT:
            return Value(image, shape)
        return Value(self._node("Cast", image, to=int(self._real_type)), shape)

    def leave(self, result: Value) -> ir.Value:
        """Hand the output over as float32; an input that is handed on gets a value of its own."""
        if result.onnx.producer() is None:
            return self._node("Identity", result.onnx)
        if self._real_type == ir.DataType.FLOAT:
            return result.onnx
        return self._node("Cast", result.onnx, to=int(ir.DataType.FLOAT))

    def param(self, name: str) -> Value:
        """An initializer."""
        return Value(self._weight(name), self._params[name].shape)

    def patch_embed(self, layer: str, image: Value) -> Value:
        """Conv with stride = kernel, then tokens last to first."""
        shape = self.count.patch_embed(layer, image.shape)
        weight = self._params[f"{layer}.weight"]
        inputs = [image.onnx, self._weight(f"{layer}.weight")]
        if f"{layer}.bias" in self._params:
            inputs.append(self._weight(f"{layer}.bias"))
        y = self._node("Conv", *inputs, site=layer, kernel_shape=list(weight.shape[2:]), strides=list(weight.shape[2:]))
        y = self._node("Reshape", y, self._integers(0, shape[2], shape[1]))
        return Value(self._node("Transpose", y, perm=[0, 2, 1]), shape)

    def constant(self, values: Array) -> Value:
        """An initializer; equal ones are shared."""
        return Value(self._constant(np.asarray(values, np.float32)), tuple(values.shape))

    def linear(self, layer: str, x: Value, rows: str = "") -> Value:
        """MatMul and Add, or one Gemm on flattened rows, as the target wants it.

        Rows that are a site of their own share the weight; without a quantizer they are multiplied in float.

        Raises:
            TargetError: naming a quantizer that the target cannot execute.
        """
        shape = self.count.linear(layer, x.shape, rows)
        if rows and f"{layer}.{rows}.x" not in self._quantizers:
            return Value(self._float_linear(layer, x.onnx, x.shape, shape), shape)
        if isinstance(x, Codes):
            reader, placed = x.reader
            if reader != layer:
                raise ValueError(f"{layer} reads the codes of {reader}")
            return Value(self._linear_of_codes(layer, x.onnx, placed), shape)
        if self._is_quantized(layer):
            return Value(self._quantized_linear(layer, x.onnx, f"{layer}.{rows}.x" if rows else f"{layer}.x"), shape)
        return Value(self._float_linear(layer, x.onnx, x.shape, shape), shape)

    def _float_linear(self, layer: str, x: ir.Value, inputs: Shape, outputs: Shape) -> ir.Value:
        bias = self._weight(f"{layer}.bias") if f"{layer}.bias" in self._params else None
        if self._target.linear_bias == "gemm" and bias is not None:
            if len(outputs) > 2:
                x = self._node("Reshape", x, self._integers(-1, inputs[-1]))
            y = self._node("Gemm", x, self._weight(f"{layer}.weight"), bias, site=layer, transB=1)
            return y if len(outputs) == 2 else self._node("Reshape", y, self._integers(-1, *outputs[1:]))
        y = self._node("MatMul", x, self._weight(f"{layer}.weight", transposed=True), site=layer)
        return y if bias is None else self._node("Add", y, bias, site=f"{layer}.bias")

    def heads(self, layer: str, x: Value, parts: int, heads: int) -> tuple[Value, ...]:
        """Linear, Reshape, Transpose and Split; or one integer product per part, which spares the Split.

        On ViT-B/16 with cpu-vnni the products take the same time, and the model 4.5 % less.

        Raises:
            TargetError: naming a quantizer that the target cannot execute.
        """
        form = self._target.quantized_product
        if form != "matmul_integer_to_float" or not self._is_quantized(layer):
            y = self.linear(layer, x)
            rows = self.reshape(y, (y.shape[1], parts * heads, y.shape[2] // (parts * heads)))
            return self.split(self.transpose(rows, (0, 2, 1, 3)), parts, 1)
        shapes = self.count.heads(layer, x.shape, parts, heads)
        values = []
        for y, shape in zip(self._integer_linear_parts(layer, x.onnx, parts), shapes, strict=True):
            rows_onnx = self._node("Reshape", y, self._integers(0, shape[2], shape[1], shape[3]))
            values.append(Value(self._node("Transpose", rows_onnx, perm=[0, 2, 1, 3]), shape))
        return tuple(values)

    def layer_norm(self, layer: str, x: Value, eps: float) -> Value:
        """One LayerNormalization; decomposed it would overflow in FP16."""
        shape = self.count.layer_norm(layer, x.shape, eps)
        scale, bias = self._weight(f"{layer}.weight"), self._weight(f"{layer}.bias")
        return Value(self._node("LayerNormalization", x.onnx, scale, bias, site=layer, axis=-1, epsilon=eps), shape)

    def activation(self, kind: str, x: Value, site: str) -> Value:
        """Gelu as one operator; the others as their textbook form."""
        shape = self.count.activation(kind, x.shape, site)
        if kind in ("gelu_erf", "gelu_tanh"):
            approximate = "none" if kind == "gelu_erf" else "tanh"
            return Value(self._node("Gelu", x.onnx, site=site, approximate=approximate), shape)
        if kind in ("relu", "elu"):
            return Value(self._node(kind.capitalize(), x.onnx, site=site), shape)
        alpha = 1.702 if kind == "quick_gelu" else 1.0
        if self._target.contrib:
            return Value(self._node("QuickGelu", x.onnx, site=site, domain=MICROSOFT, alpha=alpha), shape)
        gate = x.onnx if alpha == 1.0 else self._node("Mul", x.onnx, self._number(alpha))
        return Value(self._node("Mul", x.onnx, self._node("Sigmoid", gate), site=site), shape)

    def softmax(self, site: str, a: Value) -> Value:
        """Softmax."""
        return Value(self._node("Softmax", a.onnx, site=site, axis=-1), self.count.softmax(site, a.shape))

    def attention(self, site: str, q: Value, k: Value, v: Value, bias: Value | None) -> Value:
        """Decomposed: scores, bias, softmax, weighted sum. Every engine fuses or runs this form well.

        Raises:
            TargetError: naming a quantizer that the target cannot execute.
        """
        shape = self.count.attention(site, q.shape, k.shape, v.shape, None if bias is None else bias.shape)
        integer_scores, integer_average = self._attention_is_quantized(site)
        if integer_scores:
            scores = self._quantized_scores(site, q.onnx, k.onnx, q.shape[-1])
        else:
            scores = self._scores(f"{site}.qk", q.onnx, k.onnx, 1.0 / math.sqrt(q.shape[-1]))
        if bias is not None:
            scores = self._node("Add", scores, bias.onnx, site=f"{site}.bias")
        if integer_average and self._reorders:
            y, meant = self._reordered_average(site, scores, v.onnx)
            return Value(y, shape) if meant is None else Codes(y, shape, meant)
        weights = self._node("Softmax", scores, site=f"{site}.softmax", axis=-1)
        if integer_average:
            return Value(self._quantized_average(site, weights, v.onnx), shape)
        return Value(self._node("MatMul", weights, v.onnx, site=f"{site}.av"), shape)

    def _scores(self, site: str, a: ir.Value, b: ir.Value, alpha: float) -> ir.Value:
        """Alpha * a b^T on the last two axes of rank-4 values."""
        if self._target.contrib:
            return self._node("FusedMatMul", a, b, site=site, domain=MICROSOFT, transB=1, alpha=alpha)
        turned = self._node("Transpose", b, perm=[0, 1, 3, 2])
        return self._node("MatMul", self._node("Mul", a, self._number(alpha)), turned, site=site)

    def matmul(self, site: str, a: Value, b: Value, *, transpose_b: bool = False) -> Value:
        """MatMul; a transposed right side stays a flag where the target has one."""
        shape = self.count.matmul(site, a.shape, b.shape, transpose_b=transpose_b)
        if not transpose_b:
            return Value(self._node("MatMul", a.onnx, b.onnx, site=site), shape)
        if self._target.contrib:
            return Value(self._node("FusedMatMul", a.onnx, b.onnx, site=site, domain=MICROSOFT, transB=1), shape)
        axes = list(range(len(b.shape)))
        axes[-2:] = axes[-1], axes[-2]
        return Value(self._node("MatMul", a.onnx, self._node("Transpose", b.onnx, perm=axes), site=site), shape)

    def add(self, a: Value, b: Value) -> Value:
        """Add."""
        return Value(self._node("Add", a.onnx, b.onnx), self.count.add(a.shape, b.shape))

    def add_scalar(self, a: Value, value: float) -> Value:
        """Add a constant."""
        return Value(self._node("Add", a.onnx, self._number(value)), self.count.add_scalar(a.shape, value))

    def multiply(self, a: Value, b: Value) -> Value:
        """Mul."""
        return Value(self._node("Mul", a.onnx, b.onnx), self.count.multiply(a.shape, b.shape))

    def scale(self, a: Value, value: float) -> Value:
        """Mul with a constant."""
        return Value(self._node("Mul", a.onnx, self._number(value)), self.count.scale(a.shape, value))

    def divide(self, a: Value, b: Value) -> Value:
        """Div."""
        return Value(self._node("Div", a.onnx, b.onnx), self.count.divide(a.shape, b.shape))

    def log(self, a: Value) -> Value:
        """Log."""
        return Value(self._node("Log", a.onnx), self.count.log(a.shape))

    def tanh(self, a: Value) -> Value:
        """Tanh."""
        return Value(self._node("Tanh", a.onnx), self.count.tanh(a.shape))

    def mean(self, a: Value, axis: int) -> Value:
        """ReduceMean."""
        return Value(self._node("ReduceMean", a.onnx, self._integers(axis), keepdims=0), self.count.mean(a.shape, axis))

    def sum(self, a: Value, axis: int) -> Value:
        """ReduceSum."""
        return Value(self._node("ReduceSum", a.onnx, self._integers(axis), keepdims=0), self.count.sum(a.shape, axis))

    def reshape(self, a: Value, shape: tuple[int, ...]) -> Value:
        """Reshape; the batch axis is copied."""
        counted = self.count.reshape(a.shape, shape)
        return replace(a, onnx=self._node("Reshape", a.onnx, self._integers(0, *shape)), shape=counted)

    def transpose(self, a: Value, perm: tuple[int, ...]) -> Value:
        """Transpose."""
        counted = self.count.transpose(a.shape, perm)
        return replace(a, onnx=self._node("Transpose", a.onnx, perm=list(perm)), shape=counted)

    def split(self, a: Value, parts: int, axis: int) -> tuple[Value, ...]:
        """Split."""
        shapes = self.count.split(a.shape, parts, axis)
        values = self._nodes("Split", a.onnx, outputs=parts, axis=axis, num_outputs=parts)
        return tuple(Value(value, shape) for value, shape in zip(values, shapes, strict=True))

    def slice(self, a: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
        """Slice; taking everything is no node."""
        shape = self.count.slice(a.shape, axis, start, stop, step)
        if (start, stop, step) == (0, a.shape[axis], 1):
            return a
        bounds = (self._integers(start), self._integers(stop), self._integers(axis), self._integers(step))
        return Value(self._node("Slice", a.onnx, *bounds), shape)

    def concat(self, parts: tuple[Value, ...], axis: int) -> Value:
        """Concat."""
        shape = self.count.concat(tuple(part.shape for part in parts), axis)
        return Value(self._node("Concat", *(part.onnx for part in parts), axis=axis), shape)
