"""Operations written once over others, for every interpreter.

An interpreter derives from `Composites` and writes the primitives. `elementwise` and `reduce` are one primitive
each with many names. Where an interpreter or a target has a fused form of a composite, it overrides that one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic

import numpy as np

from vitfold.ops.protocol import Ops, T


class Composites(ABC, Generic[T]):
    """What follows from the primitives of an interpreter over values T."""

    @abstractmethod
    def elementwise(self, op: str, *operands: T) -> T:
        """`op` of operands that broadcast: add, multiply, divide, log or tanh."""

    @abstractmethod
    def reduce(self, op: str, a: T, axis: int, *, keep: bool = False) -> T:
        """`op` over one axis, which disappears or stays with length 1: mean, sum, max, abs_max or norm."""

    @abstractmethod
    def unit(self, x: T) -> T:
        """Rows (B, N, D) divided by their Euclidean norms; rows of zeros stay."""

    @abstractmethod
    def shape(self, a: T) -> tuple[int, ...]:
        """Its shape, with whatever stands for the batch in front."""

    @property
    def _ops(self: Any) -> Ops[T]:
        ops: Ops[T] = self
        return ops

    def add(self, a: T, b: T) -> T:
        """a + b."""
        return self.elementwise("add", a, b)

    def multiply(self, a: T, b: T) -> T:
        """a * b."""
        return self.elementwise("multiply", a, b)

    def divide(self, a: T, b: T) -> T:
        """a / b."""
        return self.elementwise("divide", a, b)

    def log(self, a: T) -> T:
        """Natural logarithm."""
        return self.elementwise("log", a)

    def tanh(self, a: T) -> T:
        """Hyperbolic tangent."""
        return self.elementwise("tanh", a)

    def add_scalar(self, a: T, value: float) -> T:
        """a + value, a constant without axes."""
        return self.add(a, self._ops.constant(np.array(value, np.float32)))

    def scale(self, a: T, value: float) -> T:
        """a * value, a constant without axes."""
        return self.multiply(a, self._ops.constant(np.array(value, np.float32)))

    def mean(self, a: T, axis: int) -> T:
        """Mean over one axis."""
        return self.reduce("mean", a, axis)

    def sum(self, a: T, axis: int) -> T:
        """Sum over one axis."""
        return self.reduce("sum", a, axis)

    def reduce_max(self, a: T, axis: int) -> T:
        """Maximum over one axis."""
        return self.reduce("max", a, axis)

    def abs_max(self, x: T) -> T:
        """Largest absolute value of each row."""
        return self.reduce("abs_max", x, -1, keep=True)

    def norm(self, x: T) -> T:
        """Euclidean norm of each row."""
        return self.reduce("norm", x, -1, keep=True)

    def heads(self, layer: str, x: T, parts: int, heads: int) -> tuple[T, ...]:
        """(B, N, parts H K) -> (B, N, parts H, K) -> (B, parts H, N, K), then one split."""
        ops = self._ops
        y = ops.linear(layer, x)
        _, rows, width = self.shape(y)
        turned = ops.transpose(ops.reshape(y, (rows, parts * heads, width // (parts * heads))), (0, 2, 1, 3))
        return ops.split(turned, parts, 1)

    def similarity(self, site: str, metric: T, a: range, b: range) -> T:
        """Product of rows of length 1."""
        unit = self.unit(metric)
        left, right = (self._ops.slice(unit, 1, rows.start, rows.stop, rows.step) for rows in (a, b))
        return self._ops.matmul(site, left, right, transpose_b=True)

    def merge_rows(self, site: str, parts: tuple[T, ...], survivors: T, into: T, moved: T) -> tuple[T, ...]:
        """Each part by itself: rows that stay, onto which those that move are added."""
        ops = self._ops
        return tuple(ops.scatter_add(site, ops.take(x, survivors), into, ops.take(x, moved)) for x in parts)

    def ones_like(self, a: T) -> T:
        """0 a + 1, which asks for no shape."""
        return self.add_scalar(self.scale(a, 0.0), 1.0)

    def identity_like(self, a: T) -> T:
        """0 a + I."""
        identity = self._ops.constant(np.eye(self.shape(a)[1], dtype=np.float32)[None])
        return self.add(self.scale(a, 0.0), identity)
