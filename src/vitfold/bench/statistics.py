"""What a difference measured on the same images, or in the same trials, is worth.

Owns the intervals and tests of paired data. The data are `fidelity`'s and `measurement`'s.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from fractions import Fraction
from math import comb
from typing import Any

import numpy as np
from jaxtyping import Bool

from vitfold.bench.measurement import Measurement, paired_ratios

_Z95 = 1.959963984540054
_RESAMPLES = 2000


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
    ratios = paired_ratios(baseline, subject)
    drawn = np.random.default_rng(seed).choice(ratios, (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def _sign_test(lost: int, gained: int) -> float:
    """Return the exact two-sided p-value; in integers, since 2^n leaves floats behind at n = 1024."""
    total = lost + gained
    tail = sum(comb(total, k) for k in range(min(lost, gained) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**total)))
