"""Quantized graphs: equal to `Simulate` site by site and block by block, in integers where it counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from quantizing import (
    Ranges,
    affine,
    blocks_alone,
    per_channel,
    products_in,
    quantized,
    run_exactly,
    single,
    symmetric,
    twin_sign,
)
from vitfold.architectures.programs import forward, plain_program
from vitfold.engines.exactness import exact_execution, find_execution
from vitfold.engines.onnxruntime import session_options
from vitfold.errors import EngineError, TargetError
from vitfold.model import Array, Model
from vitfold.ops.count import integer_work
from vitfold.ops.emit import SITE_KEY, emit_graph, write_onnx
from vitfold.ops.emit.codes import place, place_weight
from vitfold.ops.simulate import Simulate
from vitfold.program.queries import projections_of
from vitfold.quantizer import Log, Quantizer, QuantParams, Shifted, Twin, Uniform
from vitfold.recipe import MergeRecipe
from vitfold.target import TARGETS as KNOWN
from vitfold.target import WIDE, Target

TARGETS = {name: single(target) for name, target in KNOWN.items() if target.implied_quant != "fp8"}
EXECUTED = [name for name in TARGETS if name != "tensorrt-fp16"]
STANDARD = [name for name in EXECUTED if TARGETS[name].quantized_product == "qdq"]
CPU = [name for name in EXECUTED if TARGETS[name].quantized_product == "matmul_integer_to_float"]


def session_of(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    options = session_options(1)
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
    path, projections = folder / "model.onnx", projections_of(plain_program(model.spec))
    write_onnx(emit_graph(program, model, target, quantizers, projections=projections), path)
    return run_exactly(path, target, quantizers, images)


def refused(target: Target, quantizers: Mapping[str, Quantizer]) -> bool:
    """Say whether no way to execute these products is exact on this processor; then the error has to name the cure."""
    products = products_in(target, quantizers)
    if target.engine == "tensorrt" or exact_execution("onnxruntime", products) is not None:
        return shares_a_weight(target, quantizers)
    assert not products[-1].constant, "products with weights are exact in some way everywhere"
    with pytest.raises(EngineError, match="--target cpu-avx2"):
        find_execution("onnxruntime", products)
    return True


def shares_a_weight(target: Target, quantizers: Mapping[str, Quantizer]) -> bool:
    """Say whether ONNX Runtime has to widen weights here that two products of a twin quantizer share: it cannot."""
    twin = any(isinstance(quantizer, Twin) and site.endswith(".x") for site, quantizer in quantizers.items())
    return twin and exact_execution("onnxruntime", products_in(target, quantizers)) == WIDE


def simulated(
    program: Any, model: Model, quantizers: dict[str, Quantizer], images: Array, target: Target = TARGETS["cpu"]
) -> Array:
    ops = Simulate(model.params, quantizers, reordered=target.quantized_product == "integer")
    with torch.inference_mode():
        return np.asarray(program(ops, torch.from_numpy(images)))


def errors_of_rows(found: Array, expected: Array) -> Array:
    """Relative error of each row; one flipped rounding stays in its row, so the median tells an error from a flip."""
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected, axis=-1).ravel() / np.linalg.norm(expected, axis=-1).ravel()


def one_block(model: Model, r: int = 0) -> Any:
    """One transformer block on embedded patches: (B, N, D)."""
    return blocks_alone(model.spec, (r,))


@pytest.mark.parametrize("twin", [False, True], ids=["uniform", "twin"])
@pytest.mark.parametrize("attention", [False, True], ids=["linears", "attention too"])
@pytest.mark.parametrize("name", EXECUTED)
def test_a_block_equals_its_simulation(tiny_model, random_images, tmp_path, name, attention, twin):
    target = TARGETS[name]
    model, images = tiny_model(), random_images(tiny_model().spec, 3)
    model, quantizers = quantized_for(target, model, images, attention=attention, twin=twin)
    program = one_block(model)
    if refused(target, quantizers):
        return
    found = executed(program, model, target, quantizers, images, tmp_path)
    expected = simulated(program, model, quantizers, images, target)
    errors = errors_of_rows(found, expected)
    assert np.median(errors) < 1e-5
    assert errors.max() < 0.05
    rounded = errors_of_rows(expected, simulated(program, model, {}, images))
    assert np.median(rounded) > 1e-3, "quantization has to be visible"


def whole(model: Model, r: tuple[int, ...]) -> Any:
    return lambda ops, image: forward(ops, model.spec, MergeRecipe(r=r), image)


@pytest.mark.parametrize("feature", [{}, {"pool": "map", "map_heads": 2, "map_mlp_width": 24}, {"mlp": "swiglu"}])
@pytest.mark.parametrize("name", EXECUTED)
def test_whole_models_follow_their_simulation(tiny_model, random_images, tmp_path, name, feature):
    """One flip spreads over a model, so some images have to agree tightly and most of them loosely."""
    model = tiny_model(outputs=40, **feature)
    images = random_images(model.spec, 16)
    model, quantizers = quantized_for(TARGETS[name], model, images, (5, 3))
    program = whole(model, (5, 3))
    if refused(TARGETS[name], quantizers):
        return
    found = executed(program, model, TARGETS[name], quantizers, images, tmp_path)
    errors = errors_of_rows(found, simulated(program, model, quantizers, images, TARGETS[name]))
    assert errors.min() < 1e-5
    assert np.median(errors) < np.median(errors_of_rows(found, simulated(program, model, {}, images)))


def a_linear(ops: Any, image: Any) -> Any:
    """The layer `head` on every patch, which is what the patch embedding of `flat_model` returns."""
    return ops.linear("head", ops.patch_embed("patch_embed", image))


def flat_model(tiny_model: Any, *, bias: bool = True) -> Model:
    """A model whose patch embedding only rearranges pixels: patches of 2 x 2 pixels, width 4."""
    model = tiny_model(embed_dim=4, channels=1, image_size=(6, 8), patch_size=(2, 2), num_heads=1, head_dim=4)
    params = dict(model.params)
    params["patch_embed.weight"] = np.eye(4, dtype=np.float32).reshape(4, 1, 2, 2)
    params["patch_embed.bias"] = np.zeros(4, np.float32)
    if not bias:
        del params["head.bias"]
    return replace(model, params=params)


def patches_of(images: Array) -> Array:
    return images.reshape(-1, 3, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 12, 4)


def assert_close(found: Array, expected: Array) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def on_its_grid(model: Model, weights: Uniform) -> Model:
    return replace(model, params={**model.params, "head.weight": weights(model.params["head.weight"])})


SINGLE = {
    "uint8": affine,
    "int8": lambda x: affine(x, -128, 127),
    "symmetric int8": symmetric,
    "positive": lambda x: affine(np.abs(x)),
}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("name", EXECUTED)
def test_a_linear_layer_equals_the_numpy_quantizers(tiny_model, random_images, tmp_path, name, kind, bias):
    """Whatever type the codes come in; x beyond the range is clipped."""
    model, target = flat_model(tiny_model, bias=bias), TARGETS[name]
    images = random_images(model.spec, 5)
    x = patches_of(images)
    weights = per_channel(model.params["head.weight"], target.weight_bits)
    quantizers = {"head.x": SINGLE[kind](0.6 * x), "head.w": weights}
    model = on_its_grid(model, weights)
    found = executed(a_linear, model, target, quantizers, images, tmp_path)
    expected = quantizers["head.x"](x).astype(np.float64) @ model.params["head.weight"].T
    assert_close(found, expected + model.params["head.bias"] if bias else expected)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("name", EXECUTED)
def test_a_twin_quantizer_equals_numpy(tiny_model, random_images, tmp_path, name, bits):
    model, target = flat_model(tiny_model), TARGETS[name]
    images = random_images(model.spec, 5)
    images = (np.where(images < 0, 0.1, 1) * images).astype(np.float32)
    x = patches_of(images)
    twin = twin_sign(0.7 * x, bits)
    weights = per_channel(model.params["head.weight"], target.weight_bits)
    model = on_its_grid(model, weights)
    if target.symmetric and bits < 8:
        with pytest.raises(TargetError, match=r"head\.x"):
            emit_graph(a_linear, model, target, {"head.x": twin, "head.w": weights})
        return
    quantizers = {"head.x": twin, "head.w": weights}
    if refused(target, quantizers):
        return
    found = executed(a_linear, model, target, quantizers, images, tmp_path)
    assert_close(found, twin(x).astype(np.float64) @ model.params["head.weight"].T + model.params["head.bias"])


def shifted(x: Array, kind: str = "symmetric int8", reach: float = 1.0) -> Shifted:
    """A quantizer of x + n with a fixed n per channel, as NoisyQuant makes them."""
    offset = (reach * np.random.default_rng(1).uniform(-1, 1, x.shape[-1]) * np.abs(x).max()).astype(np.float32)
    inner = SINGLE[kind](x + offset)
    assert isinstance(inner, Uniform)
    return Shifted(offset=offset, inner=inner)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kind", ["symmetric int8", "uint8"])
@pytest.mark.parametrize("name", EXECUTED)
def test_a_shifted_quantizer_equals_numpy(tiny_model, random_images, tmp_path, name, kind, bias):
    """The offset is added before rounding, and W offset taken off in the bias."""
    model, target = flat_model(tiny_model, bias=bias), TARGETS[name]
    images = random_images(model.spec, 5)
    x = patches_of(images)
    weights = per_channel(model.params["head.weight"], target.weight_bits)
    quantizer = shifted(0.8 * x, kind)
    model = on_its_grid(model, weights)
    quantizers = {"head.x": quantizer, "head.w": weights}
    found = executed(a_linear, model, target, quantizers, images, tmp_path)
    expected = quantizer(x).astype(np.float64) @ model.params["head.weight"].T
    assert_close(found, expected + model.params["head.bias"] if bias else expected)
    plain = executed(a_linear, model, target, {**quantizers, "head.x": quantizer.inner}, images, tmp_path)
    assert np.abs(plain - found).max() > 0.01, "the offset has to be visible"


@pytest.mark.parametrize("name", EXECUTED)
def test_a_block_of_shifted_quantizers_equals_its_simulation(tiny_model, random_images, tmp_path, name):
    """All four linear layers of a block, with qkv in three products and proj behind a requantization."""
    target = TARGETS[name]
    model, images = tiny_model(), random_images(tiny_model().spec, 3)
    ranges = Ranges(model)
    with torch.inference_mode():
        one_block(model)(ranges, torch.from_numpy(images))
    model, quantizers = quantized_for(target, model, images)
    for site, x in ranges.seen.items():
        if site.endswith(".x"):
            quantizers[site] = shifted(x, "symmetric int8" if target.symmetric else "uint8", 0.2)
    program = one_block(model)
    if refused(target, quantizers):
        return
    found = executed(program, model, target, quantizers, images, tmp_path)
    errors = errors_of_rows(found, simulated(program, model, quantizers, images, target))
    assert np.median(errors) < 1e-5
    assert errors.max() < 0.05


def test_a_shifted_attention_operand_is_refused(tiny_model, random_images):
    model, images = tiny_model(), random_images(tiny_model().spec, 2)
    model, quantizers = quantized(model, images)
    quantizers["blocks.0.attn.q"] = Shifted(offset=np.ones(8, np.float32), inner=symmetric(RANGE))
    with pytest.raises(TargetError, match=r"attn\.q: no runtime executes a Shifted"):
        emit_graph(whole(model, ()), model, TARGETS["cpu-vnni"], quantizers)


@pytest.mark.parametrize("name", EXECUTED)
def test_weights_with_zero_points_and_unsigned_codes(tiny_model, random_images, tmp_path, name):
    model, target = flat_model(tiny_model), TARGETS[name]
    images = random_images(model.spec, 5)
    weight = model.params["head.weight"]
    scale = (weight.max(1) - weight.min(1)) / 15
    zero_point = np.clip(np.rint(-weight.min(1) / scale), 0, 15).astype(np.int32)
    high = 15 if target.weight_bits == 7 else 255
    weights = Uniform(scale=scale, zero_point=zero_point, low=0, high=high, axis=0)
    assert weights.zero_point.any()
    quantizers = {"head.x": affine(patches_of(images)), "head.w": weights}
    model = on_its_grid(model, weights)
    if target.symmetric:
        with pytest.raises(TargetError, match=r"head\.w has zero points"):
            emit_graph(a_linear, model, target, quantizers)
        return
    found = executed(a_linear, model, target, quantizers, images, tmp_path)
    x = quantizers["head.x"](patches_of(images)).astype(np.float64)
    assert_close(found, x @ weights(weight).T + model.params["head.bias"])


@settings(deadline=None)
@given(
    least=st.floats(-9, 0),
    most=st.floats(0.01, 9),
    low=st.sampled_from([0, -128]),
    x=st.lists(st.floats(-12, 12, width=32), min_size=1, max_size=20),
)
def test_a_symmetric_target_shifts_without_changing_a_value(least, most, low, x):
    """X - c in symmetric codes, plus c, is what the zero point gave; ties of the rounding aside."""
    values = np.array(x, np.float32)
    quantizer = affine(np.array([least, most], np.float32), low, low + 255)
    placed = place("s", quantizer, TARGETS["tensorrt-int8"])
    assert placed.zero_point == 0
    steps = (values.astype(np.float64) - placed.shift) / placed.scale
    untied = np.abs(steps - np.floor(steps) - 0.5) > 1e-3
    codes = np.clip(np.rint(steps), -128, 127)
    restored = codes * np.float64(placed.scale) + placed.shift
    np.testing.assert_allclose(restored[untied], quantizer(values)[untied], atol=1e-5)


@settings(deadline=None)
@given(
    least=st.floats(-9, 0),
    most=st.floats(0.01, 9),
    low=st.sampled_from([0, -128, 3]),
    name=st.sampled_from(["cpu-vnni", "cpu-arm"]),
    x=st.lists(st.floats(-12, 12, width=32), min_size=1, max_size=20),
)
def test_moving_codes_changes_no_value(least, most, low, name, x):
    values = np.array(x, np.float32)
    quantizer = affine(np.array([least, most], np.float32), low, low + 255)
    placed = place("s", quantizer, TARGETS[name])
    bounds = np.iinfo(placed.zero_point.dtype)
    codes = np.clip(np.rint(values / placed.scale) + int(placed.zero_point), bounds.min, bounds.max)
    restored = ((codes - int(placed.zero_point)) * placed.scale).astype(np.float32)
    np.testing.assert_array_equal(restored, quantizer(values))


@given(x=st.lists(st.integers(0, 255), min_size=2, max_size=2), w=st.lists(st.floats(-1, 1), min_size=2, max_size=2))
def test_a_pair_of_avx2_products_never_leaves_int16(x, w):
    weight = np.array([w, [1, -1]], np.float32)
    placed = place_weight("s.w", per_channel(np.maximum(weight, 1e-3), 7), TARGETS["cpu-avx2"])
    pair = np.array(x, np.int64) @ placed.codes(weight).T.astype(np.int64)
    assert np.abs(pair).max() < 2**15


RANGE = np.array([-1.0, 3.0], np.float32)
PER_CHANNEL = Uniform(scale=np.ones(4, np.float32), zero_point=np.zeros(4, np.int32), low=0, high=255, axis=-1)
LOG = Log(scale=np.array(1.0, np.float32), bits=8, root=2)
WEIGHT8 = Uniform(scale=np.array(0.1), zero_point=np.array(0), low=-128, high=127)
REFUSED: dict[str, tuple[str, dict[str, Quantizer], str]] = {
    "per channel": ("cpu-vnni", {"head.x": PER_CHANNEL, "head.w": WEIGHT8}, r"head\.x .*per channel of axis -1.*fold"),
    "7 bits": ("cpu-vnni", {"head.x": affine(RANGE, 0, 127), "head.w": WEIGHT8}, r"head\.x has the 128 codes"),
    "logarithmic": ("openvino", {"head.x": LOG, "head.w": WEIGHT8}, r"head\.x: no runtime executes a Log"),
    "8-bit weights on AVX2": (
        "cpu-avx2",
        {"head.x": affine(RANGE), "head.w": WEIGHT8},
        r"head\.w has 8-bit codes, cpu-avx2 multiplies 7-bit weights",
    ),
    "inputs only": ("portable", {"head.x": affine(RANGE)}, r"head\.x is quantized and head\.w is not"),
    "weights per input": (
        "portable",
        {"head.x": affine(RANGE), "head.w": replace(PER_CHANNEL, axis=1)},
        r"head\.w needs a uniform quantizer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_target_cannot_execute_is_refused_by_its_site(tiny_model, case):
    name, quantizers, message = REFUSED[case]
    with pytest.raises(TargetError, match=message):
        emit_graph(a_linear, flat_model(tiny_model), TARGETS[name], quantizers)


ATTENTION: dict[str, tuple[str, dict[str, Quantizer | None], str]] = {
    "q without k": ("cpu-vnni", {"k": None}, r"attn\.q is quantized and blocks\.0\.attn\.k is not"),
    "v without softmax": ("cpu-vnni", {"softmax": None}, r"attn\.v is quantized and blocks\.0\.attn\.softmax is not"),
    "per head": ("cpu-vnni", {"k": replace(PER_CHANNEL, axis=1)}, r"attn\.k is quantized per channel of axis 1"),
    "zero point on a symmetric target": ("tensorrt-int8", {"q": affine(RANGE)}, r"attn\.q has a zero point"),
}


@pytest.mark.parametrize("case", ATTENTION)
def test_attention_operands_that_cannot_be_executed_are_refused(tiny_model, random_images, case):
    name, changes, message = ATTENTION[case]
    model, images = tiny_model(), random_images(tiny_model().spec, 2)
    model, quantizers = quantized_for(TARGETS[name], model, images)
    merged = {**quantizers, **{f"blocks.0.attn.{site}": change for site, change in changes.items()}}
    kept = {site: quantizer for site, quantizer in merged.items() if quantizer is not None}
    with pytest.raises(TargetError, match=message):
        emit_graph(whole(model, ()), model, TARGETS[name], kept)


def test_quantized_weights_with_float_inputs_stay_float(tiny_model, random_images, tmp_path):
    """They lie on their grid already."""
    model, images = tiny_model(), random_images(tiny_model().spec, 2)
    model, quantizers = quantized(model, images)
    weights = {site: quantizer for site, quantizer in quantizers.items() if site.endswith(".w")}
    path = tmp_path / "model.onnx"
    write_onnx(emit_graph(whole(model, ()), model, TARGETS["cpu"], weights), path)
    written = path.read_bytes()
    write_onnx(emit_graph(whole(model, ()), model, TARGETS["cpu"]), path)
    assert written == path.read_bytes()


@pytest.mark.parametrize("name", CPU)
def test_optimized_cpu_graphs_multiply_integers_in_every_quantized_layer(tiny_model, random_images, tmp_path, name):
    target = TARGETS[name]
    model, images = tiny_model(), random_images(tiny_model().spec, 2)
    model, quantizers = quantized_for(target, model, images, (5, 3), twin=True)
    path, optimized = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    write_onnx(emit_graph(whole(model, (5, 3)), model, target, quantizers), path)
    session_of(path, optimized)
    graph = onnx.load(str(optimized)).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    integer = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    layers = {site.removesuffix(".x") for site in quantizers if site.endswith(".x")}
    multiplied = {node.input[1]: constants[node.input[1]] for node in integer if node.input[1] in constants}
    for layer in layers:
        codes = [array for name, array in multiplied.items() if name.startswith(f"{layer}.weight.codes")]
        assert sum(array.size for array in codes) == model.params[f"{layer}.weight"].size
        assert {array.dtype for array in codes} == {np.dtype(np.int8)}
    assert len(integer) == len(layers) + 2 * 2 + 2 + 2 * (1 + 2), "qkv in three; two branches in fc2 and the average"
    for node in integer:
        assert not [x for x in node.input[:2] if x in made_by and made_by[x].op_type == "DequantizeLinear"]
    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm", "FusedMatMul", "FusedGemm"):
            assert not [x for x in node.input[:2] if x in constants], f"{node.name} multiplies float weights"


def graph_of(program: Any, model: Model, target: Target, quantizers: Mapping[str, Quantizer], path: Path) -> Any:
    write_onnx(emit_graph(program, model, target, quantizers), path)
    return onnx.load(str(path)).graph


@pytest.mark.parametrize("r", [(), (5, 3)], ids=["unmerged", "merged"])
def test_float_attention_between_integer_layers_is_one_operator(tiny_model, random_images, tmp_path, r):
    """It reads rows as the layers make them, so nothing is parted into heads but the keys that merging looks at."""
    model, images = tiny_model(), random_images(tiny_model().spec, 3)
    target = TARGETS["cpu"]
    model, quantizers = quantized_for(target, model, images, r, attention=False)
    program, results, transposed = whole(model, r), [], []
    for name in ("fused", "decomposed"):
        graph = graph_of(program, model, replace(target, attention=name), quantizers, tmp_path / f"{name}.onnx")
        counted = Counter(node.op_type for node in graph.node)
        assert counted["Attention"] == (2 if name == "fused" else 0)
        assert counted["Softmax"] == (0 if name == "fused" else 2)
        transposed.append(counted["Transpose"])
        results.append(session_of(tmp_path / f"{name}.onnx").run(None, {"pixel_values": images})[0])
    assert transposed[0] <= transposed[1] - 2 * (4 if not r else 3)
    assert np.median(errors_of_rows(results[0], results[1])) < 1e-5


@pytest.mark.parametrize("name", STANDARD)
def test_standard_graphs_pair_quantize_and_dequantize(tiny_model, random_images, tmp_path, name):
    target = TARGETS[name]
    model, images = tiny_model(), random_images(tiny_model().spec, 2)
    model, quantizers = quantized_for(target, model, images, (5, 3), twin=not target.symmetric)
    path = tmp_path / "model.onnx"
    emitted = emit_graph(whole(model, (5, 3)), model, target, quantizers)
    write_onnx(emitted, path)
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(str(path)).graph
    assert {node.domain for node in graph.node} == {""}
    work = integer_work(emitted.costs)
    dequantizations = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    assert work.dequantized_operands == len(dequantizations), "what the cost model counts stands in the graph"
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    restored = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    restored |= {node.output[0] for node in graph.node if node.op_type == "Transpose" and node.input[0] in restored}
    products = [node for node in graph.node if node.op_type == "MatMul" and restored.issuperset(node.input)]
    layers = [site for site in quantizers if site.endswith(".x")]
    assert len(products) == len(layers) + 2 * 2 + (0 if target.symmetric else 2 + 2)
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero_point = constants[node.input[2]]
            assert zero_point.dtype in (np.uint8, np.int8), "a 32-bit zero point would be a bias"
            assert not target.symmetric or (zero_point.dtype == np.int8 and not zero_point.any())


PRODUCTS = {"matmul_integer_to_float": "MatMulIntegerToFloat", "qdq": "MatMul", "integer": "MatMulInteger"}


@pytest.mark.parametrize("name", EXECUTED)
def test_every_node_of_a_quantized_graph_names_its_site(tiny_model, random_images, tmp_path, name):
    model, images = tiny_model(), random_images(tiny_model().spec, 2)
    model, quantizers = quantized_for(TARGETS[name], model, images, twin=True)
    path = tmp_path / "model.onnx"
    write_onnx(emit_graph(whole(model, ()), model, TARGETS[name], quantizers), path)
    sites: dict[str, set[str]] = {}
    for node in onnx.load(str(path)).graph.node:
        (site,) = [entry.value for entry in node.metadata_props if entry.key == SITE_KEY]
        assert node.name
        sites.setdefault(site, set()).add(node.op_type)
    product = PRODUCTS[TARGETS[name].quantized_product]
    for site in quantizers:
        if site.endswith(".w"):
            assert product in sites[site.removesuffix(".w")]
        else:
            assert sites[site] & {"QuantizeLinear", "Clip"}, "codes are made, or requantized"


def test_a_quantized_graph_stores_weights_in_one_byte_and_is_emitted_twice_the_same(
    tiny_model, random_images, tmp_path
):
    model = tiny_model(embed_dim=64, mlp_dim=256, head_dim=16)
    model, quantizers = quantized(model, random_images(model.spec, 2))
    paths = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
    for path in paths:
        write_onnx(emit_graph(whole(model, ()), model, TARGETS["cpu-vnni"], QuantParams(quantizers)), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    plain = emit_graph(whole(model, ()), model, TARGETS["cpu"])
    small = emit_graph(whole(model, ()), model, TARGETS["cpu-vnni"], quantizers)
    saved = 3 * sum(model.params[f"{site[:-2]}.weight"].size for site in quantizers if site.endswith(".w"))
    assert plain.weight_bytes - small.weight_bytes == pytest.approx(saved, rel=0.1)
