"""How like two sets of generated images are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

LEAST_IMAGES = 2
FRECHET_IMAGES = 30
"""Of fewer images a covariance says nothing of hundreds of features, and the distance is that of chance."""
_C1, _C2 = 0.01**2, 0.03**2
_SIGMA, _WINDOW = 1.5, 11

Images = Float[np.ndarray, "B C Y X"]


def psnr_db(
    reference: Float[np.ndarray, B * image], images: Float[np.ndarray, B * image], *, peak: float = 1.0
) -> float | None:
    """Return the peak signal-to-noise ratio over all pixels of all images in decibels; None where they are equal.

    Equation: 10 log10(peak^2 / mean (a - b)^2).
    """
    error = float(np.mean((reference.astype(np.float64) - images) ** 2))
    return None if error == 0 else float(10 * np.log10(peak**2 / error))


def ssim(reference: Images, images: Images) -> float:
    """Return the mean structural similarity of images in [0, 1], over channels and all places of an 11 x 11 window.

    Equation: (2 m_a m_b + c1)(2 s_ab + c2) / ((m_a^2 + m_b^2 + c1)(s_a^2 + s_b^2 + c2)), moments weighted by a Gaussian
    of 1.5 pixels; c1 = 0.01^2, c2 = 0.03^2.

    Source: Wang et al. (IEEE Transactions on Image Processing 13, 2004), section III.
    """
    if min(reference.shape[2:]) < _WINDOW:
        raise ValueError(f"structural similarity takes images of at least {_WINDOW} pixels, found {reference.shape}")
    a, b = reference.astype(np.float64), images.astype(np.float64)
    mean_a, mean_b = _smooth(a), _smooth(b)
    variance_a, variance_b = _smooth(a * a) - mean_a**2, _smooth(b * b) - mean_b**2
    covariance = _smooth(a * b) - mean_a * mean_b
    upper = (2 * mean_a * mean_b + _C1) * (2 * covariance + _C2)
    lower = (mean_a**2 + mean_b**2 + _C1) * (variance_a + variance_b + _C2)
    return float(np.mean(upper / lower))


def _smooth(x: Float[np.ndarray, "B C Y X"]) -> Float[np.ndarray, "B C V U"]:
    """Weigh by a Gaussian window, where it lies within the image."""
    places = np.arange(_WINDOW) - _WINDOW // 2
    window = np.exp(-(places**2) / (2 * _SIGMA**2))
    window /= window.sum()
    for axis in (2, 3):
        x = np.lib.stride_tricks.sliding_window_view(x, _WINDOW, axis=axis) @ window
    return x


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """What a Frechet distance needs of a set of features, and of how many images they are."""

    count: int
    mean: Float[np.ndarray, " F"]
    covariance: Float[np.ndarray, "F F"]

    def __post_init__(self) -> None:
        if self.count < LEAST_IMAGES:
            raise ValueError(f"a covariance takes at least {LEAST_IMAGES} images, found {self.count}")
        if self.covariance.shape != (len(self.mean), len(self.mean)):
            raise ValueError(f"a covariance {self.covariance.shape} does not go with {len(self.mean)} means")


def moments(features: Float[np.ndarray, "N F"]) -> Moments:
    """Return mean and covariance of features, in float64."""
    count, mean = len(features), features.mean(0, dtype=np.float64)
    apart = features - mean
    return Moments(count=count, mean=mean, covariance=apart.T @ apart / max(count - 1, 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return the distance of two sets of features, taken as Gaussians; fewer images than features bias it upwards.

    Equation: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^(1/2) S_b S_a^(1/2))^(1/2)).

    Source: FID (1706.08500); an FID only where the features are Inception's.
    """
    return _distance(a, _root(a.covariance), b)


def resampled_distances(
    real: Moments, features: Float[np.ndarray, "N F"], chosen: Int[np.ndarray, "R N"]
) -> Float[np.ndarray, " R"]:
    """Return the distance of every resample of features to the real ones; a resample is a row of places."""
    root = _root(real.covariance)
    return np.array([_distance(real, root, moments(features[places])) for places in chosen])


def _distance(a: Moments, root: Float[np.ndarray, "F F"], b: Moments) -> float:
    """The distance, given the root of the first covariance."""
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ b.covariance @ root), 0, None)).sum()
    apart = np.sum((a.mean - b.mean) ** 2)
    return float(apart + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def _root(covariance: Float[np.ndarray, "F F"]) -> Float[np.ndarray, "F F"]:
    values, vectors = np.linalg.eigh(covariance)
    root: Float[np.ndarray, "F F"] = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    return root
