"""TokenCache: what its token operations compute, how it is trained, and how a budget is shared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusing import build_tiny_dit
from vitfold.diffusion import find_method
from vitfold.diffusion.opening import TokenPlan, open_parts, prepare_predictor, prepare_tokens
from vitfold.diffusion.schedulers import build_scheduler
from vitfold.diffusion.token_predictor import TokenPredictor, settle_counts, share_budget, train_predictor
from vitfold.model import DiTModel


@pytest.fixture(scope="module")
def model() -> DiTModel:
    return build_tiny_dit()


@pytest.fixture(scope="module")
def predictor(model: DiTModel) -> TokenPredictor:
    scheduler = build_scheduler("ddim", model.schedule, 20)
    return train_predictor(model, scheduler, say=lambda _: None)


def test_training_lowers_the_loss_and_leaves_the_model_alone(model: DiTModel, predictor: TokenPredictor) -> None:
    before, after = predictor.losses
    assert after < before
    assert not set(predictor.params) & set(model.params)
    assert all(np.isfinite(array).all() for array in predictor.params.values())
    again = build_tiny_dit()
    for name, array in model.params.items():
        np.testing.assert_array_equal(array, again.params[name])
    assert predictor.ranked.shape == (model.spec.num_layers, model.spec.tokens)
    assert (np.diff(predictor.ranked, axis=1) <= 0).all(), "the best token stands first"


@pytest.mark.usefixtures("own_cache")
def test_a_predictor_is_trained_once(model: DiTModel) -> None:
    said: list[str] = []
    first = prepare_predictor(model, 10, said.append)
    assert any("training the predictor" in text for text in said)
    said.clear()
    again = prepare_predictor(model, 10, said.append)
    methods = ("tokencache:0.5:2:4", "tokencache:0.25:3:6", "tokencache-blocks:0.5:2:4")
    plans = [prepare_tokens(model, find_method(method), 10, said.append) for method in methods]
    assert not said, "one predictor serves every budget"
    assert again.losses == first.losses
    for name, array in {**first.params, "ranked": first.ranked}.items():
        found = again.ranked if name == "ranked" else again.params[name]
        np.testing.assert_array_equal(found, array)
        assert name == "ranked" or all(plan is not None and (plan.params[name] == array).all() for plan in plans)
    assert [sum(plan.counts) for plan in plans if plan is not None] == [16, 24, 16]
    prepare_predictor(model, 11, said.append)
    assert said, "other steps are another trajectory"


@pytest.mark.parametrize("count", [0, 1, 5, 15, 16])
def test_the_best_tokens_get_what_the_whole_block_adds(model: DiTModel, predictor: TokenPredictor, count: int) -> None:
    """Oracle: the whole block for all tokens, then a loop over the tokens of every image."""
    import torch

    from vitfold.architectures.dit import blocks
    from vitfold.diffusion.token_refresh import predicted_scores, renewed
    from vitfold.ops.run import Run

    spec, ops = model.spec, Run({**model.params, **predictor.params})
    generator = torch.Generator().manual_seed(count)
    x, kept = (torch.randn(3, spec.tokens, spec.embed_dim, generator=generator) for _ in range(2))
    given = tuple(0.3 * torch.randn(3, 1, spec.embed_dim, generator=generator) for _ in range(spec.modulations))
    scores = predicted_scores(ops, spec, x, *given[:2])[:, :, 1:]
    found = renewed(ops, spec, 1, x, given, kept, scores, count).numpy()
    new = (blocks(ops, spec, x, given, range(1, 2)) - x).numpy()
    weights = scores.numpy()
    expected = kept.numpy().copy()
    for image in range(3):
        best = sorted(range(spec.tokens), key=lambda token: -weights[image, token, 0])[:count]
        for token in best:
            expected[image, token] = new[image, token]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 5), st.integers(1, 9), st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_budget_is_spent_on_the_best_cells(depth: int, tokens: int, ratio: float, seed: int) -> None:
    ranked = -np.sort(-np.random.default_rng(seed).uniform(size=(depth, tokens)), axis=1)
    counts = share_budget(ranked, ratio)
    assert sum(counts) == round((1 - ratio) * depth * tokens)
    taken = [ranked[block, place] for block, count in enumerate(counts) for place in range(count)]
    left = [ranked[block, place] for block, count in enumerate(counts) for place in range(count, tokens)]
    assert not taken or not left or min(taken) >= max(left)


@given(st.integers(1, 60), st.data())
@settings(max_examples=80, deadline=None)
def test_blocks_that_are_nearly_whole_are_whole(tokens: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, tokens), min_size=1, max_size=12))
    found = settle_counts(counts, tokens)
    assert sum(found) == sum(counts)
    nearly = [block for block, count in enumerate(counts) if count >= 0.9 * tokens]
    if tuple(counts) != found:
        assert all(found[block] == tokens for block in nearly)
        assert all(found[block] <= count for block, count in enumerate(counts) if block not in nearly)
    else:
        left = sum(count for block, count in enumerate(counts) if block not in nearly)
        assert sum(tokens - counts[block] for block in nearly) in range(left + 1, tokens * 12) or all(
            counts[block] == tokens for block in nearly
        )


def test_no_predictor_is_a_bug_where_one_is_needed(model: DiTModel) -> None:
    with (
        pytest.raises(ValueError, match="goes with a plan of its tokens"),
        open_parts(model, find_method("tokencache")),
    ):
        pass


def test_a_graph_hands_an_input_on(model: DiTModel, predictor: TokenPredictor) -> None:
    """A block that renews nothing returns what it was given."""
    drawn: dict[str, Any] = {}
    for engine in ("torch", "onnxruntime"):
        none = TokenPlan(counts=(0, 3), params=predictor.params)
        with open_parts(model, find_method("tokencache"), tokens=none, engine=engine) as executor:
            draw, tokens = np.random.default_rng(0), (16, 32)
            shapes = {"image": (1, 16, 16), "given": (14, 32), "kept.0": tokens, "kept.1": tokens}
            for name, shape in shapes.items():
                executor.bind({name: draw.standard_normal((2, *shape)).astype(np.float32)})
            executor.run("refresh")
            drawn[engine] = list(executor.fetch("prediction", "residual.0", "residual.1", "kept.0").values())
    for a, b in zip(*drawn.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(drawn["onnxruntime"][1], drawn["onnxruntime"][3])
