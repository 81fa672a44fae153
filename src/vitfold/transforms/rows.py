"""Rows that nothing reads: behind the last attention of a model that pools by its class token, all but one.

A slice moves towards the inputs through every operation that treats rows alike, up to the queries of an attention,
through gathers and merges whose first rows stay what they were, and no further. What is left over is dead. This is
exact: every row that is computed is computed from the same numbers. Where an engine has a better kernel for an
attention of all queries than for one of a few, the slice stops behind that attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace

from vitfold.ops.protocol import Ops
from vitfold.program import Node, Operand, Program, Ref
from vitfold.program.axes import ON_LAST_AXIS
from vitfold.program.program import Shape
from vitfold.program.queries import makers
from vitfold.program.trace import Recorder, Traced, call
from vitfold.transforms.dead import without_dead_nodes


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows start:stop of one axis of a value."""

    ref: Ref
    axis: int
    start: int
    stop: int


Given = Rows | Ref | None | tuple[Rows, ...]


@dataclass(frozen=True, slots=True)
class Moved:
    """A node that makes only some rows: which rows of its operands it reads (whole ones are refs), and its attributes.

    `node` is None where the rows are those of one operand.
    """

    node: Node | None
    operands: Mapping[str, Given] = field(default_factory=dict)

    def reads(self) -> Iterator[Rows | Ref]:
        """Return all that it reads."""
        for operand in self.operands.values():
            if isinstance(operand, tuple):
                yield from operand
            elif operand is not None:
                yield operand


Rule = Callable[[Program, Node, Rows], "Moved | None"]


@dataclass(frozen=True, slots=True)
class Made:
    """A program, who makes its values, and which attentions keep all their queries."""

    program: Program
    by: Mapping[Ref, Node]
    whole: Collection[str] = ()

    def moved(self, rows: Rows) -> Moved | None:
        """Return what makes only these rows, None where the value has to be made whole."""
        node = self.by.get(rows.ref)
        if node is None or (node.op == "attention" and node.site in self.whole):
            return None
        rule, length = RULES.get(node.op), self.program.shapes[rows.ref][rows.axis]
        few = length >= _LONG and rows.stop - rows.start <= _WORTH * length
        return rule(self.program, node, rows) if rule is not None and few else None


def without_dead_rows(program: Program, shapes: Mapping[str, Shape], *, whole: Collection[str] = ()) -> Program:
    """Return the program without the rows that no output depends on.

    Args:
        shapes: those of the parameters.
        whole: sites of attentions that are computed for all queries, whichever are read.
    """
    made = Made(program, makers(program), whole)
    needed, some = _demand(made)
    recorder = Recorder(shapes, program.inputs)
    values: dict[Ref | Rows, Traced] = {value.ref: value for value in recorder.enter()}
    waiting: dict[Ref, list[Rows]] = {}
    for rows in some:
        waiting.setdefault(rows.ref, []).append(rows)
    for number in range(len(program.inputs)):
        _place_rows(made, recorder, values, waiting.get(Ref(number), []))
    for node in program.nodes:
        recorder.scope(node.scope, node.block, node.role)
        if needed.intersection(node.outputs):
            _place_whole(recorder.ops, node, values)
        for ref in node.outputs:
            _place_rows(made, recorder, values, waiting.get(ref, []))
    return without_dead_nodes(recorder.program({name: values[ref] for name, ref in program.outputs.items()}))


def _demand(made: Made) -> tuple[set[Ref], list[Rows]]:
    """Return the values that are needed whole, and the rows of others, in the order in which they were asked for."""
    whole: set[Ref] = set()
    some: dict[Rows, None] = {}
    waiting: list[Rows | Ref] = list(made.program.outputs.values())
    while waiting:
        asked = waiting.pop()
        if isinstance(asked, Rows):
            if asked in some:
                continue
            some[asked] = None
            moved = made.moved(asked)
            waiting.extend([asked.ref] if moved is None else moved.reads())
        elif asked not in whole:
            whole.add(asked)
            node = made.by.get(asked)
            if node is not None:
                rows = _rows_of_slice(node)
                moves = rows is not None and made.moved(rows) is not None
                waiting.extend([rows] if rows is not None and moves else node.reads())
    return whole, list(some)


