"""Ridge regression of a change to a linear layer, from sums over rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.model import Array

PREFIX_WEIGHT = 16.0
"""How many original tokens a row of the prefix counts as: classifiers read it."""
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Shares of the mean second moment of a layer's inputs that are tried."""
JITTER = 1e-6
"""What keeps the bias's equation regular, as a share of its own moment."""
_PANEL = 384
"""Columns of a symmetric product that are multiplied at once with those from them on."""


def with_bias(params: Mapping[str, Array], layer: str) -> Float[Tensor, "O J"]:
    """Return a layer's weight, its bias in the last column."""
    weight, bias = torch.from_numpy(params[f"{layer}.weight"]), params.get(f"{layer}.bias")
    column = torch.zeros(len(weight)) if bias is None else torch.from_numpy(bias)
    return torch.cat((weight, column[:, None]), 1)


def as_params(layer: str, weight: Float[Tensor, "O J"]) -> dict[str, Array]:
    """Undo `with_bias`: a layer's weight and its bias as parameters."""
    columns = {"weight": weight[:, :-1], "bias": weight[:, -1]}
    return {f"{layer}.{name}": value.contiguous().numpy() for name, value in columns.items()}


@dataclass(slots=True, eq=False)
class RidgeSums:
    """Weighted sums over rows of inputs x (a one behind them) and of what their outputs miss.

    `square` sums x^T x, `cross` sums missing^T x, `missing` sums |missing|^2.
    """

    square: Float[Tensor, "J J"]
    cross: Float[Tensor, "O J"]
    missing: float = 0.0

    def add(self, x: Float[Tensor, "R I"], missing: Float[Tensor, "R O"], weight: Float[Tensor, "R 1"]) -> None:
        """Take more rows; their weights are not negative.

        What is symmetric is multiplied once, and widths stay even: a column of ones beside them makes products slower.
        """
        root, inputs = weight.sqrt(), x.shape[1]
        x, missing = x * root, missing * root
        for start in range(0, inputs, _PANEL):
            stop = min(start + _PANEL, inputs)
            self.square[start:stop, start:inputs].addmm_(x[:, start:stop].T, x[:, start:])
            self.square[stop:inputs, start:stop] = self.square[start:stop, stop:inputs].T
        self.square[:inputs, -1] += (x.T @ root).squeeze(1)
        self.square[-1] = self.square[:, -1]
        self.square[-1, -1] += weight.sum()
        self.cross[:, :-1].addmm_(missing.T, x)
        self.cross[:, -1] += (missing.T @ root).squeeze(1)
        self.missing += float(missing.square().sum())

    def change(self, ridge: float) -> Float[Tensor, "O J"]:
        """Return what to add to the weight and, in the last column, to the bias.

        Equation: D = argmin sum |missing - D x|^2 + lambda |D|^2 = C (S + lambda I)^-1, lambda = ridge mean(diag S);
        the bias is not held back.
        """
        square = self.square.double()
        held = ridge * square.diagonal()[:-1].mean()
        square.diagonal()[:-1].add_(held)
        square.diagonal()[-1].mul_(1.0 + JITTER)
        found: Tensor = torch.linalg.solve(square, self.cross.double().T).T
        return found.float()

    def along(self, basis: Float[Tensor, "J C"]) -> RidgeSums:
        """Return the sums of inputs x B instead of x."""
        square, cross = self.square.double(), self.cross.double()
        return RidgeSums(basis.T @ square @ basis, cross @ basis)

    def remaining(self, change: Float[Tensor, "O J"]) -> float:
        """Return what a change makes of the sum of |missing|^2."""
        change = change.double()
        gained = 2.0 * (change * self.cross).sum() - ((change @ self.square.double()) * change).sum()
        return self.missing - float(gained)

    def left(self, change: Float[Tensor, "O J"]) -> float:
        """Return the share of |missing|^2 that a change leaves; above 1 it makes things worse."""
        return 1.0 if self.missing == 0.0 else self.remaining(change) / self.missing


def no_sums(inputs: int, outputs: int) -> RidgeSums:
    """Return the sums over no rows for a layer of so many inputs and outputs."""
    return RidgeSums(torch.zeros(inputs + 1, inputs + 1), torch.zeros(outputs, inputs + 1))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fit:
    """The change that leaves least on held-out rows, with its ridge, and the share that it leaves there.

    Without a change where each would make things worse.
    """

    change: Float[Tensor, "O J"] | None
    ridge: float | None
    left: float


def fit_change(sums: RidgeSums, held_out: RidgeSums, ridges: Sequence[float] = RIDGES) -> Fit:
    """Try ridges; no change at all is one of the choices."""
    best = Fit(change=None, ridge=None, left=1.0)
    for ridge in ridges:
        change = sums.change(ridge)
        left = held_out.left(change)
        if left < best.left:
            best = Fit(change=change, ridge=ridge, left=left)
    return best
