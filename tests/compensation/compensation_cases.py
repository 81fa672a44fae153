"""Examples for tiny models, and compensation on them."""

from __future__ import annotations

import numpy as np

from vitfold.compensation import Compensated, compensate
from vitfold.model import Model
from vitfold.quant.network import ArrayExamples
from vitfold.recipe import MergeRecipe


def drawn(count: int, *, seed: int = 0) -> ArrayExamples:
    """Images of random colours in random gradients, in which neighbours are alike."""
    draw = np.random.default_rng(seed)
    rise, fall = np.linspace(0, 1, 32)[:, None], np.linspace(0, 1, 32)[None, :]
    colours = draw.standard_normal((3, count, 3, 1, 1))
    pixels = colours[0] + colours[1] * rise + colours[2] * fall + 0.1 * draw.standard_normal((count, 3, 32, 32))
    return ArrayExamples(arrays=(pixels.astype(np.float32),), name="image")


def compensated(model: Model, merge: MergeRecipe) -> Compensated:
    """Compensate a tiny model on 512 images."""
    return compensate(model, merge, drawn(512))
