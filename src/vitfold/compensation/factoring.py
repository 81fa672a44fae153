"""Heads of an attention that are narrower: of lower rank, along the directions that its images need."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LEAST = 1e-9
"""Directions in which a head moves less, as a share of the largest, count as so much."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Second moments of what queries, keys and values are made of: x of a layer's input, a one behind it.

    `queries` sums x^T x over rows, `keys` the same about the mean row of every image: what is added to all keys of an
    image alike changes no softmax.
    """

    queries: Float[Tensor, "J J"]
    keys: Float[Tensor, "J J"]

    def add(self, x: Float[Tensor, "B N I"], weight: Float[Tensor, "B N 1"]) -> None:
        """Take more images, each row as often as its weight says; rows of a prefix count once among the keys."""
        x = torch.cat((x, torch.ones(*x.shape[:2], 1)), 2)
        rows = x.flatten(0, 1)
        self.queries.addmm_(rows.T, rows * weight.flatten(0, 1))
        about = (x - x.mean(1, keepdim=True)).flatten(0, 1)
        self.keys.addmm_(about.T, about)


def no_moments(inputs: int) -> Moments:
    """Return the moments of no rows."""
    return Moments(queries=torch.zeros(inputs + 1, inputs + 1), keys=torch.zeros(inputs + 1, inputs + 1))


def factor_scores(
    queries: Float[Tensor, "H K J"], keys: Float[Tensor, "H K J"], moments: Moments, width: int
) -> tuple[Float[Tensor, "H W K"], Float[Tensor, "H W K"]]:
    """Return what makes queries and keys narrower, so that their products are nearest to those of the whole ones.

    Equation: L_q^T L_k = U S V^T with moments C_q = L_q L_q^T of queries and C_k of keys;
    q' = S^1/2 U^T L_q^-1 q, k' = S^1/2 V^T L_k^-1 k, of the W largest S.

    Args:
        queries: their weights by head, the bias in the last column; `keys` likewise.

    Source: best approximation of a product in the norm of its data (Eckart and Young, 1936).
    """
    queries, keys = queries.double(), keys.double()
    (left, left_inverse), (right, right_inverse) = (
        _root(weight @ moment.double() @ weight.mT)
        for weight, moment in ((queries, moments.queries), (keys, moments.keys))
    )
    u, s, vh = torch.linalg.svd(left.mT @ right)
    root = s[:, :width, None].sqrt()
    return (root * (u[:, :, :width].mT @ left_inverse)).float(), (root * (vh[:, :width] @ right_inverse)).float()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scores:
    """Queries and keys of lower rank: as weights of narrower heads, and `whole`, as the layer that they come from.

    That layer makes queries, keys and values of the old width; its queries alone are of lower rank.
    """

    queries: Float[Tensor, "H W J"]
    keys: Float[Tensor, "H W J"]
    whole: Float[Tensor, "O J"]

    def narrow(self, kept: Int[Tensor, " U"], directions: Float[Tensor, "U K W"]) -> Float[Tensor, "P J"]:
        """Return the weight of queries, keys and values of the heads that stay, values along some directions.

        Products are divided by the root of the width, so queries make up for its change.
        """
        heads, width, columns = self.queries.shape
        old = directions.shape[1]
        values = self.whole.reshape(3, heads, old, columns)[2][kept]
        parts = self.queries[kept] * math.sqrt(width / old), self.keys[kept], directions.mT @ values
        return torch.stack(parts).reshape(-1, columns)


def lower_scores(weight: Float[Tensor, "O J"], moments: Moments, heads: int, width: int) -> Scores:
    """Factor the scores of an attention whose queries, keys and values come from one layer, heads side by side."""
    parts = weight.reshape(3, heads, -1, weight.shape[1])
    queries, keys = factor_scores(parts[0], parts[1], moments, width)
    narrow = queries @ parts[0]
    whole = torch.stack((keys.mT @ narrow, parts[1], parts[2])).reshape(weight.shape)
    return Scores(queries=narrow, keys=keys @ parts[1], whole=whole)


def factor_values(
    square: Float[Tensor, "V V"], reading: Float[Tensor, "O V"], heads: int, width: int
) -> Float[Tensor, "H K W"]:
    """Return the directions of values that a projection reads best from so many columns of every head.

    Equation: L^T P^T = U S V^T with moments C = L L^T of a head's averages y and the weight P that reads them;
    y' = y L^-T U.

    Args:
        square: second moments of the averages of all heads, side by side.
    """
    size = len(square) // heads
    square, reading = square.double(), reading.double()
    own = torch.stack([square[i : i + size, i : i + size] for i in range(0, len(square), size)])
    root, inverse = _root(own)
    read = reading.reshape(len(reading), heads, size).permute(1, 2, 0)
    u, _, _ = torch.linalg.svd(root.mT @ read, full_matrices=False)
    found: Tensor = inverse.mT @ u[:, :, :width]
    return found.float()


def _root(moment: Float[Tensor, "H K K"]) -> tuple[Float[Tensor, "H K K"], Float[Tensor, "H K K"]]:
    """L with L L^T = C, and its inverse."""
    values, vectors = torch.linalg.eigh(moment)
    values = values.clamp_min(_LEAST * values[:, -1:].clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
    return vectors * values[:, None], vectors.mT / values[:, :, None]
