"""Pictures for tests that need more of them than the demo has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vitfold.images import ImageSet, find_images


def gradient_pictures(folder: Path, count: int) -> ImageSet:
    """Write small pictures of random gradients into a folder."""
    draw, rise = np.random.default_rng(0), np.linspace(0, 1, 32)
    for i in range(count):
        base, right, down = draw.uniform(0, 255, (3, 1, 1, 3))
        pixels = base + (right - base) * rise[None, :, None] / 2 + (down - base) * rise[:, None, None] / 2
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:03d}.png")
    return find_images(folder)
