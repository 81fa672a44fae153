"""Attention where a graph has only its parts: softmax(q k^T s + b) v becomes one operation, its layers one with heads.

The factor s and the order of an exporter's heads go into the weights of the layers that make queries and keys, where
they can; the sum of known biases becomes one parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vitfold.model import Array
from vitfold.ops.protocol import Ops
from vitfold.program import Node, Program, Ref
from vitfold.program.program import Shape
from vitfold.program.queries import makers, readers
from vitfold.program.trace import Recorder, Traced, call
from vitfold.sources.onnx.views import factor_of, known_numbers, view_of
from vitfold.transforms.dead import without_dead_nodes

_EXACT = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionNodes:
    """The nodes of an attention: the product of its queries and keys, and that of its weights and values.

    `factor` and `by_head` (1, H, 1, 1) are what scores are multiplied by, `known` and `biases` what is added to them.
    """

    scores: Node
    softmax: Node
    average: Node
    factor: float
    by_head: Array | None
    known: Array | None
    biases: tuple[Ref, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Heads:
    """Queries, keys or values as rows of a linear layer's weight, by head: (H, K)."""

    layer: Node
    rows: Array
    factor: float


def with_attentions(program: Program, params: Mapping[str, Array]) -> tuple[Program, dict[str, Array]]:
    """Return the program with its attentions as such, and its parameters."""
    held = dict(params)
    found = {one.average.outputs[0]: one for one in _attentions(program, params)}
    made_by = makers(program)
    shapes: dict[str, Shape] = {name: array.shape for name, array in held.items()}
    recorder = Recorder(shapes, program.inputs)
    values: dict[Ref, Traced] = {value.ref: value for value in recorder.enter()}
    writing = _Writing(program, made_by, held, shapes, recorder, values)
    for node in program.nodes:
        recorder.scope(node.scope, node.block, node.role)
        one = found.get(node.outputs[0])
        results = call(recorder.ops, node, values) if one is None else (writing.attention(one),)
        values.update(zip(node.outputs, results, strict=True))
    outputs = {name: values[ref] for name, ref in program.outputs.items()}
    return without_dead_nodes(recorder.program(outputs)), held


def _attentions(program: Program, params: Mapping[str, Array]) -> list[AttentionNodes]:
    made_by, read_by = makers(program), readers(program)
    found = []
    for node in program.nodes:
        if node.op == "softmax":
            weights, average = node.outputs[0], _only_reader(read_by, node.outputs[0])
            if average is not None and average.op == "reshape" and average.shapes[0][-1] == node.shapes[0][-1]:
                (weights,) = average.outputs
                average = _only_reader(read_by, weights)
            if average is not None and average.op == "matmul" and average.operand("a") == weights:
                one = _scores_of(program, params, made_by, node, average)
                found += [] if one is None else [one]
    return found


def _only_reader(read_by: Mapping[Ref, tuple[Node, ...]], ref: Ref) -> Node | None:
    """The only reader of a value."""
    found = read_by[ref]
    return found[0] if len(found) == 1 else None


def _scores_of(
    program: Program, params: Mapping[str, Array], made_by: Mapping[Ref, Node], softmax: Node, average: Node
) -> AttentionNodes | None:
    """Follow a softmax back to the product of queries and keys."""
    ref, factor = softmax.operand("a"), 1.0
    shape = program.shapes[average.operand("a")]
    known: Array | None = None
    by_head: Array | None = None
    biases: list[Ref] = []
    while (node := made_by.get(ref)) is not None and node.op != "matmul":
        number = factor_of(made_by, node)
        if number is not None:
            ref, factor = number[0], factor * number[1]
            continue
        plain = known is None and by_head is None and not biases
        kept = -1 if plain else -2
        if node.op == "reshape" and node.shapes[0][kept:] == program.shapes[node.operand("a")][kept:] and not biases:
            ref = node.operand("a")
            continue
        scaled = _scaled_by_head(program, params, made_by, node) if node.op == "multiply" and by_head is None else None
        if scaled is not None:
            ref, by_head = scaled
            continue
        added = _added(program, params, made_by, node) if node.op == "add" else None
        if added is None or by_head is not None:
            return None
        ref, numbers, bias = added
        if numbers is not None:
            known = numbers * np.float32(factor) if known is None else known + numbers * np.float32(factor)
        elif bias is not None and factor == 1.0:
            biases.append(bias)
        else:
            return None
    if node is None or (math.prod(shape[1:-2]), shape[-2:]) != (math.prod(node.shapes[0][1:-2]), node.shapes[0][-2:]):
        return None
    if program.shapes[node.operand("a")][1:-2] != program.shapes[node.operand("b")][1:-2]:
        return None
    return AttentionNodes(
        scores=node,
        softmax=softmax,
        average=average,
        factor=factor,
        by_head=by_head,
        known=None if known is None or not known.any() else known,
        biases=tuple(biases),
    )


