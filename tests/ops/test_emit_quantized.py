"""Quantized graphs: equal to `Simulate` site by site and block by block, in integers where it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from quantizing import quantized
from vitfold.model import Array, Model
from vitfold.ops.emit import INPUT_NAME, emit_graph, write_onnx
from vitfold.ops.simulate import Simulate
from vitfold.programs.tokens import Tokens
from vitfold.programs.vit import transformer_block
from vitfold.quantizer import Quantizer
from vitfold.target import TARGETS, Target

EXECUTED = list(TARGETS)
CPU = [name for name in EXECUTED if TARGETS[name].quantized_product == "matmul_integer_to_float"]


def session_of(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def quantized_for(target: Target, model: Model, images: Array, r=(), **choices: Any):
    return quantized(
        model, images, r, weight_bits=target.weight_bits, attention_zero_points=not target.symmetric, **choices
    )


def executed(
    program: Any, model: Model, target: Target, quantizers: dict[str, Quantizer], images: Array, folder: Path
) -> Array:
    path = folder / "model.onnx"
    write_onnx(emit_graph(program, model, target, quantizers), path)
    (found,) = session_of(path).run(None, {INPUT_NAME: images})
    return np.asarray(found)


def simulated(program: Any, model: Model, quantizers: dict[str, Quantizer], images: Array) -> Array:
    with torch.inference_mode():
        return np.asarray(program(Simulate(model.params, quantizers), torch.from_numpy(images)))


def errors_of_rows(found: Array, expected: Array) -> Array:
    """Relative error of each row; one flipped rounding stays in its row, so the median tells an error from a flip."""
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected, axis=-1).ravel() / np.linalg.norm(expected, axis=-1).ravel()


def one_block(model: Model, r: int = 0) -> Any:
    """One transformer block on embedded patches: (B, N, D)."""
    spec = model.spec

    def program(ops: Any, image: Any) -> Any:
        x = ops.patch_embed("patch_embed", image)
        tokens = Tokens(x=x, count=spec.patches, prefix=0)
        return transformer_block(ops, spec, 0, tokens, r=r, prop_attn=True, trace=False).x

    return program


@pytest.mark.parametrize("twin", [False, True], ids=["uniform", "twin"])
@pytest.mark.parametrize("attention", [False, True], ids=["linears", "attention too"])
@pytest.mark.parametrize("name", EXECUTED)
def test_a_block_equals_its_simulation(tiny_model, random_images, tmp_path, name, attention, twin):
    target = TARGETS[name]
    model, images = tiny_model(), random_images(tiny_model().spec, 3)
    model, quantizers = quantized_for(target, model, images, attention=attention, twin=twin)
    program = one_block(model)
    found = executed(program, model, target, quantizers, images, tmp_path)
    expected = simulated(program, model, quantizers, images)
    errors = errors_of_rows(found, expected)
    assert np.median(errors) < 1e-5
    assert errors.max() < 0.05
    rounded = errors_of_rows(expected, simulated(program, model, {}, images))
    assert np.median(rounded) > 1e-3, "quantization has to be visible"
