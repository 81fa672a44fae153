"""The search of a layer's raw output: what it is rounded to before scale and bias, where that spares traffic.

On GPUs the product of a wide layer is written once and read once, and half as many bytes of it count.

Source: plans of TensorRT for RTX, in which Q/DQ right behind a MatMul makes its output 8 bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from vitfold.quant.float8 import search_scale
from vitfold.quant.linear import LinearProblem
from vitfold.quant.ranges import Grid, rounded, search_symmetric
from vitfold.quant.sites import LinearSite
from vitfold.quantizer import Float8, Quantizer, Uniform, normalized_scale

_GRID = Grid(start=0.3, stop=1.0, count=36)


def search_outputs(
    problems: Iterable[LinearProblem], before: Mapping[str, Quantizer], after: Mapping[str, Quantizer]
) -> dict[str, Quantizer]:
    """Return the quantizers of `{layer}.y` of every wide layer.

    Args:
        before: quantizers of the inputs as the samples of `problems` are.
        after: the same after zero points were folded away: the inputs moved by as much.
    """
    found: dict[str, Quantizer] = {}
    for problem in problems:
        layer = problem.site.layer
        weight, inputs, given = after.get(f"{layer}.w"), after.get(f"{layer}.x"), before.get(f"{layer}.x")
        if not _writes_wide(problem.site) or inputs is None or not isinstance(weight, Uniform | Float8):
            continue
        x = problem.samples.x
        if isinstance(inputs, Uniform) and isinstance(given, Uniform):
            x = x - float(inputs.scale * np.float32(inputs.zero_point - given.zero_point))
        found[f"{layer}.y"] = _search(problem, rounded(x, inputs), weight)
    return found


def _writes_wide(site: LinearSite) -> bool:
    """Say whether a layer's output is several times as wide as the tokens: qkv and fc1 of a block."""
    return site.block is not None and site.norm is not None and site.wide


def _search(problem: LinearProblem, x_hat: Tensor, weight: Uniform | Float8) -> Quantizer:
    """Return the quantizer of the raw product, by the error of the layer's output."""
    scale = torch.from_numpy(normalized_scale(weight))
    raw = x_hat @ rounded(problem.weight, weight).T / scale
    absmax, share = raw.abs().max(), problem.samples.share

    def error(candidate: Quantizer) -> float:
        return float(((rounded(raw, candidate) - raw) * scale).square_().mul_(share).mean())

    if isinstance(weight, Float8):
        return search_scale(absmax, error)
    return search_symmetric(absmax, 8, _GRID, error)
