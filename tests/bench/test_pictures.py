"""Metrics of images against slow loops and known values."""

from __future__ import annotations

import numpy as np
import pytest

from vitfold.bench.pictures import frechet_distance, moments, psnr_db, resampled_distances, ssim


def test_psnr_of_a_known_error() -> None:
    a = np.zeros((2, 1, 4, 4), np.float32)
    assert psnr_db(a, a) is None
    assert psnr_db(a, a + np.float32(0.1)) == pytest.approx(20, abs=1e-4)
    assert psnr_db(a, a + np.float32(0.2), peak=2.0) == pytest.approx(20, abs=1e-4)


def test_ssim_is_the_mean_over_windows() -> None:
    draw = np.random.default_rng(0)
    a = draw.uniform(size=(1, 2, 12, 13)).astype(np.float32)
    b = (a + 0.1 * draw.standard_normal(a.shape)).clip(0, 1).astype(np.float32)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    found = []
    for channel in range(2):
        for y in range(2):
            for x in range(3):
                u, v = (image[0, channel, y : y + 11, x : x + 11].astype(float) for image in (a, b))
                mu, mv = (window * u).sum(), (window * v).sum()
                su, sv = (window * (u - mu) ** 2).sum(), (window * (v - mv) ** 2).sum()
                cross = (window * (u - mu) * (v - mv)).sum()
                upper = (2 * mu * mv + 1e-4) * (2 * cross + 9e-4)
                found.append(upper / ((mu**2 + mv**2 + 1e-4) * (su + sv + 9e-4)))
    assert ssim(a, b) == pytest.approx(np.mean(found), abs=1e-6)
    assert ssim(a, a) == pytest.approx(1)


def test_frechet_distance_of_gaussians() -> None:
    draw = np.random.default_rng(1)
    a = draw.standard_normal((400, 5)).astype(np.float32)
    moved, wide = a + np.float32(2), a * np.float32(3)
    assert frechet_distance(moments(a), moments(a)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(moments(a), moments(moved)) == pytest.approx(20, rel=1e-5)
    spread = np.trace(np.cov(a.astype(float), rowvar=False))
    mean = np.sum((2 * a.astype(float).mean(0)) ** 2)
    assert frechet_distance(moments(a), moments(wide)) == pytest.approx(4 * spread + mean, rel=1e-4)


def test_distances_of_resamples_are_those_of_their_rows() -> None:
    draw = np.random.default_rng(2)
    real, made = moments(draw.standard_normal((90, 4))), draw.standard_normal((40, 4)) * 1.5
    chosen = draw.integers(0, 40, (7, 40))
    expected = [frechet_distance(real, moments(np.stack([made[i] for i in places]))) for places in chosen]
    np.testing.assert_allclose(resampled_distances(real, made, chosen), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="at least 2 images, found 1"):
        moments(made[:1])
