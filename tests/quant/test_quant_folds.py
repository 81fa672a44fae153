"""Exact folds leave the function as it is, and samples move with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from quantizing import affine, collected, per_channel, single
from vitfold.architectures.programs import forward
from vitfold.architectures.vit import mlp
from vitfold.ops.emit import INPUT_NAME, emit_graph, write_onnx
from vitfold.ops.simulate import Simulate
from vitfold.quant import METHODS
from vitfold.quant.equalize import equalize_norm, equalize_values
from vitfold.quant.folding import center_norms, fold_channels
from vitfold.quant.network import network_of
from vitfold.recipe import MergeRecipe, QuantRecipe
from vitfold.target import TARGETS

R = {"r=0": (), "merging": (5, 3)}
NO_BIAS = [f"blocks.{i}.{layer}.bias" for i in range(2) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def change(width: int, seed: int):
    """Shifts as large as the numbers, scales over two decades."""
    draw = np.random.default_rng(seed)
    return {"shift": draw.standard_normal(width), "scale": 10 ** draw.uniform(-1, 1, width)}


@pytest.mark.parametrize("without", [[], NO_BIAS], ids=["biases", "no biases"])
@pytest.mark.parametrize("features", [{}, {"mlp": "swiglu", "qk_norm": True, "registers": 2}], ids=["plain", "rich"])
@pytest.mark.parametrize("r", R.values(), ids=R)
def test_equalizing_layer_norms_is_an_identity(tiny_model, random_images, run_torch, without, features, r):
    model = tiny_model(without=without, **features)
    params = dict(model.params)
    for i in range(2):
        block = f"blocks.{i}"
        for norm, layer in ((f"{block}.norm1", f"{block}.attn.qkv"), (f"{block}.norm2", f"{block}.mlp.fc1")):
            params |= equalize_norm(params, norm, layer, **change(32, i))
            assert not np.allclose(params[f"{layer}.weight"], model.params[f"{layer}.weight"], atol=0.1)
    images = random_images(model.spec, 3)
    folded = model.with_params(model.spec, params)
    assert relative_error(run_torch(folded, images, r), run_torch(model, images, r)) < 1e-5


@pytest.mark.parametrize("without", [[], NO_BIAS], ids=["biases", "no biases"])
@pytest.mark.parametrize("r", R.values(), ids=R)
def test_equalizing_values_is_an_identity(tiny_model, random_images, run_torch, without, r):
    """The width of all heads need not be the model's."""
    model = tiny_model(without=without, head_dim=6)
    params = dict(model.params)
    for i in range(2):
        params |= equalize_values(params, f"blocks.{i}.attn.qkv", f"blocks.{i}.attn.proj", **change(24, i))
    images = random_images(model.spec, 3)
    folded = model.with_params(model.spec, params)
    assert relative_error(run_torch(folded, images, r), run_torch(model, images, r)) < 1e-5
    qk = slice(None, 48)
    np.testing.assert_array_equal(
        params["blocks.0.attn.qkv.weight"][qk], model.params["blocks.0.attn.qkv.weight"][qk], "keys rank the tokens"
    )


METHOD_CASES = {
    "vitfold": METHODS["vitfold"],
    "vitfold by gradients": replace(METHODS["vitfold"], activations="hessian"),
    "repq": METHODS["repq"],
    "smooth": METHODS["smooth"],
}


@pytest.mark.parametrize("name", METHOD_CASES)
@pytest.mark.parametrize("r", R.values(), ids=R)
def test_the_folds_of_methods_are_identities_and_samples_follow(
    tiny_model, random_images, run_torch, photos, own_cache, name, r
):
    """Samples after the fold are those that the folded model would give: nothing has to be collected twice."""
    method = METHOD_CASES[name]
    model, merge = tiny_model(pool="map", map_heads=2, map_mlp_width=24), MergeRecipe(r=r)
    model = model.with_params(
        model.spec, {k: a * np.float32(3) if "norm1.weight" in k else a for k, a in model.params.items()}
    )

    def samples_of(one):
        return collected(one, merge, photos, gradients=method.gradients, rows=10**6)

    folded, samples, presets = fold_channels(network_of(model, merge), samples_of(model), method, QuantRecipe())
    folded = model.with_params(model.spec, folded.params)
    assert folded.digest() != model.digest()
    assert bool(presets) == (name == "repq")
    images = random_images(model.spec, 3)
    assert relative_error(run_torch(folded, images, r), run_torch(model, images, r)) < 1e-5
    again = samples_of(folded)
    for layer, one in samples.linears.items():
        for part in ("x", "low", "high", "grad"):
            found, expected = getattr(one, part), getattr(again.linears[layer], part)
            assert (found is None) == (expected is None)
            if found is not None and found.abs().max() > 0:
                assert relative_error(found.numpy(), expected.numpy()) < 1e-4, (layer, part)
    for site, attention in samples.attentions.items():
        for part in ("q", "k", "v", "logits", "grad_logits", "grad_output"):
            found, expected = getattr(attention, part), getattr(again.attentions[site], part)
            assert (found is None) == (expected is None)
            if found is not None and expected.abs().max() > 1e-6:
                assert relative_error(found.numpy(), expected.numpy()) < 1e-4, (site, part)


