"""Architectures that several tests speak of, without parameters."""

from __future__ import annotations

from typing import Any

from vitfold.model import ViTSpec


def vit_base(**overrides: Any) -> ViTSpec:
    """Return ViT-B/16 at 224 pixels with a thousand classes."""
    values = {
        "image_size": (224, 224),
        "patch_size": (16, 16),
        "embed_dim": 768,
        "num_layers": 12,
        "num_heads": 12,
        "head_dim": 64,
        "mlp_dim": 3072,
        "outputs": 1000,
    }
    return ViTSpec(**{**values, **overrides})
