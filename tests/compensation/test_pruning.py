"""Hidden units that go: which ones, what becomes of the others, and the narrower model that is left."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from compensation_cases import drawn
from test_graphs import exported

from vitfold.architectures.programs import UNMERGED, forward, plain_program
from vitfold.compensation import (
    Losses,
    compensate,
    cut_to_width,
    divide,
    losses_from_dict,
    measure_losses,
    pruning,
    refit,
)
from vitfold.compensation.dividing import between, some_of
from vitfold.compensation.pruning import kept_by_count
from vitfold.errors import RecipeError
from vitfold.model import Model, spec_from_dict, spec_to_dict
from vitfold.ops.run import Run
from vitfold.pipeline import fusible_widths, optimize
from vitfold.program.queries import HiddenRows, head_rows, hidden_rows
from vitfold.recipe import MergeRecipe, PruneRecipe, Recipe, RegistersRecipe, quant_from_scheme
from vitfold.target import find_target

HALF = PruneRecipe(mlp=0.5)
KINDS: dict[str, dict[str, Any]] = {
    "class token": {},
    "mean of patches": {"pool": "avg", "class_token": False, "pos_embed": "patches"},
    "gated": {"mlp": "swiglu"},
    "all tokens": {"pool": "none", "outputs": 0, "output": "last_hidden_state"},
}
NONE = MergeRecipe(r=(0, 0))


def outputs(model: Model, merge: MergeRecipe = UNMERGED) -> torch.Tensor:
    """What a model gives on images that nobody has seen."""
    (pixels,) = drawn(64, seed=7).arrays
    with torch.inference_mode():
        return forward(Run(model.params), model.spec, merge, torch.from_numpy(pixels))


def error(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Relative and squared."""
    return float((found - exact).square().sum() / exact.square().sum())


def kept_of(square: torch.Tensor, cross: torch.Tensor, count: int, width: int = 1) -> list[int]:
    """Which units stay where so many do."""
    ((_, kept),) = kept_by_count(square, cross, (count,), width)
    return kept.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_half_of_the_units_give_nearly_the_same(kind: str, tiny_model) -> None:
    model = tiny_model(mlp_dim=128, **KINDS[kind])
    done = compensate(model, NONE, drawn(512), prune=HALF)
    assert done.model.spec.mlp_dim == 64
    assert done.model.params["blocks.1.mlp.fc2.weight"].shape == (32, 64)
    exact = outputs(model)
    assert error(exact, outputs(done.model)) < 0.5 * error(exact, outputs(cut_to_width(model, HALF)))
    assert [one.units for one in done.refits if one.layer.endswith("fc2")] == [64, 64]


def test_merging_is_mended_with_it(tiny_model) -> None:
    model, merge = tiny_model(mlp_dim=128), MergeRecipe(r=(4, 4), order="index")
    together = compensate(model, merge, drawn(512), prune=HALF).model
    apart = compensate(model, NONE, drawn(512), prune=HALF).model
    exact = outputs(model)
    assert error(exact, outputs(together, merge)) < error(exact, outputs(apart, merge))


def test_units_that_nothing_needs_go_and_cost_nothing(tiny_model) -> None:
    model = tiny_model(mlp_dim=96)
    params = dict(model.params)
    for block in range(2):
        params[f"blocks.{block}.mlp.fc2.weight"] = params[f"blocks.{block}.mlp.fc2.weight"].copy()
        params[f"blocks.{block}.mlp.fc2.weight"][:, ::3] = 0.0
    model = model.with_params(model.spec, params)
    done = compensate(model, NONE, drawn(512), prune=PruneRecipe(mlp=1 / 3))
    assert done.model.spec.mlp_dim == 64
    assert error(outputs(model), outputs(done.model)) < 1e-4


def test_leaving_out_rows_that_are_gone_changes_nothing(monkeypatch) -> None:
    """Against keeping all of them to the end."""
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(600, 65, generator=draw) @ torch.randn(65, 65, generator=draw)
    square, cross = x.T @ x, torch.randn(9, 65, generator=draw) @ x.T @ x
    for width, counts in ((1, (50, 31, 7)), (8, (6, 3, 1))):
        short = {count: kept.tolist() for count, kept in kept_by_count(square, cross, counts, width)}
        with monkeypatch.context() as patched:
            patched.setattr(pruning, "_CLOSING_UP", 0.0)
            assert short == {count: kept.tolist() for count, kept in kept_by_count(square, cross, counts, width)}


