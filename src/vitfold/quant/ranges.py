"""Range search: from samples of a site to the quantizer that loses least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.quantizer import Log, Quantizer, Uniform

Error = Callable[[Quantizer], float]
PERCENTILES = (0.999, 0.9999, 0.99999)


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Return the codes of `bits` bits: two's complement, or from 0 on for affine quantizers."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def symmetric_uniform(absmax: Float[Tensor, "*C"], bits: int, *, axis: int | None = None) -> Uniform:
    """absmax maps onto the outer edge of the largest code: scale = absmax / (2^(bits-1) - 1/2)."""
    low, high = code_range(bits, symmetric=True)
    scale = _positive(absmax / (high + 0.5)).numpy()
    return Uniform(scale=scale, zero_point=np.zeros(scale.shape, np.int32), low=low, high=high, axis=axis)


def affine_uniform(
    low: Float[Tensor, "*C"], high: Float[Tensor, "*C"], bits: int, *, axis: int | None = None
) -> Uniform:
    """The codes span [low, high], widened so that zero is a code of its own."""
    first, last = code_range(bits, symmetric=False)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = _positive((high - low) / (last - first))
    zero_point = (first - low / scale).round().clamp(first, last).int().numpy()
    return Uniform(scale=scale.numpy(), zero_point=zero_point, low=first, high=last, axis=axis)


def uniform_from_scale(scale: float, low: int, high: int) -> Uniform:
    """Return the per-tensor quantizer of this scale with the zero point 0."""
    return Uniform(scale=np.array(scale, np.float32), zero_point=np.array(0, np.int32), low=low, high=high)


def wide_uniform(absmax: float) -> Uniform:
    """Return the quantizer of 16 bits whose coarse half clips nothing up to absmax: scale = absmax / (127 * 256)."""
    low, high = code_range(16, symmetric=True)
    return uniform_from_scale(float(_positive(torch.tensor(absmax / (127 * 256)))), low, high)


def _positive(scale: Tensor) -> Tensor:
    return scale.float().clamp_min(torch.finfo(torch.float32).tiny * 2**24)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Factors that shrink or widen the observed range: start, stop, how many."""

    start: float
    stop: float
    count: int

    def factors(self) -> list[float]:
        """Return the factors, the largest first, so that a tie keeps the wider range."""
        return [float(f) for f in np.linspace(self.stop, self.start, self.count)]

    def search(self, groups: int, error: Callable[[Float[Tensor, " G"]], Float[Tensor, " G"]]) -> Float[Tensor, " G"]:
        """Return the factor of least error for each group: every fourth point, then the points around the best."""
        factors = self.factors()
        stride = 4 if self.count > 12 else 1
        chosen, least = torch.full((groups,), factors[0]), torch.full((groups,), float("inf"))

        def take(candidates: Tensor) -> None:
            nonlocal chosen, least
            found = error(candidates)
            better = found < least
            least, chosen = torch.where(better, found, least), torch.where(better, candidates, chosen)

        for factor in factors[::stride]:
            take(torch.full((groups,), factor))
        if stride > 1:
            step, center = (self.stop - self.start) / (self.count - 1), chosen
            for offset in range(-stride + 1, stride):
                if offset:
                    take((center + offset * step).clamp(self.start, self.stop))
        return chosen


def search_symmetric(absmax: Float[Tensor, ""], bits: int, grid: Grid, error: Error) -> Uniform:
    """Return the symmetric quantizer of least error over the grid."""

    def found(factors: Tensor) -> Tensor:
        return torch.tensor([error(symmetric_uniform(absmax * factors[0], bits))])

    return symmetric_uniform(absmax * grid.search(1, found)[0], bits)