def _place_whole(ops: Ops[Traced], node: Node, values: dict[Ref | Rows, Traced]) -> None:
    rows = _rows_of_slice(node)
    if rows is not None and rows in values and rows.ref not in values:
        values[node.outputs[0]] = values[rows]
        return
    known = {ref: values[ref] for ref in node.reads()}
    values.update(zip(node.outputs, call(ops, node, known), strict=True))


def _place_rows(made: Made, recorder: Recorder, values: dict[Ref | Rows, Traced], asked: list[Rows]) -> None:
    """Record the rows of one value that were asked for: cut out of the whole where that is there anyway."""
    for rows in asked:
        if rows.ref in values:
            values[rows] = recorder.ops.slice(values[rows.ref], rows.axis, rows.start, rows.stop)
            continue
        moved = made.moved(rows)
        assert moved is not None, "rows that cannot be moved were asked for as a whole"
        if moved.node is None:
            (only,) = moved.reads()
            values[rows] = values[only]
            continue
        numbers = {one: Ref(number) for number, one in enumerate(dict.fromkeys(moved.reads()))}
        known = {number: values[one] for one, number in numbers.items()}
        renamed = replace(moved.node, inputs={name: _named(given, numbers) for name, given in moved.operands.items()})
        (values[rows],) = call(recorder.ops, renamed, known)


def _named(given: Given, numbers: Mapping[Rows | Ref, Ref]) -> Operand:
    if isinstance(given, tuple):
        return tuple(numbers[one] for one in given)
    return None if given is None else numbers[given]


def _rows_of_slice(node: Node) -> Rows | None:
    """Return the rows (B, start:stop, D) that a slice without gaps takes; None for any other node."""
    if node.op != "slice" or node.attributes["step"] != 1 or (node.attributes["axis"], len(node.shapes[0])) != (1, 3):
        return None
    return Rows(node.source, node.attributes["axis"], node.attributes["start"], node.attributes["stop"])


def _rowwise(name: str) -> Rule:
    """An operation on the last axis, or on single elements, of one operand."""

    def rule(program: Program, node: Node, rows: Rows) -> Moved | None:
        if rows.axis == len(program.shapes[rows.ref]) - 1 and node.op in ON_LAST_AXIS:
            return None
        return Moved(node, {name: replace(rows, ref=node.operand(name))})

    return rule


def _elementwise(program: Program, node: Node, rows: Rows) -> Moved | None:
    """Operands broadcast: those that have the axis give their rows."""
    rank = len(program.shapes[rows.ref])
    operands: dict[str, Given] = {}
    for name, given in node.inputs.items():
        if not isinstance(given, int):
            operands[name] = None
            continue
        ref = Ref(given)
        shape = program.shapes[ref]
        axis = rows.axis - (rank - len(shape))
        has = axis >= 0 and shape[axis] == program.shapes[rows.ref][rows.axis]
        operands[name] = Rows(ref, axis, rows.start, rows.stop) if has else ref
    return Moved(node, operands)


def _transpose(_program: Program, node: Node, rows: Rows) -> Moved | None:
    return Moved(node, {"a": replace(rows, ref=node.operand("a"), axis=node.attributes["perm"][rows.axis])})


def _reshape(program: Program, node: Node, rows: Rows) -> Moved | None:
    """The axis has to be one of the operand's: as long, with as much in front of it."""
    before, after = program.shapes[node.operand("a")], program.shapes[rows.ref]
    front = math.prod(after[: rows.axis])
    for axis, length in enumerate(before):
        if length == after[rows.axis] and math.prod(before[:axis]) == front and axis > 0:
            shape = list(after[1:])
            shape[rows.axis - 1] = rows.stop - rows.start
            changed = replace(node, attributes={**node.attributes, "shape": tuple(shape)})
            return Moved(changed, {"a": Rows(node.operand("a"), axis, rows.start, rows.stop)})
    return None


def _attention(program: Program, node: Node, rows: Rows) -> Moved | None:
    """Queries are rows; keys and values are needed whole."""
    bias = node.inputs["bias"]
    if rows.axis != 2 or (isinstance(bias, int) and program.shapes[Ref(bias)][2] != 1):
        return None
    whole: dict[str, Given] = {name: node.operand(name) for name in ("k", "v")}
    q = replace(rows, ref=node.operand("q"))
    return Moved(node, {"q": q, **whole, "bias": None if bias is None else node.operand("bias")})


