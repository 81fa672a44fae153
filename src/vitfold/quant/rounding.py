"""Weights onto their grid, with the error of earlier columns and of the activations compensated."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

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
    scale = torch.from_numpy(np.broadcast_to(quantizer.scale, (len(weight),)).copy())
    zero = torch.from_numpy(np.broadcast_to(quantizer.zero_point, (len(weight),)).copy()).float()
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
