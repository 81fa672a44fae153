"""Sinks in the program: identities of registers, oracles of deletion, refilling and moved neurons."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sinking import with_sinks
from vitfold.architectures.programs import forward
from vitfold.errors import RecipeError, SourceError
from vitfold.model import Sinks, ViTSpec, spec_to_dict, vit_spec_from_dict
from vitfold.ops.record import Record
from vitfold.ops.run import Run
from vitfold.recipe import MergeRecipe, tokens_per_block
from vitfold.transforms.sinks import delete_largest, move_neurons, neighbour_weights
from vitfold.transforms.tokens import Tokens

MERGES = [(), (3, 2, 1)]
POOLS = {
    "class": {},
    "mean": {"pool": "avg", "registers": 2},
    "attention": {"pool": "map", "map_heads": 4, "class_token": False},
    "dense": {"pool": "none", "outputs": 0, "output": "last_hidden_state"},
}


@pytest.mark.parametrize("r", MERGES)
@pytest.mark.parametrize("pool", POOLS)
def test_a_register_that_hardly_counts_changes_nothing(tiny_model, random_images, run_torch, pool, r):
    model = tiny_model(num_layers=3, **POOLS[pool])
    images = random_images(model.spec, 2)
    plain = run_torch(model, images, r)
    silent = run_torch(with_sinks(model, start=1, rows=1, tau=1e-30), images, r)
    assert np.abs(silent - plain).max() < 1e-5 * np.abs(plain).max()
    heard = run_torch(with_sinks(model, start=1, rows=1, tau=1.0), images, r)
    assert np.abs(heard - plain).max() > 1e-2 * np.abs(plain).max()


@pytest.mark.parametrize("r", MERGES)
@pytest.mark.parametrize("copies", [1, 2, 7])
def test_copies_of_a_row_are_one_with_the_logarithm_of_their_number(tiny_model, random_images, run_torch, copies, r):
    model = with_sinks(tiny_model(num_layers=3), start=1, rows=1, tau=float(copies))
    params = dict(model.params)
    for name in [name for name in params if "cached" in name]:
        params[name] = np.repeat(params[name], copies, axis=2)
    copied = model.with_params(replace(model.spec, sinks=Sinks(start=1, rows=copies)), params)
    images = random_images(model.spec, 2)
    one, many = run_torch(model, images, r), run_torch(copied, images, r)
    assert np.abs(one - many).max() < 1e-5 * np.abs(many).max()


@settings(derandomize=True, deadline=None, max_examples=20)
@given(tau=st.floats(1e-3, 1e3))
@example(tau=3.0)
@example(tau=1.0)
def test_attention_with_a_register_equals_the_slow_form(tiny_model, tau):
    model = with_sinks(tiny_model(), start=0, rows=1, tau=tau)
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((1, 4, 5, 8)).astype(np.float32) for _ in range(3))
    cached = [model.params[f"blocks.0.attn.cached_{name}"][0, :, 0] for name in ("k", "v")]
    expected = np.zeros((4, 5, 8))
    for head in range(4):
        for row in range(5):
            scores = [np.exp(q[0, head, row] @ key / np.sqrt(8.0)) for key in k[0, head]]
            scores.append(tau * np.exp(q[0, head, row] @ cached[0][head] / np.sqrt(8.0)))
            values = [*v[0, head], cached[1][head]]
            expected[head, row] = sum(s * x for s, x in zip(scores, values, strict=True)) / sum(scores)

    from vitfold.transforms.sinks import attend_registers

    ops = Run(model.params)
    operands = attend_registers(
        ops, model.spec.sinks, 0, "blocks.0.attn", torch.from_numpy(k), torch.from_numpy(v), None, count=5
    )
    found = ops.attention("blocks.0.attn", torch.from_numpy(q), *operands).numpy()
    assert np.abs(found[0] - expected).max() < 1e-5


@pytest.mark.parametrize("order", ["index", "score"])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_the_largest_patches_go_and_no_prefix_token(order, prefix):
    x = torch.randn(2, prefix + 16, 32)
    x[:, :prefix] *= 100.0
    x[0, prefix + 5], x[0, prefix + 9], x[1, prefix], x[1, prefix + 15] = -50.0, 40.0, 30.0, -60.0
    tokens = Tokens(x=x, count=prefix + 16, prefix=prefix, size=torch.arange(1.0, prefix + 17).expand(2, -1)[..., None])
    found = delete_largest(Run({}), tokens, 2, order=order, trace=True)
    assert found.count == prefix + 14
    for image, gone in enumerate(({5, 9}, {0, 15})):
        kept = [row for row in range(prefix + 16) if row - prefix not in gone]
        norms = x[image].abs().amax(1)
        if order == "score":
            kept = kept[:prefix] + sorted(kept[prefix:], key=lambda row: float(norms[row]))
        assert torch.equal(found.x[image], x[image, kept])
        assert torch.equal(found.size[image, :, 0], tokens.size[image, kept, 0])
        assert torch.equal(found.source[image].argmax(1), torch.tensor(kept))


@pytest.mark.parametrize("r", MERGES)
def test_deleted_places_of_a_dense_output_get_the_mean_of_their_neighbours(tiny_model, random_images, r):
    model = with_sinks(tiny_model(num_layers=3, **POOLS["dense"]), block=1, deletions=4)
    seen = []
    with torch.inference_mode():
        found = forward(
            Run(model.params),
            model.spec,
            MergeRecipe(r=r),
            torch.from_numpy(random_images(model.spec, 2)),
            sources=True,
            observe=lambda _, tokens: seen.append(tokens),
        )
    last = seen[-1]
    params = {name: torch.from_numpy(model.params[f"norm.{name}"]) for name in ("weight", "bias")}
    rows = torch.nn.functional.layer_norm(last.x, (32,), params["weight"], params["bias"], 1e-6)
    weights = neighbour_weights(model.spec.prefix, model.spec.grid)[0]
    for image in range(2):
        owner = last.source[image]
        alive = owner.sum(0) > 0
        assert int((~alive).sum()) == 4
        full = owner.T @ rows[image]
        for token in range(model.spec.tokens):
            expected = full[token]
            if not alive[token]:
                near = [(weights[token, m], full[m]) for m in range(1, model.spec.tokens) if alive[m]]
                expected = sum(w * x for w, x in near) / sum(w for w, _ in near)
            assert torch.allclose(found[image, token], expected, atol=1e-5)


def test_the_neighbours_of_a_corner_are_three_and_of_a_prefix_token_no_patch():
    weights = neighbour_weights(1, (4, 4))[0]
    assert [token - 1 for token in np.flatnonzero(weights[1] == 1.0)] == [1, 4, 5]
    assert not weights[0, 1:].any()
    assert not weights[1:, 0].any()


def test_a_mean_counts_the_tokens_that_are_left(tiny_model, random_images):
    model = with_sinks(
        tiny_model(num_layers=3, pool="avg", final_norm=False, outputs=0, output="image_embeds"), block=1, deletions=3
    )
    seen = []
    with torch.inference_mode():
        images = torch.from_numpy(random_images(model.spec, 2))
        merge = MergeRecipe(r=(3, 2, 1))
        found = forward(Run(model.params), model.spec, merge, images, observe=lambda _, tokens: seen.append(tokens))
    x, size = seen[-1].x[:, 1:], seen[-1].size[:, 1:]
    assert torch.allclose(found, (x * size).sum(1) / size.sum(1), atol=1e-5)
    assert torch.all(size.sum(1) < model.spec.patches)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": ("blocks.0.mlp.fc2", "blocks.1.attn.qkv", "blocks.1.mlp.fc1"), "apart": 3},
        {"layers": ("blocks.0.mlp.fc2", "blocks.1.attn.qkv"), "split_prefix": True},
    ],
)
@pytest.mark.parametrize("r", [(), (3, 2)])
def test_tokens_apart_change_nothing_in_float(tiny_model, random_images, run_torch, fields, r):
    model = tiny_model(registers=2)
    images = random_images(model.spec, 2)
    plain, apart = run_torch(model, images, r), run_torch(with_sinks(model, **fields), images, r)
    assert np.abs(apart - plain).max() < 1e-5 * np.abs(plain).max()


def test_moved_neurons_leave_their_maximum_in_the_last_register():
    hidden = torch.randn(2, 19, 48)
    found = move_neurons(Run({}), (3, 7), hidden, count=19, width=48, register=2)
    expected = hidden.clone()
    expected[:, :, [3, 7]] = 0.0
    expected[:, 2, [3, 7]] = hidden[:, :, [3, 7]].amax(1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("layer", ["blocks.1.attn.qkv", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.2.mlp.fc2"])
@pytest.mark.parametrize("prefix", [{}, {"class_token": False, "pool": "avg"}, {"registers": 2}])
@pytest.mark.parametrize("r", [(), (2, 0, 0)])
def test_tokens_that_go_at_a_layer_are_the_largest_of_what_it_reads(tiny_model, random_images, layer, prefix, r):
    """An MLP treats every row alike: they may as well go in front of the next block, if they are largest there."""
    plain, merge = tiny_model(num_layers=3, **prefix), MergeRecipe(r=r)
    behind, first, pixels = int(layer[7]) + (".mlp." in layer), plain.spec.prefix, random_images(plain.spec, 2)
    seen, read, found = {}, {}, {}
    with torch.inference_mode():
        forward(
            Record(plain.params, read.__setitem__),
            plain.spec,
            merge,
            torch.from_numpy(pixels),
            observe=seen.__setitem__,
        )
        tokens = seen[behind]
        gone = read[f"{layer}.x"].abs().amax(-1)[:, first:].topk(3).indices + first
        large = tokens.x.clone()
        large.scatter_(1, gone[..., None].expand(-1, -1, 32), 1e6)
        model = with_sinks(plain, block=behind, deletions=3, deletion_site=layer)
        output = forward(Run(model.params), model.spec, merge, torch.from_numpy(pixels), observe=found.__setitem__)
        if behind < 3:
            spec = with_sinks(plain, block=behind, deletions=3).spec
            expected = forward(Run(plain.params), spec, merge, None, given=(behind, replace(tokens, x=large)))
            torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        else:
            left = [[n for n in range(tokens.count) if n not in gone[image]] for image in range(2)]
            expected = torch.stack([tokens.x[image, rows] for image, rows in enumerate(left)])
            torch.testing.assert_close(found[3].x, expected, rtol=1e-4, atol=1e-5)
    assert found[3].x.shape[1] == tokens_per_block(model.spec, r)[-1] == plain.spec.tokens - sum(r) - 3


def test_deletions_count_in_the_tokens_of_every_block(tiny_model):
    spec = replace(tiny_model(num_layers=3).spec, sinks=Sinks(block=1, deletions=5))
    assert tokens_per_block(spec, ()) == (17, 12, 12, 12)
    assert tokens_per_block(spec, (4, 3, 0)) == (17, 8, 5, 5)
    with pytest.raises(RecipeError, match="r = 4 is too large for block 2: 6 tokens enter it"):
        tokens_per_block(spec, (4, 2, 4))
    with pytest.raises(RecipeError, match="leave no patch; merge or delete fewer"):
        tokens_per_block(replace(spec, sinks=Sinks(block=1, deletions=9)), (8, 0, 0))


def test_a_spec_without_sinks_says_nothing_of_them_and_one_with_comes_back(tiny_model):
    spec = tiny_model().spec
    assert "sinks" not in spec_to_dict(spec)
    full = replace(
        spec,
        registers=1,
        sinks=Sinks(
            start=1,
            rows=1,
            tau=2.5,
            block=1,
            deletions=2,
            layers=("blocks.0.mlp.fc2",),
            apart=1,
            leave_out=3,
            neurons=((0, 1),),
        ),
    )
    assert vit_spec_from_dict(spec_to_dict(full)) == full
    with pytest.raises(SourceError, match=r"unknown key sinks\.tua"):
        vit_spec_from_dict({**spec_to_dict(spec), "sinks": {"tua": 1.0}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tau": 0.0}, r"sinks\.tau must be a positive number, found 0\.0"),
        ({"tau": float("inf")}, r"sinks\.tau must be a positive number, found inf"),
        ({"deletions": -1}, r"sinks\.deletions must be an integer of at least 0, found -1"),
        ({"apart": 1, "split_prefix": True}, "exclude each other"),
    ],
)
def test_values_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(SourceError, match=message):
        Sinks(**fields)


@pytest.mark.parametrize(
    ("sinks", "message"),
    [
        (Sinks(start=2, rows=1), "there is no block 2: the model has 2"),
        (Sinks(block=5, deletions=1), "there is no block 5"),
        (Sinks(block=1, deletions=1, deletion_site="blocks.1.mlp.fc3"), "no tokens can go at 'blocks.1.mlp.fc3'"),
        (Sinks(block=0, deletions=1, deletion_site="blocks.1.mlp.fc2"), "so that block 0 has less"),
        (Sinks(deletions=16), "16 of 16 patch tokens cannot be deleted"),
        (Sinks(neurons=((0, 3),)), "cannot move the hidden unit 3 to a register"),
    ],
)
def test_sinks_that_do_not_fit_a_model_are_refused(tiny_model, sinks, message):
    spec: ViTSpec = tiny_model().spec
    with pytest.raises(SourceError, match=message):
        replace(spec, sinks=sinks)
