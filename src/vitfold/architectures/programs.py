"""The programs of a Vision Transformer: plain, with what its recipe makes of it, and as it is written for a runtime."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from vitfold.architectures.vit import vit
from vitfold.artifacts.bundle import Manifest
from vitfold.model import Architecture, GraphSpec, ViTSpec, param_shapes
from vitfold.ops.protocol import Ops, Port, T
from vitfold.program import Program, program_from_dict, replay, trace
from vitfold.program.program import Shape
from vitfold.program.queries import attentions_of
from vitfold.recipe import MergeRecipe, QuantRecipe, tokens_per_block
from vitfold.transforms import without_dead_rows
from vitfold.transforms.merging import COLUMNS, Deletion, Layout, merged, stream_name
from vitfold.transforms.rewriting import only_outputs
from vitfold.transforms.sinks import with_sinks, without_row
from vitfold.transforms.tokens import Tokens

INPUT = "pixel_values"
UNMERGED = MergeRecipe(r=())


@functools.lru_cache(maxsize=64)
def shapes_of(spec: Architecture) -> Mapping[str, Shape]:
    """Return the shapes of all parameters that a model of this architecture may have."""
    required, optional = param_shapes(spec)
    return MappingProxyType(required | optional)


@functools.lru_cache(maxsize=64)
def plain_program(spec: Architecture) -> Program:
    """Return the program of the architecture: as its paper has it, or as it came."""
    if isinstance(spec, GraphSpec):
        return program_from_dict(json.loads(spec.program))
    return trace(
        lambda ops, image: vit(ops, spec, image),
        shapes_of(spec),
        inputs=(Port(name=INPUT, shape=(spec.channels, *spec.image_size)),),
        outputs=spec.output_names,
    )


@functools.lru_cache(maxsize=64)
def program_of(spec: Architecture, merge: MergeRecipe = UNMERGED, *, sources: bool = False) -> Program:
    """Return the program with merging and with what is done about sinks.

    Its outputs are the model's own, `spec.output_names`, then the tokens in front of every block and behind the last
    one by `transforms.merging.stream_name`; with `sources` also which original tokens each row holds.

    Raises:
        RecipeError: if more tokens shall merge than there are.
    """
    tokens_per_block(spec, merge.r)
    shapes, sinks = shapes_of(spec), spec.sinks
    deletion = None
    if sinks is not None and sinks.deletions:
        deletion = Deletion(block=sinks.block, count=sinks.deletions, layer=sinks.deletion_site)
    layout = Layout(prefix=spec.prefix, grid=spec.grid, suffix=spec.suffix, narrow_heads=_narrow_heads(spec))
    if spec.unmergeable:
        return plain_program(spec)
    program = merged(plain_program(spec), shapes, merge, layout, deletion=deletion, sources=sources)
    if sinks is None:
        return program
    program = with_sinks(program, shapes, sinks, spec.prefix)
    if sinks.neurons and isinstance(spec, ViTSpec):
        dense = (spec.output,) if spec.pool == "none" else ()
        for name in (*dense, *(name for name in spec.also if name != "image_embeds")):
            program = without_row(program, shapes, name, spec.prefix - 1)
    return program


def _narrow_heads(spec: Architecture) -> frozenset[int]:
    """The blocks whose heads are narrower than the model came with."""
    return frozenset(block for block in range(spec.num_layers) if spec.head_dim_of(block) < spec.head_dim)


def forward(
    ops: Ops[T],
    spec: Architecture,
    merge: MergeRecipe,
    image: T | None,
    *,
    sources: bool = False,
    given: tuple[int, Tokens[T]] | None = None,
    observe: Callable[[int, Tokens[T]], None] | None = None,
) -> T:
    """Run a model under an interpreter: (B, 3, H, W) -> its output.

    Args:
        sources: whether `observe` sees which original tokens each row holds.
        given: a block and the tokens in front of it; what stands before that block is not run, and needs no image.
        observe: is shown the tokens in front of block l, `observe(l, tokens)`, and those that leave the last one. Where
            tokens are given, it sees those behind.

    Raises:
        RecipeError: if more tokens shall merge than there are.
    """
    program = program_of(spec, merge, sources=sources)
    known = {} if given is None else _named(program, *given)
    seen: dict[str, T] = {}
    last = {stream_name(block, "x"): block for block in range(spec.num_layers + 1)}

    def see(name: str, value: T) -> None:
        seen[name] = value
        block = last.get(name)
        if block is not None and observe is not None:
            size, source, origin = (seen.pop(stream_name(block, column), None) for column in COLUMNS[1:])
            count = program.shapes[program.outputs[name]][1]
            tokens = Tokens(
                x=value, count=count, prefix=spec.prefix, suffix=spec.suffix, size=size, source=source, origin=origin
            )
            observe(block, replace(tokens, placed=origin is not None))

    inputs = () if image is None else (image,)
    watching = see if observe is not None else None
    outputs: tuple[T, ...] = replay(program, ops, *inputs, only=(spec.output,), given=known, observe=watching)
    return outputs[0]


def _named(program: Program, block: int, tokens: Tokens[T]) -> dict[str, T]:
    columns = {column: getattr(tokens, column) for column in COLUMNS}
    named = {stream_name(block, column): value for column, value in columns.items() if value is not None}
    return {name: value for name, value in named.items() if name in program.outputs}


@functools.lru_cache(maxsize=64)
def deployed_program(spec: Architecture, merge: MergeRecipe, whole: frozenset[str] = frozenset()) -> Program:
    """Return the program that is written for a runtime: without the rows of its last block that pooling does not read.

    Args:
        whole: sites of attentions that keep all their queries, see `whole_attentions`.

    Raises:
        RecipeError: if more tokens shall merge than there are.
    """
    program = only_outputs(program_of(spec, merge), *spec.output_names)
    return without_dead_rows(program, shapes_of(spec), whole=whole)


def whole_attentions(spec: Architecture, quant: QuantRecipe | None, *, wanted: bool) -> frozenset[str]:
    """Return the sites of attentions that a runtime computes for all queries, also where only some are read.

    Args:
        wanted: whether the target has it so, `Target.whole_attention`.
    """
    if not wanted or quant is None or not quant.attention:
        return frozenset()
    sites = (node.site for node in attentions_of(plain_program(spec)))
    return frozenset(site for site in sites if quant.bits(site, weight=False) is not None)


def spec_in(manifest: Manifest) -> Architecture:
    """Return the architecture of what a bundle computes: its blocks are as narrow as the recipe left them.

    Of a graph it is that before anything was pruned: what goes is found in its parameters, which no manifest holds.
    """
    spec, prune = manifest.spec, manifest.recipe.prune
    if prune is None or not isinstance(spec, ViTSpec):
        return spec
    blocks = range(spec.num_layers)
    return spec.with_widths(
        [prune.heads_of(block, spec.heads_of(block)) for block in blocks],
        [prune.head_dim_of(block, spec.head_dim_of(block)) for block in blocks],
        [prune.units_of(block, spec.mlp_dim_of(block)) for block in blocks],
    )


def whole_in(manifest: Manifest) -> frozenset[str]:
    """Return the sites of the attentions that a bundle computes for all queries; none in those of versions before."""
    return whole_attentions(
        manifest.spec, manifest.recipe.quant, wanted=bool(manifest.target.get("whole_attention", False))
    )
