"""Quantizers for tests: ranges from one batch, weights put on their grids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime import InferenceSession

from vitfold.architectures.programs import forward, shapes_of
from vitfold.architectures.vit import transformer_block
from vitfold.engines.exactness import find_execution
from vitfold.engines.onnxruntime import session_options
from vitfold.images import ImageSet
from vitfold.model import Array, Model, ViTSpec
from vitfold.ops.emit import INPUT_NAME
from vitfold.ops.protocol import Port
from vitfold.ops.run import Run
from vitfold.products import Product, products_of
from vitfold.program import replay, trace
from vitfold.quant.collect import Samples, collect
from vitfold.quant.network import ImageExamples, Network, network_of
from vitfold.quantizer import Quantizer, Twin, Uniform
from vitfold.recipe import MergeRecipe
from vitfold.target import PLAIN, Target
from vitfold.transforms.merging import Layout, merged, stream_name
from vitfold.transforms.sinks import PREFIX_ROWS, SINK_ROWS


class Ranges(Run):
    """`Run` that keeps the inputs of every linear layer and attention product."""

    def __init__(self, model: Model) -> None:
        super().__init__(model.params)
        self.seen: dict[str, Array] = {}

    def linear(self, layer, x, rows=""):
        if rows != SINK_ROWS:
            self.seen[f"{layer}.{rows}.x" if rows else f"{layer}.x"] = x.numpy()
        return super().linear(layer, x)

    def attention(self, site, q, k, v, bias):
        for name, operand in (("q", q), ("k", k), ("v", v)):
            self.seen[f"{site}.{name}"] = operand.numpy()
        self.seen[f"{site}.softmax"] = np.ones(1, np.float32)
        return super().attention(site, q, k, v, bias)


def products_in(target: Target, quantizers: Mapping[str, Quantizer]) -> tuple[Product, ...]:
    """The integer products of a graph that ONNX Runtime is to run, whatever engine its target is for."""
    attention = any(site.endswith(".q") for site in quantizers)
    return products_of({**target.to_dict(), "engine": "onnxruntime"}, weight_bits=8, attention=attention)


def run_exactly(path: Path, target: Target, quantizers: Mapping[str, Quantizer], images: Array) -> Array:
    """Run a graph on ONNX Runtime in a way that is exact on this processor: as it is written, if made for TensorRT.

    Raises:
        EngineError: if there is none.
    """
    literal = target.engine == "tensorrt"
    execution = PLAIN if literal else find_execution("onnxruntime", products_in(target, quantizers))
    options = session_options(1, literal=literal, execution=execution)
    session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {INPUT_NAME: images})
    return np.asarray(found)


def single(target: Target) -> Target:
    """The same lowering in single precision, where it has to be exact."""
    return replace(target, float_type="float32")


def affine(x: Array, low: int = 0, high: int = 255) -> Uniform:
    """The codes low..high over [min(x, 0), max(x, 0)]."""
    least, most = min(float(x.min()), 0.0), max(float(x.max()), 1e-3)
    scale = (most - least) / (high - low)
    return Uniform(scale=np.array(scale), zero_point=np.array(round(low - least / scale)), low=low, high=high)


def symmetric(x: Array, low: int = -128, high: int = 127) -> Uniform:
    return Uniform(scale=np.array(np.abs(x).max() / high), zero_point=np.array(0), low=low, high=high)


def per_channel(weight: Array, bits: int = 8) -> Uniform:
    high = 2 ** (bits - 1) - 1
    scale = (np.abs(weight).max(1) / high).astype(np.float32)
    return Uniform(scale=scale, zero_point=np.zeros(len(scale), np.int32), low=-high - 1, high=high, axis=0)


def twin_sign(x: Array, bits: int = 8) -> Twin:
    """Post-GELU: negative and positive numbers have scales of their own."""
    high = 2 ** (bits - 1) - 1
    inner = Uniform(scale=np.array(-x.min() / (high + 1)), zero_point=np.array(0), low=-high - 1, high=0)
    outer = Uniform(scale=np.array(x.max() / high), zero_point=np.array(0), low=0, high=high)
    return Twin(rule="sign", inner=inner, outer=outer)


def twin_magnitude(split: float = 1 / 16, bits: int = 8) -> Twin:
    """Post-softmax: numbers below `split` have a finer scale."""
    high = 2 ** (bits - 1) - 1
    inner, outer = (
        Uniform(scale=np.array(end / high), zero_point=np.array(0), low=0, high=high) for end in (split, 1.0)
    )
    return Twin(rule="magnitude", inner=inner, outer=outer)


def quantized(
    model: Model,
    images: Array,
    r: Sequence[int] = (),
    *,
    weight_bits: int = 8,
    attention: bool = True,
    attention_zero_points: bool = True,
    twin: bool = False,
) -> tuple[Model, dict[str, Quantizer]]:
    """Return the model with its weights on their grids, and a quantizer for every site."""
    ranges = Ranges(model)
    with torch.inference_mode():
        forward(ranges, model.spec, MergeRecipe(r=tuple(r)), torch.from_numpy(images))
    quantizers: dict[str, Quantizer] = {}
    params = dict(model.params)
    for site, x in ranges.seen.items():
        name, _, operand = site.rpartition(".")
        if operand == "x" and name.endswith(f".{PREFIX_ROWS}"):
            quantizers[site] = affine(x)
        elif operand == "x":
            weights = per_channel(params[f"{name}.weight"], weight_bits)
            quantizers[f"{name}.w"] = weights
            params[f"{name}.weight"] = weights(params[f"{name}.weight"])
            quantizers[site] = twin_sign(x) if twin and name.endswith("mlp.fc2") else affine(x)
        elif attention and operand == "softmax":
            quantizers[site] = (
                twin_magnitude() if twin else affine(x, 0, 127) if not attention_zero_points else affine(x)
            )
        elif attention:
            quantizers[site] = affine(x) if attention_zero_points else symmetric(x)
    return replace(model, params=params), quantizers


def blocks_alone(spec: ViTSpec, r: tuple[int, ...]) -> Callable[[Any, Any], Any]:
    """The first `len(r)` blocks on embedded patches, without prefix and positions, block l merging r[l] tokens."""
    plain = replace(spec, class_token=False, dist_token=False, registers=0, pool="avg")

    def written(ops: Any, image: Any) -> Any:
        x = ops.patch_embed("patch_embed", image)
        for block in range(len(r)):
            x = transformer_block(ops, plain, block, x)
        return x

    inputs = (Port(name="pixel_values", shape=(spec.channels, *spec.image_size)),)
    program = trace(written, shapes_of(plain), inputs=inputs, outputs=("y",))
    program = merged(program, shapes_of(plain), MergeRecipe(r=r), Layout(prefix=0, grid=spec.grid), sources=True)
    return lambda ops, image: replay(program, ops, image, only=(stream_name(len(r), "x"),))[0]


def calibrating(model: Model, merge: MergeRecipe, images: ImageSet) -> tuple[Network, ImageExamples]:
    """A Vision Transformer and its images, as quantization takes them."""
    return network_of(model, merge), ImageExamples(images=images, preprocess=model.preprocess)


def collected(model: Model, merge: MergeRecipe, images: ImageSet, **how: Any) -> Samples:
    """Samples of every site of a Vision Transformer."""
    return collect(*calibrating(model, merge, images), **how)
