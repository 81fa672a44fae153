"""The simulation with gradients: values are rounded as in `simulate`, and gradients pass through the rounding.

Equation: Q(x) = s clamp(round(x / s)), dQ/dx = 1 within the range and 0 beyond it, dQ/ds = round(x / s) - x / s within.

Source: straight-through estimators, Bengio et al. (1308.3432); gradients of scales, LSQ (1902.08153), equation 3.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.model import Array
from vitfold.ops.protocol import input_site
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate, fake_quantize
from vitfold.quantizer import Quantizer, Twin, Uniform, normalized_scale


def round_through(x: Float[Tensor, ...], quantizer: Quantizer, scale: Tensor | None = None) -> Float[Tensor, ...]:
    """Quantize and dequantize; `scale`, shaped as the quantizer's own, stands for it and gets a gradient."""
    if isinstance(quantizer, Uniform):
        scale = torch.from_numpy(quantizer.scale) if scale is None else scale
        return _uniform_through(x, quantizer, scale)
    if isinstance(quantizer, Twin):
        inner, outer = (round_through(x, one) for one in (quantizer.inner, quantizer.outer))
        return torch.where(x < quantizer.threshold, inner, outer)
    return x + (fake_quantize(x.detach(), quantizer) - x.detach())


def _uniform_through(x: Tensor, quantizer: Uniform, scale: Tensor) -> Tensor:
    shape = [1] * x.ndim
    if quantizer.axis is not None:
        shape[quantizer.axis] = -1
    zero_point = torch.from_numpy(quantizer.zero_point).float().reshape(shape)
    scale = scale.reshape(shape)
    return codes_through(x / scale, quantizer.low - zero_point, quantizer.high - zero_point) * scale


def codes_through(ratio: Float[Tensor, ...], low: Tensor, high: Tensor) -> Float[Tensor, ...]:
    """Return whole numbers within a range, with the gradient of clamping alone."""
    clamped = torch.minimum(torch.maximum(ratio, low), high)
    return clamped + (clamped.round() - clamped).detach()


class StraightThrough(Simulate):
    """`Simulate`, through which gradients pass to `learned` parameters and to `scales` of quantizers by site.

    Weights are taken as they are given, as everywhere: who learns them rounds them.
    """

    def __init__(
        self,
        params: Mapping[str, Array],
        quantizers: Mapping[str, Quantizer],
        *,
        learned: Mapping[str, Tensor],
        scales: Mapping[str, Tensor],
    ) -> None:
        super().__init__(params, quantizers)
        self._params |= learned
        self._scales = scales

    def _operand(self, site: str, x: Tensor) -> Tensor:
        quantizer = self._quantizers.get(site)
        return x if quantizer is None else round_through(x, quantizer, self._scales.get(site))

    def linear(self, layer: str, x: Float[Tensor, "*B I"], rows: str = "") -> Float[Tensor, "*B O"]:
        """Q(X) W^T + b in float."""
        site = input_site(layer, rows)
        if f"{layer}.y" in self._quantizers and (not rows or site in self._quantizers):
            weight, bias = self._params[f"{layer}.weight"], self._params.get(f"{layer}.bias")
            grid = self._quantizers[f"{layer}.w"]
            assert isinstance(grid, Uniform)
            scale = torch.from_numpy(normalized_scale(grid))
            y = round_through((self._operand(site, x) @ weight.T) / scale, self._quantizers[f"{layer}.y"]) * scale
            return y if bias is None else y + bias
        return Run.linear(self, layer, x, rows)
