"""The search of 8-bit floats: one scale per tensor, one per output channel of a weight.

The format keeps a relative precision over 15 powers of two, so a scale only decides where it saturates, where it
becomes subnormal, and how the mantissa's grid lies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.quant.collect import AttentionSamples
from vitfold.quant.linear import LinearProblem
from vitfold.quant.ranges import rounded
from vitfold.quantizer import LARGEST_E4M3, Float8, Quantizer

_FACTORS = tuple(2.0 ** (-step / 4) for step in range(9))
_TINY = 1e-12
Error = Callable[[Tensor], Tensor]


def search_linear_float8(problem: LinearProblem) -> dict[str, Quantizer]:
    """Return the quantizers of `{layer}.x` and `{layer}.w`: the input's by the error of the layer's output."""
    layer, x, weight = problem.site.layer, problem.samples.x, problem.weight
    reach = weight.abs().amax(1).clamp_min(_TINY)
    weights = Float8(scale=(reach / LARGEST_E4M3).numpy(), axis=0)
    exact, w_hat = x @ weight.T, rounded(weight, weights)

    def error(x_hat: Tensor) -> Tensor:
        return ((x_hat @ w_hat.T - exact).square_() * problem.samples.share).mean()

    absmax = torch.maximum(problem.samples.low.abs(), problem.samples.high.abs()).max()
    return {f"{layer}.x": _search(x, absmax, error), f"{layer}.w": weights}


def search_attention_float8(site: str, samples: AttentionSamples) -> dict[str, Quantizer]:
    """Return the quantizers of `{site}.q`, `.k`, `.v` and `.softmax`; the softmax spans [0, 1]."""
    softmax = Float8(scale=torch.tensor(1.0 / LARGEST_E4M3).numpy())
    weights = samples.logits.softmax(-1)
    exact_logits, exact = samples.q @ samples.k.transpose(-1, -2), weights @ samples.v
    weights_hat = rounded(weights, softmax)

    def q_error(x: Tensor) -> Tensor:
        return (x @ samples.k.transpose(-1, -2) - exact_logits).square().mean()

    def k_error(q_hat: Tensor, x: Tensor) -> Tensor:
        return (q_hat @ x.transpose(-1, -2) - exact_logits).square().mean()

    def v_error(x: Tensor) -> Tensor:
        return (weights_hat @ x - exact).square().mean()

    q = _search(samples.q, samples.q.abs().max(), q_error)
    k = _search(samples.k, samples.k.abs().max(), partial(k_error, rounded(samples.q, q)))
    v = _search(samples.v, samples.v.abs().max(), v_error)
    return {f"{site}.q": q, f"{site}.k": k, f"{site}.v": v, f"{site}.softmax": softmax}


def _search(x: Tensor, absmax: Float[Tensor, ""], error: Error) -> Float8:
    return search_scale(absmax, lambda candidate: float(error(rounded(x, candidate))))


def search_scale(absmax: Float[Tensor, ""], error: Callable[[Float8], float]) -> Float8:
    """Return the quantizer per tensor of least error, the widest first."""
    found = [Float8(scale=(absmax.clamp_min(_TINY) * factor / LARGEST_E4M3).numpy()) for factor in _FACTORS]
    return min(found, key=error)
