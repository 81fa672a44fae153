"""The search of one linear layer: ranges of its input and of its weight, by the method's metric.

Grids and quantizers come from `ranges`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.quant.activations import activation_minimum
from vitfold.quant.collect import LinearSamples, Samples
from vitfold.quant.methods import QuantMethod
from vitfold.quant.ranges import (
    PERCENTILES,
    Error,
    Grid,
    affine_uniform,
    best,
    code_range,
    percentile_range,
    rounded,
    search_affine,
    search_log,
    search_symmetric,
    search_weight,
    symmetric_uniform,
    uniform_from_scale,
    wide_uniform,
)
from vitfold.quant.sites import LinearSite
from vitfold.quantizer import NARROW_BITS, Quantizer, Shifted, Twin, Uniform

_NOISE_STEPS = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LinearProblem:
    """A layer's samples, its weight (O, I) and the bits that both get.

    `symmetric` weights have the zero point 0. Inputs need not: their zero points fold into biases, unless
    `symmetric_inputs` says that nothing may stand between them and the product that they come from.
    """

    site: LinearSite
    samples: LinearSamples
    weight: Float[Tensor, "O I"]
    weight_bits: int
    bits: int
    symmetric: bool
    uniform_only: bool
    symmetric_inputs: bool = False


def search_linear(problem: LinearProblem, method: QuantMethod, *, preset: Uniform | None) -> dict[str, Quantizer]:
    """Return the quantizers of `{layer}.x` and `{layer}.w`; `preset` is an input range that a fold fixed already."""
    layer = problem.site.layer
    x, share = problem.samples.x, problem.samples.share
    grad = share if problem.samples.grad is None else problem.samples.grad.square() * share
    exact = x @ problem.weight.T
    weight = _initial_weight(problem, method)
    alternate = "hessian" in (method.weights, method.activations) and method.rounding == "nearest"
    if problem.bits > NARROW_BITS:
        preset = _widest(problem)
    inputs: Quantizer = preset or _search_inputs(problem, method, x, exact, grad, rounded(problem.weight, weight))
    for _ in range(method.rounds if alternate else 1):
        weight = _search_weight(problem, method, rounded(x, inputs), exact, grad)
        if preset is None and alternate:
            inputs = _search_inputs(problem, method, x, exact, grad, rounded(problem.weight, weight))
    if method.noise and isinstance(inputs, Uniform) and problem.bits <= NARROW_BITS:
        inputs = _search_noise(inputs, x, exact, share, rounded(problem.weight, weight))
    return {f"{layer}.x": inputs, f"{layer}.w": weight}


def _widest(problem: LinearProblem) -> Uniform:
    """What wide codes clip at: nothing, and zero is the code 0."""
    largest = float(torch.maximum(problem.samples.low.min().abs(), problem.samples.high.max().abs()))
    return wide_uniform(largest)


def _initial_weight(problem: LinearProblem, method: QuantMethod) -> Uniform:
    return search_weight(
        problem.weight,
        problem.weight_bits,
        groups=_groups(problem, method),
        symmetric=method.symmetric_weights or problem.symmetric,
        grid=Grid(start=1.0, stop=1.0, count=1),
        error=lambda w: (w - problem.weight).square().sum(1),
    )


def _groups(problem: LinearProblem, method: QuantMethod) -> int | None:
    return None if method.granularity == "channel" else problem.site.groups


def _search_weight(problem: LinearProblem, method: QuantMethod, x_hat: Tensor, exact: Tensor, grad: Tensor) -> Uniform:
    weight = problem.weight

    def error(w: Tensor) -> Tensor:
        if method.weights == "hessian":
            return ((x_hat @ w.T - exact).square() * grad).sum(0)
        return ((w - weight).square() * scale).sum(1)

    scale = (
        (x_hat.square() * problem.samples.share).mean(0) if method.weights == "output" else torch.ones(weight.shape[1])
    )
    if method.weights in ("minmax", "percentile"):
        return _initial_weight(problem, method)
    return search_weight(
        weight,
        problem.weight_bits,
        groups=_groups(problem, method),
        symmetric=method.symmetric_weights or problem.symmetric,
        grid=method.weight_grid,
        error=error,
    )


def _search_inputs(
    problem: LinearProblem, method: QuantMethod, x: Tensor, exact: Tensor, grad: Tensor, weight: Tensor
) -> Quantizer:

    def error(quantizer: Quantizer) -> float:
        if method.activations in ("mse", "minmax"):
            return float((rounded(x, quantizer) - x).square_().mul_(problem.samples.share).mean())
        difference = rounded(x, quantizer) @ weight.T - exact
        return float(
            difference.square_().mul_(grad if method.activations == "hessian" else problem.samples.share).mean()
        )

    low, high = problem.samples.low.min(), problem.samples.high.max()
    activation = problem.site.activation
    if activation is not None and method.log_gelu and not problem.uniform_only:
        offset = -activation_minimum(activation)
        moved = search_log(float(high) + offset, problem.bits, error, offset=offset)
        plain = search_affine(low, high, problem.bits, method.grid, error)
        return moved if error(moved) < error(plain) else plain
    if activation is not None and method.twin_gelu and (method.symmetric or not problem.uniform_only):
        twin = _search_twin(activation, high, problem.bits, method, error)
        if method.symmetric:
            return twin
        plain = search_affine(low, high, problem.bits, method.grid, error)
        return twin if error(twin) < error(plain) else plain
    return search_range(
        low,
        high,
        problem.samples.ordinary,
        problem.bits,
        method,
        symmetric=method.symmetric or problem.symmetric_inputs,
        error=error,
    )


def search_apart(
    problems: Iterable[LinearProblem],
    samples: Samples,
    method: QuantMethod,
    before: Mapping[str, Quantizer],
    after: Mapping[str, Quantizer],
) -> dict[str, Quantizer]:
    """Return the quantizers of inputs of tokens apart, by the error of their outputs, plain and per tensor.

    Args:
        before: quantizers of the inputs as the samples are.
        after: the same after zero points were folded away: the inputs moved by as much.
    """
    found: dict[str, Quantizer] = {}
    for problem in problems:
        layer, apart = problem.site.layer, problem.site.apart
        if apart is None:
            continue
        one = samples.linears[apart]
        x, low, high = one.x, one.low.min(), one.high.max()
        inputs, given = after[f"{layer}.x"], before[f"{layer}.x"]
        if isinstance(inputs, Uniform) and isinstance(given, Uniform):
            moved = float(inputs.scale * np.float32(inputs.zero_point - given.zero_point))
            x, low, high = x - moved, low - moved, high - moved
        weight = rounded(problem.weight, after[f"{layer}.w"])
        found[f"{apart}.x"] = search_range(
            low,
            high,
            x,
            problem.bits,
            method,
            symmetric=problem.symmetric or problem.bits > NARROW_BITS,
            error=lambda q, x=x, w=weight: float((rounded(x, q) @ w.T - x @ w.T).square().mean()),  # type: ignore[misc]
        )
    return found


def search_range(
    low: Tensor, high: Tensor, x: Tensor, bits: int, method: QuantMethod, *, symmetric: bool, error: Error
) -> Uniform:
    """Return a per-tensor quantizer by the method's way of choosing activation ranges."""
    if method.activations == "percentile":
        ranges = [percentile_range(x, p) for p in (PERCENTILES if method.equalize == "repq" else (0.9999,))]
        made = [_from_range(a, b, bits, symmetric=symmetric) for a, b in ranges]
        return best(made, lambda q: float((rounded(x, q) - x).square().mean()))
    if method.activations == "minmax":
        return _from_range(low, high, bits, symmetric=symmetric)
    if symmetric:
        return search_symmetric(torch.maximum(high.abs(), low.abs()), bits, method.grid, error)
    return search_affine(low, high, bits, method.grid, error)


