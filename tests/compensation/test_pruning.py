"""Hidden units that go: which ones, what becomes of the others, and the narrower model that is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compensation_cases import drawn
from test_graphs import exported

from vitfold.architectures.programs import UNMERGED, forward, plain_program
from vitfold.compensation import compensate, cut_to_width
from vitfold.compensation.pruning import units_to_keep
from vitfold.errors import RecipeError
from vitfold.model import Model
from vitfold.ops.run import Run
from vitfold.program.queries import HiddenRows, hidden_rows
from vitfold.recipe import MergeRecipe, PruneRecipe

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


def test_of_two_equal_units_one_stays() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=draw)
    x[:, 5] = x[:, 2]
    weight = torch.randn(3, 9, generator=draw)
    x = torch.cat((x, torch.ones(200, 1)), 1)
    kept = units_to_keep(x.T @ x, weight @ x.T @ x, 7).tolist()
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

    kept = units_to_keep(x.T @ x, y.T @ x, 5).tolist()
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
    with pytest.raises(RecipeError, match="prune.mlp is the share of the units to go"):
        PruneRecipe(mlp=share)