def _scaled_by_head(
    program: Program, params: Mapping[str, Array], made_by: Mapping[Ref, Node], node: Node
) -> tuple[Ref, Array] | None:
    """Part a product of scores and known numbers, one for each head."""
    shape = node.shapes[0]
    pair = (node.operand("a"), node.operand("b"))
    for one, other in (pair, pair[::-1]):
        numbers = known_numbers(params, made_by.get(other))
        if numbers is not None and program.shapes[one] == shape and numbers.shape[-2:] == (1, 1):
            whole = np.broadcast_to(numbers, (*shape[:-2], 1, 1))
            return one, whole.reshape((1, math.prod(shape[1:-2]), 1, 1))
    return None


def _added(
    program: Program, params: Mapping[str, Array], made_by: Mapping[Ref, Node], node: Node
) -> tuple[Ref, Array | None, Ref | None] | None:
    """Part an addition of scores and something else: the scores, known numbers (1, H, N, M) or a value."""
    shape = node.shapes[0]
    pair = (node.operand("a"), node.operand("b"))
    for one, other in (pair, pair[::-1]):
        if program.shapes[one] != shape:
            continue
        numbers = known_numbers(params, made_by.get(other))
        if numbers is not None:
            whole = np.broadcast_to(numbers, shape).reshape((1, math.prod(shape[1:-2]), *shape[-2:]))
            return one, whole, None
        if _leads_to_product(made_by, one) and len(shape) == 4 and program.shapes[other][-1] == shape[-1]:
            return one, None, other
    return None


def _leads_to_product(made_by: Mapping[Ref, Node], ref: Ref) -> bool:
    node = made_by.get(ref)
    while node is not None and node.op not in ("matmul",):
        number = factor_of(made_by, node)
        if number is None:
            return False
        node = made_by.get(number[0])
    return node is not None


