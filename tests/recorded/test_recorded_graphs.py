"""Graphs that models, recipes and targets gave when they were recorded: a move of code changes none of them.

What is recorded of a graph: its structure (operators, names, attributes, types, shapes, integer constants) as a digest,
and the sum of its float constants, which may differ in the last bits between processors. After a change that is meant:
`VITFOLD_RECORD=1 pytest tests/recorded`, and say in the commit what became better.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from diffusing import build_tiny_dit
from quantizing import affine, per_channel, symmetric
from sinking import with_sinks
from vitfold.architectures.programs import deployed_program, whole_attentions
from vitfold.diffusion.parts import parts
from vitfold.model import Array, Model
from vitfold.model.folds import fold_layer_scale
from vitfold.ops.emit import emit_graph, emit_ports, write_onnx
from vitfold.program import replay
from vitfold.program.queries import projections_of
from vitfold.quant.sites import find_sites
from vitfold.quantizer import Quantizer
from vitfold.recipe import MergeRecipe, QuantRecipe
from vitfold.target import TARGETS, Target

RECORDED = Path(__file__).with_name("graphs.json")
MAP_HEAD = {"pool": "map", "class_token": False, "map_heads": 2, "map_mlp_width": 24}
DENSE = {"pool": "none", "registers": 2, "outputs": 0, "output": "last_hidden_state"}
WIDE = {"embed_dim": 64, "mlp_dim": 128, "head_dim": 16}

VITS: dict[str, tuple[dict[str, Any], dict[str, Any], str, bool]] = {
    # name: features of the model, fields of the merge recipe, target, whether it is quantized
    "plain": ({}, {}, "cpu", False),
    "plain portable": ({}, {}, "portable", False),
    "plain fp16": ({}, {}, "tensorrt-fp16", False),
    "tome": ({}, {"r": (5, 3)}, "cpu", False),
    "tome portable": ({}, {"r": (5, 3)}, "portable", False),
    "tome fp16 by score": ({}, {"r": (5, 3), "order": "score"}, "tensorrt-fp16", False),
    "tome without proportional attention": ({}, {"r": (5, 3), "prop_attn": False}, "cpu", False),
    "tofu": ({}, {"r": (4, 3), "rule": "tofu"}, "cpu", False),
    "pitome": ({}, {"r": (4, 3), "rule": "pitome"}, "portable", False),
    "evit": ({}, {"r": (4, 3), "rule": "evit"}, "cpu", False),
    "evit fp16": ({}, {"r": (4, 3), "rule": "evit", "order": "score"}, "tensorrt-fp16", False),
    "registers, layer scale, tome": ({"registers": 4, "layer_scale": True}, {"r": (5, 0)}, "cpu", False),
    "distilled": ({"dist_token": True, "pool": "token_dist"}, {"r": (2, 2)}, "cpu", False),
    "mean, no class token": ({"pool": "avg", "class_token": False}, {"r": (5, 3)}, "cpu", False),
    "mean with tofu": ({"pool": "avg", "class_token": False}, {"r": (5, 3), "rule": "tofu"}, "portable", False),
    "attention pooling": (MAP_HEAD, {"r": (5, 3)}, "portable", False),
    "class token and mean": ({"pool": "token_avg"}, {"r": (5, 3)}, "cpu", False),
    "dense": (DENSE, {"r": (5, 3)}, "cpu", False),
    "dense fp16": (DENSE, {"r": (5, 3), "order": "score"}, "tensorrt-fp16", False),
    "swiglu, qk norm, pre norm": (
        {"mlp": "swiglu", "activation": "silu", "qk_norm": True, "pre_norm": True},
        {"r": (3, 3)},
        "cpu",
        False,
    ),
    "int8 vnni": (WIDE, {}, "cpu-vnni", True),
    "int8 vnni tome": (WIDE, {"r": (5, 3)}, "cpu-vnni", True),
    "int8 avx2 tome": (WIDE, {"r": (5, 3)}, "cpu-avx2", True),
    "int8 arm": (WIDE, {"r": (5, 3)}, "cpu-arm", True),
    "int8 portable tome": (WIDE, {"r": (5, 3)}, "portable", True),
    "int8 openvino tome": (WIDE, {"r": (5, 3)}, "openvino", True),
    "int8 integer tome": (WIDE, {"r": (5, 3)}, "integer", True),
    "int8 integer dense": ({**WIDE, **DENSE}, {"r": (5, 3)}, "integer", True),
    "int8 tensorrt": (WIDE, {"order": "score"}, "tensorrt-int8", True),
    "int8 tensorrt tome": (WIDE, {"r": (5, 3), "order": "score"}, "tensorrt-int8", True),
    "int8 attention pooling": ({**WIDE, **MAP_HEAD}, {"r": (5, 3)}, "cpu-vnni", True),
    "int8 swiglu": ({**WIDE, "mlp": "swiglu", "activation": "silu"}, {"r": (5, 3)}, "cpu-avx2", True),
}
SINKS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # name: fields of Sinks, fields of the merge recipe, target
    "register and deletion": ({"start": 1, "rows": 1, "tau": 3.5, "block": 1, "deletions": 2}, {"r": (3, 2)}, "cpu"),
    "whole copies of a register": ({"start": 0, "rows": 2, "tau": 2.0}, {}, "portable"),
    "deletion from dense": ({"block": 1, "deletions": 3}, {}, "cpu"),
    "tokens apart": ({"layers": ("blocks.0.mlp.fc2", "blocks.1.attn.qkv"), "apart": 2}, {"r": (2, 2)}, "cpu"),
}
DIT_PARTS = (("stack", "step"), ("stack", "full"), ("stack", "resume"), ("modules", "full"), ("modules", "resume"))


def made_up(site: str, spread: float) -> np.ndarray:
    """A range that follows from the site's name, the same on every machine."""
    high = spread * (0.5 + zlib.crc32(site.encode()) / 2**32)
    return np.array([-0.75 * high, high], np.float32)


