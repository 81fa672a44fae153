"""The interpreter that runs a program with quantization simulated: quantize, dequantize, compute in float.

`quantizer` states the arithmetic of quantizers in NumPy, this in torch. Weights are expected on their grid already
(`quant` puts them there), so only activations are rounded here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.model import Array
from vitfold.ops.protocol import input_site
from vitfold.ops.run import Run
from vitfold.quantizer import EXPONENTIALS, LARGEST_E4M3, Float8, Quantizer, Shifted, Twin, Uniform, normalized_scale

# torch's integer product wants more than 16 rows and multiples of 8; tiny layers run in float.
_LEAST_INTEGER_WIDTH = 64


def _aligned(quantizer: Uniform, ndim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and the ends of q - zero_point, shaped to broadcast. Torch's own fake_quantize is 15 times slower."""
    shape = [1] * ndim
    if quantizer.axis is not None:
        shape[quantizer.axis] = -1
    zero_point = torch.from_numpy(quantizer.zero_point).float().reshape(shape)
    return torch.from_numpy(quantizer.scale).reshape(shape), quantizer.low - zero_point, quantizer.high - zero_point


def fake_quantize(x: Float[Tensor, ...], quantizer: Quantizer) -> Float[Tensor, ...]:
    """Quantize and dequantize in torch."""
    if isinstance(quantizer, Uniform):
        scale, low, high = _aligned(quantizer, x.ndim)
        return (x / scale).round_().clamp_(low, high).mul_(scale)
    if isinstance(quantizer, Twin):
        inner, outer = fake_quantize(x, quantizer.inner), fake_quantize(x, quantizer.outer)
        return torch.where(x < quantizer.threshold, inner, outer)
    if isinstance(quantizer, Float8):
        return _fake_float8(x, quantizer)
    if isinstance(quantizer, Shifted):
        offset = torch.from_numpy(quantizer.offset)
        return fake_quantize(x + offset, quantizer.inner) - offset
    x = (x + quantizer.offset if quantizer.offset else x).clamp_min(1e-30)
    codes = torch.log2(x / float(quantizer.scale)).mul_(-quantizer.root).round_()
    values = torch.exp2(codes.clamp_(0, 2**quantizer.bits - 1).div_(-quantizer.root)).mul_(float(quantizer.scale))
    return values.sub_(quantizer.offset) if quantizer.offset else values


def _fake_float8(x: Float[Tensor, ...], quantizer: Float8) -> Float[Tensor, ...]:
    scale = torch.from_numpy(quantizer.scale)
    if quantizer.axis is not None:
        scale = scale.reshape(-1, *[1] * (x.ndim - 1))
    codes = (x / scale).clamp_(-LARGEST_E4M3, LARGEST_E4M3).to(torch.float8_e4m3fn)
    return codes.to(x.dtype).mul_(scale)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _WeightCodes:
    """A weight's integers (I, O), their sum per output, and the scales that belong to them."""

    integers: Tensor
    sums: Tensor
    scale: Tensor


