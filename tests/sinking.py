"""Models with remedies for tests: sinks folded in, cached rows drawn at random."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from vitfold.model import Model, Sinks


def with_sinks(model: Model, **fields: Any) -> Model:
    """Return the model with these remedies; its cached keys and values are seeded noise."""
    sinks, spec = Sinks(**fields), model.spec
    draw = np.random.default_rng(7)
    params = dict(model.params)
    for block in range(spec.num_layers):
        if sinks.cached(block):
            for name in ("cached_k", "cached_v"):
                rows = draw.standard_normal((1, spec.num_heads, sinks.rows, spec.head_dim))
                params[f"blocks.{block}.attn.{name}"] = rows.astype(np.float32)
    return model.with_params(replace(spec, sinks=sinks), params)


REMEDIES: dict[str, dict[str, Any]] = {
    "cached": {"start": 1, "rows": 1, "tau": 3.5},
    "cached once": {"start": 0, "rows": 2},
    "deleted": {"block": 1, "deletions": 3},
    "deleted at a layer": {"block": 1, "deletions": 3, "deletion_site": "blocks.0.mlp.fc2"},
    "both": {"start": 1, "rows": 1, "tau": 0.5, "block": 1, "deletions": 2},
    "float": {"layers": ("blocks.0.mlp.fc2", "blocks.1.attn.qkv"), "apart": 2},
    "split": {"layers": ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"), "split_prefix": True},
    "neurons": {"neurons": ((0, 3), (0, 7), (1, 5))},
}
"""Every field of `Sinks`; the last needs a register."""
