"""Which rows of which layers a narrower model lacks, and that model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vitfold.architectures.programs import plain_program, shapes_of
from vitfold.compensation.pruning import columns_of
from vitfold.errors import RecipeError
from vitfold.model import Architecture, Array, Model, ViTSpec
from vitfold.ops.protocol import Ops
from vitfold.program import Node, Program
from vitfold.program.queries import HiddenRows, closing_linears, head_rows, hidden_rows
from vitfold.program.trace import Traced
from vitfold.recipe import PruneRecipe
from vitfold.transforms.rewriting import Change, Given, rewrite


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrowing:
    """What reads hidden units or heads, `there` of them, each of `width` values, and how many of them `stay`.

    `rows` are the layers that make them. Heads may stay as fewer values each, `head_dim` of them.
    """

    layer: str
    rows: tuple[HiddenRows, ...]
    there: int
    stay: int
    width: int = 1
    head_dim: int | None = None

    @property
    def whole(self) -> bool:
        """True if nothing of it goes."""
        return self.stay == self.there and self.thinner is None

    @property
    def thinner(self) -> int | None:
        """How wide heads stay, None where they stay as wide as they are."""
        return None if self.head_dim in (None, self.width) else self.head_dim

    def values(self, kept: Int[Tensor, " K"]) -> Int[Tensor, " V"]:
        """Return which values those of `kept` are."""
        return columns_of(kept, self.width)


def narrowings(spec: Architecture, program: Program, prune: PruneRecipe) -> Mapping[str, Narrowing]:
    """Return what becomes narrower, by the layer that reads it.

    Raises:
        RecipeError: if what a recipe names cannot go, naming the block; if everything is to stay.
    """
    found: dict[str, Narrowing] = {}
    for block, (attention, mlp) in enumerate(closing_linears(program)):
        if prune.heads or prune.head_dims:
            one = _heads(program, attention)
            if one is None:
                raise RecipeError(
                    f"the heads of block {block} cannot be pruned: they share keys, or their results do not come "
                    "straight from linear layers and go into one; leave prune.heads and prune.head_dims out, or give "
                    "--prune-mlp"
                )
            one = replace(one, stay=prune.heads_of(block, one.there), head_dim=prune.head_dim_of(block, one.width))
            if one.thinner and not can_thin(spec):
                raise RecipeError(
                    f"the heads of block {block} cannot be narrower: their queries and keys pass a norm, or the model "
                    "comes from a graph; leave prune.head_dims out"
                )
            found[one.layer] = one
        if prune.mlp or prune.units:
            one = _units(spec, program, mlp)
            if one is None:
                raise RecipeError(
                    f"the MLP of block {block} cannot be pruned: it is not layers with only activations and products "
                    "of single units between them and the residual stream; leave --prune and --prune-mlp out"
                )
            found[one.layer] = replace(one, stay=prune.units_of(block, one.there))
    if all(one.whole for one in found.values()):
        raise RecipeError("pruning that takes no unit away, which go by 32; give a larger --prune or --prune-mlp")
    return found


def can_thin(spec: Architecture) -> bool:
    """Return whether heads of a model may be narrower: queries and keys go into their products as they are made."""
    return isinstance(spec, ViTSpec) and not spec.qk_norm


def prunable(spec: Architecture, program: Program) -> tuple[tuple[Narrowing | None, Narrowing | None], ...]:
    """Return, for every block, the heads of its attention and the units of its MLP; None for what cannot go."""
    return tuple(
        (_heads(program, attention), _units(spec, program, mlp)) for attention, mlp in closing_linears(program)
    )


def _heads(program: Program, layer: str | None) -> Narrowing | None:
    found = None if layer is None else head_rows(program, layer)
    if layer is None or found is None:
        return None
    return Narrowing(layer=layer, rows=found.rows, there=found.heads, stay=found.heads, width=found.width)


def _units(spec: Architecture, program: Program, layer: str | None) -> Narrowing | None:
    rows = None if layer is None else hidden_rows(program, layer)
    if layer is None or rows is None:
        return None
    there = shapes_of(spec)[f"{layer}.weight"][1]
    return Narrowing(layer=layer, rows=rows, there=there, stay=there)


def narrowed(model: Model, one: Narrowing, kept: Int[Tensor, " K"]) -> Model:
    """Return a model with only those of the units or heads; the layer that reads them reads no others."""
    params = {**model.params, **_only_values(model.params, one, one.values(kept).numpy())}
    return with_widths(model, params, head_dims_of(model.spec))


def _only_values(params: Mapping[str, Array], one: Narrowing, values: Array) -> dict[str, Array]:
    """The parameters of the layers that make some values and of the one that reads them."""
    found: dict[str, Array] = {f"{one.layer}.weight": np.ascontiguousarray(params[f"{one.layer}.weight"][:, values])}
    for rows in one.rows:
        for name in (f"{rows.layer}.weight", f"{rows.layer}.bias"):
            if name in params:
                found[name] = np.concatenate([part[values] for part in np.split(params[name], rows.parts)])
    return found


def thinned(model: Model, block: int, params: Mapping[str, Array], width: int) -> Model:
    """Return a model whose heads in a block are narrower, with the parameters of its attention that make them so."""
    dims = list(head_dims_of(model.spec))
    dims[block] = width
    return with_widths(model, {**model.params, **params}, dims)


def cut_to_width(model: Model, prune: PruneRecipe) -> Model:
    """Return the model with the first units and heads of every block: one as fast as a pruned one, to measure time.

    Raises:
        RecipeError: if what the recipe names cannot go.
    """
    layers = {layer: block for block, (layer, _) in enumerate(closing_linears(plain_program(model.spec)))}
    for one in narrowings(model.spec, plain_program(model.spec), prune).values():
        model = narrowed(model, one, torch.arange(one.stay))
        if one.thinner:
            first = (np.arange(one.stay)[:, None] * one.width + np.arange(one.thinner)).ravel()
            model = thinned(model, layers[one.layer], _only_values(model.params, one, first), one.thinner)
    return model


def head_dims_of(spec: Architecture) -> tuple[int, ...]:
    """Return how wide the heads of every block are; of a graph those of the first one."""
    return tuple(spec.head_dim_of(block) for block in range(spec.num_layers))


def with_widths(model: Model, params: Mapping[str, Array], head_dims: Sequence[int]) -> Model:
    """Return a model with other parameters, whose MLPs and attentions may be narrower, with heads so wide."""
    return model.with_params(_with_widths(model.spec, params, head_dims), params)


def _with_widths(spec: Architecture, params: Mapping[str, Array], head_dims: Sequence[int]) -> Architecture:
    if all(params[name].shape == shape for name, shape in shapes_of(spec).items() if name in params):
        return spec
    if isinstance(spec, ViTSpec):
        blocks = [f"blocks.{block}" for block in range(spec.num_layers)]
        joint = [params[f"{block}.attn.proj.weight"].shape[1] for block in blocks]
        heads = [width // dim for width, dim in zip(joint, head_dims, strict=True)]
        units = [params[f"{block}.mlp.fc2.weight"].shape[1] for block in blocks]
        return spec.with_widths(heads, head_dims, units)
    shapes = {name: params[name].shape for name, _ in spec.shapes}
    program = rewrite(plain_program(spec), {**shapes_of(spec), **shapes}, _fewer_heads(shapes))
    attention, mlp = closing_linears(program)[0]
    parted = None if attention is None else head_rows(program, attention)
    return replace(
        spec,
        program=json.dumps(program.to_dict()),
        shapes=tuple(shapes.items()),
        num_heads=spec.num_heads if parted is None else parted.heads,
        mlp_dim=spec.mlp_dim if mlp is None else shapes[f"{mlp}.weight"][1],
    )


def _fewer_heads(shapes: Mapping[str, tuple[int, ...]]) -> Change:
    """Return the change of nodes that part values into heads and put them together: as many as there are now."""

    def change(ops: Ops[Traced], node: Node, given: Given) -> tuple[Traced, ...] | None:
        if node.op == "heads":
            layer, parts = node.attributes["layer"], node.attributes["parts"]
            heads = shapes[f"{layer}.weight"][0] // (parts * node.shapes[0][-1])
            return ops.heads(layer, _single(given["x"]), parts, heads)
        if node.op == "reshape":
            value, shape = _single(given["a"]), node.attributes["shape"]
            count = int(np.prod(ops.shape(value)[1:]))
            if count != int(np.prod(shape)):
                return (ops.reshape(value, (*shape[:-1], count // int(np.prod(shape[:-1])))),)
        return None

    return change


def _single(operand: Traced | tuple[Traced, ...] | None) -> Traced:
    assert isinstance(operand, Traced)
    return operand