class _Writing:
    """Records attentions in place of their parts."""

    def __init__(
        self,
        program: Program,
        made_by: Mapping[Ref, Node],
        params: dict[str, Array],
        shapes: dict[str, Shape],
        recorder: Recorder,
        values: dict[Ref, Traced],
    ) -> None:
        self._program, self._made_by, self._params, self._shapes = program, made_by, params, shapes
        self._recorder, self._values = recorder, values

    @property
    def _ops(self) -> Ops[Traced]:
        return self._recorder.ops

    def attention(self, found: AttentionNodes) -> Traced:
        """Record one attention; return what the product of its weights and values was."""
        q, of_q = self._peeled(found.scores.operand("a"))
        k, of_k = self._peeled(found.scores.operand("b"))
        v, of_v = self._peeled(found.average.operand("b"))
        turned = (False, not found.scores.attributes["transpose_b"], bool(found.average.attributes["transpose_b"]))
        width = self._program.shapes[q][-1]
        factor = found.factor * of_q * of_k * math.sqrt(width)
        factors = (1.0 if abs(factor - 1.0) < _EXACT else factor, 1.0, of_v)
        made = None if found.by_head is not None else self._by_heads((q, k, v), turned, factors)
        if made is None:
            made = tuple(self._four_axes(*one) for one in zip((q, k, v), turned, factors, strict=True))
        if found.by_head is not None:
            name = f"{_site_of(found.softmax)}.scale"
            self._set(name, found.by_head)
            made = (self._ops.multiply(made[0], self._ops.param(name)), *made[1:])
        q_made, k_made, v_made = made
        y = self._ops.attention(_site_of(found.softmax), q_made, k_made, v_made, self._bias(found))
        shape = self._program.shapes[found.average.outputs[0]]
        return y if y.shape == shape else self._ops.reshape(y, shape[1:])

    def _peeled(self, ref: Ref) -> tuple[Ref, float]:
        """A value without the factors that it was multiplied by last, and those."""
        factor = 1.0
        while (node := self._made_by.get(ref)) is not None:
            number = factor_of(self._made_by, node)
            if number is None:
                break
            ref, factor = number[0], factor * number[1]
        return ref, factor

    def _four_axes(self, ref: Ref, turned: bool, factor: float) -> Traced:
        """A value as (B, H, N, K)."""
        value = self._values[ref]
        last = len(value.shape) - 1
        if turned:
            value = self._ops.transpose(value, (*range(last - 1), last, last - 1))
        if last != 3:
            value = self._ops.reshape(value, (math.prod(value.shape[1:-2]), *value.shape[-2:]))
        return value if factor == 1.0 else self._ops.scale(value, factor)

    def _by_heads(
        self, refs: tuple[Ref, ...], turned: tuple[bool, ...], factors: tuple[float, ...]
    ) -> tuple[Traced, ...] | None:
        """Queries, keys and values by linear layers that part their outputs into heads; None where they are not so."""
        found = [self._heads(ref, turn, factor) for ref, turn, factor in zip(refs, turned, factors, strict=True)]
        heads = [one for one in found if one is not None]
        if len(heads) < len(found):
            return None
        made: list[Traced] = []
        while heads:
            group = [one for one in heads if self._alike(one, heads[0])]
            if heads[: len(group)] != group:
                group = heads[:1]
            made += self._layer(group)
            heads = heads[len(group) :]
        return tuple(made)

    def _alike(self, one: _Heads, other: _Heads) -> bool:
        return one.layer.source == other.layer.source and one.rows.shape == other.rows.shape

    def _heads(self, ref: Ref, turned: bool, factor: float) -> _Heads | None:
        """Which rows of a linear layer's weight a value (B, H, N, K) comes from."""
        view = view_of(self._program, self._made_by, ref)
        node = self._made_by.get(view.base)
        if node is None or node.op != "linear" or len(node.shapes[0]) != 3:
            return None
        index = view.index.swapaxes(-1, -2) if turned else view.index
        index = index.reshape(math.prod(index.shape[:-2]), *index.shape[-2:])
        _, count, width = node.shapes[0]
        rows = index[:, 0, :]
        if index.shape[1] != count or not np.array_equal(
            index, rows[:, None, :] + np.arange(count, dtype=index.dtype)[None, :, None] * width
        ):
            return None
        return _Heads(layer=node, rows=rows, factor=factor * view.factor)

    def _layer(self, group: list[_Heads]) -> tuple[Traced, ...]:
        """One linear layer for several values of the same rows."""
        heads = len(group[0].rows)
        names = list(dict.fromkeys(one.layer.attributes["layer"] for one in group))
        weight = np.concatenate([self._rows_of(one, "weight") for one in group])
        biased = any(f"{name}.bias" in self._params for name in names)
        bias = np.concatenate([self._rows_of(one, "bias") for one in group]) if biased else None
        layer = names[0]
        held = self._params.get(f"{layer}.bias")
        same = np.array_equal(weight, self._params[f"{layer}.weight"])
        if not same or (bias is not None and (held is None or not np.array_equal(bias, held))):
            layer = self._new_name(names)
            self._set(f"{layer}.weight", weight)
            if bias is not None:
                self._set(f"{layer}.bias", bias)
        return self._ops.heads(layer, self._values[group[0].layer.source], len(group), heads)

    def _rows_of(self, one: _Heads, part: str) -> Array:
        layer = one.layer.attributes["layer"]
        array = self._params.get(f"{layer}.{part}")
        if array is None:
            return np.zeros(one.rows.size, np.float32)
        rows = array[one.rows.reshape(-1)]
        return rows if one.factor == 1.0 else (rows * np.float32(one.factor)).astype(np.float32)

    def _new_name(self, names: list[str]) -> str:
        name = "+".join([names[0], *(one.rpartition(".")[2] for one in names[1:])])
        taken = sum(held.startswith(f"{name}.") for held in self._params)
        return f"{name}.{taken}" if taken else name

    def _set(self, name: str, array: Array) -> None:
        self._params[name] = np.array(array, np.float32, order="C")
        self._shapes[name] = array.shape

    def _bias(self, found: AttentionNodes) -> Traced | None:
        """All that is added to scores."""
        parts = [self._values[ref] for ref in found.biases]
        if found.known is not None:
            name = f"{_site_of(found.softmax)}.bias"
            self._set(name, found.known)
            parts.append(self._ops.param(name))
        total = None
        for part in parts:
            total = part if total is None else self._ops.add(total, part)
        return total


def _site_of(softmax: Node) -> str:
    return str(softmax.attributes["site"]).removesuffix(".Softmax")
