"""A replay of any program with a token axis that knows where its tokens are, however few are left.

A program is replayed into a recorder. Tokens that were merged or deleted make a new generation: values that hold
it are shorter along the token axis, and operations that treat rows alike go on with it. Attention counts merged
keys by their size, a mean over tokens weights by it. Whatever needs the original tokens (an operation without a
rule, values of two generations that meet, an output that promises all tokens) gets them back first: every original
token takes the row that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from vitfold.ops.protocol import Ops
from vitfold.program import Node, Program, Ref
from vitfold.program.axes import ON_LAST_AXIS, Span, token_spans
from vitfold.program.program import Shape
from vitfold.program.queries import makers
from vitfold.program.trace import Recorder, Traced, call
from vitfold.transforms.tokens import Tokens, log_size

ORIGINAL = 0
"""The generation of the tokens that a model has by itself."""


class MissingSourcesError(Exception):
    """Rows have to be given back, and nobody kept whose they are."""


class MissingPlacesError(Exception):
    """Something known stands in the order of the original tokens, and nobody kept which places rows have."""


class TokenReplay:
    """A replay that knows where tokens are; subclasses say where they merge."""

    def __init__(self, program: Program, shapes: Mapping[str, Shape], prefix: int, suffix: int = 0) -> None:
        self._program, self._spans, self._prefix = program, token_spans(program), prefix
        self._suffix = suffix
        self._made_by = makers(program)
        self._originals = max((span.stop for span in self._spans.values()), default=0)
        self._recorder = Recorder(shapes, program.inputs)
        self._made: dict[Ref, Traced] = {value.ref: value for value in self._recorder.enter()}
        self._generation: dict[Ref, int] = {}
        self._whole: dict[Ref, Traced] = {}
        self._tokens: dict[int, Tokens[Traced]] = {}
        self._conserved = True
        self._prop_attn = True

    @property
    def _ops(self) -> Ops[Traced]:
        return self._recorder.ops

    def run(self) -> Program:
        """Replay and return what was recorded."""
        for node in self._program.nodes:
            self._recorder.scope(node.scope, node.block, node.role)
            self._before(node)
            self._recorder.scope(node.scope, node.block, node.role)
            self._place(node)
            self._after(node)
        outputs = {name: self._original(ref) for name, ref in self._program.outputs.items()}
        return self._recorder.program({**outputs, **self._columns()})

    def _before(self, node: Node) -> None:
        """Change what a node will read."""

    def _after(self, node: Node) -> None:
        """Change what a node made."""

    def _columns(self) -> Mapping[str, Traced]:
        return {}

    def _place(self, node: Node) -> None:
        """Record a node for whatever generation its operands are of."""
        moving = [ref for ref in node.reads() if self._moves(ref)]
        known = [ref for ref in moving if self._is_known(ref)] if node.op in _TABLES else []
        generations = {self._generation.get(ref, ORIGINAL) for ref in moving if ref not in known}
        generation = generations.pop() if len(generations) == 1 else ORIGINAL
        results = None if generation == ORIGINAL else self._shorter(node, generation, known)
        if results is None:
            generation = ORIGINAL
            operands = {ref: self._original(ref) for ref in node.reads()}
            self._recorder.scope(node.scope, node.block, node.role)
            results = call(self._ops, node, operands)
        for ref, value in zip(node.outputs, results, strict=True):
            self._made[ref] = value
            if generation != ORIGINAL and self._moves(ref):
                self._generation[ref] = generation

    def _moves(self, ref: Ref) -> bool:
        """Whether a value holds tokens that may merge."""
        span = self._spans.get(ref)
        return span is not None and span.stop > self._prefix and span.start < self._originals - self._suffix

    def _is_known(self, ref: Ref) -> bool:
        """Whether a value is a parameter, which has a row for every original token."""
        maker = self._made_by.get(ref)
        return maker is not None and maker.op == "param"

    def _shorter(self, node: Node, generation: int, known: list[Ref]) -> tuple[Traced, ...] | None:
        """Record a node on merged tokens; None where it needs the original ones."""
        if node.op == "attention":
            return self._attention(node, generation)
        if known:
            return self._beside_known(node, generation, known)
        if node.op in ("mean", "sum"):
            return self._reduced(node, generation)
        if any(ref not in self._spans for ref in node.outputs):
            return None
        changed = self._resized(node, self._tokens[generation].count)
        return None if changed is None else call(self._ops, changed, self._made)

    def _beside_known(self, node: Node, generation: int, known: list[Ref]) -> tuple[Traced, ...] | None:
        """An operation on single elements, with the rows of parameters (positions, rotary tables) that tokens keep."""
        values: dict[Ref, Traced] = {ref: self._made[ref] for ref in node.reads()}
        for ref in known:
            span, shape = self._spans[ref], self._program.shapes[ref]
            if span.axis != len(shape) - 2 or node.outputs[0] not in self._spans:
                return None
            values[ref] = self._ops.lookup(self._name_of(ref), self._places(generation, span))
        return call(self._ops, node, values)

    def _name_of(self, ref: Ref) -> str:
        return str(self._made_by[ref].attributes["name"])

    def _places(self, generation: int, span: Span) -> Traced:
        """Which rows of a span its tokens keep, counted from its beginning."""
        tokens = self._tokens[generation]
        if tokens.origin is None:
            raise MissingPlacesError
        rows = tokens.origin
        if (span.start, span.stop) != (0, self._originals):
            rows = self._ops.slice(rows, 1, span.start, span.start + self._length(span, tokens.count))
        return self._ops.affine_index(rows, 1, -span.start) if span.start else rows

    def _resized(self, node: Node, count: int) -> Node | None:
        """The node with attributes for `count` tokens; None if it does not treat rows alike."""
        if node.op == "reshape":
            span = self._spans[node.outputs[0]]
            shape = list(node.attributes["shape"])
            shape[span.axis - 1] = self._length(span, count)
            return replace(node, attributes={**node.attributes, "shape": tuple(shape)})
        (operand, *_) = [self._spans[one] for one in node.reads() if one in self._spans]
        if node.op == "slice" and node.attributes["axis"] == operand.axis:
            first = operand.start + node.attributes["start"]
            last = operand.start + node.attributes["stop"]
            whole = Span(axis=operand.axis, start=first, stop=last)
            behind, gone = self._originals - self._suffix, self._originals - count
            of_prefix, of_suffix = last <= self._prefix, first >= behind
            if node.attributes["step"] != 1 or not (
                of_prefix or of_suffix or (first <= self._prefix and last >= behind)
            ):
                return None  # some of the patches, which are in other places now
            start = node.attributes["start"] - gone * of_suffix
            return replace(
                node, attributes={**node.attributes, "start": start, "stop": start + self._length(whole, count)}
            )
        if node.op == "concat" and node.attributes["axis"] == operand.axis:
            return node if self._adjoin(node) else None
        if node.op in ON_LAST_AXIS:
            return node if operand.axis != len(node.shapes[0]) - 1 else None
        return node if node.op in _ROWWISE and node.attributes.get("axis") != operand.axis else None

    def _adjoin(self, node: Node) -> bool:
        """Whether a concatenation puts the parts of a sequence one behind the other, as they were."""
        spans = [self._spans.get(ref) for ref in node.reads()]
        whole = self._spans.get(node.outputs[0])
        ends = [whole.start if whole is not None else -1]
        for span in spans:
            if span is None or span.start != ends[-1]:
                return False
            ends.append(span.stop)
        return whole is not None and ends[-1] == whole.stop

    def _length(self, span: Span, count: int) -> int:
        """How many rows of a span are left where `count` of all are: those of prefix and suffix are."""
        if span.stop <= self._prefix or span.start >= self._originals - self._suffix:
            return span.stop - span.start
        return span.stop - span.start - (self._originals - count)

    def _attention(self, node: Node, generation: int) -> tuple[Traced, ...] | None:
        """Merged keys count by their size; a known bias of pairs is that of the places that tokens keep."""
        span = self._spans[node.operand("k")]
        q, k, v = (self._made[node.operand(name)] for name in ("q", "k", "v"))
        tokens = self._part(generation, span)
        bias = log_size(self._ops, tokens) if self._prop_attn else None
        given = node.inputs["bias"]
        if isinstance(given, int):
            lengths = {self._program.shapes[Ref(given)][axis] for axis in (2, 3)}
            if not self._is_known(Ref(given)) or lengths != {span.stop - span.start}:
                return None
            rows = self._places(generation, span)
            pairs = self._ops.lookup(self._name_of(Ref(given)), rows, rows)
            bias = pairs if bias is None else self._ops.add(pairs, bias)
        return (self._ops.attention(node.attributes["site"], q, k, v, bias),)

    def _reduced(self, node: Node, generation: int) -> tuple[Traced, ...] | None:
        """A mean over tokens weights them by their size."""
        a = node.operand("a")
        if self._spans[a].axis != node.attributes["axis"]:
            return call(self._ops, node, self._made)
        tokens = self._part(generation, self._spans[a])
        x, size, axis = self._made[a], tokens.size, node.attributes["axis"]
        if axis != 1 or len(x.shape) != 3 or node.op != "mean":
            return None
        if size is None:
            return (self._ops.mean(x, axis),)
        x = self._ops.sum(self._ops.multiply(x, size), axis)
        if self._conserved:
            return (self._ops.scale(x, 1.0 / (self._spans[a].stop - self._spans[a].start)),)
        return (self._ops.divide(x, self._ops.sum(size, axis)),)

    def _part(self, generation: int, span: Span) -> Tokens[Traced]:
        """The columns of the tokens that a span has; `x` is not among them."""
        tokens = self._tokens[generation]
        if (span.start, span.stop) == (0, self._originals):
            return tokens
        rows = (span.start, span.start + self._length(span, tokens.count))
        size = None if tokens.size is None else self._ops.slice(tokens.size, 1, *rows)
        front, back = max(tokens.prefix - span.start, 0), max(span.stop - self._originals + tokens.suffix, 0)
        return replace(tokens, size=size, source=None, count=rows[1] - rows[0], prefix=front, suffix=back)

    def _original(self, ref: Ref) -> Traced:
        """The value with all its original tokens."""
        generation = self._generation.get(ref, ORIGINAL)
        if generation == ORIGINAL:
            return self._made[ref]
        if ref not in self._whole:
            tokens = self._tokens[generation]
            if tokens.source is None:
                raise MissingSourcesError
            self._whole[ref] = self._restored(ref, self._made[ref], self._spans[ref], tokens)
        return self._whole[ref]

    def _restored(self, ref: Ref, value: Traced, span: Span, tokens: Tokens[Traced]) -> Traced:
        """Give every original token the row that holds it, along whatever axis the tokens are."""
        node, ops, shape = self._made_by[ref], self._ops, self._program.shapes[ref]
        self._recorder.scope(node.scope, node.block, node.role)
        last = len(shape) - 1
        if last == 1:
            value, last = ops.reshape(value, (*value.shape[1:], 1)), 2
        others = [axis for axis in range(last + 1) if axis != span.axis]
        order = (*others[:-1], span.axis, others[-1])
        moves = order != tuple(range(last + 1))
        x = ops.transpose(value, order) if moves else value
        source = self._owners(span, tokens)
        owned = ops.transpose(source, (0, 2, 1))
        if last > 2:
            owned = ops.reshape(owned, (*(1,) * (last - 2), *owned.shape[1:]))
        whole = self._filled(ref, ops.matmul(f"{node.scope}.unmerge", owned, x), source, span)
        if moves:
            whole = ops.transpose(whole, tuple(order.index(axis) for axis in range(last + 1)))
        return whole if len(shape) > 2 else ops.reshape(whole, shape[1:])

    def _filled(self, ref: Ref, whole: Traced, source: Traced, span: Span) -> Traced:  # noqa: ARG002
        """Fill the places of tokens that no row holds; `whole` is (B, ..., N, D)."""
        return whole

    def _owners(self, span: Span, tokens: Tokens[Traced]) -> Traced:
        """Which of a span's original tokens each of its rows holds: (B, n, N)."""
        source = tokens.source
        assert source is not None
        if (span.start, span.stop) == (0, self._originals):
            return source
        rows = self._ops.slice(source, 1, span.start, span.start + self._length(span, tokens.count))
        return self._ops.slice(rows, 2, span.start, span.stop)

    def _begin(self, ref: Ref, tokens: Tokens[Traced]) -> None:
        """Let a value be of a new generation."""
        generation = len(self._tokens) + 1
        self._tokens[generation], self._made[ref], self._generation[ref] = tokens, tokens.x, generation
        self._whole.pop(ref, None)


_TABLES = frozenset({"add", "multiply", "divide", "elementwise", "attention"})
"""Operations that may take a parameter with a row for every token: it gives the rows of the places that tokens keep."""
_ROWWISE = frozenset(
    {
        *("heads", "activation", "scale", "add_scalar", "log", "tanh", "transpose", "add", "multiply", "divide"),
        *("split", "slice", "concat", "ones_like", "elementwise"),
    }
)
"""Operations that treat rows of tokens alike, where their attributes do not name the token axis."""
