"""Graphs with remedies against sinks: equal to `Run` in float and to `Simulate` in integers, static in their shapes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from test_emit_quantized import (
    EXECUTED,
    TARGETS,
    errors_of_rows,
    executed,
    quantized_for,
    refused,
    session_of,
    simulated,
)

from quantizing import single
from sinking import REMEDIES, with_sinks
from vitfold.architectures.programs import forward
from vitfold.ops.count import Count
from vitfold.ops.emit import INPUT_NAME, emit_graph, write_onnx
from vitfold.ops.run import Run
from vitfold.quantizer import QuantParams
from vitfold.recipe import MergeRecipe
from vitfold.target import find_target

FLOAT = ["cpu", "portable", "tensorrt-fp16"]
MERGES = [(), (3, 2)]


def program_of(model, r):
    return lambda ops, image: forward(ops, model.spec, MergeRecipe(r=r), image)


@pytest.mark.parametrize("r", MERGES)
@pytest.mark.parametrize("name", FLOAT)
@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_graph_equals_the_interpreter(tiny_model, random_images, tmp_path, remedy, name, r):
    model = with_sinks(tiny_model(registers=1), **REMEDIES[remedy])
    images = random_images(model.spec, 3)
    with torch.inference_mode():
        expected = program_of(model, r)(Run(model.params), torch.from_numpy(images)).numpy()
    path = tmp_path / "model.onnx"
    write_onnx(emit_graph(program_of(model, r), model, single(find_target(name))), path)
    (found,) = session_of(path).run(None, {INPUT_NAME: images})
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    assert not {"Shape", "Expand", "NonZero"} & {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("name", [name for name in EXECUTED if TARGETS[name].engine != "simulation"])
@pytest.mark.parametrize("remedy", [remedy for remedy in REMEDIES if remedy != "neurons"])
def test_a_quantized_graph_follows_its_simulation(tiny_model, random_images, tmp_path, remedy, name):
    model = with_sinks(tiny_model(), **REMEDIES[remedy])
    target, images = TARGETS[name], random_images(model.spec, 4)
    model, quantizers = quantized_for(target, model, images, attention=target.quantize_attention)
    program = program_of(model, ())
    if refused(target, quantizers):
        return
    found = executed(program, model, target, quantizers, images, tmp_path)
    expected = simulated(program, model, quantizers, images, target)
    moved = simulated(program, model, quantizers, images * np.float32(1 + 1e-6), target)
    noise = float(np.median(errors_of_rows(moved, expected)))
    assert float(np.median(errors_of_rows(found, expected))) <= max(1e-4, 5 * noise)


def test_a_row_costs_one_key_per_query_and_a_deletion_saves_a_token(tiny_model):
    def macs(model):
        shapes = {name: array.shape for name, array in model.params.items()}
        count = Count(shapes)
        forward(count, model.spec, MergeRecipe(r=()), (1, 3, 32, 32))
        return {cost.site: cost.macs for cost in count.costs if cost.macs}

    plain = macs(tiny_model())
    for tau, keys in ((1.0, 1), (1.5, 1), (2.0, 2), (9.0, 1)):
        cached = macs(with_sinks(tiny_model(), start=1, rows=1, tau=tau))
        assert {site for site in plain if plain[site] != cached[site]} == {"blocks.1.attn.qk", "blocks.1.attn.av"}
        assert cached["blocks.1.attn.qk"] == plain["blocks.1.attn.qk"] * (17 + keys) // 17
    deleted = macs(with_sinks(tiny_model(), block=1, deletions=3))
    assert deleted["blocks.1.mlp.fc1"] == plain["blocks.1.mlp.fc1"] * 14 // 17
    assert deleted["blocks.0.mlp.fc1"] == plain["blocks.0.mlp.fc1"]


def test_quantizers_of_prefix_tokens_are_used(tiny_model, random_images, tmp_path):
    model = with_sinks(tiny_model(), **REMEDIES["split"])
    images = random_images(model.spec, 2)
    model, quantizers = quantized_for(TARGETS["cpu"], model, images, attention=False)
    program = program_of(model, ())
    fine = executed(program, model, TARGETS["cpu"], quantizers, images, tmp_path)
    coarse = dict(QuantParams(quantizers))
    coarse["blocks.1.mlp.fc2.prefix.x"] = quantizers["blocks.1.mlp.fc1.x"]
    other = executed(program, model, TARGETS["cpu"], coarse, images, tmp_path)
    assert np.abs(fine - other).max() > 1e-4
