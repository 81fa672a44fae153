"""The least value that an activation function takes.

Nothing but that number: the end of the negative range of a twin quantizer.
"""

from __future__ import annotations

import functools

import torch

from vitfold.ops.run import Run


@functools.cache
def activation_minimum(kind: str) -> float:
    """Return min f: -0.169971 for erf GELU, -0.170041 for tanh, -0.163610 for quick GELU, -0.278465 for SiLU.

    Source: derived numerically; PTQ4ViT (2111.12293) has the first as a constant.
    """
    x = torch.linspace(-4.0, 0.0, 400_001, dtype=torch.float64)
    return float(Run({}).activation(kind, x, "").min())
