"""Turned streams and heads: the same outputs, no outlier among channels, and none where something looks at one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vitfold.model import Model
from vitfold.ops.run import Run
from vitfold.program import Program
from vitfold.quant.network import Network, network_of
from vitfold.quant.rotation import mean_keeping_rotation, random_rotation, rotate_streams, streams_of, turn_heads
from vitfold.recipe import MergeRecipe

KINDS = {
    "class token": {},
    "registers": {"registers": 2},
    "mean of tokens": {"pool": "avg"},
    "mean, then norm": {"pool": "avg", "final_norm": False, "pool_norm": True},
    "attention pooling": {"pool": "map", "map_heads": 2},
    "normalized queries": {"qk_norm": True},
    "layer scale": {"layer_scale": True},
}
"""What `layer_scale` multiplies by stands in the way until it is folded; the others have one stream."""


def outputs(network: Network, model: Model) -> np.ndarray:
    spec = model.spec
    pixels = np.random.default_rng(0).standard_normal((3, spec.channels, *spec.image_size)).astype(np.float32)
    with torch.inference_mode():
        return network.run(Run(network.params), (torch.from_numpy(pixels),)).numpy()


@pytest.mark.parametrize("width", [2, 7, 32])
def test_rotations_are_orthogonal_and_the_mean_stays(width):
    for rotation in (random_rotation(width, seed=3), mean_keeping_rotation(width, seed=3)):
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(width), atol=1e-12)
    np.testing.assert_allclose(mean_keeping_rotation(width, seed=3).sum(1), 1.0, atol=1e-12)
    assert not np.allclose(random_rotation(width, seed=3), random_rotation(width, seed=4))


@pytest.mark.parametrize("r", [(), (3, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_turned_networks_compute_the_same(tiny_model, kind, r):
    model = tiny_model(**KINDS[kind])
    network = network_of(model, MergeRecipe(r=r))
    turned = turn_heads(rotate_streams(network))
    np.testing.assert_allclose(outputs(turned, model), outputs(network, model), rtol=1e-4, atol=2e-6)
    same = [name for name in network.params if np.array_equal(turned.params[name], network.params[name])]
    streams = streams_of(network.program)
    assert len(streams) == (kind != "layer scale")
    assert ("patch_embed.weight" in same) == (kind == "layer scale")
    assert "blocks.1.attn.proj.weight" not in same


def test_one_stream_has_all_layers_of_the_blocks(tiny_model):
    (stream,) = streams_of(network_of(tiny_model(), MergeRecipe(r=(3, 2))).program)
    assert set(stream.writers) == {
        "patch_embed",
        *(f"blocks.{i}.{x}" for i in (0, 1) for x in ("attn.proj", "mlp.fc2")),
    }
    assert set(stream.tables) == {"cls_token", "pos_embed"}
    assert stream.norms["blocks.1.norm2"] == ("blocks.1.mlp.fc1",)
    assert stream.norms["norm"] == ("head",)
    assert not stream.readers


def test_an_outlier_channel_is_spread_over_all(tiny_model):
    model = tiny_model()
    params = dict(model.params)
    params["pos_embed"] = params["pos_embed"].copy()
    params["pos_embed"][..., 5] += 100.0
    network = network_of(model.with_params(model.spec, params), MergeRecipe(r=()))
    turned = rotate_streams(network)
    assert np.abs(turned.params["pos_embed"]).max() < 0.6 * np.abs(network.params["pos_embed"]).max()
    np.testing.assert_allclose(outputs(turned, model), outputs(network, model), rtol=2e-4, atol=1e-5)


def test_streams_that_something_else_looks_at_stay(tiny_model):
    for kind in ({"pre_norm": True}, {"also": ("hidden_states.1",)}):
        network = network_of(tiny_model(**kind), MergeRecipe(r=()))
        assert streams_of(network.program) == ()
        assert rotate_streams(network).params == network.params


def test_parameters_that_are_read_twice_stay(tiny_model):
    """A layer in two places, as tied weights of a graph, cannot be turned for one of them."""
    program = network_of(tiny_model(), MergeRecipe(r=())).program
    nodes = [
        replace(node, attributes={**node.attributes, "layer": "blocks.0.mlp.fc2"})
        if node.site == "blocks.1.mlp.fc2"
        else node
        for node in program.nodes
    ]
    tied = Program(inputs=program.inputs, nodes=tuple(nodes), outputs=program.outputs)
    assert len(streams_of(program)) == 1
    assert streams_of(tied) == ()


def test_heads_of_a_layer_that_is_read_twice_stay(tiny_model):
    network = network_of(tiny_model(), MergeRecipe(r=()))
    nodes = [
        replace(node, attributes={**node.attributes, "layer": "blocks.0.attn.proj"})
        if node.site == "blocks.1.attn.proj"
        else node
        for node in network.program.nodes
    ]
    tied = Program(inputs=network.program.inputs, nodes=tuple(nodes), outputs=network.program.outputs)
    linears = tuple(
        replace(site, layer="blocks.0.attn.proj") if site.layer == "blocks.1.attn.proj" else site
        for site in network.linears
    )
    turned = turn_heads(replace(network, program=tied, linears=linears))
    assert all(np.array_equal(turned.params[name], network.params[name]) for name in network.params)


def test_a_norm_without_some_scales_stays_where_rows_are_summed(tiny_model):
    model = tiny_model(pool="avg")
    params = {**model.params, "norm.weight": model.params["norm.weight"].copy()}
    params["norm.weight"][3] = 0.0
    network = network_of(model.with_params(model.spec, params), MergeRecipe(r=(2, 2)))
    assert rotate_streams(network).params["patch_embed.weight"] is network.params["patch_embed.weight"]
    whole = network_of(model.with_params(model.spec, params), MergeRecipe(r=()))
    turned = rotate_streams(whole)
    assert not np.array_equal(turned.params["patch_embed.weight"], whole.params["patch_embed.weight"])
    np.testing.assert_allclose(outputs(turned, model), outputs(whole, model), rtol=1e-4, atol=2e-6)


def test_digests_tell_turned_networks_apart(tiny_model):
    network = network_of(tiny_model(), MergeRecipe(r=()))
    digests = {network.digest, rotate_streams(network).digest, rotate_streams(network, seed=1).digest}
    assert len({*digests, turn_heads(network).digest}) == 4