class Simulate(Run):
    """`Run`, with the operands of linear layers and attention products rounded as the quantizers say.

    With `reordered` (target "integer") a quantized softmax rounds the exponentials, whatever its own
    quantizer, and is normalized behind the product with v by the sum of what they were rounded to, so
    that its weights sum to 1 exactly. It shares the integers of weights with `like`, which rounds the same weights
    alike, and inputs to as many bits.
    """

    def __init__(
        self,
        params: Mapping[str, Array],
        quantizers: Mapping[str, Quantizer],
        *,
        reordered: bool = False,
        device: str = "cpu",
        like: Simulate | None = None,
    ) -> None:
        super().__init__(params, device=device)
        self._quantizers = quantizers
        self._reordered = reordered
        self._codes: dict[str, _WeightCodes | None] = {} if like is None else like._codes

    def _operand(self, site: str, x: Tensor) -> Tensor:
        quantizer = self._quantizers.get(site)
        return x if quantizer is None else fake_quantize(x, quantizer)

    def linear(self, layer: str, x: Float[Tensor, "*B I"], rows: str = "") -> Float[Tensor, "*B O"]:
        """Q(X) W^T + b, rounded again where codes are handed on."""
        return self._operand(f"{layer}.out", self._product(layer, x, rows))

    def layer_norm(self, layer: str, x: Float[Tensor, "*B D"], eps: float) -> Float[Tensor, "*B D"]:
        """LayerNorm of a stream that may be on a grid."""
        return super().layer_norm(layer, self._operand(f"{layer}.x", x), eps)

    def _product(self, layer: str, x: Float[Tensor, "*B I"], rows: str) -> Float[Tensor, "*B O"]:
        """Q(X) W^T + b; in integers where both are uniform, which is exact and three times as fast."""
        site = input_site(layer, rows)
        if f"{layer}.y" in self._quantizers and (not rows or site in self._quantizers):
            return self._rounded_output(layer, self._operand(site, x))
        codes = None if rows else self._weight_codes(layer)
        if codes is None:
            return super().linear(layer, x, rows)
        quantizer = self._quantizers[f"{layer}.x"]
        assert isinstance(quantizer, Uniform)
        scale, low, high = _aligned(quantizer, 2)
        middle = (low + high + 1) / 2
        integers = (x.reshape(-1, x.shape[-1]) / scale).round_().clamp_(low, high).sub_(middle).to(torch.int8)
        sums = torch._int_mm(integers, codes.integers).to(torch.float32).add_(codes.sums * middle)
        y = sums.mul_(codes.scale * scale).reshape(*x.shape[:-1], -1)
        bias = self._params.get(f"{layer}.bias")
        return y if bias is None else y.add_(bias)

    def _rounded_output(self, layer: str, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """s Q(X W^T / s) + b, with the normalized scale s of each output channel."""
        weight = self._quantizers[f"{layer}.w"]
        assert isinstance(weight, Uniform | Float8)
        scale, bias = torch.from_numpy(normalized_scale(weight)), self._params.get(f"{layer}.bias")
        y = fake_quantize((x @ self._params[f"{layer}.weight"].T).div_(scale), self._quantizers[f"{layer}.y"])
        y = y.mul_(scale)
        return y if bias is None else y.add_(bias)

    def _weight_codes(self, layer: str) -> _WeightCodes | None:
        """The weight as integers, None where the layer does not run in them."""
        if layer not in self._codes:
            self._codes[layer] = self._make_codes(layer)
        return self._codes[layer]

    def _make_codes(self, layer: str) -> _WeightCodes | None:
        inputs, quantizer = self._quantizers.get(f"{layer}.x"), self._quantizers.get(f"{layer}.w")
        if not (isinstance(inputs, Uniform) and inputs.axis is None and isinstance(quantizer, Uniform)):
            return None
        weight = self._params[f"{layer}.weight"]
        if not quantizer.symmetric or quantizer.low < -128 or quantizer.high > 127 or inputs.bits > 8:
            return None
        if min(*weight.shape) < _LEAST_INTEGER_WIDTH or (inputs.low + inputs.high + 1) % 2:
            return None
        scale = torch.from_numpy(quantizer.scale)
        integers = (weight / scale.reshape(-1, *[1] * quantizer.scale.ndim)).round_().to(torch.int8)
        return _WeightCodes(integers=integers.T.contiguous(), sums=integers.sum(1).float(), scale=scale)

    def _in_steps(self, site: str) -> bool:
        return any(f"{site}.{operand}" in self._quantizers for operand in ("q", "k", "v", "softmax"))

    def _average(self, site: str, logits: Tensor, v: Tensor) -> Tensor:
        if not (self._reordered and f"{site}.softmax" in self._quantizers):
            return super()._average(site, logits, v)
        below = self._operand(f"{site}.logits", logits - logits.amax(-1, keepdim=True))
        powers = fake_quantize(torch.exp(below), EXPONENTIALS)
        return (powers @ v) / powers.sum(-1, keepdim=True)
