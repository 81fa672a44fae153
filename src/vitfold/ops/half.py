"""The interpreter that rounds every value to half precision, as a strongly typed FP16 graph states it.

ONNX Runtime's CPU provider keeps values between FP16 nodes in float32, so an overflow that a GPU meets passes there
unseen. Sums within one product or one normalization stay in single precision, as GPUs keep them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.errors import EngineError
from vitfold.model import Array
from vitfold.ops.protocol import input_site
from vitfold.ops.simulate import Simulate, fake_quantize
from vitfold.quantizer import Float8, Quantizer, Uniform, normalized_scale

LARGEST = 65504.0
"""The largest finite number in half precision."""


class Half(Simulate):
    """`Simulate` (or `Run`, without quantizers) with every result rounded to FP16, in the order of the emitted nodes.

    `peak` is the largest magnitude that was met before rounding, and where; `overflow` the first site whose value
    half precision cannot hold, with that value, None while there is none.
    """

    def __init__(self, params: Mapping[str, Array], quantizers: Mapping[str, Quantizer]) -> None:
        with np.errstate(over="ignore"):
            half = {name: array.astype(np.float16).astype(np.float32) for name, array in params.items()}
        super().__init__(half, quantizers)
        self.peak: tuple[float, str] = (0.0, "input")
        self.overflow: tuple[float, str] | None = None
        self._scope = "input"

    def check(self) -> tuple[float, str]:
        """Return the largest number that was met so far, and its site.

        Raises:
            EngineError: if half precision cannot hold one.
        """
        if self.overflow is not None:
            value, site = self.overflow
            shown = f"{value:,.0f}" if math.isfinite(value) else "infinity"
            raise EngineError(
                f"half precision overflows at {site}: it meets {shown}, and FP16 holds 65,504 at most, so a GPU would "
                "answer NaN on ordinary images; make the bundle in single precision: --target portable"
            )
        return self.peak

    def _half(self, x: Tensor, site: str | None = None) -> Tensor:
        if not x.is_floating_point():
            return x
        where = site or self._scope
        most = float(x.abs().max()) if x.numel() else 0.0
        if not most <= self.peak[0]:
            self.peak = (most, where)
        rounded = x.to(torch.float16).to(torch.float32)
        if self.overflow is None and not math.isfinite(float(rounded.abs().max() if x.numel() else 0.0)):
            self.overflow = (most, where)
        return rounded

    def _operand(self, site: str, x: Tensor) -> Tensor:
        return self._half(super()._operand(site, x), site)

    def _step(self, site: str, x: Tensor) -> Tensor:
        return self._half(x, site)

    def scope(self, site: str, block: int | None = None, role: str | None = None) -> None:
        """Remember where the operations that follow belong."""
        self._scope = site

    def constant(self, values: Array) -> Tensor:
        """The numbers, rounded."""
        return self._half(super().constant(values))

    def patch_embed(self, layer: str, image: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B N D"]:
        """On rounded pixels."""
        return self._half(super().patch_embed(layer, self._half(image, "input")), layer)

    def linear(self, layer: str, x: Float[Tensor, "*B I"], rows: str = "") -> Float[Tensor, "*B O"]:
        """The product, its scale and the bias are three nodes."""
        weight = self._quantizers.get(f"{layer}.w")
        y = self._operand(input_site(layer, rows), x) @ self._params[f"{layer}.weight"].T
        bias = self._params.get(f"{layer}.bias")
        if isinstance(weight, Uniform | Float8) and weight.scale.ndim:
            scale = torch.from_numpy(normalized_scale(weight))
            y = self._half(y / scale, layer)
            output = self._quantizers.get(f"{layer}.y")
            y = self._half((y if output is None else fake_quantize(y, output)) * scale, f"{layer}.scale")
        y = self._half(y, layer)
        return y if bias is None else self._half(y + bias, f"{layer}.bias")

    def layer_norm(self, layer: str, x: Float[Tensor, "*B D"], eps: float) -> Float[Tensor, "*B D"]:
        """One operator, single precision within."""
        return self._half(super().layer_norm(layer, x, eps), layer)

    def activation(self, kind: str, x: Float[Tensor, "*B"], site: str) -> Float[Tensor, "*B"]:
        """Rounded."""
        return self._half(super().activation(kind, x, site), site)

    def _in_steps(self, site: str) -> bool:
        return True

    def _logits(self, site: str, q: Tensor, k: Tensor) -> Tensor:
        """Quantized scores are scaled behind the product, others in front of it."""
        alpha, k = 1.0 / math.sqrt(q.shape[-1]), k.transpose(-1, -2)
        if f"{site}.q" in self._quantizers:
            return self._half(self._half(q @ k, f"{site}.qk") * alpha, f"{site}.qk")
        return self._half(self._half(q * alpha, f"{site}.q") @ k, f"{site}.qk")

    def matmul(
        self, site: str, a: Float[Tensor, ...], b: Float[Tensor, ...], *, transpose_b: bool = False
    ) -> Float[Tensor, ...]:
        """Rounded."""
        return self._half(super().matmul(site, a, b, transpose_b=transpose_b), site)

    def elementwise(self, op: str, a: Tensor, b: Tensor | None = None) -> Tensor:
        """Rounded."""
        return self._half(super().elementwise(op, a, b))

    def reduce(self, op: str, a: Tensor, axis: int, *, keep: bool = False) -> Tensor:
        """Rounded."""
        return self._half(super().reduce(op, a, axis, keep=keep))

    def softmax(self, site: str, a: Tensor) -> Tensor:
        """Rounded."""
        return self._half(super().softmax(site, a), site)

    def lookup(self, name: str, rows: Tensor, columns: Tensor | None = None) -> Tensor:
        """Rounded, as parameters are."""
        return self._half(super().lookup(name, rows, columns))

    def foreign(
        self,
        site: str,
        parts: tuple[Tensor, ...],
        graph: Array,
        weights: tuple[str, ...],
        shapes: tuple[tuple[int, ...], ...],
        macs: int = 0,
    ) -> tuple[Tensor, ...]:
        """Rounded behind the piece, not within."""
        return tuple(self._half(y, site) for y in super().foreign(site, parts, graph, weights, shapes, macs))

    def rms_norm(self, layer: str, x: Tensor, eps: float) -> Tensor:
        """One operator, single precision within."""
        root = (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return self._half(x / root * self._params[f"{layer}.weight"], layer)

    def scatter_add(self, site: str, x: Tensor, index: Tensor, rows: Tensor) -> Tensor:
        """Rounded."""
        return self._half(super().scatter_add(site, x, index, rows), site)
