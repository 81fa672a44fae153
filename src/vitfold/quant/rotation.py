"""Exact folds that spread residual streams and values over all of their channels, so that no channel is an outlier.

A stream x becomes Q x with an orthogonal Q that keeps the mean. Layers that write to it are turned at their outputs,
layers that read it behind a norm at their inputs, and norms in between commute with Q once their scale and shift are
folded into what reads them. So the graph stays as it is, in every engine, with other weights. Values of attention are
turned within each head, and back in the projection.

Source: QuaRot (2404.00456), section 4, and SliceGPT (2401.15024), theorem 1, for RMSNorm; here Q 1 = 1, so that
LayerNorm needs no change.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Float

from vitfold.artifacts.cache import key_of
from vitfold.model import Array
from vitfold.program import Node, Program, Ref
from vitfold.program.queries import attentions_of, makers, readers
from vitfold.quant.network import Network

_NORMS = frozenset({"layer_norm", "rms_norm"})
_LAYERS = frozenset({"linear", "heads"})
_WRITERS = frozenset({"linear", "patch_embed"})
_PICKS = frozenset({"slice", "take", "reshape", "mean"})
_SUMS = frozenset({"multiply", "divide", "scale", "sum", "elementwise"})
_LEAST_SCALE = 1e-2
"""Of the largest; below, a norm's shift is not put in front of its scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One residual stream of `width` channels.

    `writers` are layers whose outputs are added to it, `tables` parameters that are, as positions and class tokens.
    `norms` names for every norm that reads it the layers behind it; `readers` are layers that read it without one.
    Behind the norms in `summed` rows are weighted and added up, as by pooling of merged tokens.
    """

    width: int
    writers: tuple[str, ...]
    tables: tuple[str, ...]
    norms: Mapping[str, tuple[str, ...]]
    readers: tuple[str, ...]
    summed: frozenset[str] = frozenset()


def rotate_streams(network: Network, *, seed: int = 0) -> Network:
    """Return a network that computes the same on turned streams; streams that cannot be turned stay as they are."""
    params = dict(network.params)
    for number, stream in enumerate(streams_of(network.program)):
        if _can_turn(params, stream):
            params |= _turned(params, stream, mean_keeping_rotation(stream.width, seed=seed + number))
    digest = None if network.digest is None else key_of(network.digest, "rotated", seed)
    return replace(network, params=params, digest=digest)


def turn_heads(network: Network, *, seed: int = 0) -> Network:
    """Return a network that computes the same on turned queries, keys and values; what cannot be turned stays.

    Queries and keys get one orthogonal matrix, which leaves their products as they are, values another, which the
    projection takes back: R q . R k = q . k and W_o R^T (R v) = W_o v. All heads of an attention get the same, so that
    means of keys over heads keep their angles: merging sees no difference.
    """
    params = dict(network.params)
    attentions = {node.site: node for node in attentions_of(network.program)}
    named = _times_named(network.program)
    for site in network.linears:
        if site.values is None or site.attention is None or named[site.values] > 1 or named[site.layer] > 1:
            continue
        shape = network.program.shapes[attentions[site.attention].operand("v")]
        heads, width = shape[1], shape[3]
        turn = random_rotation(width, seed=seed)
        params |= _turned_rows(params, site.values, slice(-heads * width, None), turn)
        params |= _turned_rows(params, f"{site.attention}.cached_v", None, turn)
        columns = params[f"{site.layer}.weight"].astype(np.float64).reshape(-1, heads, width) @ turn.T
        params[f"{site.layer}.weight"] = np.ascontiguousarray(columns.reshape(len(columns), -1), np.float32)
        if site.direct:
            count = len(params[f"{site.values}.weight"]) - heads * width
            width = network.program.shapes[attentions[site.attention].operand("q")][3]
            turn = random_rotation(width, seed=seed + 1)
            params |= _turned_rows(params, site.values, slice(0, count), turn)
            params |= _turned_rows(params, f"{site.attention}.cached_k", None, turn)
    digest = None if network.digest is None else key_of(network.digest, "turned heads", seed)
    return replace(network, params=params, digest=digest)


def _turned_rows(
    params: Mapping[str, Array], name: str, rows: slice | None, turn: Float[np.ndarray, "K K"]
) -> dict[str, Array]:
    """Turn the outputs `rows` of a layer, K by K, or a table (..., K) where `rows` is None."""
    if rows is None:
        return {name: np.ascontiguousarray(params[name] @ turn.T, np.float32)} if name in params else {}
    made: dict[str, Array] = {}
    for kind in ("weight", "bias"):
        if f"{name}.{kind}" in params:
            whole = params[f"{name}.{kind}"].astype(np.float64)
            part = whole[rows]
            whole[rows] = (turn @ part.reshape(-1, len(turn), part.size // len(part))).reshape(part.shape)
            made[f"{name}.{kind}"] = np.ascontiguousarray(whole, np.float32)
    return made


def random_rotation(width: int, *, seed: int) -> Float[np.ndarray, "D D"]:
    """Return a random orthogonal matrix, in double precision."""
    turn, upper = np.linalg.qr(np.random.default_rng([seed, width]).standard_normal((width, width)))
    return np.asarray(turn * np.sign(np.diag(upper)))


def mean_keeping_rotation(width: int, *, seed: int) -> Float[np.ndarray, "D D"]:
    """Return a random orthogonal matrix Q with Q 1 = 1, in double precision."""
    draw = np.random.default_rng([seed, width])
    ones = np.full((width, 1), width**-0.5)
    basis, _ = np.linalg.qr(np.concatenate([ones, draw.standard_normal((width, width - 1))], 1))
    rest = basis[:, 1:]
    return np.asarray(ones @ ones.T + rest @ random_rotation(width - 1, seed=seed) @ rest.T)


def _can_turn(params: Mapping[str, Array], stream: Stream) -> bool:
    """Say whether what a sum of rows needs is there: shifts of norms that can be told from their scales."""
    scales = [np.abs(params[f"{norm}.weight"]) for norm in stream.summed if f"{norm}.weight" in params]
    return all(scale.min() >= _LEAST_SCALE * scale.max() for scale in scales)


def _turned(params: Mapping[str, Array], stream: Stream, rotation: Float[np.ndarray, "D D"]) -> dict[str, Array]:
    made: dict[str, Array] = {}

    def value(name: str) -> Array:
        return np.asarray(made.get(name, params.get(name)), np.float64)

    for layer in stream.writers:
        made[f"{layer}.weight"] = np.tensordot(rotation, value(f"{layer}.weight"), 1)
        if f"{layer}.bias" in params:
            made[f"{layer}.bias"] = rotation @ value(f"{layer}.bias")
    for name in stream.tables:
        made[name] = value(name) @ rotation.T
    for norm, layers in stream.norms.items():
        scale, shift = (value(f"{norm}.{kind}") if f"{norm}.{kind}" in params else None for kind in ("weight", "bias"))
        behind = shift is not None and norm in stream.summed
        for layer in layers:
            weight = value(f"{layer}.weight")
            if shift is not None and not behind:
                bias = value(f"{layer}.bias") if f"{layer}.bias" in params else np.zeros(len(weight))
                made[f"{layer}.bias"] = bias + weight @ shift
            made[f"{layer}.weight"] = (weight if scale is None else weight * scale) @ rotation.T
        made |= {} if scale is None else {f"{norm}.weight": np.ones(stream.width)}
        if shift is not None:
            made[f"{norm}.bias"] = rotation @ (shift if scale is None else shift / scale) if behind else 0.0 * shift
    for layer in stream.readers:
        made[f"{layer}.weight"] = value(f"{layer}.weight") @ rotation.T
    return {name: np.ascontiguousarray(array, np.float32) for name, array in made.items()}


def streams_of(program: Program) -> tuple[Stream, ...]:
    """Return the residual streams that can be turned: layers, norms and what works on rows is all that is there."""
    named = _times_named(program)
    made_by, read_by = makers(program), readers(program)
    found: list[Stream] = []
    seen: set[Ref] = set()
    for node in program.nodes:
        if node.op in _NORMS and node.operand("x") not in seen:
            flood = _Flood(program=program, made_by=made_by, read_by=read_by)
            if flood.from_(node.operand("x")) and flood.whole(named):
                found.append(flood.stream())
            seen |= flood.refs
    return tuple(found)


def _times_named(program: Program) -> Mapping[str, int]:
    """Return how often a program reads each layer and parameter."""
    return Counter(name for node in program.nodes for name in _names_read(node))


def _names_read(node: Node) -> Iterator[str]:
    """Layers and parameters that a node reads; of a weight that it reads by its own name, the layer."""
    if node.attributes.get("layer"):
        yield str(node.attributes["layer"])
    if node.op in ("param", "lookup"):
        yield str(node.attributes["name"])
        yield str(node.attributes["name"]).rpartition(".")[0]
    for name in node.attributes.get("weights", ()):
        yield name
        yield name.rpartition(".")[0]


@dataclass(slots=True, kw_only=True, eq=False)
class _Flood:
    """Everything that has the channels of one value."""

    program: Program
    made_by: Mapping[Ref, Node]
    read_by: Mapping[Ref, tuple[Node, ...]]
    refs: set[Ref] = field(default_factory=set)
    writers: list[Node] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    norms: dict[str, list[Node]] = field(default_factory=dict)
    readers: list[Node] = field(default_factory=list)
    summed: set[str] = field(default_factory=set)
    width: int = 0

    def from_(self, start: Ref) -> bool:
        """Spread from one value; False if something stands in the way."""
        self.width = self.program.shapes[start][-1]
        outputs = set(self.program.outputs.values())
        todo = [start]
        while todo:
            ref = todo.pop()
            if ref in self.refs:
                continue
            self.refs.add(ref)
            maker = self.made_by.get(ref)
            before = None if maker is None else self._before(maker, ref)
            if ref in outputs or before is None:
                return False
            todo += before
            for reader in self.read_by[ref]:
                behind = self._behind(reader, ref)
                if behind is None:
                    return False
                todo += behind
        return True

    def whole(self, named: Mapping[str, int]) -> bool:
        """Say whether every layer and norm has one place only, and no parameter is read as a table twice."""
        layers = Counter(node.site for node in (*self.writers, *self.readers))
        layers.update(node.site for nodes in self.norms.values() for node in nodes)
        alone = all(count == 1 or (count == 2 and name in self._both()) for name, count in layers.items())
        return alone and all(named[name] == 1 for name in (*layers, *self.norms, *self.tables))

    def stream(self) -> Stream:
        """Return what was found."""
        return Stream(
            width=self.width,
            writers=tuple(node.site for node in self.writers),
            tables=tuple(self.tables),
            norms={norm: tuple(node.site for node in nodes) for norm, nodes in self.norms.items()},
            readers=tuple(node.site for node in self.readers),
            summed=frozenset(self.summed),
        )

    def _both(self) -> set[str]:
        """Layers that read the stream and write to it."""
        reading = {node.site for node in self.readers} | {n.site for nodes in self.norms.values() for n in nodes}
        return reading & {node.site for node in self.writers}

    def _before(self, maker: Node, ref: Ref) -> list[Ref] | None:
        """The values that the maker of one takes its channels from; None if it mixes them."""
        if maker.op in _WRITERS:
            self.writers.append(maker)
            return []
        if maker.op == "param":
            self.tables.append(maker.attributes["name"])
            return []
        found = list(self._linked(maker, ref))
        return found or None

    def _behind(self, reader: Node, ref: Ref) -> list[Ref] | None:
        """The values that have the channels of one behind a reader of it; None if it does something else with them."""
        if reader.op in _NORMS:
            self.norms[reader.site] = []
            return [] if self._normed(reader, reader.outputs[0]) else None
        if reader.op in _LAYERS:
            self.readers.append(reader)
            return []
        if reader.op == "slice" and all(one.op == "ones_like" for one in self.read_by[reader.outputs[0]]):
            return []
        if reader.op in ("norm", "similarity") or (reader.op == "reduce" and _is_row_norm(reader)):
            return []
        found = [made for made in reader.outputs if ref in self._linked(reader, made)]
        return found or None

    def _normed(self, norm: Node, ref: Ref) -> bool:
        """Collect the layers behind a norm; False if its output reaches something else."""
        if ref in self.program.outputs.values():
            return False
        for reader in self.read_by[ref]:
            if reader.op in _LAYERS:
                if reader not in self.norms[norm.site]:
                    self.norms[norm.site].append(reader)
                continue
            linear = reader.op in _PICKS | _SUMS and set(self._linked(reader, reader.outputs[0])) == {ref}
            if reader.op in _SUMS:
                self.summed.add(norm.site)
            if not linear or not self._normed(norm, reader.outputs[0]):
                return False
        return True

    def _linked(self, node: Node, made: Ref) -> Iterator[Ref]:
        """Operands whose channels are those of a result, row by row or as sums of rows."""
        shapes, last = self.program.shapes, len(self.program.shapes[made]) - 1
        if shapes[made][-1] != self.width:
            return
        if node.op in ("add", "elementwise", "multiply", "divide"):
            yield from self._linked_elementwise(node)
        elif node.op in ("slice", "split", "concat", "mean", "sum"):
            axis = node.attributes["axis"]
            rank = max(len(shapes[ref]) for ref in node.reads())
            if axis % rank != rank - 1:
                yield from node.reads()
        elif node.op == "scale":
            yield node.operand("a")
        elif node.op == "transpose":
            if node.attributes["perm"][-1] == last:
                yield node.source
        elif node.op == "reshape":
            if shapes[node.source][-1] == self.width:
                yield node.source
        elif node.op == "prepend_rows":
            yield from (node.operand("rows"), node.operand("x"))
        elif node.op == "take":
            yield node.operand("x")
        elif node.op == "scatter_add":
            yield from (node.operand("x"), node.operand("rows"))
        elif node.op == "merge_rows":
            parts = node.inputs["parts"]
            assert isinstance(parts, tuple)
            yield parts[node.outputs.index(made)]
        elif node.op == "matmul" and not node.attributes["transpose_b"]:
            yield node.operand("b")

    def _linked_elementwise(self, node: Node) -> Iterator[Ref]:
        """Sums of two values with these channels, and products of one with one number per row."""
        shapes = self.program.shapes
        operands = tuple(node.reads())
        kind = node.attributes["op"] if node.op == "elementwise" else node.op
        wide = [ref for ref in operands if shapes[ref] and shapes[ref][-1] == self.width]
        if kind in ("add", "subtract") and len(wide) == len(operands):
            yield from wide
        elif kind in ("multiply", "divide") and len(wide) == 1 and math.prod(shapes[operands[-1]][-1:]) == 1:
            yield wide[0]


def _is_row_norm(node: Node) -> bool:
    return bool(node.attributes.get("op") == "norm" and node.attributes.get("axis") == -1)