def _concat(program: Program, node: Node, rows: Rows) -> Moved | None:
    """The rows of every part, or, along the rows, those of one part."""
    parts = node.inputs["parts"]
    assert isinstance(parts, tuple)
    if node.attributes["axis"] != rows.axis:
        return Moved(node, {"parts": tuple(replace(rows, ref=ref) for ref in parts)})
    start = 0
    for ref in parts:
        length = program.shapes[ref][rows.axis]
        if start <= rows.start and rows.stop <= start + length:
            return Moved(None, {"part": Rows(ref, rows.axis, rows.start - start, rows.stop - start)})
        start += length
    return None


def _slice(_program: Program, node: Node, rows: Rows) -> Moved | None:
    """Slices of two axes change places, slices of one are one."""
    a, start = node.operand("a"), int(node.attributes["start"])
    if node.attributes["axis"] != rows.axis:
        return Moved(node, {"a": replace(rows, ref=a)})
    if node.attributes["step"] != 1:
        return None
    return Moved(None, {"a": Rows(a, rows.axis, start + rows.start, start + rows.stop)})


def _split(program: Program, node: Node, rows: Rows) -> Moved | None:
    """One part, cut out of the rows of all parts."""
    if node.attributes["axis"] == rows.axis:
        return None
    length = program.shapes[rows.ref][node.attributes["axis"]]
    start = length * node.outputs.index(rows.ref)
    cut = {"axis": node.attributes["axis"], "start": start, "stop": start + length, "step": 1}
    part = replace(node, op="slice", attributes=cut, outputs=(rows.ref,), shapes=(program.shapes[rows.ref],))
    return Moved(part, {"a": replace(rows, ref=node.operand("a"))})


def _take(program: Program, node: Node, rows: Rows) -> Moved | None:
    """The first rows of a gather that keeps them in their places."""
    if rows.axis != 1 or rows.stop > _kept_in_front(program, node.operand("index")):
        return None
    return Moved(None, {"x": replace(rows, ref=node.operand("x"))})


def _merge_rows(program: Program, node: Node, rows: Rows) -> Moved | None:
    """The first rows where they keep their places and nothing joins them."""
    parts = node.inputs["parts"]
    assert isinstance(parts, tuple)
    kept = _kept_in_front(program, node.operand("survivors"))
    if rows.axis != 1 or rows.stop > min(kept, _least_index(program, node.operand("into"))):
        return None
    return Moved(None, {"part": replace(rows, ref=parts[node.outputs.index(rows.ref)])})


def _kept_in_front(program: Program, index: Ref) -> int:
    """Return how many leading indices are 0, 1, 2 ... whatever the image."""
    node = makers(program).get(index)
    if node is not None and node.op == "pad_index":
        before: range = node.attributes["before"]
        if not before:
            return _kept_in_front(program, node.operand("index"))
        return len(before) if before == range(len(before)) else 0
    if node is not None and node.op == "concat":
        parts = node.inputs["parts"]
        assert isinstance(parts, tuple)
        return _kept_in_front(program, parts[0])
    return 0


def _least_index(program: Program, index: Ref) -> int:
    """Return the least that an index can be: behind start + step i with i >= 0 it is the start."""
    node = makers(program).get(index)
    if node is None or node.op != "affine_index" or node.attributes["step"] < 0:
        return 0
    return int(node.attributes["start"])


_WORTH = 0.5
_LONG = 8
"""Only slices that leave at most so much of a long axis move: cutting a few rows off costs a copy of all others, and
taking two rows apart makes two products of one.
"""
RULES: Mapping[str, Rule] = {
    **{op: _rowwise("x") for op in ("linear", "layer_norm", "rms_norm", "activation", "norm", "abs_max")},
    **{op: _rowwise("a") for op in ("add_scalar", "scale", "log", "tanh", "softmax", "ones_like")},
    **dict.fromkeys(("add", "multiply", "divide", "elementwise"), _elementwise),
    "transpose": _transpose,
    "reshape": _reshape,
    "attention": _attention,
    "concat": _concat,
    "slice": _slice,
    "split": _split,
    "take": _take,
    "merge_rows": _merge_rows,
}
"""How rows of a result follow from rows of operands; an operation without a rule is computed whole."""
