"""The interpreter that computes shapes only and counts work: the cost model's input.

The rule: one multiply-accumulate (MAC) per product in linear layers, patch embedding and
matrix products, for one image; attention is counted at the tokens that enter a block, the MLP at those
that leave its merge; elementwise work, softmax and normalization count bytes but no MACs. Values take four bytes,
but for those that quantizers of outputs and norms (`{layer}.out`, `{norm}.x`, `{attention}.logits`) hand on as codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vitfold.model import Array
from vitfold.ops.protocol import Ops, input_site
from vitfold.quantizer import NARROW_BITS, Quantizer, Twin, Uniform

Shape = tuple[int, ...]
FLOAT_BYTES = 4


class CodeShape(Shape):
    """The shape of a value that is written as codes of 8 bits, a byte each."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCost:
    """Work of one operation on one image: MACs, bytes of activations moved, bytes of weights read.

    `integer` says whether both operands of a product are quantized; then weights take one byte each;
    `products` counts the products of 8 bits that it takes then: two where an operand has two branches.
    `dequantized_operands` counts the dequantizations that stand in front of that product.
    """

    site: str
    kind: str
    macs: int
    activation_bytes: int
    weight_bytes: int
    integer: bool = False
    products: int = 1
    dequantized_operands: int = 0
    block: int | None = None
    role: str | None = None


def _branches(quantizer: Quantizer) -> int:
    """How many operands of 8 bits stand for one of an activation; weights of any width have one."""
    wide = isinstance(quantizer, Uniform) and quantizer.bits > NARROW_BITS
    return 2 if wide or isinstance(quantizer, Twin) else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegerWork:
    """What of a model's products is integer, as its operands are given; compare before and after reordering."""

    macs: int
    integer_macs: int
    dequantized_operands: int

    @property
    def integer_ratio(self) -> float:
        """The share of MACs whose operands are quantized."""
        return self.integer_macs / self.macs if self.macs else 0.0


def integer_work(costs: Iterable[SiteCost]) -> IntegerWork:
    """Sum up what `Count` found."""
    found = tuple(costs)
    return IntegerWork(
        macs=sum(cost.macs for cost in found),
        integer_macs=sum(cost.macs for cost in found if cost.integer),
        dequantized_operands=sum(cost.dequantized_operands for cost in found),
    )