def quantizers_for(model: Model, target: Target) -> tuple[Model, dict[str, Quantizer]]:
    """Quantizers of every site with made-up ranges, and the model with its weights on their grids."""
    linears, attentions = find_sites(model.spec)
    range_of = symmetric if target.symmetric else affine
    found: dict[str, Quantizer] = {}
    params = dict(model.params)
    for site in linears:
        found[f"{site.layer}.x"] = range_of(made_up(site.layer, 4.0))
        found[f"{site.layer}.w"] = per_channel(params[f"{site.layer}.weight"], target.weight_bits)
        params[f"{site.layer}.weight"] = found[f"{site.layer}.w"](params[f"{site.layer}.weight"])
    if target.quantize_attention:
        for attention in attentions:
            for operand in ("q", "k", "v"):
                found[f"{attention.site}.{operand}"] = range_of(made_up(f"{attention.site}.{operand}", 3.0))
            found[f"{attention.site}.softmax"] = range_of(np.array([0.0, 1.0], np.float32))
    return model.with_params(model.spec, params), found


def record(path: Path) -> dict[str, Any]:
    """What is compared of a graph."""
    model = onnx.load(str(path))
    graph = model.graph
    lines = [f"ir {model.ir_version} " + " ".join(f"{o.domain}:{o.version}" for o in model.opset_import)]
    sums: dict[str, float] = {}
    for tensor in sorted(graph.initializer, key=lambda one: one.name):
        values = numpy_helper.to_array(tensor)
        lines.append(f"{tensor.name} {tensor.data_type} {tuple(tensor.dims)}")
        if values.dtype.kind == "f":
            sums[tensor.name] = float(np.abs(values.astype(np.float64)).sum())
        else:
            lines[-1] += f" {hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()}"
    for end in (*graph.input, *graph.output):
        lines.append(f"{end.name} {end.type.SerializeToString().hex()}")
    for node in graph.node:
        attributes = sorted(attribute.SerializeToString().hex() for attribute in node.attribute)
        site = {entry.key: entry.value for entry in node.metadata_props}
        ends = f"{list(node.input)} {list(node.output)}"
        lines.append(f"{node.domain}.{node.op_type} {node.name} {ends} {attributes} {site}")
    return {
        "structure": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "nodes": dict(sorted(Counter(node.op_type for node in graph.node).items())),
        "sum": round(sum(sums.values()), 4),
    }


