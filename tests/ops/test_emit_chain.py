"""The target "integer" where outputs are rounded, too: every step from product to product is one of integers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from integer_graphs import INTEGER, Emitted, every_tensor
from oracles import reordered as oracle
from vitfold.architectures.programs import deployed_program, forward
from vitfold.errors import TargetError
from vitfold.model import Array, Model
from vitfold.ops.emit import SITE_KEY, emit_graph, write_onnx
from vitfold.ops.emit.chain import fixed_point
from vitfold.ops.emit.reordered import dyadic
from vitfold.ops.run import Run
from vitfold.ops.simulate import Simulate
from vitfold.program import replay
from vitfold.program.queries import projections_of
from vitfold.quant import QuantConstraints
from vitfold.quant.calibrate import Rounded, calibrate_network
from vitfold.quant.network import ArrayExamples, network_of
from vitfold.quantizer import EXPONENTS, STREAM_LIMIT, Uniform
from vitfold.recipe import MergeRecipe, QuantRecipe

pytestmark = pytest.mark.usefixtures("own_cache")
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")


def calibrated(model: Model, images: Array, r: tuple[int, ...] = (0, 0), **quant: Any) -> Rounded:
    recipe = QuantRecipe(**{"method": "minmax", "attention": True, "outputs": True, **quant})
    network = network_of(model, MergeRecipe(r=r))
    examples = ArrayExamples(arrays=(images,), name="image")
    return calibrate_network(network, recipe, examples, scheme=QuantConstraints.of(INTEGER))


def graph_of(model: Model, done: Rounded, path: Path, r: tuple[int, ...] = (0, 0)) -> onnx.ModelProto:
    program = deployed_program(model.spec, MergeRecipe(r=r))
    emitted = emit_graph(
        lambda ops, image: replay(program, ops, image),
        model.with_params(model.spec, done.params),
        INTEGER,
        done.quantizers,
        projections=projections_of(program),
    )
    write_onnx(emitted, path)
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(str(path))


def simulated(model: Model, done: Rounded, images: Array, r: tuple[int, ...] = (0, 0)) -> Array:
    with torch.inference_mode():
        ops = Simulate(done.params, done.quantizers, reordered=True)
        return forward(ops, model.spec, MergeRecipe(r=r), torch.from_numpy(images)).numpy()


def site_of(node: onnx.NodeProto) -> str:
    return next(entry.value for entry in node.metadata_props if entry.key == SITE_KEY)


class Chain(Emitted):
    """A run of a graph whose products hand codes on."""

    def __init__(self, graph: onnx.ModelProto, tensors: dict[str, Array], done: Rounded) -> None:
        super().__init__(graph, tensors)
        self.done = done

    def grid(self, site: str) -> tuple[float, int]:
        """The scale of a site of 256 codes, and the zero point among 0..255."""
        found = self.done.quantizers[site]
        assert isinstance(found, Uniform)
        return float(found.scale), int(found.zero_point - found.low)

    def products(self, site: str) -> list[tuple[Array, Array, Array]]:
        """Both operands of every integer product of a site, and the sums."""
        nodes = [n for n in self._graph.node if n.op_type == "MatMulInteger" and site_of(n) == site]
        return [(self.value(n.input[0]), self.value(n.input[1]), self.value(n.output[0])) for n in nodes]

    def handed(self, layer: str, sums: Array, start: int, wanted: str) -> Array:
        """What a layer writes for the site that reads it, by the oracle; `start` is its first output channel."""
        weight, inputs = self.done.quantizers[f"{layer}.w"], self.done.quantizers[f"{layer}.x"]
        stop, grid = start + sums.shape[-1], self.done.quantizers[wanted]
        assert isinstance(weight, Uniform)
        assert isinstance(inputs, Uniform)
        assert isinstance(grid, Uniform)
        step = float(grid.scale)
        multipliers = inputs.scale * weight.scale[start:stop].astype(np.float64) / step
        offsets = self.done.params[f"{layer}.bias"][start:stop].astype(np.float64) / step
        ends = (grid.low, grid.high) if grid.bits > 8 else (0, 255)
        return oracle.handed(sums, multipliers, offsets, int(grid.zero_point) - (grid.bits <= 8) * grid.low, *ends)

    def norm(self, site: str, stream: Array, eps: float, wanted: str) -> Array:
        """The codes that a LayerNorm writes for the layer that reads it, by the oracle."""
        grid = self.done.quantizers[f"{site}.x"]
        assert isinstance(grid, Uniform)
        weight, bias = (self.done.params[f"{site}.{name}"] for name in ("weight", "bias"))
        return oracle.norm(stream, weight, bias, eps, float(grid.scale), *self.grid(f"{wanted}.x"))


@pytest.mark.parametrize("level", LEVELS)
def test_every_step_between_products_equals_the_integer_oracle(tiny_model, random_images, tmp_path, level):
    model = tiny_model()
    done = calibrated(model, random_images(model.spec, 8))
    graph = graph_of(model, done, tmp_path / "model.onnx")
    chain = Chain(graph, every_tensor(graph, random_images(model.spec, 2, seed=1), level), done)
    stream = chain.output("blocks.0.norm1.x", "Cast").astype(np.int64)
    attn, mlp, eps = "blocks.0.attn", "blocks.0.mlp", model.spec.norm_eps
    ((q, k, scores),) = chain.products(f"{attn}.qk")
    ((powers, v, average),) = chain.products(f"{attn}.av")
    entering = chain.norm("blocks.0.norm1", stream, eps, f"{attn}.qkv")
    width = model.spec.embed_dim
    for number, (name, codes) in enumerate((("q", q), ("k", k.swapaxes(-1, -2)), ("v", v))):
        x, weight, sums = chain.products(f"{attn}.qkv")[number]
        np.testing.assert_array_equal(x, entering)
        np.testing.assert_array_equal(sums, oracle.product(x, weight, chain.grid(f"{attn}.qkv.x")[1], 0))
        rows = codes.swapaxes(1, 2).reshape(x.shape)
        np.testing.assert_array_equal(rows, chain.handed(f"{attn}.qkv", sums, number * width, f"{attn}.{name}"))
    scale = np.float32(chain.grid(f"{attn}.q")[0]) * np.float32(chain.grid(f"{attn}.k")[0])
    scale = float(scale * np.float32(1 / np.sqrt(q.shape[-1])))
    np.testing.assert_array_equal(powers, oracle.exponentials(scores, scale, 2.0**-9, 4095))
    multiplier, shift = dyadic(chain.grid(f"{attn}.v")[0] / chain.grid(f"{attn}.proj.x")[0])
    totals, zero = powers.astype(np.int64).sum(-1, keepdims=True), chain.grid(f"{attn}.proj.x")[1]
    joined = oracle.requantized(average, totals, Fraction(multiplier, 2**shift), zero, 0, 255)
    ((x, _, sums),) = chain.products(f"{attn}.proj")
    np.testing.assert_array_equal(x, joined.swapaxes(1, 2).reshape(x.shape))
    stream = stream + chain.handed(f"{attn}.proj", sums, 0, f"{attn}.proj.out")
    ((x, _, sums),) = chain.products(f"{mlp}.fc1")
    np.testing.assert_array_equal(x, chain.norm("blocks.0.norm2", stream, eps, f"{mlp}.fc1"))
    hidden = chain.handed(f"{mlp}.fc1", sums, 0, f"{mlp}.fc1.out")
    ((x, _, sums),) = chain.products(f"{mlp}.fc2")
    written = oracle.gelu(hidden, *chain.grid(f"{mlp}.fc1.out"), *chain.grid(f"{mlp}.fc2.x"))
    np.testing.assert_array_equal(x, written)
    stream = stream + chain.handed(f"{mlp}.fc2", sums, 0, f"{mlp}.fc2.out")
    x = chain.products("blocks.1.attn.qkv")[1][0]
    np.testing.assert_array_equal(x, chain.norm("blocks.1.norm1", stream, eps, "blocks.1.attn.qkv"))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_between_the_embedding_and_the_pool_nothing_is_a_float(tiny_model, random_images, tmp_path, pool):
    model = tiny_model(pool=pool)
    images = random_images(model.spec, 8)
    done = calibrated(model, images)
    graph = graph_of(model, done, tmp_path / "model.onnx")
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(graph).graph.value_info}
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
    found = [n.name for n in graph.graph.node if site_of(n).startswith("blocks.") and types[n.output[0]] in floats]
    rounding = [name for name in found if not name.startswith("blocks.0.norm1.x")]
    assert [name for name in rounding if name.startswith("blocks.0.")] == []
    assert len(rounding) <= (pool == "avg") * 3, "an average over tokens is taken in floats, and nothing else"
    assert len([n for n in graph.graph.node if n.op_type == "MatMulInteger"]) == 2 * 8 + 1


@pytest.mark.parametrize("r", [(0, 0), (5, 3)])
def test_the_graph_is_what_the_simulation_says(tiny_model, random_images, tmp_path, r):
    model = tiny_model()
    images = random_images(model.spec, 16)
    done = calibrated(model, images, r)
    graph = graph_of(model, done, tmp_path / "model.onnx", r)
    given = random_images(model.spec, 4, seed=1)
    found = every_tensor(graph, given, "ORT_ENABLE_ALL")[graph.graph.output[0].name]
    expected = simulated(model, done, given, r)
    with torch.inference_mode():
        exact = forward(Run(model.params), model.spec, MergeRecipe(r=r), torch.from_numpy(given)).numpy()
    noise = np.linalg.norm(expected - exact) / np.linalg.norm(exact)
    assert 0 < noise < 0.1
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < noise / 2


@pytest.mark.parametrize("activation", ["gelu_erf", "gelu_tanh", "quick_gelu", "relu", "silu"])
def test_every_activation_function_is_a_table(tiny_model, random_images, tmp_path, activation):
    model = tiny_model(activation=activation)
    images = random_images(model.spec, 8)
    done = calibrated(model, images)
    assert "blocks.0.mlp.fc1.out" in done.quantizers
    graph = graph_of(model, done, tmp_path / "model.onnx")
    tables = [n for n in graph.graph.node if n.op_type == "Gather" and site_of(n).endswith("fc2.x")]
    assert len(tables) == 2
    found = every_tensor(graph, images, "ORT_ENABLE_ALL")[graph.graph.output[0].name]
    expected = simulated(model, done, images)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.03


FEATURES: dict[str, dict[str, Any]] = {
    "map": {"pool": "map", "map_heads": 2, "map_mlp_width": 24},
    "none": {"pool": "none", "outputs": 0, "output": "last_hidden_state"},
    "swiglu": {"mlp": "swiglu", "activation": "silu"},
    "qk norm": {"qk_norm": True},
    "registers": {"registers": 2, "dist_token": True, "pool": "token_dist"},
    "norm in front": {"pre_norm": True},
    "layer scale": {"layer_scale": True},
    "no bias": {"without": ["head.bias", *(f"blocks.{i}.{n}.bias" for i in range(2) for n in ("attn.qkv", "mlp.fc2"))]},
}


@pytest.mark.parametrize("r", [(0, 0), (5, 3)])
@pytest.mark.parametrize("feature", FEATURES)
def test_where_the_chain_has_gaps_the_graph_still_follows(tiny_model, random_images, tmp_path, feature, r):
    model = tiny_model(**FEATURES[feature])
    images = random_images(model.spec, 8)
    done = calibrated(model, images, r)
    assert any(site.endswith(".out") for site in done.quantizers)
    graph = graph_of(model, done, tmp_path / "model.onnx", r)
    found = every_tensor(graph, images, "ORT_ENABLE_ALL")[graph.graph.output[0].name]
    expected = simulated(model, done, images, r)
    distances = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, expected, strict=True)]
    assert np.median(distances) < 0.05


def test_what_is_kept_float_hands_nothing_on(tiny_model, random_images, tmp_path):
    model = tiny_model()
    images = random_images(model.spec, 8)
    done = calibrated(model, images, sites={"blocks.0.mlp.fc2": "float", "blocks.1.attn": "float"})
    kept = {"blocks.0.mlp.fc1.out", "blocks.0.mlp.fc2.out", "blocks.1.attn.qkv.out", "blocks.1.attn.logits"}
    assert not kept & set(done.quantizers)
    assert {"blocks.0.attn.qkv.out", "blocks.1.mlp.fc1.out", "blocks.1.attn.proj.out"} <= set(done.quantizers)
    graph = graph_of(model, done, tmp_path / "model.onnx")
    found = every_tensor(graph, images, "ORT_ENABLE_ALL")[graph.graph.output[0].name]
    expected = simulated(model, done, images)
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.03


def test_a_stream_has_one_grid_with_room_above(tiny_model, random_images):
    model = tiny_model()
    done = calibrated(model, random_images(model.spec, 8))
    sites = [f"blocks.{b}.{s}" for b in range(2) for s in ("norm1.x", "norm2.x", "attn.proj.out", "mlp.fc2.out")]
    grids = [done.quantizers[site] for site in (*sites, "norm.x")]
    assert all(isinstance(g, Uniform) and (g.low, g.high) == (-STREAM_LIMIT, STREAM_LIMIT - 1) for g in grids)
    (step,) = {float(g.scale) for g in grids}
    assert np.log2(step).is_integer()
    logits = done.quantizers["blocks.0.attn.logits"]
    assert isinstance(logits, Uniform)
    assert logits.scale == EXPONENTS.scale


@pytest.mark.parametrize("factor", [1e-7, 1e5])
def test_tiny_and_huge_streams_fit_integers(tiny_model, random_images, tmp_path, factor):
    model = tiny_model(class_token=False, pool="avg", pos_embed="none")
    params = {name: array * factor if name.startswith("patch_embed") else array for name, array in model.params.items()}
    model = model.with_params(model.spec, params)
    images = random_images(model.spec, 8)
    done = calibrated(model, images)
    graph = graph_of(model, done, tmp_path / "model.onnx")
    found = every_tensor(graph, images, "ORT_ENABLE_ALL")[graph.graph.output[0].name]
    expected = simulated(model, done, images)
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.05


@given(multipliers=st.lists(st.floats(2.0**-60, 2.0**29), min_size=1, max_size=5))
def test_fixed_points_share_a_shift_and_fit(multipliers):
    m, shift = fixed_point(np.array(multipliers))
    assert (m.tolist(), shift) == oracle.fixed_point(np.array(multipliers))
    assert 0 <= shift <= 40
    assert 0 <= m.min() <= m.max() <= 2**30
    for found, wanted in zip(m, multipliers, strict=True):
        assert abs(Fraction(int(found), 2**shift) - Fraction(wanted)) <= Fraction(1, 2 ** (shift + 1))


@pytest.mark.parametrize("multiplier", [0.0, np.inf, 2.0**30])
def test_multipliers_out_of_reach_are_an_error(multiplier):
    with pytest.raises(ValueError, match="no ratio of two scales"):
        fixed_point(np.array([multiplier]))


def test_a_bias_beyond_its_range_is_refused(tiny_model, random_images, tmp_path):
    model = tiny_model()
    done = calibrated(model, random_images(model.spec, 8))
    done.params["blocks.0.attn.proj.bias"][:] = 1e12
    with pytest.raises(TargetError, match=r"blocks\.0\.attn\.proj\.out cannot be requantized"):
        graph_of(model, done, tmp_path / "model.onnx")
