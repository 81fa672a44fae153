"""Which axes of a program's values are one and the same: where tokens are in each of them.

Every operation says which axes of its operands are axes of its result. Axes that are one form a class; the class of
the keys of attention is the token axis. Cutting a range of it out gives a class of its own, whose rows are known,
too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from vitfold.program.program import Node, Program, Ref, Shape
from vitfold.program.queries import attentions_of

Axis = tuple[Ref, int]
ON_LAST_AXIS = frozenset({"linear", "layer_norm", "rms_norm", "softmax", "norm", "abs_max"})
"""Operations that mix what stands along the last axis."""
Pairs = Iterator[tuple[Axis, Axis]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Axis `axis` of a value holds the tokens start:stop of the whole sequence."""

    axis: int
    start: int
    stop: int


def token_spans(program: Program) -> Mapping[Ref, Span]:
    """Return where tokens are in every value that has any: those that attention in blocks has as keys."""
    classes = _Classes()
    for node in program.nodes:
        for one, other in _equal_axes(node, program.shapes):
            classes.join(one, other)
    found: dict[Axis, tuple[int, int]] = {}
    for attention in attentions_of(program):
        if attention.block is not None:
            key = attention.operand("k")
            found[classes.root((key, 2))] = (0, program.shapes[key][2])
    for node in program.nodes:
        if node.op == "slice" and node.attributes["step"] == 1:
            axis = node.attributes["axis"]
            whole = found.get(classes.root((node.source, axis)))
            if whole is not None:
                first = whole[0] + node.attributes["start"]
                length = node.attributes["stop"] - node.attributes["start"]
                found.setdefault(classes.root((node.outputs[0], axis)), (first, first + length))
    spans: dict[Ref, Span] = {}
    for ref, shape in program.shapes.items():
        for axis in range(1, len(shape)):
            rows = found.get(classes.root((ref, axis)))
            if rows is not None:
                spans[ref] = Span(axis=axis, start=rows[0], stop=rows[1])
                break
    return spans


class _Classes:
    """Disjoint sets of axes."""

    def __init__(self) -> None:
        self._parent: dict[Axis, Axis] = {}

    def root(self, axis: Axis) -> Axis:
        while (parent := self._parent.get(axis, axis)) != axis:
            self._parent[axis] = self._parent.get(parent, parent)
            axis = parent
        return axis

    def join(self, one: Axis, other: Axis) -> None:
        self._parent[self.root(one)] = self.root(other)


def _equal_axes(node: Node, shapes: Mapping[Ref, Shape]) -> Pairs:
    rule = _RULES.get(node.op)
    return iter(()) if rule is None else rule(node, shapes)


def _all(name: str, *, but_last: bool = False) -> Callable[[Node, Mapping[Ref, Shape]], Pairs]:
    def rule(node: Node, shapes: Mapping[Ref, Shape]) -> Pairs:
        a = node.operand(name)
        for axis in range(1, len(shapes[a]) - but_last):
            yield (a, axis), (node.outputs[0], axis)

    return rule


def _heads(node: Node, _shapes: Mapping[Ref, Shape]) -> Pairs:
    for ref in node.outputs:
        yield (node.operand("x"), 1), (ref, 2)


def _elementwise(node: Node, shapes: Mapping[Ref, Shape]) -> Pairs:
    (made,) = node.outputs
    for ref in node.reads():
        ahead = len(shapes[made]) - len(shapes[ref])
        for axis in range(1, len(shapes[ref])):
            if shapes[ref][axis] == shapes[made][axis + ahead] and shapes[ref][axis] > 1:
                yield (ref, axis), (made, axis + ahead)


def _transpose(node: Node, _shapes: Mapping[Ref, Shape]) -> Pairs:
    for axis, source in enumerate(node.attributes["perm"]):
        yield (node.operand("a"), source), (node.outputs[0], axis)


def _reshape(node: Node, shapes: Mapping[Ref, Shape]) -> Pairs:
    """An axis stays one where as much stands in front of it and it is as long."""
    a, (made,) = node.operand("a"), node.outputs
    before, after = shapes[a], shapes[made]
    places = {(math.prod(after[:axis]), after[axis]): axis for axis in range(1, len(after)) if after[axis] > 1}
    for axis in range(1, len(before)):
        there = places.get((math.prod(before[:axis]), before[axis]))
        if there is not None:
            yield (a, axis), (made, there)


def _but_one(node: Node, shapes: Mapping[Ref, Shape]) -> Pairs:
    """Split and slice: all axes but the one that is cut; where nothing is cut off, that one too."""
    a, axis = node.operand("a"), node.attributes["axis"]
    for ref in node.outputs:
        for one in range(1, len(shapes[a])):
            if one != axis or shapes[ref][one] == shapes[a][one]:
                yield (a, one), (ref, one)


def _concat(node: Node, shapes: Mapping[Ref, Shape]) -> Pairs:
    parts = node.inputs["parts"]
    assert isinstance(parts, tuple)
    for ref in parts:
        for axis in range(1, len(shapes[ref])):
            if axis != node.attributes["axis"]:
                yield (ref, axis), (node.outputs[0], axis)


def _prepend_rows(node: Node, shapes: Mapping[Ref, Shape]) -> Pairs:
    for name in ("rows", "x"):
        ref = node.operand(name)
        for axis in (*range(1, len(shapes[ref]) - 2), len(shapes[ref]) - 1):
            yield (ref, axis), (node.outputs[0], axis)


def _attention(node: Node, shapes: Mapping[Ref, Shape]) -> Pairs:
    q, k, v = (node.operand(name) for name in ("q", "k", "v"))
    (made,) = node.outputs
    yield (q, 2), (made, 2)
    yield (k, 2), (v, 2)
    yield (v, 3), (made, 3)
    for ref in (q, k, v):
        yield (ref, 1), (made, 1)
    bias = node.inputs["bias"]
    if isinstance(bias, int):
        for axis, operand in ((2, q), (3, k)):
            if shapes[Ref(bias)][axis] > 1:
                yield (Ref(bias), axis), (operand, 2)


def _matmul(node: Node, shapes: Mapping[Ref, Shape]) -> Pairs:
    a, b, (made,) = node.operand("a"), node.operand("b"), node.outputs
    rank = len(shapes[made])
    yield (a, len(shapes[a]) - 2), (made, rank - 2)
    yield (b, len(shapes[b]) - (2 if node.attributes["transpose_b"] else 1)), (made, rank - 1)


def _reduced(node: Node, shapes: Mapping[Ref, Shape]) -> Pairs:
    a, gone = node.operand("a"), node.attributes["axis"]
    for axis in range(1, len(shapes[a])):
        if axis != gone:
            yield (a, axis), (node.outputs[0], axis - (axis > gone))


_RULES: Mapping[str, Callable[[Node, Mapping[Ref, Shape]], Pairs]] = {
    "linear": _all("x", but_last=True),
    "norm": _all("x", but_last=True),
    "abs_max": _all("x", but_last=True),
    **{op: _all("x") for op in ("layer_norm", "rms_norm", "activation")},
    **{op: _all("a") for op in ("add_scalar", "scale", "log", "tanh", "softmax", "ones_like")},
    **dict.fromkeys(("add", "multiply", "divide", "elementwise"), _elementwise),
    **dict.fromkeys(("split", "slice"), _but_one),
    **dict.fromkeys(("mean", "sum", "reduce_max"), _reduced),
    "heads": _heads,
    "transpose": _transpose,
    "reshape": _reshape,
    "concat": _concat,
    "prepend_rows": _prepend_rows,
    "attention": _attention,
    "matmul": _matmul,
}
