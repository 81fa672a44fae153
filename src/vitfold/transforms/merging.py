"""Where tokens merge or go in a program: behind attention, in front of a block or a layer, around attention.

What follows from them for the rest of the program is the replay's (`transforms/replay.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from vitfold.errors import ProgramError
from vitfold.program import Node, Program, Ref
from vitfold.program.axes import Span
from vitfold.program.program import Shape
from vitfold.program.queries import readers, residuals
from vitfold.program.trace import Traced
from vitfold.recipe import RULES, MergeRecipe
from vitfold.transforms.replay import ORIGINAL, MissingPlacesError, MissingSourcesError, TokenReplay
from vitfold.transforms.rules import Reduction, reduce_tokens
from vitfold.transforms.sinks import delete_largest, largest_left, refill, without_rows
from vitfold.transforms.tokens import Tokens, match, merge


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
        except MissingPlacesError:
            places = True
        except MissingSourcesError:
            sources = True


def merged_around_attention(program: Program, shapes: Mapping[str, Shape], r: int) -> Program:
    """Return the program in which r tokens less enter every attention, given back their rows behind it.

    They are matched by what the attention reads.

    Source: ToMe (2210.09461) for the merge, ToMe for Stable Diffusion (2303.17604) for undoing it.

    Raises:
        ProgramError: if queries, keys and values of a block do not come from one value.
    """
    return _Around(program, shapes, r).run() if r else program


class _Merging(TokenReplay):
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


class _Around(TokenReplay):
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
