"""The interpreter that lowers each operation to ONNX for one target.

It holds a writer, a lowering of rows and lowerings of products: values that the target and the quantizers choose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from vitfold.model import Array
from vitfold.ops.count import Count
from vitfold.ops.emit.foreign import copy_foreign, opset_of
from vitfold.ops.emit.operands import Operands
from vitfold.ops.emit.products import Float, Fused, Pairs, Products
from vitfold.ops.emit.reordered import Reordered
from vitfold.ops.emit.rows import Rows
from vitfold.ops.emit.writer import MICROSOFT, Shape, Value, Writer
from vitfold.ops.protocol import UNARY, Ops, input_site
from vitfold.quantizer import Quantizer
from vitfold.target import Target

ATTENTION_OPSET = 23
"""The first one with an operator Attention."""
_ELEMENTWISE = {
    **{"add": "Add", "subtract": "Sub", "multiply": "Mul", "divide": "Div", "power": "Pow"},
    **{"maximum": "Max", "minimum": "Min", "negative": "Neg"},
    **{name: name.capitalize() for name in UNARY if name != "negative"},
}
_REDUCTIONS = {"mean": "ReduceMean", "sum": "ReduceSum", "max": "ReduceMax", "abs_max": "ReduceMax", "norm": "ReduceL2"}


def _quantized_products(writer: Writer, operands: Operands, projections: Mapping[str, str]) -> Products:
    """The form of products whose operands have quantizers."""
    if operands.target.quantized_product == "integer":
        return Reordered(writer, operands, projections)
    return (Pairs if operands.target.quantized_product == "qdq" else Fused)(writer, operands)


class Emit(Ops[Value]):
    """ONNX values on a tape; shapes come from `Count`, so both agree by construction.

    Sites that have no quantizer stay float; the weights of those that have one lie on its grid. `projections` names
    the linear layer that reads an attention's result, by the attention's site.
    """

    def __init__(
        self,
        params: Mapping[str, Array],
        target: Target,
        quantizers: Mapping[str, Quantizer] | None = None,
        projections: Mapping[str, str] | None = None,
    ) -> None:
        shapes = {name: array.shape for name, array in params.items()}
        self.count = Count(shapes, quantizers, dequantize_first=target.quantized_product == "qdq")
        self.writer = Writer(params, target)
        self._target = target
        self.opset = target.opset
        self._rows = Rows(self.writer, target)
        self._operands = Operands(self.writer, target, quantizers or {})
        self._float = Float(self.writer, target)
        self._quantized = _quantized_products(self.writer, self._operands, projections or {})

    def _products(self, first: str, second: str) -> Products:
        """The form of the product of these two operands."""
        return self._quantized if self._operands.quantized(first, second) else self._float

    def shape(self, a: Value) -> Shape:
        """That of one image's share."""
        return a.shape

    def scope(self, site: str, block: int | None = None, role: str | None = None) -> None:
        """Name the nodes that follow."""
        self.writer.scope = site
        self.count.scope(site)

    def enter(self, image: ir.Value, shape: Shape) -> Value:
        """Take an input of reals over into the graph's float type."""
        if image.dtype == self.writer.real or (image.dtype is not None and not image.dtype.is_floating_point()):
            return Value(image, shape)
        return Value(self.writer.node("Cast", image, to=int(self.writer.real)), shape)

    def leave(self, result: Value, kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """Hand the output over in its type; an input that is handed on gets a value of its own."""
        if result.onnx.producer() is None:
            return self.writer.node("Identity", result.onnx)
        if self.writer.real == kind or not kind.is_floating_point():
            return result.onnx
        return self.writer.node("Cast", result.onnx, to=int(kind))

    def param(self, name: str) -> Value:
        """An initializer."""
        return Value(self.writer.weight(name), self.writer.params[name].shape)

    def constant(self, values: Array) -> Value:
        """An initializer; equal ones are shared."""
        return Value(self.writer.constant(np.asarray(values, np.float32)), tuple(values.shape))

    def patch_embed(self, layer: str, image: Value) -> Value:
        """Conv with stride = kernel, then tokens last to first."""
        shape, writer = self.count.patch_embed(layer, image.shape), self.writer
        size = list(writer.params[f"{layer}.weight"].shape[2:])
        weight, bias = writer.weight(f"{layer}.weight"), writer.bias(layer)
        inputs = [image.onnx, weight] if bias is None else [image.onnx, weight, bias]
        y = writer.node("Conv", *inputs, site=layer, kernel_shape=size, strides=size)
        y = writer.node("Reshape", y, writer.integers(0, shape[2], shape[1]))
        return Value(writer.node("Transpose", y, perm=[0, 2, 1]), shape)

    def linear(self, layer: str, x: Value, rows: str = "") -> Value:
        """Rows that are a site of their own share the weight; without a quantizer they are multiplied in float.

        Raises:
            TargetError: naming a quantizer that the target cannot execute.
        """
        shape, site = self.count.linear(layer, x.shape, rows), input_site(layer, rows)
        if rows and site not in self._operands.quantizers:
            return Value(self._float.linear(layer, site, x, shape), shape)
        return Value(self._products(f"{layer}.x", f"{layer}.w").linear(layer, site, x, shape), shape)

    def heads(self, layer: str, x: Value, parts: int, heads: int) -> tuple[Value, ...]:
        """Linear, Reshape, Transpose and Split; or one product per part, which spares the Split.

        Where attention is one operator, it reads those products as they are, and nothing is transposed.

        Raises:
            TargetError: naming a quantizer that the target cannot execute.
        """
        made = self._products(f"{layer}.x", f"{layer}.w").linear_parts(layer, x.onnx, parts)
        if made is None:
            return super().heads(layer, x, parts, heads)
        shapes = self.count.heads(layer, x.shape, parts, heads)
        return tuple(self._in_heads(y, shape) for y, shape in zip(made, shapes, strict=True))

    def _in_heads(self, rows: ir.Value, shape: Shape) -> Value:
        """Rows (B, N, H K) as tokens in heads."""
        parted = self.writer.node("Reshape", rows, self.writer.integers(0, shape[2], shape[1], shape[3]))
        return Value(self.writer.node("Transpose", parted, perm=[0, 2, 1, 3]), shape, rows)

    def layer_norm(self, layer: str, x: Value, eps: float) -> Value:
        """One LayerNormalization; decomposed it would overflow in FP16."""
        shape, writer = self.count.layer_norm(layer, x.shape, eps), self.writer
        scale, bias = writer.weight(f"{layer}.weight"), writer.weight(f"{layer}.bias")
        normal = writer.node("LayerNormalization", x.onnx, scale, bias, site=layer, axis=-1, epsilon=eps)
        self._operands.chain.norm(layer, eps, x.onnx, normal)
        return Value(normal, shape)

    def rms_norm(self, layer: str, x: Value, eps: float) -> Value:
        """One operator where the target has it, which in FP16 keeps its sum in single precision."""
        if not self._target.contrib:
            return super().rms_norm(layer, x, eps)
        shape, scale = self.count.rms_norm(layer, x.shape, eps), self.writer.weight(f"{layer}.weight")
        normal = self.writer.node("SimplifiedLayerNormalization", x.onnx, scale, site=layer, axis=-1, epsilon=eps)
        return Value(normal, shape)

    def activation(self, kind: str, x: Value, site: str) -> Value:
        """Gelu as one operator; the others as their textbook form."""
        y = self._activation(kind, x.onnx, site)
        self._operands.chain.activation(kind, x.onnx, y)
        return Value(y, self.count.activation(kind, x.shape, site))

    def _activation(self, kind: str, x: ir.Value, site: str) -> ir.Value:
        node = self.writer.node
        if kind in ("gelu_erf", "gelu_tanh"):
            return node("Gelu", x, site=site, approximate="none" if kind == "gelu_erf" else "tanh")
        if kind in ("relu", "elu"):
            return node(kind.capitalize(), x, site=site)
        alpha = 1.702 if kind == "quick_gelu" else 1.0
        if self._target.contrib:
            return node("QuickGelu", x, site=site, domain=MICROSOFT, alpha=alpha)
        gate = x if alpha == 1.0 else node("Mul", x, self.writer.number(alpha))
        return node("Mul", x, node("Sigmoid", gate), site=site)

    def softmax(self, site: str, a: Value) -> Value:
        """Softmax."""
        return Value(self.writer.node("Softmax", a.onnx, site=site, axis=-1), self.count.softmax(site, a.shape))

    def attention(self, site: str, q: Value, k: Value, v: Value, bias: Value | None) -> Value:
        """One operator, where the target has it and all is float; else scores, bias, softmax and weighted sum.

        A bias may have any shape that broadcasts.

        Raises:
            TargetError: naming a quantizer that the target cannot execute.
        """
        shape = self.count.attention(site, q.shape, k.shape, v.shape, None if bias is None else bias.shape)
        scoring, averaging = (self._products(f"{site}.{a}", f"{site}.{b}") for a, b in (("q", "k"), ("softmax", "v")))
        scale = 1.0 / math.sqrt(q.shape[-1])
        rows = [one.rows for one in (q, k, v) if one.rows is not None]
        if self._target.attention == "fused" and len(rows) == 3 and scoring is averaging is self._float:
            return self._in_heads(self._fused(site, rows, q, bias, scale), shape)
        scores = scoring.scores(site, q.onnx, k.onnx, scale)
        if bias is not None:
            scores = scoring.biased(site, scores, bias.onnx)
        return Value(averaging.average(site, scores, v.onnx), shape)

    def _fused(self, site: str, rows: Sequence[ir.Value], q: Value, bias: Value | None, scale: float) -> ir.Value:
        """Attention of rows that are not parted into heads, to rows; ONNX Runtime wants a bias for every query."""
        self.opset = max(self.opset, ATTENTION_OPSET)
        inputs, writer, (_, heads, queries, _) = list(rows), self.writer, q.shape
        if bias is not None:
            each = writer.integers(1, 1, queries, 1)
            whole = bias.shape[-2] == queries
            inputs.append(bias.onnx if whole else writer.node("Expand", bias.onnx, each, site=f"{site}.bias"))
        attributes: dict[str, Any] = {"scale": scale, "q_num_heads": heads, "kv_num_heads": heads}
        return writer.node("Attention", *inputs, site=site, **attributes)

    def matmul(self, site: str, a: Value, b: Value, *, transpose_b: bool = False) -> Value:
        """MatMul; a transposed right side stays a flag where the target has one."""
        shape = self.count.matmul(site, a.shape, b.shape, transpose_b=transpose_b)
        if transpose_b:
            return Value(self._float.transposed(site, a.onnx, b.onnx, len(b.shape)), shape)
        return Value(self.writer.node("MatMul", a.onnx, b.onnx, site=site), shape)

    def elementwise(self, op: str, a: Value, b: Value | None = None) -> Value:
        """One operator."""
        if b is None:
            return Value(self.writer.node(_ELEMENTWISE[op], a.onnx), self.count.elementwise(op, a.shape))
        y = self._operands.chain.add(a.onnx, b.onnx) if op == "add" else None
        if y is None:
            y = self.writer.node(_ELEMENTWISE[op], a.onnx, b.onnx)
        return Value(y, self.count.elementwise(op, a.shape, b.shape))

    def reduce(self, op: str, a: Value, axis: int, *, keep: bool = False) -> Value:
        """One operator, or two."""
        shape = self.count.reduce(op, a.shape, axis, keep=keep)
        onnx = self.writer.node("Abs", a.onnx) if op == "abs_max" else a.onnx
        return Value(self.writer.node(_REDUCTIONS[op], onnx, self.writer.integers(axis), keepdims=int(keep)), shape)

    def unit(self, x: Value) -> Value:
        """LpNormalization, which leaves zero rows zero."""
        return Value(self.writer.node("LpNormalization", x.onnx, axis=-1, p=2), self.count.unit(x.shape))

    def similarity(self, site: str, metric: Value, a: range, b: range) -> Value:
        """Normalized rows and a product; or a product divided by both norms."""
        if self._target.similarity != "divide":
            return super().similarity(site, metric, a, b)
        shape = self.count.similarity(site, metric.shape, a, b)
        return Value(self._rows.similarity(site, metric.onnx, a, b), shape)

    def reshape(self, a: Value, shape: tuple[int, ...]) -> Value:
        """Reshape; the batch axis is copied. Tokens whose heads are joined again are rows that are there."""
        counted = self.count.reshape(a.shape, shape)
        if a.rows is not None and shape == (a.shape[1], a.shape[2] * a.shape[3]):
            return Value(a.rows, counted)
        return Value(self.writer.node("Reshape", a.onnx, self.writer.integers(0, *shape)), counted)

    def transpose(self, a: Value, perm: tuple[int, ...]) -> Value:
        """Transpose."""
        counted = self.count.transpose(a.shape, perm)
        rows = a.rows if perm == (0, 2, 1, 3) else None
        return Value(self.writer.node("Transpose", a.onnx, perm=list(perm)), counted, rows)

    def split(self, a: Value, parts: int, axis: int) -> tuple[Value, ...]:
        """Split."""
        shapes = self.count.split(a.shape, parts, axis)
        values = self.writer.nodes("Split", a.onnx, outputs=parts, axis=axis, num_outputs=parts)
        return tuple(map(Value, values, shapes))

    def slice(self, a: Value, axis: int, start: int, stop: int, step: int = 1) -> Value:
        """Slice; taking everything is no node."""
        shape = self.count.slice(a.shape, axis, start, stop, step)
        if (start, stop, step) == (0, a.shape[axis], 1):
            return a
        bounds = [self.writer.integers(n) for n in (start, stop, axis, step)]
        return Value(self._operands.chain.pick(a.onnx, lambda x: self.writer.node("Slice", x, *bounds)), shape)

    def concat(self, parts: tuple[Value, ...], axis: int) -> Value:
        """Concat."""
        shape = self.count.concat(tuple(part.shape for part in parts), axis)
        return Value(self.writer.node("Concat", *(part.onnx for part in parts), axis=axis), shape)

    def prepend_rows(self, rows: Value, x: Value) -> Value:
        """Without asking for the batch size."""
        return Value(self._rows.prepend(rows, x), self.count.prepend_rows(rows.shape, x.shape))

    def argmax(self, a: Value) -> tuple[Value, Value]:
        """The first on ties."""
        values, index = map(Value, self._rows.argmax(a), self.count.argmax(a.shape))
        return values, index

    def topk_split(self, scores: Value, count: int, *, by_score: bool = False) -> tuple[Value, Value]:
        """TopK, Split and perhaps another TopK."""
        shapes = self.count.topk_split(scores.shape, count)
        first, rest = map(Value, self._rows.topk_split(scores, count, by_score=by_score), shapes)
        return first, rest

    def affine_index(self, index: Value, step: int, start: int) -> Value:
        """No node where nothing changes."""
        shape = self.count.affine_index(index.shape, step, start)
        return Value(self._rows.affine_index(index.onnx, step, start), shape)

    def pad_index(self, index: Value, before: range, after: range) -> Value:
        """Without asking for the batch size."""
        shape = self.count.pad_index(index.shape, before, after)
        return Value(self._rows.pad_index(index, before, after), shape)

    def take(self, x: Value, index: Value) -> Value:
        """In the target's form."""
        shape = self.count.take(x.shape, index.shape)
        return Value(self._rows.take(x, index.onnx), shape)

    def lookup(self, name: str, rows: Value, columns: Value | None = None) -> Value:
        """A gather from the parameter, whose rows, or entries, lie in front."""
        shape = self.count.lookup(name, rows.shape, None if columns is None else columns.shape)
        return Value(self._rows.lookup(name, rows, columns, shape), shape)

    def scatter_add(self, site: str, x: Value, index: Value, rows: Value) -> Value:
        """In the target's form."""
        shape = self.count.scatter_add(site, x.shape, index.shape, rows.shape)
        return Value(self._rows.scatter_add(site, x, index.onnx, rows), shape)

    def foreign(
        self,
        site: str,
        parts: tuple[Value, ...],
        graph: Array,
        weights: tuple[str, ...],
        shapes: tuple[tuple[int, ...], ...],
        macs: int = 0,
    ) -> tuple[Value, ...]:
        """The nodes as they were."""
        self.opset = max(self.opset, opset_of(graph))
        self.count.foreign(site, tuple(part.shape for part in parts), graph, weights, shapes, macs)
        inputs = [part.onnx for part in parts] + [self.writer.weight(name) for name in weights]
        return tuple(map(Value, copy_foreign(self.writer, site, graph, inputs), shapes))

    def merge_rows(
        self, site: str, parts: tuple[Value, ...], survivors: Value, into: Value, moved: Value
    ) -> tuple[Value, ...]:
        """Each part by itself, or all at once."""
        if not self._rows.joins_merges(len(parts)):
            return super().merge_rows(site, parts, survivors, into, moved)
        shapes = self.count.merge_rows(site, tuple(x.shape for x in parts), survivors.shape, into.shape, moved.shape)
        return tuple(map(Value, self._rows.merge(site, parts, survivors, into.onnx, moved), shapes))
