"""The lowering of operations on token rows: ranking, picking and summing them, in the forms that a target wants.

Lengths are static: how many rows is known when a graph is written, which ones is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from vitfold.model import Array
from vitfold.ops.emit.writer import MICROSOFT, Value, Writer
from vitfold.target import Target

_LEAST_NORM = 1e-4
"""Shorter metric vectors count as zero: FP16 holds no smaller number of full precision."""


class Rows:
    """Nodes on a writer for rows (B, N, D) and columns of indices (B, R, 1)."""

    def __init__(self, writer: Writer, target: Target) -> None:
        self._writer, self._target = writer, target
        self._derived: dict[tuple[ir.Value, int], ir.Value] = {}
        self._tables: dict[str, ir.Value] = {}

    def prepend(self, rows: Value, x: Value) -> ir.Value:
        """Pad with zero rows and add, so that the graph never asks for its batch size.

        ONNX Runtime runs both as passes over everything, so there the rows of every block get their batch from a
        slice, times zero.
        """
        node, integers, rank = self._writer.node, self._writer.integers, len(x.shape)
        axis = rank - 2
        if self._target.contrib and rank == 4:
            bounds = (integers(n) for n in (0, 1, axis))
            none = node("Mul", node("Slice", x.onnx, *bounds), self._writer.number(0.0))
            return node("Concat", node("Add", none, rows.onnx), x.onnx, axis=axis)
        before, after = rows.shape[axis], x.shape[axis]
        padded = node("Pad", x.onnx, integers(*(before * (i == axis) for i in range(2 * rank))))
        below = node("Pad", rows.onnx, integers(*(after * (i == rank + axis) for i in range(2 * rank))))
        return node("Add", padded, below)

    def argmax(self, a: Value) -> tuple[ir.Value, ir.Value]:
        """ReduceMax and ArgMax, which takes the first on ties; or one TopK."""
        writer = self._writer
        if self._target.argmax == "topk":
            values, index = writer.nodes("TopK", a.onnx, writer.integers(1), outputs=2, axis=len(a.shape) - 1)
            return values, index
        values = writer.node("ReduceMax", a.onnx, writer.integers(-1), keepdims=1)
        return values, writer.node("ArgMax", a.onnx, axis=-1, keepdims=1)

    def similarity(self, site: str, metric: ir.Value, a: range, b: range) -> ir.Value:
        """A product divided by both norms, where a compiler has the result in registers.

        The metric is scaled down first: cosines do not change, and products of unusually long vectors fit FP16.
        """
        node, integers, number = self._writer.node, self._writer.integers, self._writer.number
        metric = node("Mul", metric, number(0.125), site=site)
        left, right = (
            node("Slice", metric, *(integers(n) for n in (rows.start, rows.stop, 1, rows.step))) for rows in (a, b)
        )
        scores = node("MatMul", left, node("Transpose", right, perm=[0, 2, 1]), site=site)
        for rows, shape in ((left, (0, len(a), 1)), (right, (0, 1, len(b)))):
            squares = node("ReduceSum", node("Mul", rows, rows), integers(2), keepdims=0)
            norm = node("Max", node("Sqrt", squares), number(_LEAST_NORM))
            scores = node("Div", scores, node("Reshape", norm, integers(*shape)), site=site)
        return scores

    def topk_split(self, scores: Value, count: int, *, by_score: bool) -> tuple[ir.Value, ir.Value]:
        """Sort by TopK, cut, and sort the rest by index: ONNX breaks ties by the smaller index."""
        nodes, integers, total = self._writer.nodes, self._writer.integers, scores.shape[1]
        if by_score:
            _, order = nodes("TopK", scores.onnx, integers(total), outputs=2, axis=1, largest=0)
            rest, first = nodes("Split", order, integers(total - count, count), outputs=2, axis=1)
            return first, rest
        _, order = nodes("TopK", scores.onnx, integers(total), outputs=2, axis=1)
        first, rest = nodes("Split", order, integers(count, total - count), outputs=2, axis=1)
        if count < total:
            rest, _ = nodes("TopK", rest, integers(total - count), outputs=2, axis=1, largest=0)
        return first, rest

    def affine_index(self, index: ir.Value, step: int, start: int) -> ir.Value:
        """Mul and Add, where they do something."""
        if step != 1:
            index = self._writer.node("Mul", index, self._writer.integers(step))
        return index if start == 0 else self._writer.node("Add", index, self._writer.integers(start))

    def pad_index(self, index: Value, before: range, after: range) -> ir.Value:
        """Pad with zeros and add the constants, so that the graph never asks for its batch size."""
        writer = self._writer
        padded = writer.node("Pad", index.onnx, writer.integers(0, len(before), 0, 0, len(after), 0))
        ends = np.array([*before, *(0,) * index.shape[1], *after], np.int64)
        return writer.node("Add", padded, writer.constant(ends.reshape(1, -1, 1)))

    def take(self, x: Value, index: ir.Value) -> ir.Value:
        """Gather rows in the target's form; a single column needs no widened index."""
        node, (_, depth, width) = self._writer.node, x.shape
        if width == 1:
            return node("GatherElements", x.onnx, index, axis=1)
        if self._target.gather == "one_hot":
            return node("MatMul", self._one_hot(index, depth), x.onnx)
        if self._target.gather == "gather_nd":
            return node("GatherND", x.onnx, index, batch_dims=1)
        return node("GatherElements", x.onnx, self._widened(index, width), axis=1)

    def lookup(self, name: str, rows: Value, columns: Value | None, shape: tuple[int, ...]) -> ir.Value:
        """Gather from a table (N, L D), or (N N, L) where rows and columns meet, with L leading axes in one."""
        node, integers, writer = self._writer.node, self._writer.integers, self._writer
        array = writer.params[name]
        lead = math.prod(array.shape[1:-2])
        count, width = array.shape[-2:]
        flat = array.reshape(lead, count, width)
        if columns is None:
            table = self._table(f"{name}.rows", (count, lead * width), lambda: flat.transpose(1, 0, 2))
            found = node("Gather", table, node("Reshape", rows.onnx, integers(0, shape[-2])), axis=0)
            if lead > 1:
                parted = node("Reshape", found, integers(0, shape[-2], lead, width))
                found = node("Transpose", parted, perm=[0, 2, 1, 3])
            return node("Reshape", found, integers(0, *shape[1:]))
        table = self._table(f"{name}.entries", (count * width, lead), lambda: flat.transpose(1, 2, 0))
        across = node("Reshape", columns.onnx, integers(0, 1, shape[-1]))
        index = node("Add", node("Mul", rows.onnx, integers(width)), across)
        found = node("Transpose", node("Gather", table, index, axis=0), perm=[0, 3, 1, 2])
        return node("Reshape", found, integers(0, *shape[1:]))

    def _table(self, name: str, shape: tuple[int, ...], make: Callable[[], Array]) -> ir.Value:
        """A parameter in another order of axes, once."""
        if name not in self._tables:
            real = self._writer.real
            self._tables[name] = self._writer.lazy(
                name, shape, real, lambda: make().reshape(shape).astype(real.numpy(), copy=False)
            )
        return self._tables[name]

    def _one_hot(self, index: ir.Value, depth: int) -> ir.Value:
        """(B, R, depth) with a 1 at `index` in each row; made once per index."""
        key = (index, depth)
        if key not in self._derived:
            numbers = self._writer.constant(np.arange(depth, dtype=np.int64).reshape(1, 1, depth))
            hits = self._writer.node("Equal", index, numbers)
            self._derived[key] = self._writer.node("Cast", hits, to=int(self._writer.real))
        return self._derived[key]

    def _widened(self, index: ir.Value, width: int) -> ir.Value:
        """(B, R, 1) -> (B, R, width), once per index."""
        key = (index, -width)
        if key not in self._derived:
            ones = self._writer.constant(np.ones((1, 1, width), np.int64))
            self._derived[key] = self._writer.node("Mul", index, ones)
        return self._derived[key]

    def scatter_add(self, site: str, x: Value, index: ir.Value, rows: Value) -> ir.Value:
        """A product with a one-hot matrix, a masked sum, or a scatter with reduction, as the target wants it."""
        node, (_, depth, width) = self._writer.node, x.shape
        if self._target.scatter_add == "masked_sum":
            return self._masked_sum(site, x, index, rows)
        if self._target.scatter_add == "one_hot":
            hits = self._one_hot(index, depth)
            if self._target.contrib:
                added = node("FusedMatMul", hits, rows.onnx, site=site, domain=MICROSOFT, transA=1)
            else:
                added = node("MatMul", node("Transpose", hits, perm=[0, 2, 1]), rows.onnx, site=site)
            return node("Add", x.onnx, added)
        places = index if width == 1 else self._widened(index, width)
        return node("ScatterElements", x.onnx, places, rows.onnx, site=site, axis=1, reduction="add")

    def _masked_sum(self, site: str, x: Value, index: ir.Value, rows: Value) -> ir.Value:
        """x + sum over i of [index_i = m] rows_i: products and a sum that a compiler fuses into one kernel."""
        node, integers = self._writer.node, self._writer.integers
        depth, count, width = x.shape[1], rows.shape[1], x.shape[2]
        places = node("Reshape", index, integers(0, 1, count, 1), site=site)
        numbers = self._writer.constant(np.arange(depth, dtype=np.int64).reshape(1, depth, 1, 1))
        hits = node("Cast", node("Equal", places, numbers, site=site), to=int(self._writer.real), site=site)
        wide = node("Reshape", rows.onnx, integers(0, 1, count, width), site=site)
        added = node("ReduceSum", node("Mul", hits, wide, site=site), integers(2), site=site, keepdims=0)
        return node("Add", x.onnx, added, site=site)

    def joins_merges(self, parts: int) -> bool:
        """Say whether several parts merge in one: where a kernel less counts more than their copy."""
        return parts > 1 and self._target.scatter_add == "masked_sum"

    def merge(
        self, site: str, parts: tuple[Value, ...], survivors: Value, into: ir.Value, moved: Value
    ) -> tuple[ir.Value, ...]:
        """All parts as the columns of one: rows `survivors`, row `into[i]` of which row `moved[i]` joins."""
        writer, widths = self._writer, [x.shape[2] for x in parts]
        joined = Value(writer.node("Concat", *(x.onnx for x in parts), axis=2), (*parts[0].shape[:2], sum(widths)))
        kept, added = (
            Value(self.take(joined, index.onnx), (*index.shape[:2], sum(widths))) for index in (survivors, moved)
        )
        summed = self.scatter_add(site, kept, into, added)
        return tuple(writer.nodes("Split", summed, writer.integers(*widths), outputs=len(parts), axis=2))
