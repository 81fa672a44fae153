"""Token merging, deletions and their undoing as a change of any program with a token axis.

The program is replayed into a recorder. A merge makes a new generation of tokens: values that hold it are shorter
along the token axis, and operations that treat rows alike go on with it. Attention counts merged keys by their
size, a mean over tokens weights by it. Whatever needs the original tokens (an operation without a rule, values of
two generations that meet, an output that promises all tokens) gets them back first: every original token takes the
row that holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vitfold.errors import ProgramError
from vitfold.ops.protocol import Ops
from vitfold.program import Node, Program, Ref
from vitfold.program.axes import ON_LAST_AXIS, Span, token_spans
from vitfold.program.program import Shape
from vitfold.program.queries import makers, readers, residuals
from vitfold.program.trace import Recorder, Traced, call
from vitfold.recipe import RULES, MergeRecipe
from vitfold.transforms.rules import Reduction, reduce_tokens
from vitfold.transforms.sinks import delete_largest, largest_left, refill, without_rows
from vitfold.transforms.tokens import Tokens, log_size, match, merge

ORIGINAL = 0
"""The generation of the tokens that a model has by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a program's tokens stand: a raster of `grid` patches between `prefix` and `suffix` rows that never merge.

    In blocks of `narrow_heads` every head has directions of its own, so a mean over heads says nothing of a key.
    """

    prefix: int
    grid: tuple[int, int]
    suffix: int = 0
    narrow_heads: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """In front of block `block` the `count` patch tokens of largest norm go, or at the input of `layer`, if given."""

    block: int
    count: int
    layer: str | None = None


COLUMNS = ("x", "size", "source", "origin")
"""What is kept of the tokens in front of a block: all that what follows may read."""


def stream_name(boundary: int, column: str) -> str:
    """Name an output that holds one of `COLUMNS` of the tokens in front of block `boundary`."""
    return f"tokens.{boundary}.{column}"


def merged(
    program: Program,
    shapes: Mapping[str, Shape],
    recipe: MergeRecipe,
    layout: Layout,
    *,
    deletion: Deletion | None = None,
    sources: bool = False,
) -> Program:
    """Return the program in which block l merges `recipe.r[l]` tokens behind its attention.

    The tokens in front of every block, and behind the last one, are outputs, too, by `stream_name`: `x` (B, N, D),
    `size` (B, N, 1) where there was a merge, `source` (B, N, N_0) with `sources`, or where an output needs it, and
    `origin` (B, N, 1) where something asks for the places of tokens.

    Args:
        shapes: those of the parameters.

    Raises:
        ProgramError: if a block has no attention with a residual addition behind it.
    """
    places = False
    while True:
        replaying = _Merging(program, shapes, recipe, layout, deletion, sources=sources, places=places)
        try:
            return replaying.run()
        except _MissingPlacesError:
            places = True
        except _MissingSourcesError:
            sources = True


def merged_around_attention(program: Program, shapes: Mapping[str, Shape], r: int) -> Program:
    """Return the program in which r tokens less enter every attention, given back their rows behind it.

    They are matched by what the attention reads.

    Source: ToMe (2210.09461) for the merge, ToMe for Stable Diffusion (2303.17604) for undoing it.

    Raises:
        ProgramError: if queries, keys and values of a block do not come from one value.
    """
    return _Around(program, shapes, r).run() if r else program


class _MissingSourcesError(Exception):
    """Rows have to be given back, and nobody kept whose they are."""


class _MissingPlacesError(Exception):
    """Something known stands in the order of the original tokens, and nobody kept which places rows have."""


class _Replay:
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
            raise _MissingPlacesError
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
                raise _MissingSourcesError
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


class _Merging(_Replay):
    """Merges behind the attention of blocks, deletions in front of one."""

    def __init__(
        self,
        program: Program,
        shapes: Mapping[str, Shape],
        recipe: MergeRecipe,
        layout: Layout,
        deletion: Deletion | None,
        *,
        sources: bool,
        places: bool,
    ) -> None:
        super().__init__(program, shapes, layout.prefix, layout.suffix)
        self._keeps_places = places
        self._deletion = deletion or Deletion(block=0, count=0)
        self._recipe, self._layout, self._keeps = recipe, layout, sources
        self._prop_attn = recipe.prop_attn
        blocks = residuals(program)
        self._blocks, self._residuals = len(blocks), blocks
        last = [node for node in program.nodes if node.block == self._blocks - 1][-1:]
        self._streams = (*(block.stream for block in blocks), *(node.outputs[0] for node in last))
        self._seen: dict[str, Traced] = {}
        self._open = 0
        self._merges = {
            id(block.addition): (r, block.attention) for r, block in zip(recipe.r, blocks, strict=False) if r
        }
        self._deletes = self._deletion.count > 0
        self._conserved = not self._deletes and (not any(recipe.r) or RULES[recipe.rule].conserves)

    def _stream(self, ref: Ref) -> Tokens[Traced]:
        """The tokens that a value of the residual stream holds."""
        generation = self._generation.get(ref, ORIGINAL)
        if generation == ORIGINAL:
            x = self._made[ref]
            return Tokens(x=x, count=x.shape[1], prefix=self._prefix, suffix=self._suffix, placed=self._keeps_places)
        return replace(self._tokens[generation], x=self._made[ref])

    def _before(self, node: Node) -> None:
        if node.block != self._open - 1 and node.block is not None:
            self._note(node.block)
            self._open = node.block + 1
            if self._deletes and self._deletion.layer is None and self._deletion.block == node.block:
                self._delete(node.block, self._deletion.count)
        if self._deletes and self._deletion.layer is not None and node.attributes.get("layer") == self._deletion.layer:
            self._delete_at(node, self._deletion.count)

    def _note(self, boundary: int) -> None:
        """Keep the tokens in front of a block as outputs."""
        tokens = self._stream(self._streams[boundary])
        for column in COLUMNS:
            value = getattr(tokens, column)
            if value is not None:
                self._seen[stream_name(boundary, column)] = value

    def _columns(self) -> Mapping[str, Traced]:
        self._note(self._blocks)
        return self._seen

    def _delete(self, block: int, count: int) -> None:
        self._recorder.scope(f"blocks.{block}.delete", block, "merge")
        ref = self._streams[block]
        left = delete_largest(self._ops, self._stream(ref), count, order=self._recipe.order, trace=self._keeps)
        self._begin(ref, left)

    def _delete_at(self, node: Node, count: int) -> None:
        """Drop tokens from what a layer reads and from the residual stream beside it.

        Raises:
            ProgramError: if the two do not hold the same tokens.
        """
        assert node.block is not None
        residual = self._residuals[node.block]
        (stream,) = residual.addition.outputs if node.role == "mlp" else (residual.stream,)
        x = node.source
        if self._generation.get(x, ORIGINAL) != self._generation.get(stream, ORIGINAL):
            raise ProgramError(f"{node.site} reads other tokens than the residual stream; delete in front of a block")
        self._recorder.scope(f"blocks.{node.block}.delete", node.block, "merge")
        tokens, read = self._stream(stream), self._made[x]
        survivors = largest_left(self._ops, read, tokens, count, order=self._recipe.order)
        left = without_rows(self._ops, tokens, survivors, count, trace=self._keeps)
        self._begin(stream, left)
        self._made[x], self._generation[x] = self._ops.take(read, survivors), self._generation[stream]
        self._whole.pop(x, None)

    def _after(self, node: Node) -> None:
        r, attention = self._merges.get(id(node), (0, None))
        if attention is None:
            return
        (ref,) = node.outputs
        q, k = attention.operand("q"), attention.operand("k")
        here = Reduction(
            tokens=self._stream(ref),
            q=self._as_long(q, ref),
            k=self._as_long(k, ref),
            r=r,
            width=self._made[ref].shape[-1],
            head_width=self._made[q].shape[-1],
            narrow_heads=node.block in self._layout.narrow_heads,
            originals=self._originals,
            depth_ratio=(node.block or 0) / self._blocks,
            order=self._recipe.order,
            trace=self._keeps,
        )
        self._recorder.scope(node.scope, node.block, "merge")
        self._begin(ref, reduce_tokens(self._ops, self._recipe.rule, f"blocks.{node.block}.merge", here))

    def _as_long(self, ref: Ref, stream: Ref) -> Traced:
        """A value with the tokens of the stream, which had its own back where it met others."""
        whole = self._generation.get(stream, ORIGINAL) == ORIGINAL
        return self._original(ref) if whole else self._made[ref]

    def _filled(self, ref: Ref, whole: Traced, source: Traced, span: Span) -> Traced:
        if not self._deletes:
            return whole
        if len(whole.shape) != 3:
            raise ProgramError(
                f"{self._name(ref)} needs deleted tokens back among {len(whole.shape)} axes; delete none"
            )
        prefix = max(self._prefix - span.start, 0)
        return refill(self._ops, prefix, self._layout.grid, source, whole)

    def _name(self, ref: Ref) -> str:
        readings = readers(self._program)[ref]
        return readings[0].site if readings else self._made_by[ref].site


class _Around(_Replay):
    """Merges in front of every attention, undone behind its projection."""

    def __init__(self, program: Program, shapes: Mapping[str, Shape], r: int) -> None:
        super().__init__(program, shapes, prefix=0)
        self._r = r
        self._sources: dict[int, Ref] = {}
        for node in program.nodes:
            if node.op == "attention" and node.block is not None:
                found = {_read_by_linear(self._made_by, node.operand(name)) for name in ("q", "k", "v")}
                if len(found) != 1 or None in found:
                    raise ProgramError(f"{node.site} does not take queries, keys and values from one value; use r = 0")
                (source,) = found
                assert source is not None
                self._sources[node.block] = source

    def _before(self, node: Node) -> None:
        if node.block is None or node.op not in ("linear", "heads"):
            return
        source = self._sources.get(node.block)
        if source is None or source not in node.reads() or source in self._generation:
            return
        x = self._made[source]
        tokens = Tokens(x=x, count=x.shape[1], prefix=0)
        site = f"blocks.{node.block}.attn.merge"
        pairs = match(self._ops, site, x, count=tokens.count, prefix=0, r=self._r)
        self._begin(source, merge(self._ops, site, tokens, pairs, r=self._r, trace=True))

    def _after(self, node: Node) -> None:
        (ref, *_) = node.outputs
        if node.op == "linear" and self._generation.get(ref, ORIGINAL) != ORIGINAL:
            self._made[ref] = self._original(ref)
            del self._generation[ref]


def _read_by_linear(made_by: Mapping[Ref, Node], ref: Ref) -> Ref | None:
    """The value that the linear layer reads which a query, key or value comes from."""
    while True:
        node = made_by.get(ref)
        if node is None:
            return None
        ref = node.source
        if node.op in ("linear", "heads"):
            return ref


_TABLES = frozenset({"add", "multiply", "divide", "elementwise", "attention"})
"""Operations that may take a parameter with a row for every token: it gives the rows of the places that tokens keep."""
_ROWWISE = frozenset(
    {
        *(
            "heads",
            "activation",
            "scale",
            "add_scalar",
            "log",
            "tanh",
            "transpose",
            "add",
            "multiply",
            "divide",
            "split",
        ),
        *("slice", "concat", "ones_like", "elementwise"),
    }
)
"""Operations that treat rows of tokens alike, where their attributes do not name the token axis."""