def vit_graph(model: Model, merge: Mapping[str, Any], target: Target, path: Path, quantizers: Any = None) -> None:
    recipe = MergeRecipe(**{"r": (), **merge})
    quant = None if quantizers is None else QuantRecipe(attention=target.quantize_attention)
    whole = whole_attentions(model.spec, quant, wanted=target.whole_attention)
    program = deployed_program(model.spec, recipe, whole)
    projections = projections_of(program)
    graph = emit_graph(
        lambda ops, image: replay(program, ops, image)[0], model, target, quantizers, projections=projections
    )
    write_onnx(graph, path)


def emit_vit(name: str, tiny_model: Callable[..., Model], path: Path) -> None:
    features, merge, target_name, quantize = VITS[name]
    target = TARGETS[target_name]
    model = fold_layer_scale(tiny_model(**features))
    quantizers = None
    if quantize:
        model, quantizers = quantizers_for(model, target)
    vit_graph(model, merge, target, path, quantizers)


def emit_sinks(name: str, tiny_model: Callable[..., Model], path: Path) -> None:
    sinks, merge, target = SINKS[name]
    features = DENSE if "dense" in name else {}
    vit_graph(with_sinks(tiny_model(**features), **sinks), merge, TARGETS[target], path)


def emit_dit(cut: str, name: str, path: Path) -> None:
    model = build_tiny_dit()
    part = parts(model.spec, cut, r=4 if cut == "stack" else 0)[name]
    graph = emit_ports(
        part.run, model.params, TARGETS["cpu"], inputs=part.inputs, outputs=[port.name for port in part.outputs]
    )
    write_onnx(graph, path)


def assert_as_recorded(name: str, found: dict[str, Any]) -> None:
    if os.environ.get("VITFOLD_RECORD") == "1":
        kept = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
        RECORDED.write_text(json.dumps({**kept, name: found}, indent=1, sort_keys=True) + "\n")
        return
    expected = json.loads(RECORDED.read_text())[name]
    assert found["nodes"] == expected["nodes"]
    assert found["structure"] == expected["structure"], "same operators, but other names, shapes or integers"
    assert found["sum"] == pytest.approx(expected["sum"], rel=1e-5)


@pytest.mark.parametrize("name", VITS)
def test_a_vision_transformer(tiny_model, tmp_path, name):
    emit_vit(name, tiny_model, tmp_path / "model.onnx")
    assert_as_recorded(f"vit: {name}", record(tmp_path / "model.onnx"))


@pytest.mark.parametrize("name", SINKS)
def test_what_is_done_about_sinks(tiny_model, tmp_path, name):
    emit_sinks(name, tiny_model, tmp_path / "model.onnx")
    assert_as_recorded(f"sinks: {name}", record(tmp_path / "model.onnx"))


@pytest.mark.parametrize(("cut", "name"), DIT_PARTS)
def test_a_diffusion_transformer(tmp_path, cut, name):
    emit_dit(cut, name, tmp_path / "model.onnx")
    assert_as_recorded(f"dit: {cut}, {name}", record(tmp_path / "model.onnx"))


def test_what_is_recorded_tells_graphs_apart(tiny_model: Callable[..., Model], tmp_path: Path) -> None:
    """Another constant, another name or another shape is another record."""
    kept = json.loads(RECORDED.read_text())
    assert len(kept) == len(VITS) + len(SINKS) + len(DIT_PARTS)
    assert len({entry["structure"] for entry in kept.values()}) == len(kept)
    emit_vit("int8 vnni", tiny_model, tmp_path / "a.onnx")
    before = record(tmp_path / "a.onnx")
    graph = onnx.load(str(tmp_path / "a.onnx"))
    codes = next(tensor for tensor in graph.graph.initializer if tensor.name.endswith("weight.codes.0"))
    changed: Array = numpy_helper.to_array(codes).copy()
    changed[0, 0] ^= 1
    codes.CopyFrom(numpy_helper.from_array(changed, codes.name))
    onnx.save(graph, str(tmp_path / "b.onnx"))
    assert record(tmp_path / "b.onnx")["structure"] != before["structure"]
