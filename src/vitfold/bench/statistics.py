"""What a difference measured on the same images, or in the same trials, is worth.

The data are `fidelity`'s, `measurement`'s and `pictures`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import comb
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from vitfold.bench.measurement import Measurement, paired_ratios

_Z95 = 1.959963984540054
_RESAMPLES = 2000
_RESAMPLES_OF_SETS = 100
_LEAST_PER_CLASS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """How many images fewer are right, as a share of all, with a 95 % interval; negative where more are.

    `lost` images were right before and are not now, `gained` the other way; `p_value` is McNemar's.
    """

    images: int
    drop: float
    low: float
    high: float
    lost: int
    gained: int
    p_value: float

    @property
    def standard_error(self) -> float:
        """Half the width of a 68 % interval."""
        return (self.high - self.low) / (2 * _Z95)

    @property
    def is_noise(self) -> bool:
        """True if chance alone explains the difference (p > 0.05)."""
        return self.p_value > 0.05

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def paired_drop(before: Bool[np.ndarray, " B"], after: Bool[np.ndarray, " B"]) -> Drop:
    """Compare which images were right before and after, image by image.

    Equation: drop = (b - c) / n, b lost and c gained of n; interval (b - c) / m -+ 1.96 s / m with m = n + 2 and
    s^2 = b + c + 1 - (b - c)^2 / m; exact two-sided p = min(1, 2 P[X <= min(b, c)]), X ~ Bin(b + c, 1/2).

    Source: Agresti and Min (Statistics in Medicine 24, 2005) for the interval; McNemar (Psychometrika 12, 1947).
    """
    if len(before) == 0:
        raise ValueError("a paired comparison needs at least one image")
    lost, gained = int(np.sum(before & ~after)), int(np.sum(~before & after))
    wide = len(before) + 2
    middle = (lost - gained) / wide
    half = _Z95 * np.sqrt(lost + gained + 1 - (lost - gained) ** 2 / wide) / wide
    return Drop(
        images=len(before),
        drop=(lost - gained) / len(before),
        low=float(middle - half),
        high=float(middle + half),
        lost=lost,
        gained=gained,
        p_value=_sign_test(lost, gained),
    )


def ratio_interval(baseline: Measurement, subject: Measurement, *, seed: int = 0) -> dict[str, float]:
    """Return how many times faster `subject` is: the median over interleaved trials, and a 95 % interval of it.

    The interval is a percentile bootstrap over trials; few trials make it too narrow, so give it seven or more.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.
    """
    return median_interval(paired_ratios(baseline, subject), np.random.default_rng(seed))


def median_interval(values: Float[np.ndarray, " T"], rng: np.random.Generator) -> dict[str, float]:
    """Return the median, and a 95 % interval of it: a percentile bootstrap."""
    drawn = rng.choice(values, (_RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {"median": float(np.median(values)), "low": float(low), "high": float(high)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rise:
    """By how much a figure of a set of images is higher than that of another, with a 95 % interval."""

    rise: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """Return plain JSON values."""
        return asdict(self)


def paired_rise(
    before: float, after: float, resampled_before: Float[np.ndarray, " R"], resampled_after: Float[np.ndarray, " R"]
) -> Rise:
    """Compare a figure of two sets of images, given what it is in the same resamples of both.

    Equation: (after - before) -+ 1.96 s, s the standard deviation over resamples of after - before. Centred on what was
    measured: a distance of a resample is biased, whose images are fewer different ones.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), sections 6.4 and 13.2.
    """
    half = _Z95 * float(np.std(resampled_after - resampled_before, ddof=1))
    rise = after - before
    return Rise(rise=rise, low=rise - half, high=rise + half)


def resampled_places(labels: Sequence[int], *, seed: int = 0) -> Int[np.ndarray, "R N"]:
    """Return seeded resamples of a set of images: for every place one of its class, since a seed changes no class.

    Classes of fewer than five images are drawn from together, which adds the noise of their shares.
    """
    classes, inverse, counts = np.unique(np.array(labels), return_inverse=True, return_counts=True)
    group = np.where(counts < _LEAST_PER_CLASS, len(classes), np.arange(len(classes)))[inverse]
    draw = np.random.default_rng(seed)
    chosen = np.empty((_RESAMPLES_OF_SETS, len(labels)), np.int64)
    for one in np.unique(group):
        places = np.flatnonzero(group == one)
        chosen[:, places] = draw.choice(places, (_RESAMPLES_OF_SETS, len(places)))
    return chosen


def share_interval(right: Bool[np.ndarray, " B"]) -> dict[str, float]:
    """Return the 95 % interval of the share of images that are right.

    Equation: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    Source: Wilson (Journal of the American Statistical Association 22, 1927).
    """
    n, share = len(right), float(np.mean(right))
    middle = share + _Z95**2 / (2 * n)
    half = _Z95 * float(np.sqrt(share * (1 - share) / n + _Z95**2 / (4 * n * n)))
    wide = 1 + _Z95**2 / n
    return {"low": max(0.0, (middle - half) / wide), "high": min(1.0, (middle + half) / wide)}


def _sign_test(lost: int, gained: int) -> float:
    """Return the exact two-sided p-value; in integers, since 2^n leaves floats behind at n = 1024."""
    total = lost + gained
    tail = sum(comb(total, k) for k in range(min(lost, gained) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**total)))