def test_repq_gives_every_channel_one_scale(tiny_model, photos, own_cache):
    """After the fold the preset of a layer spans every channel's range by the same codes."""
    model = tiny_model()
    gamma = np.ones(32, np.float32)
    gamma[[3, 17]] = 40
    model = model.with_params(model.spec, {**model.params, "blocks.0.norm1.weight": gamma})
    samples = collected(model, MergeRecipe(r=()), photos, gradients=None)
    _, moved, presets = fold_channels(
        network_of(model, MergeRecipe(r=())), samples, METHODS["repq"], QuantRecipe(weights=6, activations=6)
    )
    before, after = (s.linears["blocks.0.attn.qkv"] for s in (samples, moved))
    spread = [float((o.high - o.low).max() / (o.high - o.low).min()) for o in (before, after)]
    assert spread[0] > 20
    assert spread[1] < 2
    preset = presets["blocks.0.attn.qkv.x"]
    assert (preset.low, preset.high, preset.axis) == (0, 63, None)


def test_layers_that_stay_float_are_not_folded(tiny_model, photos, own_cache):
    model = tiny_model()
    samples = collected(model, MergeRecipe(r=()), photos, gradients=None)
    quant = QuantRecipe(sites={"blocks.0.*": "float"})
    folded, _, _ = fold_channels(network_of(model, MergeRecipe(r=())), samples, METHODS["vitfold"], quant)
    changed = {name for name, array in model.params.items() if not np.array_equal(array, folded.params[name])}
    assert changed
    assert not {name for name in changed if name.startswith("blocks.0.")}


def test_the_scale_of_attention_stands_behind_the_product_of_codes(random_images):
    """Q(q) Q(k)^T / sqrt(K), not Q(q / sqrt(K)): what is emitted multiplies codes first."""
    q, k, v = (random_images_of(seed) for seed in range(3))
    quantizers = {f"a.{name}": affine(x, 0, 15) for name, x in (("q", q), ("k", k))}
    found = Simulate({}, quantizers).attention("a", *(torch.from_numpy(x) for x in (q, k, v)), None).numpy()
    logits = quantizers["a.q"](q) @ quantizers["a.k"](k).transpose(0, 1, 3, 2) / np.sqrt(9)
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    assert relative_error(found, powers / powers.sum(-1, keepdims=True) @ v) < 1e-6


def random_images_of(seed):
    return np.random.default_rng(seed).standard_normal((2, 2, 5, 9)).astype(np.float32)


def test_the_shift_of_gelu_goes_into_the_bias_of_fc2_where_zero_points_cannot(tiny_model, random_images, tmp_path):
    """On TensorRT x ~ c + scale code with all 256 codes in use, and W c in the bias."""
    model = tiny_model()

    def program(ops: Any, image: Any) -> Any:
        x = ops.patch_embed("patch_embed", image)
        return mlp(ops, model.spec, 0, x)

    inputs = np.array([-0.17, 2.5], np.float32)
    weights = {f"blocks.0.mlp.{n}.w": per_channel(model.params[f"blocks.0.mlp.{n}.weight"]) for n in ("fc1", "fc2")}
    quantizers = {
        "blocks.0.mlp.fc1.x": affine(np.array([-3, 3], np.float32)),
        "blocks.0.mlp.fc2.x": affine(inputs),
        **weights,
    }
    model = model.with_params(
        model.spec,
        {**model.params, **{f"{s[:-2]}.weight": q(model.params[f"{s[:-2]}.weight"]) for s, q in weights.items()}},
    )
    graph = emit_graph(program, model, single(TARGETS["tensorrt-int8"]), quantizers)
    write_onnx(graph, tmp_path / "model.onnx")
    images = random_images(model.spec, 3)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {INPUT_NAME: images})
    with torch.inference_mode():
        expected = program(Simulate(model.params, quantizers), torch.from_numpy(images)).numpy()
    errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(errors) < 1e-5
    assert errors.max() < 0.05


@pytest.mark.parametrize("r", R.values(), ids=R)
def test_zero_points_behind_layer_norms_fold_away(tiny_model, random_images, r):
    """The folded model rounds the same numbers to the same codes, with the zero point in the middle."""
    model = tiny_model()
    quantizers = {
        f"blocks.{i}.{layer}.x": affine(np.array([-1.5, 3.0])) for i in range(2) for layer in ("attn.qkv", "mlp.fc1")
    }
    quantizers["blocks.0.mlp.fc2.x"] = affine(np.array([-0.2, 4.0]))
    folded, centered = center_norms(network_of(model, MergeRecipe(r=())), quantizers)
    assert all(int(q.zero_point) == 128 for site, q in centered.items() if "fc2" not in site)
    assert centered["blocks.0.mlp.fc2.x"] is quantizers["blocks.0.mlp.fc2.x"], "no LayerNorm feeds it"
    images = torch.from_numpy(random_images(model.spec, 3))
    merge = MergeRecipe(r=r)
    with torch.inference_mode():
        expected = forward(Simulate(model.params, quantizers), model.spec, merge, images)
        found = forward(Simulate(folded.params, centered), model.spec, merge, images)
    assert relative_error(found.numpy(), expected.numpy()) < 2e-3, "but for codes that round the other way"
