"""Weights onto their grid, with the error of earlier columns and of the activations compensated."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.quant.ranges import rounded
from vitfold.quantizer import Uniform


def ridge_weight(
    weight: Float[Tensor, "O I"], moments: Float[Tensor, "I I"], cross: Float[Tensor, "I I"], *, damping: float
) -> Float[Tensor, "O I"]:
    """Return the weight W* that on rounded inputs comes nearest to W on exact ones.

    W* = argmin ||W X - W* Xq||^2 + lambda ||W* - W||^2 = W + W (cross - moments) (moments + lambda I)^-1, with
    moments = Xq Xq^T and cross = X Xq^T (both I x I, row vectors summed), lambda = damping mean(diag moments).

    Source: ERQ (2407.06794), section 4.2, with X rounded on the same stream.
    """
    lam = damping * moments.diagonal().mean()
    system = moments + lam * torch.eye(len(moments), dtype=moments.dtype)
    right = weight.to(moments.dtype) @ (cross - moments)
    corrected: Tensor = (weight + torch.linalg.solve(system, right.T).T).to(weight.dtype)
    return corrected


def gptq(
    weight: Float[Tensor, "O I"], quantizer: Uniform, moments: Float[Tensor, "I I"], *, damping: float, block: int = 128
) -> Float[Tensor, "O I"]:
    """Round column by column, spreading each column's error over the columns that are still to come.

    Columns are taken in the order of falling second moment; scales are per output channel and fixed.

    Source: GPTQ (2210.17323), algorithm 1, with the Cholesky factor of the inverse Hessian.
    """
    inputs = weight.shape[1]
    moments = moments.double()
    dead = moments.diagonal() <= 0
    order = torch.argsort(moments.diagonal(), descending=True)
    hessian = moments[order][:, order].clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    hessian.diagonal()[dead[order]] += 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    work = weight[:, order].clone()
    result = torch.empty_like(work)
    scale, zero = _grids(quantizer, len(weight))
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        part = work[:, start:stop].clone()
        errors = torch.empty_like(part)
        local = upper[start:stop, start:stop]
        for i in range(stop - start):
            column = part[:, i]
            codes = (column / scale).round_().add_(zero).clamp_(quantizer.low, quantizer.high)
            value = (codes - zero) * scale
            result[:, start + i] = value
            error = (column - value) / local[i, i]
            if i + 1 < stop - start:
                part[:, i + 1 :] -= torch.outer(error, local[i, i + 1 :])
            errors[:, i] = error
        if stop < inputs:
            work[:, stop:] -= errors @ upper[start:stop, stop:]
    back = torch.empty_like(order)
    back[order] = torch.arange(inputs)
    return result[:, back]


def descend(
    weight: Float[Tensor, "O I"],
    start: Float[Tensor, "O I"],
    quantizer: Uniform,
    moments: Float[Tensor, "I I"],
    *,
    steps: int,
) -> Float[Tensor, "O I"]:
    """Move single codes by one while that makes the error of the output smaller: a row's best move, `steps` times.

    With d = W - W', M = moments and a move of column j by t: E |d x|^2 grows by t^2 M_jj - 2 t (d M)_j. `start` lies on
    the grid, and what is returned does, with no larger error.

    Source: greedy coordinate descent, as in CDQuant (2406.17542), algorithm 1.
    """
    scale, zero = _grids(quantizer, len(weight))
    codes = (start / scale[:, None]).round_().add_(zero[:, None]).double()
    moments, step = moments.double(), scale.double()[:, None]
    pull = (weight.double() - (codes - zero[:, None].double()) * step) @ moments
    curvature, rows = moments.diagonal(), torch.arange(len(weight))
    for _ in range(steps):
        direction = torch.sign(pull)
        gain = 2.0 * step * pull.abs() - step.square() * curvature
        moved = codes + direction
        gain = torch.where((moved >= quantizer.low) & (moved <= quantizer.high), gain, -torch.inf)
        best, column = gain.max(1)
        moving = best > _LEAST_GAIN * (step.square() * curvature).amax(1)
        if not moving.any():
            break
        t = torch.where(moving, direction[rows, column], 0.0)
        codes[rows, column] += t
        pull -= (t[:, None] * step) * moments[column]
    return (codes.float() - zero[:, None]) * scale[:, None]


def halving(
    weight: Float[Tensor, "O I"], quantizer: Uniform, moments: Float[Tensor, "I I"], *, damping: float
) -> Float[Tensor, "O I"]:
    """Round half of the columns that are left, refine their directions, refit the other half to what they err; again.

    W_r += (W_s - W'_s) E[x_s x_r^T] (E[x_r x_r^T] + lambda I)^-1, lambda = damping mean(diag moments).

    Source: ERQ (2407.06794), section 4.3; its proxy chooses directions by a gradient, here each by its exact gain.
    """
    moments = moments.double()
    lam = damping * moments.diagonal().mean()
    work, result = weight.clone(), torch.empty_like(weight)
    left = torch.arange(weight.shape[1])
    while len(left):
        now, left = left[: (len(left) + 1) // 2], left[(len(left) + 1) // 2 :]
        near = rounded(work[:, now], quantizer)
        result[:, now] = descend(work[:, now], near, quantizer, moments[now][:, now], steps=_REFINEMENTS)
        if len(left):
            error = (work[:, now] - result[:, now]).double()
            system = moments[left][:, left] + lam * torch.eye(len(left), dtype=moments.dtype)
            work[:, left] += torch.linalg.solve(system, (error @ moments[now][:, left]).T).T.float()
    return result


ROUNDINGS = {"gptq": gptq, "halving": halving}
"""How weights go to their grid where they look at each other, by name."""
_LEAST_GAIN = 1e-9
_REFINEMENTS = 100
"""ERQ's number of refinements of a half."""


def _grids(quantizer: Uniform, rows: int) -> tuple[Float[Tensor, " O"], Float[Tensor, " O"]]:
    """Return the scale and zero point of every row."""
    scale = torch.from_numpy(np.broadcast_to(quantizer.scale, (rows,)).copy())
    return scale, torch.from_numpy(np.broadcast_to(quantizer.zero_point, (rows,)).copy()).float()
