"""The lowering of operations on token rows: ranking, picking and summing them.

Owns the values that all lowerings pass on, and their shapes' count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from vitfold.model import Array
from vitfold.ops.count import Count
from vitfold.ops.emit.quantized import MICROSOFT
from vitfold.ops.emit.reordered import Reader, Reordered
from vitfold.ops.emit.writer import Shape
from vitfold.quantizer import Quantizer
from vitfold.target import Target

_LEAST_NORM = 1e-4
"""Shorter metric vectors count as zero: FP16 holds no smaller number of full precision."""


@dataclass(frozen=True, slots=True)
class Value:
    """An ONNX value and the shape of one image's share of it (batch axis 1)."""

    onnx: ir.Value
    shape: Shape


@dataclass(frozen=True, slots=True)
class Codes(Value):
    """Integer codes, which only move until the one layer that they are meant for reads them."""

    reader: Reader


class Rows(Reordered):
    """Static lengths, no scatter: row counts are known when a graph is written, which rows is not."""

    def __init__(
        self, params: Mapping[str, Array], target: Target, quantizers: Mapping[str, Quantizer] | None = None
    ) -> None:
        super().__init__(params, target, quantizers)
        shapes = {name: array.shape for name, array in params.items()}
        self.count = Count(shapes, quantizers, dequantize_first=target.quantized_product == "qdq")
        self._derived: dict[tuple[ir.Value, int], ir.Value] = {}

    def prepend_rows(self, rows: Value, x: Value) -> Value:
        """Pad with zero rows and add, so that the graph never asks for its batch size.

        ONNX Runtime runs both as passes over everything, so there the rows of every block get their batch from a
        slice, times zero.
        """
        shape = self.count.prepend_rows(rows.shape, x.shape)
        rank = len(shape)
        if self._target.contrib and rank == 4:
            bounds = (self._integers(n) for n in (0, 1, rank - 2))
            none = self._node("Mul", self._node("Slice", x.onnx, *bounds), self._number(0.0))
            front = self._node("Add", none, rows.onnx)
            return Value(self._node("Concat", front, x.onnx, axis=rank - 2), shape)
        axis = rank - 2
        before, after = rows.shape[axis], x.shape[axis]
        padded = self._node("Pad", x.onnx, self._integers(*(before * (i == axis) for i in range(2 * rank))))
        below = self._node("Pad", rows.onnx, self._integers(*(after * (i == rank + axis) for i in range(2 * rank))))
        return Value(self._node("Add", padded, below), shape)

    def abs_max(self, x: Value) -> Value:
        """Abs and ReduceMax."""
        shape = self.count.abs_max(x.shape)
        return Value(self._node("ReduceMax", self._node("Abs", x.onnx), self._integers(-1), keepdims=1), shape)

    def reduce_max(self, a: Value, axis: int) -> Value:
        """ReduceMax."""
        shape = self.count.reduce_max(a.shape, axis)
        return Value(self._node("ReduceMax", a.onnx, self._integers(axis), keepdims=0), shape)

    def argmax(self, a: Value) -> tuple[Value, Value]:
        """ReduceMax and ArgMax, which takes the first on ties."""
        shapes = self.count.argmax(a.shape)
        if self._target.argmax == "topk":
            values, index = self._nodes("TopK", a.onnx, self._integers(1), outputs=2, axis=len(a.shape) - 1)
            return Value(values, shapes[0]), Value(index, shapes[1])
        values = self._node("ReduceMax", a.onnx, self._integers(-1), keepdims=1)
        return Value(values, shapes[0]), Value(self._node("ArgMax", a.onnx, axis=-1, keepdims=1), shapes[1])

    def norm(self, x: Value) -> Value:
        """ReduceL2."""
        return Value(self._node("ReduceL2", x.onnx, self._integers(-1), keepdims=1), self.count.norm(x.shape))

    def similarity(self, site: str, metric: Value, a: range, b: range) -> Value:
        """LpNormalization, which leaves zero rows zero, and a product; or a product divided by both norms."""
        shape = self.count.similarity(site, metric.shape, a, b)
        if self._target.similarity == "divide":
            return Value(self._divided_similarity(site, metric.onnx, a, b), shape)
        unit = self._node("LpNormalization", metric.onnx, axis=-1, p=2)
        left, right = self._rows(unit, a), self._rows(unit, b)
        if self._target.contrib:
            return Value(self._node("FusedMatMul", left, right, site=site, domain=MICROSOFT, transB=1), shape)
        return Value(self._node("MatMul", left, self._node("Transpose", right, perm=[0, 2, 1]), site=site), shape)

    def _rows(self, x: ir.Value, rows: range) -> ir.Value:
        """Every `step`-th row of axis 1."""
        bounds = (self._integers(n) for n in (rows.start, rows.stop, 1, rows.step))
        return self._node("Slice", x, *bounds)

    def _divided_similarity(self, site: str, metric: ir.Value, a: range, b: range) -> ir.Value:
        """The norms divide behind the product, where a compiler has the result in registers.

        The metric is scaled down first: cosines do not change, and products of unusually long vectors fit FP16.
        """
        metric = self._node("Mul", metric, self._number(0.125), site=site)
        left, right = self._rows(metric, a), self._rows(metric, b)
        scores = self._node("MatMul", left, self._node("Transpose", right, perm=[0, 2, 1]), site=site)
        for rows, shape in ((left, (0, len(a), 1)), (right, (0, 1, len(b)))):
            squares = self._node("ReduceSum", self._node("Mul", rows, rows), self._integers(2), keepdims=0)
            norm = self._node("Max", self._node("Sqrt", squares), self._number(_LEAST_NORM))
            scores = self._node("Div", scores, self._node("Reshape", norm, self._integers(*shape)), site=site)
        return scores

    def topk_split(self, scores: Value, count: int, *, by_score: bool = False) -> tuple[Value, Value]:
        """Sort by TopK, cut, and sort the rest by index: ONNX breaks ties by the smaller index."""
        shapes = self.count.topk_split(scores.shape, count)
        total = scores.shape[1]
        if by_score:
            _, order = self._nodes("TopK", scores.onnx, self._integers(total), outputs=2, axis=1, largest=0)
            rest, first = self._nodes("Split", order, self._integers(total - count, count), outputs=2, axis=1)
            return Value(first, shapes[0]), Value(rest, shapes[1])
        _, order = self._nodes("TopK", scores.onnx, self._integers(total), outputs=2, axis=1)
        first, rest = self._nodes("Split", order, self._integers(count, total - count), outputs=2, axis=1)
        if count < total:
            rest, _ = self._nodes("TopK", rest, self._integers(total - count), outputs=2, axis=1, largest=0)
        return Value(first, shapes[0]), Value(rest, shapes[1])

    def affine_index(self, index: Value, step: int, start: int) -> Value:
        """Mul and Add, where they do something."""
        onnx = index.onnx
        if step != 1:
            onnx = self._node("Mul", onnx, self._integers(step))
        if start != 0:
            onnx = self._node("Add", onnx, self._integers(start))
        return Value(onnx, self.count.affine_index(index.shape, step, start))

    def pad_index(self, index: Value, before: range, after: range) -> Value:
        """Pad with zeros and add the constants, so that the graph never asks for its batch size."""
        shape = self.count.pad_index(index.shape, before, after)
        padded = self._node("Pad", index.onnx, self._integers(0, len(before), 0, 0, len(after), 0))
        ends = np.array([*before, *(0,) * index.shape[1], *after], np.int64)
        return Value(self._node("Add", padded, self._constant(ends.reshape(1, -1, 1))), shape)

    def take(self, x: Value, index: Value) -> Value:
        """Gather rows in the target's form; a single column needs no widened index."""
        shape = self.count.take(x.shape, index.shape)
        if x.shape[2] == 1:
            return Value(self._node("GatherElements", x.onnx, index.onnx, axis=1), shape)
        if self._target.gather == "one_hot":
            return Value(self._node("MatMul", self._one_hot(index, x.shape[1]), x.onnx), shape)
        if self._target.gather == "gather_nd":
            return Value(self._node("GatherND", x.onnx, index.onnx, batch_dims=1), shape)
        return Value(self._node("GatherElements", x.onnx, self._widened(index, x.shape[2]), axis=1), shape)

    def _one_hot(self, index: Value, depth: int) -> ir.Value:
        """(B, R, depth) with a 1 at `index` in each row; made once per index."""
        key = (index.onnx, depth)
        if key not in self._derived:
            hits = self._node(
                "Equal", index.onnx, self._constant(np.arange(depth, dtype=np.int64).reshape(1, 1, depth))
            )
            self._derived[key] = self._node("Cast", hits, to=int(self._real_type))
        return self._derived[key]

    def _widened(self, index: Value, width: int) -> ir.Value:
        """(B, R, 1) -> (B, R, width), once per index."""
        key = (index.onnx, -width)
        if key not in self._derived:
            self._derived[key] = self._node("Mul", index.onnx, self._constant(np.ones((1, 1, width), np.int64)))
        return self._derived[key]

    def scatter_add(self, site: str, x: Value, index: Value, rows: Value) -> Value:
        """A product with a one-hot matrix, or a scatter with reduction, as the target wants it."""
        shape = self.count.scatter_add(site, x.shape, index.shape, rows.shape)
        if self._target.scatter_add == "masked_sum":
            return Value(self._masked_sum(site, x, index, rows), shape)
        if self._target.scatter_add == "one_hot":
            hits = self._one_hot(index, x.shape[1])
            if self._target.contrib:
                added = self._node("FusedMatMul", hits, rows.onnx, site=site, domain=MICROSOFT, transA=1)
            else:
                added = self._node("MatMul", self._node("Transpose", hits, perm=[0, 2, 1]), rows.onnx, site=site)
            return Value(self._node("Add", x.onnx, added), shape)
        places = index.onnx if x.shape[2] == 1 else self._widened(index, x.shape[2])
        return Value(
            self._node("ScatterElements", x.onnx, places, rows.onnx, site=site, axis=1, reduction="add"), shape
        )

    def _masked_sum(self, site: str, x: Value, index: Value, rows: Value) -> ir.Value:
        """x + sum over i of [index_i = m] rows_i: products and a sum that a compiler fuses into one kernel."""
        width, count = x.shape[1], rows.shape[1]
        places = self._node("Reshape", index.onnx, self._integers(0, 1, count, 1), site=site)
        numbers = self._constant(np.arange(width, dtype=np.int64).reshape(1, width, 1, 1))
        hits = self._node("Cast", self._node("Equal", places, numbers, site=site), to=int(self._real_type), site=site)
        wide = self._node("Reshape", rows.onnx, self._integers(0, 1, count, x.shape[2]), site=site)
        added = self._node(
            "ReduceSum", self._node("Mul", hits, wide, site=site), self._integers(2), site=site, keepdims=0
        )
        return self._node("Add", x.onnx, added, site=site)

    def merge_rows(
        self, site: str, parts: tuple[Value, ...], survivors: Value, into: Value, moved: Value
    ) -> tuple[Value, ...]:
        """Each part by itself; or all as the columns of one, where a kernel less counts more than their copy."""
        if self._target.scatter_add != "masked_sum" or len(parts) == 1:
            return tuple(self.scatter_add(site, self.take(x, survivors), into, self.take(x, moved)) for x in parts)
        shapes = self.count.merge_rows(site, tuple(x.shape for x in parts), survivors.shape, into.shape, moved.shape)
        counted = list(self.count.costs)
        joined = self._node("Concat", *(x.onnx for x in parts), axis=2)
        whole = Value(joined, (*parts[0].shape[:2], sum(x.shape[2] for x in parts)))
        summed = self.scatter_add(site, self.take(whole, survivors), into, self.take(whole, moved))
        self.count.costs[:] = counted
        widths = [shape[2] for shape in shapes]
        split = self._nodes("Split", summed.onnx, self._integers(*widths), outputs=len(parts), axis=2)
        return tuple(Value(value, shape) for value, shape in zip(split, shapes, strict=True))

    def ones_like(self, a: Value) -> Value:
        """0 a + 1: no shape arithmetic in the graph."""
        zeros = self._node("Mul", a.onnx, self._number(0.0))
        return Value(self._node("Add", zeros, self._number(1.0)), self.count.ones_like(a.shape))

    def identity_like(self, a: Value) -> Value:
        """0 a + I."""
        shape = self.count.identity_like(a.shape)
        identity = self._constant(np.eye(a.shape[1], dtype=np.float32)[None])
        return Value(self._node("Add", self._node("Mul", a.onnx, self._number(0.0)), identity), shape)