@pytest.mark.parametrize("prune", ["even heads", "thin heads", "no pruning"])
def test_what_attention_averaged_is_not_computed_again(prune: str, tiny_model, monkeypatch) -> None:
    """Averages that were kept from fitting the projection are those that the narrower attention would give."""
    model, merge = tiny_model(mlp_dim=128), MergeRecipe(r=(3, 3), order="index")
    recipe = {"even heads": UNEVEN, "thin heads": THIN, "no pruning": None}[prune]
    kept = compensate(model, merge, drawn(512), prune=recipe)
    monkeypatch.setattr(refit._Averages, "known", lambda *_: {})
    anew = compensate(model, merge, drawn(512), prune=recipe)
    assert kept.error_after == pytest.approx(anew.error_after, rel=1e-3)
    for one, other in zip(kept.refits, anew.refits, strict=True):
        assert (one.layer, one.ridge) == (other.layer, other.ridge)
        assert one.left == pytest.approx(other.left, rel=1e-3)
    assert error(outputs(anew.model, merge), outputs(kept.model, merge)) < 1e-5


def test_what_is_not_measured_lies_on_powers_of_what_goes_and_below_the_first_on_a_line() -> None:
    counts = (7, 6, 5, 4, 3, 2, 1)
    assert some_of(counts) == (6, 4, 2, 1)
    assert some_of(counts[1:], first=0) == (6, 4, 2, 1)
    assert some_of((3, 2, 1)) == (3, 2, 1)
    assert between({}, (), 8) == {8: 0.0}
    exact = {count: 0.01 * (8 - count) ** 1.7 for count in counts}
    found = between({count: exact[count] for count in some_of(counts)}, counts, 8)
    assert found == pytest.approx({8: 0.0, **exact, 7: exact[6] / 2})
    assert list(found) == [8, *counts]
    nothing = between({6: 0.0, 4: 0.0, 2: 0.0, 1: 0.0}, counts, 8)
    assert max(nothing.values()) < 1e-9


def test_of_two_equal_units_one_stays() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=draw)
    x[:, 5] = x[:, 2]
    weight = torch.randn(3, 9, generator=draw)
    x = torch.cat((x, torch.ones(200, 1)), 1)
    kept = kept_of(x.T @ x, weight @ x.T @ x, 7)
    assert len(kept) == 7
    assert (2 in kept) != (5 in kept)


