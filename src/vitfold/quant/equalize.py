"""Exact folds that make one range fit all channels.

The algebra: a layer's input is replaced by (x - shift) / scale per channel, where the producer (a LayerNorm, or the
V rows of qkv) takes the change for nothing, and the consumer undoes it in its weight and bias.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from vitfold.model import Array


def equalize_norm(
    params: Mapping[str, Array],
    norm: str,
    layer: str,
    *,
    shift: Float[np.ndarray, " D"],
    scale: Float[np.ndarray, " D"],
) -> dict[str, Array]:
    """Fold (x - shift) / scale into the LayerNorm before a linear layer.

    gamma' = gamma / s, beta' = (beta - m) / s, W' = W diag(s), b' = b + W m.

    Source: RepQ-ViT (2212.08254), section 3.2, with s r2 written as the shift m.
    """
    changed = dict(params)
    changed[f"{norm}.weight"] = _f32(params[f"{norm}.weight"] / scale)
    changed[f"{norm}.bias"] = _f32((params[f"{norm}.bias"] - shift) / scale)
    return changed | _consumer(params, layer, shift=shift, scale=scale)


def equalize_values(
    params: Mapping[str, Array], qkv: str, proj: str, *, shift: Float[np.ndarray, " A"], scale: Float[np.ndarray, " A"]
) -> dict[str, Array]:
    """Fold (v - shift) / scale into the V rows of qkv and into cached values; the attention's output changes alike.

    Exact since the rows of softmax sum to one: A (V - 1 m^T) diag(1/s) = (A V - 1 m^T) diag(1/s).
    """
    changed = dict(params)
    width = len(shift)
    weight, bias = params[f"{qkv}.weight"].copy(), params.get(f"{qkv}.bias")
    weight[-width:] = weight[-width:] / scale[:, None]
    bias = np.zeros(len(weight), np.float32) if bias is None else bias.copy()
    bias[-width:] = (bias[-width:] - shift) / scale
    changed[f"{qkv}.weight"], changed[f"{qkv}.bias"] = _f32(weight), _f32(bias)
    cached = f"{qkv.removesuffix('.qkv')}.cached_v"
    if cached in params:
        heads = (1, params[cached].shape[1], 1, -1)
        changed[cached] = _f32((params[cached] - shift.reshape(heads)) / scale.reshape(heads))
    return changed | _consumer(params, proj, shift=shift, scale=scale)


def _consumer(params: Mapping[str, Array], layer: str, *, shift: Array, scale: Array) -> dict[str, Array]:
    weight = params[f"{layer}.weight"].astype(np.float64)
    bias = params.get(f"{layer}.bias", np.zeros(len(weight), np.float32))
    return {f"{layer}.weight": _f32(weight * scale), f"{layer}.bias": _f32(bias + weight @ shift)}


def _f32(array: Array) -> Array:
    return np.ascontiguousarray(array, np.float32)
