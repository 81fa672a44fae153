"""The ONNX graphs: equal to `Run` for every target, lowering and feature, and named by sites."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from vitfold.architectures.programs import forward
from vitfold.model import Array, Model, param_shapes
from vitfold.ops.count import Count
from vitfold.ops.emit import INPUT_NAME, MICROSOFT, SITE_KEY, emit_graph, write_onnx
from vitfold.ops.run import Run
from vitfold.recipe import MergeRecipe, largest_r, tokens_per_block
from vitfold.target import TARGETS, Target

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"registers": 4},
    "dist token": {"dist_token": True},
    "dist token, two heads": {"dist_token": True, "pool": "token_dist"},
    "dist token, no head": {"dist_token": True, "pool": "token_dist", "outputs": 0, "output": "image_embeds"},
    "avg, no class token": {"pool": "avg", "class_token": False, "pos_embed": "all"},
    "avg, registers only": {"pool": "avg", "class_token": False, "registers": 3},
    "avg with prefix": {"pool": "avg", "pool_prefix": True, "pool_norm": True, "final_norm": False},
    "map": {"pool": "map", "class_token": False, "map_heads": 2, "map_mlp_width": 24, "map_activation": "gelu_tanh"},
    "map without mlp": {"pool": "map", "map_heads": 4},
    "token_avg": {"pool": "token_avg"},
    "none": {"pool": "none", "outputs": 0, "output": "last_hidden_state"},
    "none with registers and head": {"pool": "none", "registers": 2, "output": "last_hidden_state"},
    "swiglu": {"mlp": "swiglu", "activation": "silu"},
    "quick_gelu": {"activation": "quick_gelu"},
    "silu": {"activation": "silu"},
    "relu": {"activation": "relu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "qk_norm": {"qk_norm": True},
    "pre_norm": {"pre_norm": True, "norm_eps": 1e-5},
    "pos_embed patches": {"pos_embed": "patches", "registers": 1},
    "pos_embed none": {"pos_embed": "none"},
    "layer_scale": {"layer_scale": True},
    "oblong": {"image_size": (24, 40), "patch_size": (8, 4)},
    "one channel, narrow heads": {"channels": 1, "num_heads": 3, "head_dim": 4},
    "tanh head": {"head_activation": "tanh", "output": "image_embeds"},
    "no head": {"outputs": 0, "output": "image_embeds"},
}
# Without quantizers the other rows of the table emit what one of these does; a test below holds them to it.
FLOAT_TARGETS = ("cpu", "portable")
BIAS_FREE = ("patch_embed", "blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1", "blocks.0.mlp.fc2", "head")
LOWERINGS = {
    "-".join(("contrib" if contrib else "standard", gather, scatter, bias)): replace(
        TARGETS["cpu"], contrib=contrib, gather=gather, scatter_add=scatter, linear_bias=bias
    )
    for contrib, gather, scatter, bias in product(
        (True, False),
        ("gather_nd", "gather_elements", "one_hot"),
        ("one_hot", "scatter_elements"),
        ("gemm", "add"),
    )
}


def program(model: Model, r: tuple[int, ...], *, prop_attn: bool = True) -> Callable[..., Any]:
    recipe = MergeRecipe(r=r, prop_attn=prop_attn)
    return lambda ops, image: forward(ops, model.spec, recipe, image)


def written(
    model: Model, target: Target, r: tuple[int, ...], folder: Path, *, prop_attn: bool = True, **how: int
) -> Path:
    path = folder / "model.onnx"
    write_onnx(emit_graph(program(model, r, prop_attn=prop_attn), model, target), path, **how)
    return path


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def relative_error(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def assert_well_formed(path: Path, model: Model, target: Target) -> None:
    """What every graph keeps, whatever it computes."""
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(str(path)).graph
    names = Counter(node.name for node in graph.node)
    assert "" not in names
    assert [name for name, count in names.items() if count > 1] == []
    for node in graph.node:
        sites = {entry.key: entry.value for entry in node.metadata_props}
        assert sites.get(SITE_KEY), f"node {node.name} carries no site"
    domains = {node.domain for node in graph.node}
    assert domains <= ({"", MICROSOFT} if target.contrib else {""})
    required, _ = param_shapes(model.spec)
    linears = {name.removesuffix(".weight") for name, shape in required.items() if len(shape) in (2, 4)}
    products = {node.name for node in graph.node if node.op_type in ("Gemm", "MatMul", "Conv")}
    assert linears <= products
    if target.scatter_add == "one_hot":
        assert not [node.name for node in graph.node if node.op_type.startswith("Scatter")]
    assert [i.name for i in graph.input] == [INPUT_NAME]
    assert [o.name for o in graph.output] == [model.spec.output]


def assert_graph_equals_run(
    model: Model, target: Target, r: tuple[int, ...], folder: Path, images: Array, run_torch: Callable[..., Array]
) -> None:
    path = written(model, target, r, folder)
    assert_well_formed(path, model, target)
    expected = run_torch(model, images, r)
    session = session_of(path)
    for batch in (1, len(images)):
        (found,) = session.run(None, {INPUT_NAME: images[:batch]})
        assert found.shape == (batch, *expected.shape[1:])
        assert relative_error(found, expected[:batch]) < 1e-5


@pytest.mark.parametrize("r", [(), (5, 3)], ids=["r=0", "merging"])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("target", FLOAT_TARGETS)
def test_every_feature_equals_run(tiny_model, random_images, run_torch, tmp_path, target, feature, r):
    model = tiny_model(**FEATURES[feature])
    images = random_images(model.spec, 3)
    assert_graph_equals_run(model, TARGETS[target], r, tmp_path, images, run_torch)


@pytest.mark.parametrize("rule", ["nearest", "greedy", "tofu", "pitome", "evit"])
@pytest.mark.parametrize("order", ["index", "score"])
@pytest.mark.parametrize("feature", ["plain", "registers", "none with registers and head", "token_avg"])
@pytest.mark.parametrize("target", FLOAT_TARGETS)
def test_every_rule_equals_run(tiny_model, random_images, tmp_path, target, feature, order, rule):
    model = tiny_model(**FEATURES[feature])
    recipe = MergeRecipe(r=(4, 3), rule=rule, order=order)
    write_onnx(
        emit_graph(lambda ops, image: forward(ops, model.spec, recipe, image), model, TARGETS[target]),
        tmp_path / "m.onnx",
    )
    images = random_images(model.spec, 3)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = forward(Run(model.params), model.spec, recipe, torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(session.run(None, {INPUT_NAME: images})[0], expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("feature", ["plain", "none with registers and head"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_every_lowering_equals_run(tiny_model, random_images, run_torch, tmp_path, lowering, feature):
    model = tiny_model(**FEATURES[feature])
    images = random_images(model.spec, 3)
    assert_graph_equals_run(model, LOWERINGS[lowering], (6, 2), tmp_path, images, run_torch)


@pytest.mark.parametrize("prefix", [{"class_token": False, "pool": "avg"}, {}, {"dist_token": True}, {"registers": 4}])
@pytest.mark.parametrize("image_size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("lowering", ["contrib-gather_nd-one_hot-gemm", "standard-one_hot-scatter_elements-add"])
def test_the_largest_r_in_every_block(tiny_model, random_images, run_torch, tmp_path, lowering, image_size, prefix):
    """Nothing of A may remain; odd and even lengths, every prefix parity, until one patch is left."""
    model = tiny_model(num_layers=5, image_size=image_size, **prefix)
    spec = model.spec
    r: tuple[int, ...] = ()
    count = spec.tokens
    for _ in range(spec.num_layers):
        r += (largest_r(count, spec.prefix),)
        count -= r[-1]
    assert count == spec.prefix + 1
    images = random_images(spec, 3)
    assert_graph_equals_run(model, LOWERINGS[lowering], r, tmp_path, images, run_torch)


@pytest.mark.parametrize("target", FLOAT_TARGETS)
def test_linear_layers_without_bias(tiny_model, random_images, run_torch, tmp_path, target):
    model = tiny_model(without=[f"{layer}.bias" for layer in BIAS_FREE])
    assert_graph_equals_run(model, TARGETS[target], (4, 2), tmp_path, random_images(model.spec, 3), run_torch)


@pytest.mark.parametrize("target", FLOAT_TARGETS)
def test_without_proportional_attention(tiny_model, random_images, run_torch, tmp_path, target):
    model = tiny_model(num_layers=3)
    images = random_images(model.spec, 3)
    session = session_of(written(model, TARGETS[target], (5, 3, 2), tmp_path, prop_attn=False))
    (found,) = session.run(None, {INPUT_NAME: images})
    assert relative_error(found, run_torch(model, images, (5, 3, 2), prop_attn=False)) < 1e-5
    assert relative_error(found, run_torch(model, images, (5, 3, 2))) > 1e-4


@pytest.mark.parametrize("target", FLOAT_TARGETS)
def test_tied_patches_keep_the_output_of_the_unmerged_model(tiny_model, random_images, run_torch, tmp_path, target):
    model = tiny_model(pos_embed="none")
    images = np.tile(random_images(model.spec, 3)[:, :, :8, :8], (1, 1, 4, 4))
    (found,) = session_of(written(model, TARGETS[target], (7, 3), tmp_path)).run(None, {INPUT_NAME: images})
    assert relative_error(found, run_torch(model, images)) < 1e-5


def test_r_zero_emits_the_same_graph_as_no_merging_at_all(tiny_model, tmp_path):
    model = tiny_model()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = written(model, TARGETS["cpu"], (), tmp_path / "a").read_bytes()
    assert first == written(model, TARGETS["cpu"], (0, 0), tmp_path / "b").read_bytes()


def test_emitting_twice_gives_the_same_bytes(tiny_model, tmp_path):
    model = tiny_model()
    first = written(model, TARGETS["cpu"], (4, 2), tmp_path).read_bytes()
    assert first == written(model, TARGETS["cpu"], (4, 2), tmp_path).read_bytes()


@pytest.mark.parametrize("target", [name for name, target in TARGETS.items() if target.graph_floats == "float32"])
def test_targets_without_quantizers_emit_one_of_the_float_graphs(tiny_model, tmp_path, target):
    model = tiny_model()
    kind = "cpu" if TARGETS[target].contrib else "openvino" if target.startswith("openvino") else "portable"
    emitted = written(model, TARGETS[target], (4, 2), tmp_path).read_bytes()
    assert emitted == written(model, TARGETS[kind], (4, 2), tmp_path).read_bytes()


@pytest.mark.parametrize("target", FLOAT_TARGETS)
def test_large_weights_go_to_external_data(tiny_model, random_images, run_torch, tmp_path, target):
    model = tiny_model()
    path = written(model, TARGETS[target], (4, 2), tmp_path, external_bytes=1000)
    data = tmp_path / "model.onnx.data"
    assert data.stat().st_size > model.size_bytes / 2 > path.stat().st_size / 2
    assert path.stat().st_size < model.size_bytes / 2
    onnx.checker.check_model(str(path), full_check=True)
    images = random_images(model.spec, 2)
    (found,) = session_of(path).run(None, {INPUT_NAME: images})
    assert relative_error(found, run_torch(model, images, (4, 2))) < 1e-5


def test_small_weights_stay_in_one_file(tiny_model, tmp_path):
    written(tiny_model(), TARGETS["cpu"], (), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_weights_are_written_once_and_unchanged(tiny_model, tmp_path):
    model = tiny_model()
    before = {name: array.copy() for name, array in model.params.items()}
    graph = onnx.load(str(written(model, TARGETS["portable"], (4, 2), tmp_path))).graph
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert len(stored) == len(graph.initializer)
    for name, array in before.items():
        np.testing.assert_array_equal(model.params[name], array)
        found = stored[name] if name in stored else stored[f"{name}.T"].T
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("r", [(), (5, 3)])
@pytest.mark.parametrize("feature", ["plain", "map", "none", "swiglu"])
@pytest.mark.parametrize("target", FLOAT_TARGETS)
def test_costs_of_a_graph_equal_the_count_of_its_program(tiny_model, target, feature, r):
    model = tiny_model(**FEATURES[feature])
    count = Count({name: array.shape for name, array in model.params.items()})
    program(model, r)(count, (1, model.spec.channels, *model.spec.image_size))
    graph = emit_graph(program(model, r), model, TARGETS[target])
    assert graph.macs == count.macs > 0
    work = {(cost.site, cost.macs) for cost in graph.costs if cost.macs}
    assert work == {(cost.site, cost.macs) for cost in count.costs if cost.macs}
    assert graph.weight_bytes >= model.size_bytes


def test_static_lengths_and_a_symbolic_batch_stand_in_the_graph(tiny_model, tmp_path):
    model = tiny_model(pool="none", outputs=0, output="last_hidden_state")
    loaded = onnx.load(str(written(model, TARGETS["cpu"], (5, 3), tmp_path)))
    inferred = onnx.shape_inference.infer_shapes(onnx.load(str(written(model, TARGETS["portable"], (5, 3), tmp_path))))
    for value in (*loaded.graph.input, *loaded.graph.output):
        dims = value.type.tensor_type.shape.dim
        assert dims[0].dim_param == "batch"
        assert all(dim.dim_value > 0 for dim in dims[1:])
    lengths = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim][1:]
        for value in inferred.graph.value_info
    }
    counts = tokens_per_block(model.spec, (5, 3))
    assert lengths["blocks.0.attn.qkv:0"] == [counts[0], 96]
    assert lengths["blocks.0.mlp.fc1:0"] == [counts[1], 48]
    assert lengths["blocks.1.attn.qkv:0"] == [counts[1], 96]
    assert lengths["blocks.1.mlp.fc1:0"] == [counts[2], 48]
