"""The search of one attention: ranges of q, k, v and of the softmax's output.

Owns the order: q and k by the error of the logits, then the softmax and v by that of the output.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.quant.collect import AttentionSamples
from vitfold.quant.methods import Method
from vitfold.quant.ranges import (
    affine_uniform,
    code_range,
    percentile_range,
    rounded,
    symmetric_uniform,
    uniform_from_scale,
)
from vitfold.quantizer import Log, Quantizer, Twin, Uniform

Errors = Callable[[Tensor], Tensor]
_SPLITS = range(1, 20)


def search_attention(
    site: str, samples: AttentionSamples, bits: int, method: Method, *, symmetric: bool, uniform_only: bool
) -> dict[str, Quantizer]:
    """Return the quantizers of `{site}.q`, `.k`, `.v` and `.softmax`."""
    symmetric = symmetric or method.symmetric
    per_head = method.head_scales and not uniform_only
    q, k, v = samples.q, samples.k, samples.v
    alpha = q.shape[-1] ** -0.5
    weigh_logits = _weights(samples.grad_logits, method)
    weigh_output = _weights(samples.grad_output, method)
    exact_logits = (q @ k.transpose(-1, -2)) * alpha
    found: dict[str, Quantizer] = {}
    q_hat, k_hat = q, k
    for _ in range(method.rounds if method.activations == "hessian" else 1):
        found[f"{site}.q"] = _operand(
            q,
            bits,
            method,
            symmetric,
            per_head,
            lambda x: ((x @ k_hat.transpose(-1, -2)) * alpha - exact_logits).square() * weigh_logits,  # noqa: B023
        )
        q_hat = rounded(q, found[f"{site}.q"])
        found[f"{site}.k"] = _operand(
            k,
            bits,
            method,
            symmetric,
            per_head,
            lambda x: ((q_hat @ x.transpose(-1, -2)) * alpha - exact_logits).square() * weigh_logits,  # noqa: B023
        )
        k_hat = rounded(k, found[f"{site}.k"])
    weights = samples.logits.softmax(-1)
    exact = weights @ v
    candidates = _softmax_candidates(bits, method, symmetric=symmetric, uniform_only=uniform_only)
    softmax = min(candidates, key=lambda c: float(((rounded(weights, c) @ v - exact).square() * weigh_output).mean()))
    weights_hat = rounded(weights, softmax)
    found[f"{site}.softmax"] = softmax
    found[f"{site}.v"] = _operand(
        v, bits, method, symmetric, per_head, lambda x: (weights_hat @ x - exact).square() * weigh_output
    )
    return found


def _weights(grad: Tensor | None, method: Method) -> Tensor:
    if method.activations != "hessian" or grad is None:
        return torch.ones(())
    return grad.square()


def _operand(
    x: Float[Tensor, "S H N K"], bits: int, method: Method, symmetric: bool, per_head: bool, error: Errors
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


def _softmax_candidates(bits: int, method: Method, *, symmetric: bool, uniform_only: bool) -> list[Quantizer]:
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
        else:
            made.append(Log(scale=np.array(1.0, np.float32), bits=bits, root=1 if kind == "log2" else 2))
    return made