def search_affine(low: Float[Tensor, ""], high: Float[Tensor, ""], bits: int, grid: Grid, error: Error) -> Uniform:
    """Coordinate descent over (low, high): both ends together, then each alone around the best."""
    fine = [float(f) for f in np.linspace(1.15, 0.7, 10)]

    def make(factors: tuple[float, float]) -> Uniform:
        return affine_uniform(low * factors[0], high * factors[1], bits)

    def pick(candidates: Sequence[tuple[float, float]]) -> tuple[float, float]:
        errors = [error(make(candidate)) for candidate in candidates]
        return candidates[int(np.argmin(errors))]

    f = float(grid.search(1, lambda factors: torch.tensor([error(make((float(factors[0]), float(factors[0]))))]))[0])
    a, b = f, f
    a, b = pick([(a, b), *((a, b * f) for f in fine)])
    a, b = pick([(a, b), *((a * f, b) for f in fine)])
    return make((a, b))


LOG_STEPS = 37
"""AdaLog's r: bases are 2^(q / r) for whole q."""


def search_log(scale: float, bits: int, error: Error, *, offset: float = 0.0) -> Log:
    """Return the logarithmic quantizer of least error: base and scale in turn, coarse to fine.

    Equation: base = 2^(q / 37), q = 1 .. 111; scale times 0.4 .. 1.1.

    Source: AdaLog (2407.12951), section 3.3: progressive search, here of one candidate at a time.
    """

    def make(q: int, factor: float) -> Log:
        return Log(scale=np.array(scale * factor, np.float32), bits=bits, root=LOG_STEPS / q, offset=offset)

    def pick(pairs: Iterable[tuple[int, float]]) -> tuple[int, float]:
        return min(pairs, key=lambda pair: error(make(*pair)))

    q, factor = pick((q, 1.0) for q in (1, 2, 3, 4, 6, 8, 11, 15, 20, 27, 37, 50, 68, 92, 111))
    q, factor = pick((q, float(f)) for f in np.linspace(1.1, 0.4, 15))
    near = sorted({max(1, round(q * one)) for one in np.linspace(0.75, 1.35, 13)})
    q, factor = pick((one, factor) for one in near)
    return make(*pick((q, factor + float(step)) for step in np.linspace(-0.04, 0.04, 5)))


def best(candidates: Iterable[Uniform], error: Error) -> Uniform:
    """Return the candidate of least error, the first on ties."""
    return min(candidates, key=error)


def percentile_range(x: Float[Tensor, ...], ratio: float) -> tuple[Tensor, Tensor]:
    """Return the (1 - ratio) and ratio quantiles over everything."""
    flat = x.flatten()
    count = flat.numel()
    above = max(1, round((1.0 - ratio) * count))
    high = flat.kthvalue(max(1, count - above + 1)).values
    low = flat.kthvalue(min(count, above)).values
    return low, high


def search_weight(
    weight: Float[Tensor, "O I"],
    bits: int,
    *,
    groups: int | None,
    symmetric: bool,
    grid: Grid,
    error: Callable[[Float[Tensor, "O I"]], Float[Tensor, " O"]],
) -> Uniform:
    """Pick scales for a weight, one per output channel or one per equal group of them.

    `error` maps a rounded weight to the error of each output channel; a group takes the factor of least
    sum. With `groups=None` every output channel is its own group.
    """
    outputs = weight.shape[0]
    count = outputs if groups is None else groups

    def grouped(values: Tensor, how: str) -> Tensor:
        parts = values.reshape(count, -1)
        each = parts.amax(1) if how == "max" else parts.amin(1)
        return each.repeat_interleave(outputs // count)

    high = grouped(weight.amax(1), "max")
    low = grouped(weight.amin(1), "min")
    absmax = torch.maximum(high.abs(), low.abs())

    def make(factor: Tensor) -> Uniform:
        if symmetric:
            return symmetric_uniform(absmax * factor, bits, axis=0)
        return affine_uniform(low * factor, high * factor, bits, axis=0)

    def found(factors: Tensor) -> Tensor:
        spread = factors.repeat_interleave(outputs // count)
        return error(rounded(weight, make(spread))).reshape(count, -1).sum(1)

    return make(grid.search(count, found).repeat_interleave(outputs // count))


def rounded(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Quantize and dequantize, exactly as the simulation does."""
    from vitfold.ops.simulate import fake_quantize

    return fake_quantize(x, quantizer)
