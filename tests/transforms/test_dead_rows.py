"""Rows that nothing reads are not computed, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from sinking import REMEDIES, with_sinks
from vitfold.architectures.programs import forward
from vitfold.ops.count import Count
from vitfold.ops.protocol import Port
from vitfold.ops.run import Run
from vitfold.program import Program, replay, trace
from vitfold.recipe import MergeRecipe
from vitfold.transforms import without_dead_nodes, without_dead_rows

FEATURES = {
    "token": {},
    "token, layer scale": {"layer_scale": True},
    "token, registers, qk norm": {"registers": 4, "qk_norm": True},
    "token, swiglu": {"mlp": "swiglu", "activation": "silu"},
    "token, no head": {"outputs": 0, "output": "image_embeds"},
    "two tokens": {"dist_token": True, "pool": "token_dist"},
    "two tokens, no head": {"dist_token": True, "pool": "token_dist", "outputs": 0, "output": "image_embeds"},
    "token, pool norm": {"pool_norm": True, "final_norm": False},
    "mean": {"pool": "avg"},
    "mean of patches, no class token": {"pool": "avg", "class_token": False},
    "token and mean": {"pool": "token_avg"},
    "map": {"pool": "map", "map_heads": 2, "map_mlp_width": 24},
    "dense": {"pool": "none", "outputs": 0, "output": "last_hidden_state"},
}
SHORTER = [
    name for name in FEATURES if "token" in name and name not in ("mean of patches, no class token", "token and mean")
]
RECIPES = {
    "none": MergeRecipe(r=()),
    "tome": MergeRecipe(r=(5, 3)),
    "tome by score": MergeRecipe(r=(5, 3), order="score"),
    "tome, last block only": MergeRecipe(r=(0, 6)),
    "tome, no proportional attention": MergeRecipe(r=(5, 3), prop_attn=False),
    "tofu": MergeRecipe(r=(4, 3), rule="tofu"),
    "pitome": MergeRecipe(r=(4, 3), rule="pitome"),
    "evit": MergeRecipe(r=(4, 3), rule="evit"),
}


def shapes_of(model):
    return {name: array.shape for name, array in model.params.items()}


def program_of(model, recipe) -> Program:
    spec = model.spec
    return trace(
        lambda ops, image: forward(ops, spec, recipe, image),
        shapes_of(model),
        inputs=(Port(name="pixel_values", shape=(spec.channels, *spec.image_size)),),
        outputs=(spec.output,),
    )


def run(program, model, images):
    with torch.inference_mode():
        return replay(program, Run(model.params), torch.from_numpy(images))[0].numpy()


def macs(program, model):
    count = Count(shapes_of(model))
    replay(program, count, *((1, *port.shape) for port in program.inputs))
    return {cost.site: cost.macs for cost in count.costs if cost.macs}


def check(model, recipe, images):
    program = program_of(model, recipe)
    shorter = without_dead_rows(program, shapes_of(model))
    expected, found = run(program, model, images), run(shorter, model, images)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    return macs(program, model), macs(shorter, model), shorter


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("feature", FEATURES)
def test_outputs_stay_what_they_were(tiny_model, random_images, feature, recipe):
    features = FEATURES[feature]
    if recipe == "evit" and not features.get("class_token", True):
        pytest.skip("evit asks the class token")
    model = tiny_model(**features)
    before, after, shorter = check(model, RECIPES[recipe], random_images(model.spec, 3))
    if feature not in SHORTER:
        assert after == before
        return
    rows = 2 if features.get("pool") == "token_dist" else 1
    spec = model.spec
    assert after["blocks.1.mlp.fc1"] == rows * spec.embed_dim * len(model.params["blocks.1.mlp.fc1.weight"])
    assert after["blocks.1.attn.proj"] == rows * spec.embed_dim**2
    assert after["blocks.1.attn.qkv"] == before["blocks.1.attn.qkv"], "keys and values of every token are needed"
    assert after["blocks.1.attn.qk"] < before["blocks.1.attn.qk"]
    assert after["blocks.0.mlp.fc1"] == before["blocks.0.mlp.fc1"]
    assert not [site for site in after if site.startswith("blocks.1.merge")], "a merge that nothing reads is dead"
    again = without_dead_rows(shorter, shapes_of(model))
    assert macs(again, model) == after, "there is nothing left to do"
    assert len(again.nodes) == len(shorter.nodes)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("feature", [name for name in SHORTER if name != "token, pool norm"])
def test_an_attention_that_stays_whole_is_the_last_that_has_every_row(tiny_model, random_images, feature, recipe):
    model, last = tiny_model(**FEATURES[feature]), "blocks.1.attn"
    program = program_of(model, RECIPES[recipe])
    shorter = without_dead_rows(program, shapes_of(model), whole={last})
    images = random_images(model.spec, 3)
    expected, found = run(program, model, images), run(shorter, model, images)
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()
    before, after = macs(program, model), macs(shorter, model)
    assert {site: after[site] for site in (f"{last}.qk", f"{last}.av")} == {
        site: before[site] for site in (f"{last}.qk", f"{last}.av")
    }
    few = macs(without_dead_rows(program, shapes_of(model)), model)
    assert {site: n for site, n in after.items() if not site.startswith(f"{last}.")} == {
        site: n for site, n in few.items() if not site.startswith(f"{last}.")
    }, "the MLP and what follows have the rows that are read, and a merge that nothing reads is dead"
    assert after[f"{last}.proj"] == few[f"{last}.proj"]


@pytest.mark.parametrize("remedy", REMEDIES)
def test_remedies_against_sinks_stay_what_they_were(tiny_model, random_images, remedy):
    model = with_sinks(tiny_model(registers=1), **REMEDIES[remedy])
    for recipe in (RECIPES["none"], RECIPES["tome"]):
        check(model, recipe, random_images(model.spec, 3))


def test_what_several_outputs_read_is_kept(tiny_model, random_images):
    """A second output that needs every row keeps them; rows are then cut out of it and not computed twice."""
    model = tiny_model()
    program = program_of(model, RECIPES["none"])
    last = [node for node in program.nodes if node.op == "add" and node.block == 1][-1]
    both = replace(program, outputs={**program.outputs, "tokens": last.outputs[0]})
    shorter = without_dead_rows(both, shapes_of(model))
    assert macs(shorter, model) == macs(both, model)
    images = torch.from_numpy(random_images(model.spec, 2))
    with torch.inference_mode():
        for one, other in zip(
            replay(both, Run(model.params), images), replay(shorter, Run(model.params), images), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_dead_nodes_go_and_the_others_stay(tiny_model):
    program = program_of(tiny_model(), RECIPES["tome"])
    live = without_dead_nodes(program)
    assert without_dead_nodes(live) == live
    first = next(node for node in program.nodes if node.op == "layer_norm")
    short = without_dead_nodes(replace(program, outputs={"x": first.outputs[0]}))
    assert (short.nodes[-1].op, short.nodes[-1].site) == (first.op, first.site)
    assert {node.role for node in short.nodes} == {"embed", "attention"}
