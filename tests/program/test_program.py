"""Programs as values: what is recorded replays the same under every interpreter, prints, saves and compares."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from diffusing import build_tiny_dit
from sinking import REMEDIES, with_sinks
from vitfold.architectures.programs import forward
from vitfold.diffusion.parts import parts
from vitfold.errors import ProgramError
from vitfold.ops.count import Count
from vitfold.ops.emit import emit_graph, write_onnx
from vitfold.ops.protocol import Ops, Port
from vitfold.ops.run import Run
from vitfold.program import VOCABULARY, Literal, Program, Ref, program_from_dict, replay, trace
from vitfold.program.queries import attention_of, blocks_of, linears_of, norm_before
from vitfold.recipe import MergeRecipe
from vitfold.target import TARGETS

MODELS = {
    "plain": {},
    "registers": {"registers": 4, "layer_scale": True},
    "swiglu": {"mlp": "swiglu", "activation": "silu", "qk_norm": True},
    "map": {"pool": "map", "class_token": False, "map_heads": 2, "map_mlp_width": 24},
    "dense": {"pool": "none", "outputs": 0, "output": "last_hidden_state"},
    "distilled": {"dist_token": True, "pool": "token_dist"},
}
RECIPES = {
    "none": MergeRecipe(r=()),
    "tome": MergeRecipe(r=(5, 3)),
    "tofu": MergeRecipe(r=(4, 3), rule="tofu"),
    "pitome": MergeRecipe(r=(4, 3), rule="pitome"),
    "evit": MergeRecipe(r=(4, 3), rule="evit"),
}


def program_of(model, recipe=RECIPES["none"]) -> Program:
    spec = model.spec
    shapes = {name: array.shape for name, array in model.params.items()}
    return trace(
        lambda ops, image: forward(ops, spec, recipe, image),
        shapes,
        inputs=(Port(name="pixel_values", shape=(spec.channels, *spec.image_size)),),
        outputs=(spec.output,),
    )


def written_program(spec, recipe, ops, image):
    return forward(ops, spec, recipe, image)


def replayed_program(program, ops, image):
    return replay(program, ops, image)[0]


def cases(tiny_model):
    for features in MODELS.values():
        for name, recipe in RECIPES.items():
            if name != "evit" or features.get("class_token", True):
                yield tiny_model(**features), recipe
    for remedy in REMEDIES.values():
        yield with_sinks(tiny_model(registers=1), **remedy), RECIPES["tome"]


def test_the_vocabulary_is_that_of_the_protocol():
    assert {"linear", "attention", "merge_rows", "topk_split"} <= set(VOCABULARY)
    assert "scope" not in VOCABULARY
    assert all(hasattr(Run, op) for op in VOCABULARY)
    assert isinstance(Run({}), Ops)


def test_a_replay_computes_what_the_written_program_does(tiny_model, random_images):
    for model, recipe in cases(tiny_model):
        images = torch.from_numpy(random_images(model.spec, 2))
        with torch.inference_mode():
            expected = forward(Run(model.params), model.spec, recipe, images).numpy()
            (found,) = replay(program_of(model, recipe), Run(model.params), images)
        np.testing.assert_array_equal(found.numpy(), expected)


def test_a_replay_counts_and_emits_the_same(tiny_model, tmp_path):
    for index, (model, recipe) in enumerate(cases(tiny_model)):
        program, spec = program_of(model, recipe), model.spec

        shapes = {name: array.shape for name, array in model.params.items()}
        written, replayed = Count(shapes), Count(shapes)
        forward(written, spec, recipe, (1, spec.channels, *spec.image_size))
        replay(program, replayed, (1, spec.channels, *spec.image_size))
        assert written.costs == replayed.costs
        paths = [tmp_path / f"{index}.{kind}.onnx" for kind in ("written", "replayed")]
        write_onnx(emit_graph(partial(written_program, spec, recipe), model, TARGETS["cpu"]), paths[0])
        write_onnx(emit_graph(partial(replayed_program, program), model, TARGETS["cpu"]), paths[1])
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_diffusion_transformer_is_a_program_too():
    model = build_tiny_dit()
    for part in parts(model.spec, "stack").values():
        shapes = {name: array.shape for name, array in model.params.items()}
        program = trace(part.run, shapes, inputs=part.inputs, outputs=[port.name for port in part.outputs])
        arrays = [torch.randn(1 if port.batch == 1 else 2, *port.shape) for port in part.inputs]
        with torch.inference_mode():
            expected = part.run(Run(model.params), *arrays)
            found = replay(program, Run(model.params), *arrays)
        assert len(found) == len(expected) == len(program.outputs)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_programs_are_saved_and_compare_by_content(tiny_model):
    for model, recipe in cases(tiny_model):
        program = program_of(model, recipe)
        again = program_from_dict(json.loads(json.dumps(program.to_dict())))
        assert again == program
        assert str(again) == str(program)
    assert program_of(tiny_model()) == program_of(tiny_model(seed=1)), "weights are no part of a program"
    assert program_of(tiny_model()) != program_of(tiny_model(), RECIPES["tome"])
    values = program_of(with_sinks(tiny_model(), start=1, rows=1, tau=3.5)).to_dict()
    assert any(isinstance(v, dict) and "data" in v for node in values["nodes"] for v in node["attributes"].values())


@pytest.mark.parametrize(
    "damage",
    [
        {"nodes": 3},
        {"inputs": [{}]},
        {"outputs": {"logits": 99999}},
        {
            "nodes": [
                {
                    "op": "add",
                    "inputs": {"a": 77, "b": 0},
                    "attributes": {},
                    "outputs": [5],
                    "shapes": [[1]],
                    "scope": "",
                }
            ]
        },
    ],
)
def test_damaged_values_are_no_program(tiny_model, damage):
    values = program_of(tiny_model()).to_dict()
    with pytest.raises(ProgramError, match="no program"):
        program_from_dict({**values, **damage})


def test_a_value_is_made_once_and_before_it_is_read(tiny_model):
    program = program_of(tiny_model())
    first, *rest = program.nodes
    with pytest.raises(ValueError, match="nothing before it makes"):
        replace(program, nodes=tuple(rest))
    with pytest.raises(ValueError, match="a second time"):
        replace(program, nodes=(first, first, *rest))
    with pytest.raises(ValueError, match="which nothing makes"):
        replace(program, outputs={"logits": Ref(10**6)})
    with pytest.raises(ValueError, match="takes 1 inputs, found 2"):
        replay(program, Run({}), torch.zeros(1), torch.zeros(1))


def test_a_listing_reads_like_the_paper(tiny_model):
    text = str(program_of(tiny_model(), RECIPES["tome"]))
    assert text.startswith(
        "%0 = input pixel_values 1x3x32x32\n# embed\n%1 = patch_embed(%0, layer='patch_embed') 1x16x32\n"
    )
    assert "# blocks.0.attn" in text
    assert "layer_norm(" in text
    assert text.endswith(f"output logits = %{max(program_of(tiny_model(), RECIPES['tome']).shapes)}")


def test_literals_compare_by_content():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert Literal.of(values) == Literal.of(values.copy()) != Literal.of(values + 1)
    assert Literal.of(values) != Literal.of(values.reshape(3, 2))
    np.testing.assert_array_equal(Literal.of(values).array(), values)
    kept = Literal.of(values)
    kept.array()[0, 0] = 7
    np.testing.assert_array_equal(kept.array(), values)


def test_questions_are_answered_by_the_program(tiny_model):
    program = program_of(tiny_model(), RECIPES["tome"])
    assert blocks_of(program) == 2
    assert attention_of(program, 1).site == "blocks.1.attn"
    norms = {node.site: norm_before(program, node) for node in linears_of(program)}
    found = {layer: None if norm is None else norm.site for layer, norm in norms.items()}
    assert found["blocks.0.attn.qkv"] == "blocks.0.norm1"
    assert found["blocks.1.mlp.fc1"] == "blocks.1.norm2"
    assert found["blocks.0.attn.proj"] is None
    assert found["blocks.0.mlp.fc2"] is None
    roles = {(node.block, node.role) for node in program.nodes}
    blocks = {(block, role) for block in (0, 1) for role in ("attention", "merge", "mlp")}
    assert roles == blocks | {(None, role) for role in ("embed", "pool", "head")}
