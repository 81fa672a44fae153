"""Choosing the exact folds of a method: how far to equalize the channels that a LayerNorm or V feeds.

Samples go through the same change, so nothing is collected twice.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitfold.model import Array
from vitfold.quant.collect import LinearSamples, Samples
from vitfold.quant.equalize import equalize_norm, equalize_values
from vitfold.quant.methods import QuantMethod
from vitfold.quant.network import Network
from vitfold.quant.ranges import PERCENTILES, Grid, affine_uniform, rounded, search_weight, symmetric_uniform
from vitfold.quant.sites import LinearSite
from vitfold.quantizer import Quantizer, Uniform
from vitfold.recipe import QuantRecipe

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_COARSE = Grid(start=0.5, stop=1.0, count=11)
_FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)


def fold_channels(
    network: Network,
    samples: Samples,
    method: QuantMethod,
    quant: QuantRecipe,
) -> tuple[Network, Samples, Mapping[str, Uniform]]:
    """Return the folded network, the samples that it would see, and input ranges that a fold fixed."""
    if method.equalize == "none" and not method.values:
        return network, samples, {}
    params: dict[str, Array] = dict(network.params)
    linears, attentions = dict(samples.linears), dict(samples.attentions)
    presets: dict[str, Uniform] = {}
    for site in network.linears:
        bits, weight_bits = quant.bits(site.layer, weight=False), quant.bits(site.layer, weight=True)
        if bits is None or weight_bits is None:
            continue
        one = linears[site.layer]
        if site.norm is not None and method.equalize != "none":
            shift, scale, preset = _choose(site, one, params, method, bits, weight_bits)
            params |= equalize_norm(params, site.norm, site.layer, shift=shift.numpy(), scale=scale.numpy())
            linears[site.layer] = _moved(one, shift, scale)
            if site.apart is not None:
                linears[site.apart] = _moved(linears[site.apart], shift, scale)
            if preset is not None:
                presets[f"{site.layer}.x"] = preset
        elif site.values is not None and method.values:
            shift, scale = _search_strength(site, one, params, bits, weight_bits)
            params |= equalize_values(params, site.values, site.layer, shift=shift.numpy(), scale=scale.numpy())
            linears[site.layer] = _moved(one, shift, scale)
            assert site.attention is not None
            name = site.attention
            attention = attentions[name]
            heads = attention.v.shape[1]
            s, m = (t.reshape(1, heads, 1, -1) for t in (scale, shift))
            grad = attention.grad_output
            attentions[name] = replace(
                attention, v=(attention.v - m) / s, grad_output=None if grad is None else grad * s
            )
            values = linears[site.values]
            if values.grad is not None:
                grown = values.grad.clone()
                grown[:, -len(scale) :] *= scale
                linears[site.values] = replace(values, grad=grown)
    return network.with_params(params), replace(samples, linears=linears, attentions=attentions), presets


def center_norms(network: Network, quantizers: Mapping[str, Quantizer]) -> tuple[Network, dict[str, Quantizer]]:
    """Fold the zero points of inputs that a LayerNorm feeds into its shift and the layer's bias, exactly.

    x = s (q - z) becomes x' = x - s (m - z) with the zero point m in the middle of the codes, which is 0 in signed
    ones: an affine quantizer for a runtime that knows symmetric ones only, at no cost.

    Source: RepQ-ViT (2212.08254), which folds shifts so.
    """
    params: dict[str, Array] = dict(network.params)
    centered = dict(quantizers)
    for site in network.linears:
        found = quantizers.get(f"{site.layer}.x")
        if site.norm is None or not isinstance(found, Uniform) or found.axis is not None:
            continue
        middle = (found.low + found.high + 1) // 2
        shift = found.scale * np.float32(middle - int(found.zero_point))
        if shift:
            width = len(params[f"{site.norm}.weight"])
            params |= equalize_norm(
                params,
                site.norm,
                site.layer,
                shift=np.full(width, shift, np.float32),
                scale=np.ones(width, np.float32),
            )
            centered[f"{site.layer}.x"] = replace(found, zero_point=np.array(middle, np.int32))
    return network.with_params(params), centered


def _moved(one: LinearSamples, shift: Tensor, scale: Tensor) -> LinearSamples:
    return replace(one, x=(one.x - shift) / scale, low=(one.low - shift) / scale, high=(one.high - shift) / scale)


def _choose(
    site: LinearSite,
    one: LinearSamples,
    params: Mapping[str, Array],
    method: QuantMethod,
    bits: int,
    weight_bits: int,
) -> tuple[Tensor, Tensor, Uniform | None]:
    if method.equalize == "smooth":
        weight = torch.from_numpy(params[f"{site.layer}.weight"])
        reach = torch.maximum(one.low.abs(), one.high.abs()).clamp_min(1e-5)
        scale = (reach / weight.abs().amax(0).clamp_min(1e-5)).sqrt()
        return torch.zeros_like(scale), scale, None
    if method.equalize == "repq":
        return _repq(one, bits)
    shift, scale = _search_strength(site, one, params, bits, weight_bits)
    return shift, scale, None


def _repq(one: LinearSamples, bits: int) -> tuple[Tensor, Tensor, Uniform]:
    """Per-channel affine ranges by percentile, then one scale and zero point for all.

    Source: RepQ-ViT (2212.08254), section 3.2: r1 = s / mean(s), r2 = z - mean(z).
    """
    x = one.ordinary
    chosen: Uniform | None = None
    least = float("inf")
    for percentile in PERCENTILES:
        low, high = torch.quantile(x, torch.tensor([1 - percentile, percentile]), dim=0)
        candidate = affine_uniform(low, high, bits, axis=1)
        error = float((rounded(x, candidate) - x).square().mean())
        if error < least:
            chosen, least = candidate, error
    assert chosen is not None
    s, z = torch.from_numpy(chosen.scale), torch.from_numpy(chosen.zero_point).float()
    mean, middle = s.mean(), z.mean().round()
    preset = Uniform(scale=mean.numpy(), zero_point=middle.int().numpy(), low=chosen.low, high=chosen.high)
    return -s * (z - middle), s / mean, preset


def _search_strength(
    site: LinearSite, one: LinearSamples, params: Mapping[str, Array], bits: int, weight_bits: int
) -> tuple[Float[Tensor, " I"], Float[Tensor, " I"]]:
    """Center every channel, scale it by its half range to a power; the power of least output error wins."""
    x = one.x
    weight = torch.from_numpy(params[f"{site.layer}.weight"])
    ends = torch.quantile(one.ordinary, torch.tensor([0.002, 0.998]), dim=0)
    shift = ends.mean(0)
    half = ((ends[1] - ends[0]) / 2).clamp_min(1e-5)
    grad = one.share if one.grad is None else one.grad.square() * one.share
    chosen, least = torch.ones_like(half), float("inf")
    for strength in STRENGTHS:
        scale = half**strength
        scale = scale / scale.log().mean().exp()
        moved, heavier = (x - shift) / scale, weight * scale
        moments = (moved.square() * one.share).mean(0)
        w = search_weight(
            heavier,
            weight_bits,
            groups=None,
            symmetric=True,
            grid=_COARSE,
            error=functools.partial(_weighted_error, heavier, moments),
        )
        exact, w_hat = moved @ heavier.T, rounded(heavier, w)
        absmax = moved.abs().max()
        for factor in _FACTORS:
            x_hat = rounded(moved, symmetric_uniform(absmax * factor, bits))
            error = float(((x_hat @ w_hat.T - exact).square() * grad).mean())
            if error < least:
                chosen, least = scale, error
    return shift, chosen


def _weighted_error(weight: Tensor, moments: Tensor, candidate: Tensor) -> Tensor:
    """The error of each output, for inputs of these second moments that are taken as uncorrelated."""
    return ((candidate - weight).square() * moments).sum(1)
