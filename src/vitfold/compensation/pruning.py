"""Hidden units of an MLP that its output can do without, and the narrower model without them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitfold.architectures.programs import plain_program, shapes_of
from vitfold.compensation.ridge import JITTER, RidgeSums
from vitfold.errors import RecipeError
from vitfold.model import Architecture, Array, Model, ViTSpec
from vitfold.program import Program
from vitfold.program.queries import HiddenRows, closing_linears, hidden_rows
from vitfold.recipe import PruneRecipe
from vitfold.transforms.rewriting import rewrite

_CHOOSING_RIDGE = 0.01
_LEAST = 1e-30
_STEPS = 128
"""In how many steps units go, at least; in each all weights are fitted anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowMlp:
    """An MLP by its last layer: which rows of which layers make its hidden units, and how many of these stay."""

    layer: str
    rows: tuple[HiddenRows, ...]
    units: int


def narrow_mlps(spec: Architecture, program: Program, prune: PruneRecipe) -> Mapping[str, NarrowMlp]:
    """Return the MLP of every block by its last layer.

    Raises:
        RecipeError: if the units of a block cannot go, naming the block; if all are to stay.
    """
    shapes, found = shapes_of(spec), {}
    for block, (_, layer) in enumerate(closing_linears(program)):
        rows = None if layer is None else hidden_rows(program, layer)
        if layer is None or rows is None:
            raise RecipeError(
                f"the MLP of block {block} cannot be pruned: it is not layers with only activations and products of "
                "single units between them and the residual stream; leave --prune-mlp out"
            )
        hidden = shapes[f"{layer}.weight"][1]
        found[layer] = NarrowMlp(layer=layer, rows=rows, units=prune.units(hidden))
    widths = {shapes[f"{one.layer}.weight"][1] - one.units for one in found.values()}
    if widths <= {0}:
        raise RecipeError(f"a share of {prune.mlp:g} takes no unit away, which go by 32; give a larger --prune-mlp")
    return found


def units_to_keep(square: Float[Tensor, "J J"], cross: Float[Tensor, "O J"], units: int) -> Int[Tensor, " U"]:
    """Return the units that the least squares of an output need most, in their order.

    Equation: W = C H^-1, H = S + lambda I; unit j costs |w_j|^2 / [H^-1]_jj. The cheapest few go, W and H^-1 become
    those of the others, and so on.

    Args:
        square: S, sums of x^T x; the last row and column are those of the bias, which stays.
        cross: C, sums of y^T x for the wanted outputs y.

    Source: Optimal Brain Surgeon (Hassibi and Stork, 1993) for single weights, ZipLM (2302.04089) for columns.
    """
    held = square.double().clone()
    held.diagonal()[:-1].add_(_CHOOSING_RIDGE * held.diagonal()[:-1].mean())
    held.diagonal()[-1].mul_(1.0 + JITTER)
    inverse = torch.linalg.inv(held)
    weight = cross.double() @ inverse
    stays = torch.ones(len(square), dtype=torch.bool)
    surplus = len(square) - 1 - units
    group = max(1, surplus // _STEPS)
    while surplus > 0:
        cost = weight.square().sum(0) / inverse.diagonal()
        cost[~stays] = torch.inf
        cost[-1] = torch.inf
        going = torch.topk(cost, min(group, surplus), largest=False).indices
        reach = inverse[:, going]
        step = torch.linalg.solve(inverse[going][:, going], reach.T)
        weight -= weight[:, going] @ step
        inverse -= reach @ step
        stays[going] = False
        surplus -= len(going)
        inverse[:, going] = 0.0
        inverse[going] = 0.0
        inverse[going, going] = 1.0
    return stays[:-1].nonzero().flatten()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NarrowFit:
    """Which units stay, the weight with zeros for the others and the bias behind it, its ridge.

    `left` is the share of the squared output that is missed on held-out rows.
    """

    kept: Int[Tensor, " U"]
    weight: Float[Tensor, "O J"]
    ridge: float
    left: float


def fit_narrow(
    sums: RidgeSums, held_out: RidgeSums, weight: Float[Tensor, "O J"], units: int, ridges: Sequence[float]
) -> NarrowFit:
    """Choose the units that stay and fit their weights anew; the ridge is the one that leaves least on held-out rows.

    Args:
        weight: the layer's weight now, its bias in the last column; `sums` hold what its outputs miss.
    """
    weight = weight.double()
    cross = sums.cross.double() + weight @ sums.square.double()
    kept = units_to_keep(sums.square, cross, units)
    columns = torch.cat((kept, torch.tensor([len(sums.square) - 1])))
    some = RidgeSums(sums.square[columns][:, columns], cross[:, columns])
    outputs, best = held_out.remaining(-weight), None
    for ridge in ridges:
        found = torch.zeros_like(weight)
        found[:, columns] = some.change(ridge).double()
        left = held_out.remaining(found - weight) / max(outputs, _LEAST)
        if best is None or left < best.left:
            best = NarrowFit(kept=kept, weight=found.float(), ridge=ridge, left=left)
    assert best is not None
    return best


def narrowed(model: Model, mlps: Mapping[str, NarrowMlp], kept: Mapping[str, Int[Tensor, " U"]]) -> Model:
    """Return a model without the units that do not stay; its last layers have zeros there, so it computes the same."""
    params = dict(model.params)
    for layer, stays in kept.items():
        units = stays.numpy()
        for rows in mlps[layer].rows:
            for name in (f"{rows.layer}.weight", f"{rows.layer}.bias"):
                if name in params:
                    parts = np.split(params[name], rows.parts)
                    params[name] = np.concatenate([part[units] for part in parts])
        params[f"{layer}.weight"] = np.ascontiguousarray(params[f"{layer}.weight"][:, units])
    return with_widths(model, params)


def can_prune(model: Model, *shares: float) -> bool:
    """Say whether units of every block can go, in each of these shares."""
    try:
        for share in shares:
            narrow_mlps(model.spec, plain_program(model.spec), PruneRecipe(mlp=share))
    except RecipeError:
        return False
    return True


def cut_to_width(model: Model, prune: PruneRecipe) -> Model:
    """Return the model with the first units of every MLP: one as fast as a pruned one, for measuring time.

    Raises:
        RecipeError: if the units of a block cannot go.
    """
    mlps = narrow_mlps(model.spec, plain_program(model.spec), prune)
    return narrowed(model, mlps, {layer: torch.arange(one.units) for layer, one in mlps.items()})


def with_widths(model: Model, params: Mapping[str, Array]) -> Model:
    """Return a model with other parameters, whose MLPs may be narrower."""
    return model.with_params(_with_widths(model.spec, params), params)


def _with_widths(spec: Architecture, params: Mapping[str, Array]) -> Architecture:
    if all(params[name].shape == shape for name, shape in shapes_of(spec).items() if name in params):
        return spec
    if isinstance(spec, ViTSpec):
        return replace(spec, mlp_dim=params["blocks.0.mlp.fc2.weight"].shape[1])
    shapes = {name: params[name].shape for name, _ in spec.shapes}
    program = rewrite(plain_program(spec), {**shapes_of(spec), **shapes}, lambda *_: None)
    closing = next(layer for _, layer in closing_linears(program) if layer is not None)
    return replace(
        spec,
        program=json.dumps(program.to_dict()),
        shapes=tuple(shapes.items()),
        mlp_dim=shapes[f"{closing}.weight"][1],
    )
