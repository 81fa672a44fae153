"""Exact folds: model -> model rewrites that leave the function unchanged.

Each fold has an identity test. Lossy folds are not here: they are chosen by a recipe.
"""

from __future__ import annotations

from dataclasses import replace

from vitfold.model.params import Model
from vitfold.model.spec import ViTSpec


def fold_layer_scale(model: Model) -> Model:
    """Fold LayerScale into the linear layer before it: gamma * (W x + b) = (gamma W) x + gamma b.

    Source: CaiT (2103.17239), equation 4; the fold is algebra.
    """
    if not isinstance(model.spec, ViTSpec) or not model.spec.layer_scale:
        return model
    params = dict(model.params)
    for i in range(model.spec.num_layers):
        for gamma_name, layer in ((f"blocks.{i}.ls1", "attn.proj"), (f"blocks.{i}.ls2", "mlp.fc2")):
            gamma = params.pop(gamma_name)
            weight, bias = f"blocks.{i}.{layer}.weight", f"blocks.{i}.{layer}.bias"
            params[weight] = params[weight] * gamma[:, None]
            if bias in params:
                params[bias] = params[bias] * gamma
    return model.with_params(replace(model.spec, layer_scale=False), params)
