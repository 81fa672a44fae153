"""The seam between programs and interpreters: the operations in which programs are written.

Axis 0 of every activation is the batch B, which no operation names: shapes passed to operations are those of one image.
An interpreter decides what a value `T` is: a torch tensor, an ONNX value, a shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from vitfold.model import Array

T = TypeVar("T")


BINARY = ("add", "subtract", "multiply", "divide", "power", "maximum", "minimum")
UNARY = ("log", "tanh", "exp", "sqrt", "reciprocal", "negative", "abs", "sin", "cos", "erf", "sigmoid", "floor")
"""Functions of single elements, by the names that NumPy has for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """An end of a program: (batch, *shape), numbers of the type that NumPy calls `dtype`; a named batch may vary."""

    name: str
    shape: tuple[int, ...]
    batch: str | int = "batch"
    dtype: str = "float32"


def input_site(layer: str, rows: str = "") -> str:
    """Return the name of what a linear layer multiplies: rows that are a site of their own have a name of their own."""
    return f"{layer}.{rows}.x" if rows else f"{layer}.x"


class Ops(ABC, Generic[T]):
    """What a program may do. `layer` names parameters, `site` names the operation everywhere.

    26 primitives, which every interpreter writes: param, constant, patch_embed, linear, layer_norm, activation,
    attention, matmul, softmax, elementwise, reduce, unit, reshape, transpose, split, slice, concat, prepend_rows,
    argmax, topk_split, affine_index, pad_index, take, lookup, scatter_add, foreign.

    18 composites, written here once over others: add, multiply, divide, log, tanh, add_scalar, scale, mean, sum,
    reduce_max, abs_max, norm, rms_norm, heads, similarity, merge_rows, ones_like, identity_like. An interpreter
    overrides one where it, or its target, has a fused form. Programs are recorded with the names of both.
    """

    @abstractmethod
    def scope(self, site: str, block: int | None = None, role: str | None = None) -> None:
        """Name the operations that follow, up to the next call, for graphs, profiles and counts.

        `role` says what they are, "embed", "attention", "merge", "mlp", "pool" or "head", and `block` of which block; a
        call without a role keeps both.
        """

    @abstractmethod
    def shape(self, a: T) -> tuple[int, ...]:
        """Return the shape of a value, with whatever stands for the batch in front."""

    @abstractmethod
    def param(self, name: str) -> T:
        """Return a parameter with its leading batch axis of length 1."""

    @abstractmethod
    def patch_embed(self, layer: str, image: T) -> T:
        """Project patches: (B, 3, H, W) -> (B, N, D) in raster order."""

    @abstractmethod
    def constant(self, values: Array) -> T:
        """Return numbers that the program computed, with a leading batch axis of length 1."""

    @abstractmethod
    def linear(self, layer: str, x: T, rows: str = "") -> T:
        """Apply x W^T + b on the last axis; b only where the model has one.

        `rows` names a subset of tokens whose input is a site of its own, `{layer}.{rows}.x`.
        """

    def heads(self, layer: str, x: T, parts: int, heads: int) -> tuple[T, ...]:
        """Apply a linear layer and part its outputs, part by part, into heads: (B, N, I) -> parts x (B, H, N, K)."""
        y = self.linear(layer, x)
        _, rows, width = self.shape(y)
        turned = self.transpose(self.reshape(y, (rows, parts * heads, width // (parts * heads))), (0, 2, 1, 3))
        return self.split(turned, parts, 1)

    @abstractmethod
    def layer_norm(self, layer: str, x: T, eps: float) -> T:
        """Normalize the last axis, then scale and shift."""

    def rms_norm(self, layer: str, x: T, eps: float) -> T:
        """x / sqrt(mean(x^2) + eps) times the weight, along the last axis.

        Source: RMSNorm (1910.07467), equation 4.
        """
        mean = self.reduce("mean", self.multiply(x, x), -1, keep=True)
        root = self.elementwise("sqrt", self.add_scalar(mean, eps))
        return self.multiply(self.divide(x, root), self.param(f"{layer}.weight"))

    @abstractmethod
    def activation(self, kind: str, x: T, site: str) -> T:
        """Apply the activation function `kind`: those of `model.spec.Activation`, and elu."""

    @abstractmethod
    def attention(self, site: str, q: T, k: T, v: T, bias: T | None) -> T:
        """softmax(q k^T / sqrt(K) + bias) v on (B, H, N, K).

        q is (B, H, N, K), k and v are (B, H, M, K). The bias broadcasts to (B, H, N, M), its last axis whole: per key,
        per head, per query. It and q may have batch 1 and broadcast too.
        """

    @abstractmethod
    def matmul(self, site: str, a: T, b: T, *, transpose_b: bool = False) -> T:
        """Multiply the last two axes; leading axes broadcast."""

    @abstractmethod
    def elementwise(self, op: str, a: T, b: T | None = None) -> T:
        """`op` of operands that broadcast: one of `BINARY` of two, of `UNARY` of one."""

    @abstractmethod
    def reduce(self, op: str, a: T, axis: int, *, keep: bool = False) -> T:
        """`op` over one axis, which disappears or is kept with length 1: mean, sum, max, abs_max or norm."""

    @abstractmethod
    def unit(self, x: T) -> T:
        """Divide rows (B, N, D) by their Euclidean norms; rows of zeros stay."""

    def add(self, a: T, b: T) -> T:
        """a + b, broadcast."""
        return self.elementwise("add", a, b)

    def add_scalar(self, a: T, value: float) -> T:
        """a + value."""
        return self.add(a, self.constant(np.array(value, np.float32)))

    def multiply(self, a: T, b: T) -> T:
        """a * b, broadcast."""
        return self.elementwise("multiply", a, b)

    def scale(self, a: T, value: float) -> T:
        """a * value."""
        return self.multiply(a, self.constant(np.array(value, np.float32)))

    def divide(self, a: T, b: T) -> T:
        """a / b, broadcast."""
        return self.elementwise("divide", a, b)

    def log(self, a: T) -> T:
        """Natural logarithm."""
        return self.elementwise("log", a)

    def tanh(self, a: T) -> T:
        """Hyperbolic tangent."""
        return self.elementwise("tanh", a)

    def norm(self, x: T) -> T:
        """Euclidean norm of each row: (B, N, D) -> (B, N, 1)."""
        return self.reduce("norm", x, -1, keep=True)

    @abstractmethod
    def softmax(self, site: str, a: T) -> T:
        """Softmax over the last axis."""

    def similarity(self, site: str, metric: T, a: range, b: range) -> T:
        """Cosine of the rows `a` with the rows `b` of (B, N, K): (B, len(a), len(b)); 0 with a zero row."""
        rows = self.unit(metric)
        left, right = (self.slice(rows, 1, span.start, span.stop, span.step) for span in (a, b))
        return self.matmul(site, left, right, transpose_b=True)

    def mean(self, a: T, axis: int) -> T:
        """Mean over one axis, which disappears."""
        return self.reduce("mean", a, axis)

    def sum(self, a: T, axis: int) -> T:
        """Sum over one axis, which disappears."""
        return self.reduce("sum", a, axis)

    @abstractmethod
    def reshape(self, a: T, shape: tuple[int, ...]) -> T:
        """Reshape everything behind the batch axis to `shape`."""

    @abstractmethod
    def transpose(self, a: T, perm: tuple[int, ...]) -> T:
        """Permute axes; perm[0] is 0."""

    @abstractmethod
    def split(self, a: T, parts: int, axis: int) -> tuple[T, ...]:
        """Split into equal parts."""

    @abstractmethod
    def slice(self, a: T, axis: int, start: int, stop: int, step: int = 1) -> T:
        """Take start:stop:step of one axis; `stop` is not beyond the end."""

    @abstractmethod
    def concat(self, parts: tuple[T, ...], axis: int) -> T:
        """Concatenate along an axis."""

    @abstractmethod
    def prepend_rows(self, rows: T, x: T) -> T:
        """Put rows (1, P, D) in front of every image's: (B, N, D) -> (B, P+N, D), also with axes between B and N."""

    def abs_max(self, x: T) -> T:
        """Return the largest absolute value of each row: (B, N, D) -> (B, N, 1)."""
        return self.reduce("abs_max", x, -1, keep=True)

    def reduce_max(self, a: T, axis: int) -> T:
        """Maximum over one axis, which disappears."""
        return self.reduce("max", a, axis)

    @abstractmethod
    def argmax(self, a: T) -> tuple[T, T]:
        """Return the largest value of the last axis and its index (the first, on ties): (B, N, M) -> 2 x (B, N, 1)."""

    @abstractmethod
    def topk_split(self, scores: T, count: int, *, by_score: bool = False) -> tuple[T, T]:
        """Split rows by score (B, N, 1): indices of the `count` largest (descending), of the others (ascending).

        On ties the smaller index counts as larger. `by_score` leaves both in ascending order of their scores, and
        on ties the larger index counts as larger. Indices are columns (B, R, 1) everywhere.
        """

    @abstractmethod
    def affine_index(self, index: T, step: int, start: int) -> T:
        """start + step * index, on integers (B, R, 1)."""

    @abstractmethod
    def pad_index(self, index: T, before: range, after: range) -> T:
        """Put constant indices in front of and behind those of every image, along axis 1."""

    @abstractmethod
    def take(self, x: T, index: T) -> T:
        """Gather rows of every image: x (B, N, D), index (B, R, 1) -> (B, R, D)."""

    @abstractmethod
    def lookup(self, name: str, rows: T, columns: T | None = None) -> T:
        """Pick rows of a parameter (1, ..., N, D), for every image others: rows (B, R, 1) -> (B, ..., R, D).

        With `columns` (B, M, 1) it picks the entries where both meet: (B, ..., R, M).
        """

    @abstractmethod
    def scatter_add(self, site: str, x: T, index: T, rows: T) -> T:
        """Add rows (B, R, D) onto rows `index` (B, R, 1) of x (B, N, D); several may meet in one row."""

    @abstractmethod
    def foreign(
        self,
        site: str,
        parts: tuple[T, ...],
        graph: Array,
        weights: tuple[str, ...],
        shapes: tuple[tuple[int, ...], ...],
        macs: int = 0,
    ) -> tuple[T, ...]:
        """Run a piece of somebody's ONNX graph, which has no other name here.

        `graph` holds the bytes of an ONNX model whose inputs are the parts, batch first, and then the parameters
        `weights`; its outputs, batch first, have `shapes` for one image, for which it multiplies `macs` times.
        """

    def merge_rows(self, site: str, parts: tuple[T, ...], survivors: T, into: T, moved: T) -> tuple[T, ...]:
        """Sum rows that merge, of every part (B, N, D): rows `survivors`, row `into[i]` of which `moved[i]` joins.

        A target may join all parts in one.
        """
        return tuple(self.scatter_add(site, self.take(x, survivors), into, self.take(x, moved)) for x in parts)

    def ones_like(self, a: T) -> T:
        """Ones of the shape and type of `a`, whose values are finite."""
        return self.add_scalar(self.scale(a, 0.0), 1.0)

    def identity_like(self, a: T) -> T:
        """The identity matrix (B, N, N) for a (B, N, 1), whose values are finite."""
        identity = self.constant(np.eye(self.shape(a)[1], dtype=np.float32)[None])
        return self.add(self.scale(a, 0.0), identity)
