"""The search of one attention: ranges of q, k, v and of the softmax's output.

The order: q and k by the error of the logits, then the softmax and v by that of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.quant.collect import AttentionSamples
from vitfold.quant.methods import QuantMethod
from vitfold.quant.ranges import (
    affine_uniform,
    code_range,
    percentile_range,
    rounded,
    search_log,
    symmetric_uniform,
    uniform_from_scale,
)
from vitfold.quantizer import Log, Quantizer, Twin, Uniform

Errors = Callable[[Tensor], Tensor]
_SPLITS = range(1, 20)


def search_attention(
    site: str, samples: AttentionSamples, bits: int, method: QuantMethod, *, symmetric: bool, uniform_only: bool
) -> dict[str, Quantizer]:
    """Return the quantizers of `{site}.q`, `.k`, `.v` and `.softmax`."""
    symmetric = symmetric or method.symmetric
    per_head = method.head_scales and not uniform_only
    search = partial(_operand, bits=bits, method=method, symmetric=symmetric, per_head=per_head)
    found: dict[str, Quantizer] = {}
    operands = {"q": samples.q, "k": samples.k}
    operands_hat = dict(operands)
    exact_logits = _logits(**operands)
    weigh_logits = _weights(samples.grad_logits, method)

    def logits_error(name: str, x_hat: Tensor) -> Tensor:
        return (_logits(**{**operands_hat, name: x_hat}) - exact_logits).square() * weigh_logits

    for _ in range(method.rounds if method.activations == "hessian" else 1):
        for name, x in operands.items():
            quantizer = search(x, error=partial(logits_error, name))
            found[f"{site}.{name}"], operands_hat[name] = quantizer, rounded(x, quantizer)
    weights = samples.logits.softmax(-1)
    exact = weights @ samples.v
    weigh_output = _weights(samples.grad_output, method)

    def output_error(weights_hat: Tensor, v_hat: Tensor) -> Tensor:
        return (weights_hat @ v_hat - exact).square() * weigh_output

    candidates = _softmax_candidates(bits, method, symmetric=symmetric, uniform_only=uniform_only)

    def softmax_error(candidate: Quantizer) -> float:
        return float(output_error(rounded(weights, candidate), samples.v).mean())

    candidates += [search_log(1.0, bits, softmax_error)] if "adalog" in method.softmax else []
    softmax = min(candidates, key=softmax_error)
    found[f"{site}.softmax"] = softmax
    found[f"{site}.v"] = search(samples.v, error=partial(output_error, rounded(weights, softmax)))
    return found


def _logits(q: Float[Tensor, "S H N K"], k: Float[Tensor, "S H M K"]) -> Float[Tensor, "S H N M"]:
    """q k^T / sqrt(K)."""
    alpha: float = q.shape[-1] ** -0.5
    return (q @ k.transpose(-1, -2)) * alpha


def _weights(grad: Tensor | None, method: QuantMethod) -> Tensor:
    if method.activations != "hessian" or grad is None:
        return torch.ones(())
    return grad.square()


def _operand(
    x: Float[Tensor, "S H N K"], *, error: Errors, bits: int, method: QuantMethod, symmetric: bool, per_head: bool
) -> Uniform:
    """One range per head, or one for all; the error of a candidate is summed per head."""
    axis = 1 if per_head else None
    if per_head:
        low, high = x.amin((0, 2, 3)), x.amax((0, 2, 3))
    else:
        low, high = x.amin(), x.amax()
    if method.activations == "percentile":
        low, high = percentile_range(x, 0.9999)

    def make(factor: Tensor) -> Uniform:
        if symmetric:
            return symmetric_uniform(torch.maximum(low.abs(), high.abs()) * factor, bits, axis=axis)
        return affine_uniform(low * factor, high * factor, bits, axis=axis)

    if method.activations in ("minmax", "percentile"):
        return make(torch.ones(()))

    def found(factors: Tensor) -> Tensor:
        x_hat = rounded(x, make(factors.reshape(low.shape)))
        total = (x_hat - x).square() if method.activations == "mse" else error(x_hat)
        return total.sum((0, 2, 3)) if per_head else total.sum().reshape(1)

    return make(method.grid.search(low.numel(), found).reshape(low.shape))


def _softmax_candidates(bits: int, method: QuantMethod, *, symmetric: bool, uniform_only: bool) -> list[Quantizer]:
    """Quantizers for numbers in [0, 1] that the method may choose from."""
    made: list[Quantizer] = []
    kinds = ("uniform",) if uniform_only and "uniform" in method.softmax else method.softmax
    for kind in kinds:
        if kind == "uniform":
            last = code_range(bits, symmetric=symmetric)[1]
            tops = [1.0] if method.activations in ("minmax", "percentile") else np.linspace(1.0, 0.1, 19)
            made += [uniform_from_scale(float(top) / last, 0, last) for top in tops]
        elif kind == "twin":
            last = 2 ** (bits - 1) - 1
            outer = uniform_from_scale(1.0 / 2 ** (bits - 1), 0, last)
            made += [
                Twin(
                    rule="magnitude",
                    inner=uniform_from_scale(2.0**-m / 2 ** (bits - 1), 0, last),
                    outer=outer,
                )
                for m in _SPLITS
            ]
        elif kind == "adalog":
            continue
        else:
            made.append(Log(scale=np.array(1.0, np.float32), bits=bits, root=1 if kind == "log2" else 2))
    return made