def test_the_best_single_unit_to_go_is_found() -> None:
    """Against trying each."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(400, 6, generator=draw) @ torch.randn(6, 6, generator=draw)
    x = torch.cat((x, torch.ones(400, 1)), 1)
    y = x @ torch.randn(7, 4, generator=draw)

    def missed(gone: int) -> float:
        rest = x[:, [column for column in range(7) if column != gone]]
        return float((y - rest @ torch.linalg.lstsq(rest, y).solution).square().sum())

    kept = kept_of(x.T @ x, y.T @ x, 5)
    assert set(range(6)) - set(kept) == {min(range(6), key=missed)}


def test_a_graph_is_pruned_like_a_written_program(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    given = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
    model = exported(tmp_path, timm.models.vision_transformer.VisionTransformer(**given).eval())
    done = compensate(model, NONE, drawn(512), prune=HALF)
    assert done.model.spec.mlp_dim == 64
    exact = outputs(model)
    assert error(exact, outputs(done.model)) < 0.5 * error(exact, outputs(cut_to_width(model, HALF)))
    assert {node.shapes[0][-1] for node in plain_program(done.model.spec).nodes if node.op == "activation"} == {64}


def test_rows_of_a_gated_mlp_are_found_in_both_halves(tiny_model) -> None:
    program = plain_program(tiny_model(mlp="swiglu").spec)
    assert hidden_rows(program, "blocks.0.mlp.fc2") == (HiddenRows(layer="blocks.0.mlp.fc1", parts=2),)


def test_what_cannot_be_pruned_is_refused(tiny_model) -> None:
    with pytest.raises(RecipeError, match="the MLP of block 0 cannot be pruned"):
        compensate(tiny_model(layer_scale=True), NONE, drawn(256), prune=HALF)
    with pytest.raises(RecipeError, match="takes no unit away, which go by 32"):
        compensate(tiny_model(mlp_dim=64), NONE, drawn(256), prune=PruneRecipe(mlp=0.1))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_is_between_0_and_1(share: float) -> None:
    with pytest.raises(RecipeError, match=r"prune.mlp is the share of the units to go|names either mlp, a share"):
        PruneRecipe(mlp=share)


UNEVEN = PruneRecipe(heads=(1, 3), units=(32, 96))


@pytest.mark.parametrize("kind", [*KINDS, "normed heads"])
def test_blocks_keep_heads_and_units_of_their_own(kind: str, tiny_model) -> None:
    model = tiny_model(mlp_dim=128, **({"qk_norm": True} if kind == "normed heads" else KINDS[kind]))
    done = compensate(model, NONE, drawn(512), prune=UNEVEN)
    spec = done.model.spec
    assert (spec.block_heads, spec.block_mlp_dims, spec.num_heads, spec.mlp_dim) == ((1, 3), (32, 96), 3, 96)
    assert done.model.params["blocks.0.attn.proj.weight"].shape == (32, spec.head_dim)
    exact = outputs(model)
    assert error(exact, outputs(done.model)) < 0.6 * error(exact, outputs(cut_to_width(model, UNEVEN)))
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


def test_the_head_that_nothing_needs_goes_and_costs_nothing(tiny_model) -> None:
    model = tiny_model()
    params, width = dict(model.params), model.spec.head_dim
    for block in range(2):
        name = f"blocks.{block}.attn.proj.weight"
        params[name] = params[name].copy()
        params[name][:, width : 2 * width] = 0.0
    model = model.with_params(model.spec, params)
    kept = model.spec.num_heads - 1
    done = compensate(model, NONE, drawn(512), prune=PruneRecipe(heads=(kept, kept)))
    assert done.model.spec.num_heads == kept
    assert error(outputs(model), outputs(done.model)) < 1e-3


THIN = PruneRecipe(heads=(2, 4), head_dims=(8, 4), units=(128, 96))


@pytest.mark.parametrize("kind", KINDS)
def test_heads_become_narrower(kind: str, tiny_model) -> None:
    model = tiny_model(mlp_dim=128, **KINDS[kind])
    assert model.spec.head_dim == 8
    done = compensate(model, NONE, drawn(512), prune=THIN)
    spec = done.model.spec
    assert (spec.block_heads, spec.block_head_dims, spec.num_heads, spec.head_dim) == ((2, 4), (8, 4), 4, 8)
    assert done.model.params["blocks.1.attn.qkv.weight"].shape == (3 * 4 * 4, 32)
    assert [one.head_dim for one in done.refits if one.layer.endswith("proj")] == [None, 4]
    exact = outputs(model)
    assert error(exact, outputs(done.model)) < 0.6 * error(exact, outputs(cut_to_width(model, THIN)))
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec


def test_heads_of_low_rank_lose_nothing_as_narrow_ones(tiny_model) -> None:
    """Queries, keys and values of rank 4 that are turned at random, so that no column by itself can go."""
    model = tiny_model(num_heads=4)
    params, draw = dict(model.params), torch.Generator().manual_seed(3)
    for block in range(2):
        name = f"blocks.{block}.attn.qkv"
        weight = torch.from_numpy(params[f"{name}.weight"]).reshape(3, 4, 8, -1)
        turns = torch.linalg.qr(torch.randn(3, 4, 8, 8, generator=draw)).Q[..., :4]
        params[f"{name}.weight"] = (turns @ (turns.mT @ weight)).reshape(96, -1).numpy()
        bias = torch.from_numpy(params[f"{name}.bias"]).reshape(3, 4, 8, 1)
        params[f"{name}.bias"] = (turns @ (turns.mT @ bias)).flatten().numpy()
    model = model.with_params(model.spec, params)
    done = compensate(model, NONE, drawn(512), prune=PruneRecipe(head_dims=(4, 4)))
    assert (done.model.spec.head_dim, done.model.spec.block_head_dims) == (8, (4, 4))
    assert error(outputs(model), outputs(done.model)) < 1e-3


def test_a_constant_on_all_keys_does_not_count(tiny_model) -> None:
    """It changes no softmax, however large it is, so no direction of a narrower head is spent on it."""
    model = tiny_model(num_heads=4)
    shifted = dict(model.params)
    for block in range(2):
        name = f"blocks.{block}.attn.qkv.bias"
        shifted[name] = shifted[name].copy()
        shifted[name][32:64] += 30.0 * torch.randn(32, generator=torch.Generator().manual_seed(block)).numpy()
    moved = model.with_params(model.spec, shifted)
    narrow = PruneRecipe(head_dims=(4, 4))
    assert error(outputs(model), outputs(moved)) < 1e-6
    both = [compensate(one, NONE, drawn(512), prune=narrow).error_after for one in (model, moved)]
    assert both[1] == pytest.approx(both[0], rel=0.02)


def test_narrow_heads_match_tokens_by_all_their_directions(tiny_model) -> None:
    """A head may turn its keys as it likes, if its queries turn with them: who merges with whom stays the same."""
    model, draw = tiny_model(num_heads=4), torch.Generator().manual_seed(5)
    spec = replace(model.spec, head_dim=16, block_head_dims=(8, 8))
    params = dict(model.params)
    for block in range(2):
        name = f"blocks.{block}.attn.qkv"
        turns = torch.linalg.qr(torch.randn(4, 8, 8, generator=draw)).Q
        for kind in ("weight", "bias"):
            value = torch.from_numpy(params[f"{name}.{kind}"]).reshape(3, 4, 8, -1)
            turned = torch.stack((turns @ value[0], turns @ value[1], value[2]))
            params[f"{name}.{kind}"] = turned.reshape(params[f"{name}.{kind}"].shape).numpy()
    narrow, turned = (model.with_params(spec, values) for values in (model.params, params))
    merge = MergeRecipe(r=(3, 3), order="index")
    assert error(outputs(narrow, merge), outputs(turned, merge)) < 1e-6
    assert error(outputs(model, merge), outputs(model.with_params(model.spec, params), merge)) > 1e-5


def test_heads_behind_norms_of_queries_stay_as_wide_as_they_are(tiny_model) -> None:
    with pytest.raises(RecipeError, match="heads of block 0 cannot be narrower"):
        compensate(tiny_model(qk_norm=True), NONE, drawn(512), prune=PruneRecipe(head_dims=(4, 4)))
    assert measure_losses(tiny_model(qk_norm=True), drawn(512)).head_dims == ()


def test_merging_matches_by_the_heads_that_stay(tiny_model) -> None:
    """What was refitted is what is deployed: the error that the record tells is that of the model."""
    model, merge = tiny_model(mlp_dim=128), MergeRecipe(r=(4, 4), order="index")
    images = drawn(512)
    done = compensate(model, merge, images, prune=UNEVEN)
    held = torch.from_numpy(images.arrays[0][7::8])
    with torch.inference_mode():
        exact = forward(Run(model.params), model.spec, UNMERGED, held)
        found = forward(Run(done.model.params), done.model.spec, merge, held)
    errors = (found - exact).square().sum(1) / exact.square().sum(1)
    assert float(errors.mean()) == pytest.approx(done.error_after, rel=1e-4)


def test_heads_of_a_graph_go_like_those_of_a_written_program(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    given = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
    model = exported(tmp_path, timm.models.vision_transformer.VisionTransformer(**given).eval())
    assert head_rows(plain_program(model.spec), "blocks.1.attn.proj") is not None
    done = compensate(model, NONE, drawn(512), prune=UNEVEN)
    program = plain_program(done.model.spec)
    assert [node.shapes[0][1] for node in program.nodes if node.op == "attention"] == [1, 3]
    assert [node.shapes[0][-1] for node in program.nodes if node.op == "activation"] == [32, 96]
    exact = outputs(model)
    assert error(exact, outputs(done.model)) < 0.6 * error(exact, outputs(cut_to_width(model, UNEVEN)))


def test_a_share_goes_where_the_output_loses_least(tiny_model) -> None:
    """A block whose MLP nothing needs gives its units before others do."""
    model = tiny_model(mlp_dim=128)
    params = dict(model.params)
    params["blocks.1.mlp.fc2.weight"] = 1e-4 * params["blocks.1.mlp.fc2.weight"]
    model = model.with_params(model.spec, params)
    losses = measure_losses(model, drawn(512))
    assert losses_from_dict(json.loads(json.dumps(losses.to_dict()))) == losses
    assert max(losses.units[1].values()) < 1e-4 < losses.units[0][32]
    assert losses.units[0][32] > losses.units[0][64] > losses.units[0][96] > losses.units[0][128] == 0.0
    units = divide(losses, [(1.0, 1.0)] * 2, 0.3).units
    assert units[1] < units[0]


def test_of_all_divisions_the_best_is_found() -> None:
    """Against trying each, at shares where one of them lies on the lower hull."""
    losses = Losses(
        heads=({3: 0.0, 2: 0.1, 1: 0.5}, {3: 0.0, 2: 0.3, 1: 0.4}), units=({64: 0.0, 32: 0.2}, {64: 0.0, 32: 1.0})
    )
    costs = [(96.0, 64.0), (48.0, 64.0)]
    whole = sum(map(sum, costs))
    for share in (0.1, 0.2, 0.25, 0.4):
        found = divide(losses, costs, share)

        def lost(heads: tuple[int, ...], units: tuple[int, ...]) -> tuple[float, float]:
            cost = sum(c[0] * h / 3 + c[1] * u / 64 for c, h, u in zip(costs, heads, units, strict=True))
            return cost, sum(of[h] for of, h in zip(losses.heads, heads, strict=True)) + sum(
                of[u] for of, u in zip(losses.units, units, strict=True)
            )

        cost, loss = lost(found.heads, found.units)
        assert cost <= (1 - share) * whole
        every = [lost(h, u) for h in product((1, 2, 3), repeat=2) for u in product((32, 64), repeat=2)]
        assert all(other >= loss or price > cost for price, other in every)


def test_heads_become_only_as_wide_as_the_target_fuses() -> None:
    dims = {64: 0.0, 56: 0.01, 48: 0.02, 40: 0.03, 32: 0.2, 24: 0.3}
    heads = {4: 0.0, 3: 1.0, 2: 2.0, 1: 3.0}
    units = {64: 0.0, 32: 5.0}
    losses = Losses(heads=(heads,) * 2, units=(units,) * 2, head_dims=(dims,) * 2)
    costs = [(1.0, 1.0)] * 2
    assert set(divide(losses, costs, 0.15).head_dims) == {40}
    widths = fusible_widths(find_target("tensorrt-int8"), quant_from_scheme("w8a8"))
    assert widths is not None
    assert set(divide(losses.of_widths(widths), costs, 0.15).head_dims) == {32}
    for target, quant in (("tensorrt-int8", None), ("tensorrt-fp8", "fp8"), ("openvino", "w8a8")):
        assert fusible_widths(find_target(target), quant and quant_from_scheme(quant)) is None


def test_registers_are_refused_where_heads_come_to_differ(tiny_model) -> None:
    uneven = Recipe(
        merge=NONE,
        quant=quant_from_scheme("w8a8"),
        registers=RegistersRecipe(remedy="auto"),
        prune=PruneRecipe(head_dims=(8, 16)),
    )
    model = tiny_model(head_dim=16)
    with pytest.raises(RecipeError, match="heads differ from block to block; take hidden units only"):
        optimize(model, recipe=uneven)
    even = replace(uneven, prune=PruneRecipe(head_dims=(8, 8)))
    assert optimize(model, recipe=even).recipe.registers is not None


def test_more_than_can_go_is_refused(tiny_model) -> None:
    losses = Losses(heads=(), units=({64: 0.0, 32: 0.2}, {64: 0.0, 32: 1.0}))
    for share in (0.6, 0.0, 1.2):
        with pytest.raises(RecipeError, match=r"a share of the blocks' work, below 0.50"):
            divide(losses, [(0.0, 1.0)] * 2, share)
    for prune, told in (
        (PruneRecipe(heads=(9, 9)), "names 9, and block 0"),
        (PruneRecipe(units=(32,)), "names 1 blocks"),
    ):
        with pytest.raises(RecipeError, match=told):
            compensate(tiny_model(), NONE, drawn(512), prune=prune)
    for values in ({}, {"mlp": 0.5, "heads": (1, 1)}, {"units": (0, 1)}, {"heads": (True,)}):
        with pytest.raises(RecipeError, match="prune"):
            PruneRecipe(**values)


def test_heads_that_are_not_parted_straight_from_a_layer_stay(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    given = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 10}
    model = exported(tmp_path, timm.models.vision_transformer.VisionTransformer(**given, qk_norm=True).eval())
    with pytest.raises(RecipeError, match="the heads of block 0 cannot be pruned"):
        compensate(model, NONE, drawn(512), prune=PruneRecipe(heads=(1, 1)))
    losses = measure_losses(model, drawn(512))
    assert losses.heads == ()
    assert len(losses.units) == 2