class Count(Ops[Shape]):
    """Shapes of one image, with a batch axis of 1; `costs` grows in execution order.

    `dequantize_first` says where dequantizations of quantized operands stand: in front of the products,
    as in a Q/DQ graph, or behind them.
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        quantizers: Mapping[str, Quantizer] | None = None,
        *,
        dequantize_first: bool = False,
    ) -> None:
        self._shapes = shapes
        self._quantizers = quantizers or {}
        self._dequantize_first = dequantize_first
        self._scope = ""
        self._block: int | None = None
        self._role: str | None = None
        self.costs: list[SiteCost] = []

    @property
    def macs(self) -> int:
        """Multiply-accumulates of everything counted so far."""
        return sum(cost.macs for cost in self.costs)

    def _note(
        self,
        site: str,
        kind: str,
        inputs: tuple[Shape, ...],
        output: Shape,
        macs: int = 0,
        weights: int = 0,
        operands: tuple[str, str] | None = None,
    ) -> None:
        """Append a cost; `operands` are the sites of both sides of a product."""
        moved = sum(math.prod(shape) * _item_bytes(shape) for shape in (*inputs, output))
        integer = operands is not None and all(operand in self._quantizers for operand in operands)
        dequantized, products = 0, 1
        if integer and operands is not None:
            products = max(_branches(self._quantizers[operand]) for operand in operands)
        if integer and operands is not None and self._dequantize_first:
            dequantized = sum(_branches(self._quantizers[operand]) for operand in operands)
        self.costs.append(
            SiteCost(
                site=site,
                kind=kind,
                macs=macs,
                activation_bytes=moved,
                weight_bytes=weights * (1 if integer else FLOAT_BYTES),
                integer=integer,
                products=products,
                dequantized_operands=dequantized,
                block=self._block,
                role=self._role,
            )
        )

    def _hands(self, site: str) -> bool:
        """Whether what is written at a site is codes of 8 bits."""
        found = self._quantizers.get(site)
        return isinstance(found, Uniform) and found.bits <= NARROW_BITS

    def shape(self, a: Shape) -> Shape:
        """The value itself."""
        return a

    def elementwise(self, op: str, a: Shape, b: Shape | None = None) -> Shape:
        """One pass; a number without axes is no traffic."""
        operands = (a, b) if b else (a,)
        output = _broadcast(*operands)
        self._note(self._scope, "elementwise", operands, output)
        return output

    def reduce(self, op: str, a: Shape, axis: int, *, keep: bool = False) -> Shape:
        """One pass in."""
        axis %= len(a)
        output = (*a[:axis], *((1,) if keep else ()), *a[axis + 1 :])
        self._note(self._scope, "reduction", (a,), output)
        return output

    def unit(self, x: Shape) -> Shape:
        """One pass in, one out."""
        self._note(self._scope, "normalization", (x,), x)
        return x

    def scope(self, site: str, block: int | None = None, role: str | None = None) -> None:
        """Charge unnamed operations to `site`."""
        self._scope = site
        if role is not None:
            self._block, self._role = block, role

    def param(self, name: str) -> Shape:
        """The parameter's shape."""
        return self._shapes[name]

    def patch_embed(self, layer: str, image: Shape) -> Shape:
        """Patches as a matrix product."""
        width, channels, height, across = self._shapes[f"{layer}.weight"]
        _require(image[1] == channels, f"{layer} takes {channels} channels, found {image}")
        output = (image[0], (image[2] // height) * (image[3] // across), width)
        weights = width * channels * height * across
        self._note(layer, "linear", (image,), output, macs=output[1] * weights, weights=weights)
        return output

    def constant(self, values: Array) -> Shape:
        """Its shape."""
        return tuple(values.shape)

    def linear(self, layer: str, x: Shape, rows: str = "") -> Shape:
        """Rows times weights."""
        outputs, inputs = self._shapes[f"{layer}.weight"]
        _require(x[-1] == inputs, f"{layer} takes width {inputs}, found {x}")
        output = _written((*x[:-1], outputs), codes=self._hands(f"{layer}.out"))
        weights, operands = inputs * outputs, (input_site(layer, rows), f"{layer}.w")
        self._note(layer, "linear", (x,), output, math.prod(x[:-1]) * weights, weights, operands)
        return output

    def layer_norm(self, layer: str, x: Shape, eps: float) -> Shape:
        """One pass in, one out."""
        output = _written(x, codes=f"{layer}.x" in self._quantizers)
        self._note(layer, "normalization", (x,), output, weights=2 * x[-1])
        return output

    def activation(self, kind: str, x: Shape, site: str) -> Shape:
        """One pass in, one out; of codes a table makes codes."""
        self._note(site, "activation", (x,), x)
        return x

    def attention(self, site: str, q: Shape, k: Shape, v: Shape, bias: Shape | None) -> Shape:
        """Two products and a softmax over the scores."""
        _require(k[-2] == v[-2], f"{site} needs one value per key, found {k} and {v}")
        scores = self._product(f"{site}.qk", q, k, (f"{site}.q", f"{site}.k"), transpose_b=True)
        fits = bias is None or (_broadcast(scores, bias) == scores and bias[-1] == scores[-1])
        _require(fits, f"{site} cannot add a bias {bias} to scores {scores}")
        handed = f"{site}.logits" in self._quantizers and self._hands(f"{site}.softmax")
        shares = _written(scores, codes=handed)
        self._note(f"{site}.softmax", "softmax", (scores,) if bias is None else (scores, bias), shares)
        operands = (f"{site}.softmax", f"{site}.v")
        return self._product(f"{site}.av", shares, v, operands, codes=handed and self._hands(f"{site}.v"))

    def matmul(self, site: str, a: Shape, b: Shape, *, transpose_b: bool = False) -> Shape:
        """Rows times columns times depth."""
        return self._product(site, a, b, transpose_b=transpose_b)

    def _product(
        self,
        site: str,
        a: Shape,
        b: Shape,
        operands: tuple[str, str] | None = None,
        *,
        transpose_b: bool = False,
        codes: bool = False,
    ) -> Shape:
        columns, depth = (b[-2], b[-1]) if transpose_b else (b[-1], b[-2])
        _require(a[-1] == depth, f"{site} cannot multiply {a} and {b}")
        output = _written((*_broadcast(a[:-2], b[:-2]), a[-2], columns), codes=codes)
        self._note(site, "matmul", (a, b), output, macs=math.prod(output) * a[-1], operands=operands)
        return output

    def softmax(self, site: str, a: Shape) -> Shape:
        """One pass in, one out."""
        self._note(site, "softmax", (a,), a)
        return a

    def reshape(self, a: Shape, shape: tuple[int, ...]) -> Shape:
        """Free; a wrong size is a bug in the program."""
        output = (a[0], *shape)
        _require(math.prod(output) == math.prod(a), f"cannot reshape {a} to {output}")
        return _like(a, output)

    def transpose(self, a: Shape, perm: tuple[int, ...]) -> Shape:
        """One copy."""
        output = _like(a, tuple(a[axis] for axis in perm))
        self._note(self._scope, "layout", (a,), output)
        return output

    def split(self, a: Shape, parts: int, axis: int) -> tuple[Shape, ...]:
        """One copy."""
        _require(a[axis] % parts == 0, f"cannot split axis {axis} of {a} into {parts}")
        self._note(self._scope, "layout", (a,), a)
        return (_like(a, (*a[:axis], a[axis] // parts, *a[axis + 1 :])),) * parts

    def slice(self, a: Shape, axis: int, start: int, stop: int, step: int = 1) -> Shape:
        """One copy of what is taken."""
        _require(0 <= start <= stop <= a[axis], f"slice {start}:{stop} is outside axis {axis} of {a}")
        output = _like(a, (*a[:axis], len(range(start, stop, step)), *a[axis + 1 :]))
        self._note(self._scope, "layout", (output,), output)
        return output

    def concat(self, parts: tuple[Shape, ...], axis: int) -> Shape:
        """One copy."""
        first = parts[0]
        rest = {part[:axis] + part[axis + 1 :] for part in parts}
        _require(len(rest) == 1, f"cannot concatenate {parts} along axis {axis}")
        output = (*first[:axis], sum(part[axis] for part in parts), *first[axis + 1 :])
        self._note(self._scope, "layout", parts, output)
        return output

    def prepend_rows(self, rows: Shape, x: Shape) -> Shape:
        """One copy."""
        return self.concat((rows, x), len(x) - 2)

    def argmax(self, a: Shape) -> tuple[Shape, Shape]:
        """Reduction."""
        output = (*a[:-1], 1)
        self._note(self._scope, "reduction", (a,), output)
        return output, output

    def topk_split(self, scores: Shape, count: int, *, by_score: bool = False) -> tuple[Shape, Shape]:
        """A sort of one short column."""
        batch, rows, _ = _column(scores)
        _require(0 <= count <= rows, f"cannot take the {count} largest of {scores}")
        self._note(self._scope, "reduction", (scores,), scores)
        return (batch, count, 1), (batch, rows - count, 1)

    def affine_index(self, index: Shape, step: int, start: int) -> Shape:
        """Free: a few integers."""
        return _column(index)

    def pad_index(self, index: Shape, before: range, after: range) -> Shape:
        """Free: a few integers."""
        batch, rows, _ = _column(index)
        return (batch, len(before) + rows + len(after), 1)

    def take(self, x: Shape, index: Shape) -> Shape:
        """One copy of what is taken."""
        batch, rows, _ = _column(index)
        output = (batch, rows, x[2])
        self._note(self._scope, "layout", (output,), output)
        return output

    def foreign(
        self,
        site: str,
        parts: tuple[Shape, ...],
        graph: Array,
        weights: tuple[str, ...],
        shapes: tuple[tuple[int, ...], ...],
        macs: int = 0,
    ) -> tuple[Shape, ...]:
        """What the piece states of itself; its convolutions count as products."""
        read = sum(math.prod(self._shapes[name]) for name in weights)
        self._note(site, "foreign", (*parts, *shapes[:-1]), shapes[-1], macs=macs, weights=read)
        return shapes

    def lookup(self, name: str, rows: Shape, columns: Shape | None = None) -> Shape:
        """One copy of what is picked."""
        shape = self._shapes[name]
        batch, count, _ = _column(rows)
        output = (batch, *shape[1:-2], count, shape[-1] if columns is None else _column(columns)[1])
        self._note(self._scope, "layout", (output,), output)
        return output

    def scatter_add(self, site: str, x: Shape, index: Shape, rows: Shape) -> Shape:
        """Counted as additions of bytes, not as the one-hot product that some targets use."""
        _require(rows == (*_column(index)[:2], x[2]), f"{site} needs one row of {x} per index of {index}, found {rows}")
        self._note(site, "elementwise", (x, rows), x)
        return x


def _written(shape: Shape, *, codes: bool) -> Shape:
    """The shape of values that are written as codes, or as floats."""
    return CodeShape(shape) if codes else shape


def _like(a: Shape, shape: Shape) -> Shape:
    """A shape of the same kind of values as `a`."""
    return _written(shape, codes=isinstance(a, CodeShape))


def _item_bytes(shape: Shape) -> int:
    return 1 if isinstance(shape, CodeShape) else FLOAT_BYTES


def _broadcast(*shapes: Shape) -> Shape:
    rank = max(len(shape) for shape in shapes)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    output = []
    for lengths in zip(*padded, strict=True):
        longer = {length for length in lengths if length != 1}
        _require(len(longer) <= 1, f"shapes {shapes} do not broadcast")
        output.append(longer.pop() if longer else 1)
    return tuple(output)


def _column(shape: Shape) -> tuple[int, int, int]:
    _require(len(shape) == 3 and shape[2] == 1, f"expected a column (B, R, 1), found {shape}")
    return (shape[0], shape[1], 1)


def _require(fits: bool, message: str) -> None:
    """Raise for a bug in a program: shapes that no interpreter could run."""
    if not fits:
        raise ValueError(message)
