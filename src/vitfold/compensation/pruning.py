"""Hidden units of an MLP, or heads of an attention, that its output can do without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitfold.compensation.factoring import factor_values
from vitfold.compensation.ridge import JITTER, RIDGES, RidgeSums

CHOOSING_RIDGE = 0.01
_LEAST = 1e-30
_STEPS = 128
"""In how many steps units go, at least; in each all weights are fitted anew."""
_CLOSING_UP = 7 / 8
"""The share of rows that are still in use at which the others are left out of what is computed with."""


def kept_by_count(
    square: Float[Tensor, "J J"], cross: Float[Tensor, "O J"], counts: Sequence[int], width: int = 1
) -> Iterator[tuple[int, Int[Tensor, " K"]]]:
    """Yield, for each count of units, largest first, those that the least squares of an output need most, in order.

    Equation: W = C H^-1, H = S + lambda I; a unit of columns J costs tr(W_J [H^-1]_JJ^-1 W_J^T). The cheapest few go, W
    and H^-1 become those of the others, and so on.

    Args:
        square: S, sums of x^T x; the last row and column are those of the bias, which stays.
        cross: C, sums of y^T x for the wanted outputs y.
        width: columns of a unit: 1 for hidden units, the width of a head for heads.

    Source: Optimal Brain Surgeon (Hassibi and Stork, 1993) for weights, ZipLM (2302.04089) for columns and heads.
    """
    held = square.double().clone()
    held.diagonal()[:-1].add_(CHOOSING_RIDGE * held.diagonal()[:-1].mean())
    held.diagonal()[-1].mul_(1.0 + JITTER)
    inverse = torch.linalg.inv(held)
    weight = cross.double() @ inverse
    there = (len(square) - 1) // width
    left, stays = torch.arange(there), torch.ones(there, dtype=torch.bool)
    group = max(1, there // _STEPS)
    for count in sorted(counts, reverse=True):
        while (surplus := int(stays.sum()) - count) > 0:
            if stays.sum() <= _CLOSING_UP * len(stays):
                read = torch.cat((columns_of(stays.nonzero().flatten(), width), torch.tensor([len(inverse) - 1])))
                inverse, weight = inverse[read][:, read], weight[:, read]
                left, stays = left[stays], stays[stays]
            cost = _costs(weight, inverse, width)
            cost[~stays] = torch.inf
            going = torch.topk(cost, min(group, surplus), largest=False).indices
            stays[going] = False
            columns = columns_of(going, width)
            reach = inverse[:, columns]
            step = torch.linalg.solve(inverse[columns][:, columns], reach.T)
            weight.addmm_(weight[:, columns], step, alpha=-1.0)
            inverse.addmm_(reach, step, alpha=-1.0)
            inverse[:, columns] = 0.0
            inverse[columns] = 0.0
            inverse[columns, columns] = 1.0
        yield count, left[stays]


def _costs(weight: Float[Tensor, "O J"], inverse: Float[Tensor, "J J"], width: int) -> Float[Tensor, " U"]:
    """What the output would lose with each unit."""
    if width == 1:
        return weight[:, :-1].square().sum(0) / inverse.diagonal()[:-1]
    count = (len(inverse) - 1) // width
    blocks = torch.stack([inverse[i : i + width, i : i + width] for i in range(0, count * width, width)])
    weights = weight[:, :-1].reshape(len(weight), count, width).transpose(0, 1)
    costs: Tensor = (weights * torch.linalg.solve(blocks, weights.mT).mT).sum((1, 2))
    return costs


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NarrowFit:
    """Which units or heads stay, the weight with zeros for the others and the bias behind it, its ridge.

    `left` is the share of the squared output that is missed on held-out rows.
    """

    kept: Int[Tensor, " U"]
    weight: Float[Tensor, "O J"]
    ridge: float
    left: float


def fit_narrow(
    sums: RidgeSums,
    held_out: RidgeSums,
    weight: Float[Tensor, "O J"],
    units: int,
    width: int = 1,
) -> NarrowFit:
    """Choose the units that stay and fit their weights anew; the ridge is the one that leaves least on held-out rows.

    Args:
        weight: the layer's weight now, its bias in the last column; `sums` hold what its outputs miss.
        width: columns of a unit.
    """
    weight = weight.double()
    cross = sums.cross.double() + weight @ sums.square.double()
    ((_, kept),) = kept_by_count(sums.square, cross, (units,), width)
    some = RidgeSums(sums.square, cross)
    outputs, best = held_out.remaining(-weight), None
    for ridge in RIDGES:
        found = weight_of(some, columns_of(kept, width), ridge).double()
        left = held_out.remaining(found - weight) / max(outputs, _LEAST)
        if best is None or left < best.left:
            best = NarrowFit(kept=kept, weight=found.float(), ridge=ridge, left=left)
    assert best is not None
    return best


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ThinFit:
    """The weight that reads narrower heads, its bias in the last column, and their directions among the values.

    `ridge` and `left` as of `NarrowFit`.
    """

    weight: Float[Tensor, "O W1"]
    directions: Float[Tensor, "H K W"]
    ridge: float
    left: float


def fit_thin(
    sums: RidgeSums, held_out: RidgeSums, weight: Float[Tensor, "O J"], narrow: NarrowFit, heads: int, width: int
) -> ThinFit:
    """Let the heads that stay be `width` values wide, along the directions that the layer reads best, and fit it anew.

    Args:
        weight: the layer's weight now, its bias in the last column; `sums` hold what its outputs miss.
        narrow: which heads stay.
    """
    weight = weight.double()
    size = (len(sums.square) - 1) // heads
    columns = columns_of(narrow.kept, size)
    own = sums.square[columns][:, columns]
    directions = factor_values(own, narrow.weight[:, columns], len(narrow.kept), width)
    basis = basis_of(directions, columns, len(sums.square))
    some = RidgeSums(sums.square, sums.cross.double() + weight @ sums.square.double()).along(basis)
    outputs, best = held_out.remaining(-weight), None
    for ridge in RIDGES:
        found = some.change(ridge)
        left = held_out.remaining(found.double() @ basis.T - weight) / max(outputs, _LEAST)
        if best is None or left < best.left:
            best = ThinFit(weight=found, directions=directions, ridge=ridge, left=left)
    assert best is not None
    return best


def basis_of(directions: Float[Tensor, "H K W"], columns: Int[Tensor, " C"], inputs: int) -> Float[Tensor, "J W1"]:
    """Return what makes narrower heads of a layer's inputs, a one behind them."""
    heads, size, width = directions.shape
    basis = torch.zeros(inputs, heads * width + 1, dtype=torch.double)
    for head in range(heads):
        rows = columns[head * size : (head + 1) * size]
        basis[rows, head * width : (head + 1) * width] = directions[head].double()
    basis[-1, -1] = 1.0
    return basis


def weight_of(sums: RidgeSums, columns: Int[Tensor, " C"], ridge: float) -> Float[Tensor, "O J"]:
    """Return the weight that reads only some columns, and the bias behind them; zeros for the others."""
    read = torch.cat((columns, torch.tensor([len(sums.square) - 1])))
    weight = torch.zeros(sums.cross.shape)
    weight[:, read] = RidgeSums(sums.square[read][:, read], sums.cross[:, read]).change(ridge)
    return weight


def columns_of(units: Int[Tensor, " K"], width: int) -> Int[Tensor, " C"]:
    """Return the columns of units that have `width` of them each."""
    return (units[:, None] * width + torch.arange(width)).flatten()
