"""Values that are other values in another order: which element of which value each of their elements is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vitfold.model import Array
from vitfold.ops.protocol import Ops
from vitfold.program import Node, Program, Ref
from vitfold.program.program import Literal, Shape
from vitfold.program.queries import makers
from vitfold.program.trace import Recorder, Traced, call


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class View:
    """`factor` times the elements `index` of one image's share of the value `base`; `chain` leads there."""

    base: Ref
    index: Array
    factor: float
    chain: tuple[Node, ...]


def view_of(program: Program, made_by: Mapping[Ref, Node], ref: Ref, *, scaled: bool = True) -> View:
    """Follow a value back through changes of shape, parts and, with `scaled`, factors."""
    chain: list[tuple[Node, Ref]] = []
    factor = 1.0
    while (node := made_by.get(ref)) is not None:
        number = factor_of(made_by, node) if scaled else None
        if number is not None:
            factor *= number[1]
            ref = number[0]
            continue
        if node.op not in _MOVING:
            break
        chain.append((node, ref))
        ref = node.operand("a")
    shape = program.shapes[ref]
    index = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    for node, made in reversed(chain):
        index = _MOVING[node.op](index, node, made)
    return View(base=ref, index=index[0], factor=factor, chain=tuple(node for node, _ in reversed(chain)))


def known_numbers(params: Mapping[str, Array], node: Node | None) -> Array | None:
    """Return what a node makes, where that is known before any input is."""
    if node is not None and node.op == "param":
        return params[node.attributes["name"]]
    if node is not None and node.op == "constant":
        literal = node.attributes["values"]
        assert isinstance(literal, Literal)
        return literal.array()
    return None


def factor_of(made_by: Mapping[Ref, Node], node: Node) -> tuple[Ref, float] | None:
    """Return what a node multiplies by a single known number, and that number."""
    if node.op == "scale":
        return node.operand("a"), float(node.attributes["value"])
    if node.op not in ("multiply", "divide"):
        return None
    a, b = node.operand("a"), node.operand("b")
    for one, other in ((a, b), (b, a)):
        maker = made_by.get(other)
        numbers = known_numbers({}, maker) if maker is not None and maker.op == "constant" else None
        if numbers is None or numbers.size != 1 or (node.op == "divide" and other == a):
            continue
        number = float(numbers.reshape(()))
        if number:
            return one, number if node.op == "multiply" else 1.0 / number
    return None


def _sliced(index: Array, node: Node, _made: Ref) -> Array:
    given = node.attributes
    where: list[slice] = [slice(None)] * index.ndim
    where[given["axis"]] = slice(given["start"], given["stop"], given["step"])
    return index[tuple(where)]


def _split(index: Array, node: Node, made: Ref) -> Array:
    parts: list[Array] = np.split(index, node.attributes["parts"], node.attributes["axis"])
    return parts[node.outputs.index(made)]


_MOVING: Mapping[str, Callable[[Array, Node, Ref], Array]] = {
    "reshape": lambda index, node, _: index.reshape((1, *node.attributes["shape"])),
    "transpose": lambda index, node, _: index.transpose(node.attributes["perm"]),
    "slice": _sliced,
    "split": _split,
}


def with_short_views(program: Program, shapes: Mapping[str, Shape]) -> Program:
    """Return the program in which changes of shape and of the order of axes are as few as they can be.

    Args:
        shapes: those of the parameters.
    """
    made_by = makers(program)
    recorder = Recorder(shapes, program.inputs)
    values: dict[Ref, Traced] = {value.ref: value for value in recorder.enter()}
    for node in program.nodes:
        recorder.scope(node.scope, node.block, node.role)
        short = _short(recorder.ops, program, made_by, values, node) if node.op in ("reshape", "transpose") else None
        results = call(recorder.ops, node, values) if short is None else (short,)
        values.update(zip(node.outputs, results, strict=True))
    return recorder.program({name: values[ref] for name, ref in program.outputs.items()})


def _short(
    ops: Ops[Traced], program: Program, made_by: Mapping[Ref, Node], values: Mapping[Ref, Traced], node: Node
) -> Traced | None:
    """The value of a node by at most one transpose between two reshapes; None where that is no less than there was."""
    chain: list[Node] = []
    ref = node.outputs[0]
    while (maker := made_by.get(ref)) is not None and maker.op in ("reshape", "transpose"):
        chain.append(maker)
        ref = maker.operand("a")
    if len(chain) < 2:
        return None
    shape, base = node.shapes[0], program.shapes[ref]
    index = np.arange(math.prod(base), dtype=np.int32).reshape(base)
    for one in reversed(chain):
        index = _MOVING[one.op](index, one, one.outputs[0])
    if np.array_equal(index.reshape(-1), np.arange(index.size, dtype=np.int32)):
        return values[ref] if shape == base else ops.reshape(values[ref], shape[1:])
    if sum(one.op == "transpose" for one in chain) < 2:
        return None
    found = _strides(index[0])
    if found is None:
        return None
    lengths, perm = found
    parted = values[ref] if (1, *lengths) == base else ops.reshape(values[ref], lengths)
    moved = ops.transpose(parted, (0, *(1 + axis for axis in perm)))
    return moved if moved.shape == shape else ops.reshape(moved, shape[1:])


def _strides(index: Array) -> tuple[Shape, Sequence[int]] | None:
    """Part an order of elements into axes: their lengths as they are stored, and in which order they are read."""
    steps = [
        (length, int(np.take(index, 1, axis).flat[0] - index.flat[0]))
        for axis, length in enumerate(index.shape)
        if length > 1
    ]
    order = sorted(range(len(steps)), key=lambda i: -steps[i][1])
    lengths = tuple(steps[i][0] for i in order)
    perm = tuple(order.index(i) for i in range(len(steps)))
    found = np.arange(index.size, dtype=np.int32).reshape(lengths).transpose(perm)
    return (lengths, perm) if np.array_equal(found.reshape(-1), index.reshape(-1)) else None
