"""The target "integer": a block equals the int64 oracle bit for bit, and every product takes integers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from integer_graphs import INTEGER, Emitted, every_tensor
from oracles import reordered as oracle
from quantizing import blocks_alone, quantized, symmetric
from vitfold.architectures.programs import plain_program
from vitfold.errors import TargetError
from vitfold.model import Model
from vitfold.ops.emit import emit_graph, write_onnx
from vitfold.ops.emit.reordered import dyadic
from vitfold.program.queries import projections_of
from vitfold.quantizer import Quantizer


def block_graph(model: Model, quantizers: dict[str, Quantizer], path: Path, r: int = 0) -> onnx.ModelProto:
    """Two blocks of which the first merges, so that the second has a log-size bias; all tensors are outputs."""
    projections = projections_of(plain_program(model.spec))
    program = blocks_alone(model.spec, (r, 0))
    write_onnx(emit_graph(program, model, INTEGER, quantizers, projections=projections), path)
    return onnx.load(str(path))


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize("kind", ["zero points", "symmetric attention"])
def test_a_block_equals_the_integer_oracle_bit_for_bit(tiny_model, random_images, tmp_path, level, kind):
    model = tiny_model()
    images = random_images(model.spec, 3)
    model, quantizers = quantized(
        model, images, (5, 0), attention_zero_points=kind == "zero points", weight_bits=INTEGER.weight_bits
    )
    graph = block_graph(model, quantizers, tmp_path / "model.onnx", r=5)
    tensors = every_tensor(graph, images, level)
    emitted = Emitted(graph, tensors)
    for block in range(2):
        site = f"blocks.{block}.attn"
        q, q_scale, q_zero = emitted.quantized(f"{site}.q")
        k, k_scale, k_zero = emitted.quantized(f"{site}.k")
        v, v_scale, v_zero = emitted.quantized(f"{site}.v")
        scores = oracle.product(q, k.swapaxes(-1, -2), q_zero, k_zero)
        np.testing.assert_array_equal(emitted.output(f"{site}.qk", "MatMulInteger"), scores)
        width = np.float32(1 / np.sqrt(q.shape[-1]))
        logits = oracle.scaled(scores, np.float32(q_scale) * np.float32(k_scale) * width)
        np.testing.assert_array_equal(emitted.output(f"{site}.qk.scale", "Mul"), logits)
        powers, scale, zero = emitted.quantized(f"{site}.softmax")
        assert (np.float32(scale), zero, powers.max()) == (np.float32(1 / 255), 0, 255)
        sums = powers.astype(np.int64).sum(-1, keepdims=True)
        np.testing.assert_array_equal(emitted.output(f"{site}.softmax.sum", "ReduceSum"), sums)
        average = oracle.product(powers, v, 0, v_zero)
        np.testing.assert_array_equal(emitted.output(f"{site}.av", "MatMulInteger"), average)
        proj = quantizers[f"{site}.proj.x"]
        m, shift = dyadic(v_scale / float(proj.scale))
        codes = oracle.requantized(average, sums, Fraction(m, 2**shift), int(proj.zero_point), 0, 255)
        ints = emitted.node(f"{site}.proj", "MatMulInteger").input[0]
        moved = codes.swapaxes(1, 2).reshape(*codes.shape[:1], codes.shape[2], -1)
        assert emitted.value(ints).dtype == np.uint8
        np.testing.assert_array_equal(emitted.value(ints), moved)
        emitted.linear(f"{site}.proj", model, quantizers, moved)
        for layer in (f"{site}.qkv", f"blocks.{block}.mlp.fc1", f"blocks.{block}.mlp.fc2"):
            emitted.linear(layer, model, quantizers, emitted.quantized(f"{layer}.x")[0])


def test_every_product_takes_integers_and_no_dequantization_stands_before_one(tiny_model, random_images, tmp_path):
    model, images = tiny_model(), random_images(tiny_model().spec, 2)
    model, quantizers = quantized(model, images, (5, 0), weight_bits=INTEGER.weight_bits)
    graph = block_graph(model, quantizers, tmp_path / "model.onnx", r=5).graph
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    assert {node.domain for node in graph.node} == {""}
    assert not [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert len([node for node in graph.node if node.op_type == "MatMulInteger"]) == 2 * 6
    constants = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            assert not constants & set(node.input), f"{node.name} multiplies float weights"


@given(multiplier=st.floats(2.0**-14, 2.0**24, exclude_max=True))
def test_a_dyadic_multiplier_is_as_exact_as_a_float32_and_fits(multiplier):
    m, shift = dyadic(multiplier)
    assert abs(Fraction(m, 2**shift) / Fraction(multiplier) - 1) <= Fraction(1, 2**24)
    assert 0 < m <= 2**24
    assert 0 <= shift <= 38
    assert 2 * m * 2**31 + 2**shift * 2**23 < 2**63
    assert 2 ** (shift + 1) * 2**23 < 2**63


@pytest.mark.parametrize("multiplier", [0.0, -1.0, 2.0**-15, 2.0**24])
def test_a_multiplier_out_of_reach_is_an_error(multiplier):
    with pytest.raises(ValueError, match="no ratio of two activation scales"):
        dyadic(multiplier)


def test_scales_that_cannot_be_requantized_are_refused(tiny_model, random_images, tmp_path):
    model, images = tiny_model(), random_images(tiny_model().spec, 2)
    model, quantizers = quantized(model, images, weight_bits=INTEGER.weight_bits)
    quantizers["blocks.0.attn.v"] = symmetric(np.array([1e-9], np.float32))
    with pytest.raises(TargetError, match=r"blocks\.0\.attn\.proj\.x cannot be requantized"):
        block_graph(model, quantizers, tmp_path / "model.onnx")


@pytest.mark.parametrize("left_out", ["proj.x and proj.w", "k and q", "v and softmax"])
def test_what_has_no_quantizer_stays_float(tiny_model, random_images, tmp_path, left_out):
    model, images = tiny_model(), random_images(tiny_model().spec, 2)
    model, quantizers = quantized(model, images, weight_bits=INTEGER.weight_bits)
    for part in left_out.split(" and "):
        del quantizers[f"blocks.0.attn.{part}"]
    graph = block_graph(model, quantizers, tmp_path / "model.onnx")
    assert len([node for node in graph.graph.node if node.op_type == "MatMulInteger"]) == 2 * 6 - 1
    every_tensor(graph, images, "ORT_ENABLE_ALL")