def _from_range(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> Uniform:
    if symmetric:
        return symmetric_uniform(torch.maximum(high.abs(), low.abs()), bits)
    return affine_uniform(low, high, bits)


def _search_twin(activation: str, high: Tensor, bits: int, method: QuantMethod, error: Error) -> Twin:
    """The negative range spans the function's minimum exactly; the positive scale is searched.

    Equation: with tied scales outer = 2^m inner, m an integer, over the same span as the grid of free ones.

    Source: PTQ4ViT (2111.12293), section 3.2, with the minimum of the activation function at hand; the released code
    leaves the outer scale free.
    """
    first, last = code_range(bits, symmetric=True)
    inner = uniform_from_scale(activation_minimum(activation) / first, first, 0)
    if method.tied_twins:
        widest = float(high) / (last + 0.5) / float(inner.scale)
        powers = range(_power(widest * method.grid.start), _power(widest * method.grid.stop) + 1)
        scales = [float(np.ldexp(inner.scale, power)) for power in powers]
        return min((Twin(rule="sign", inner=inner, outer=uniform_from_scale(s, 0, last)) for s in scales), key=error)
    outer = search_symmetric(
        high,
        bits,
        method.grid,
        lambda q: error(Twin(rule="sign", inner=inner, outer=q)),  # type: ignore[arg-type]
    )
    return Twin(rule="sign", inner=inner, outer=replace(outer, low=0))


def _power(ratio: float) -> int:
    """The power of two nearest to a positive ratio."""
    return round(math.log2(max(ratio, 2.0**-20)))


def _search_noise(inner: Uniform, x: Tensor, exact: Tensor, share: Tensor, weight: Tensor) -> Shifted:
    """A mean and a width for a fixed uniform noise vector, by the error of the layer's output.

    No offset at all is one of the candidates, so that the samples' error never grows.

    Source: NoisyQuant (2211.16056), section 3.3; width in (0, 2] scales as in the released code.
    """
    noise = torch.rand(x.shape[1], generator=torch.Generator().manual_seed(0)) * 2 - 1
    scale = float(inner.scale)

    def made(mean: float, width: float) -> Shifted:
        return Shifted(offset=(mean + noise * width * scale).numpy(), inner=inner)

    def error(candidate: Shifted) -> float:
        return float((rounded(x, candidate) @ weight.T - exact).square_().mul_(share).mean())

    reach = float(x.mean().abs() + x.std())
    means = [float(m) for m in np.linspace(-reach, reach, 2 * _NOISE_STEPS + 1)]
    errors = {(mean, width): error(made(mean, width)) for mean in means for width in (0.0, 1.0)}
    mean = min(errors, key=errors.__getitem__)[0]
    widths = [float(w) for w in np.linspace(0.0, 2.0, _NOISE_STEPS + 1)]
    return min((made(mean, width) for width in widths), key=error)
