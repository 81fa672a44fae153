"""Full steps chosen for a model: against every other choice, and through to what is drawn."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float

from diffusing import build_tiny_dit
from vitfold.diffusion import find_method, full_steps, solve_steps
from vitfold.diffusion.compare import SamplingConfig, diffuse
from vitfold.diffusion.forecast import taylor
from vitfold.diffusion.opening import open_parts
from vitfold.diffusion.solving import best_steps, step_weights
from vitfold.errors import RecipeError
from vitfold.model import DiTModel


def error_of(chosen: tuple[int, ...], residuals: Float[np.ndarray, "T F"], weights: Float[np.ndarray, " T"]) -> float:
    """What the objective says, forecast by forecast."""
    total = 0.0
    for t in range(len(residuals)):
        if t not in chosen:
            places = [place for place in chosen if place < t][-2:]
            forecast = sum(w * residuals[place] for w, place in zip(taylor(places, t, order=1), places, strict=True))
            total += float(weights[t] * np.sum((residuals[t] - forecast) ** 2))
    return total


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(3, 6))
def test_no_other_choice_has_a_smaller_error(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    residuals, weights = np.cumsum(rng.standard_normal((8, 3)), 0), rng.uniform(0.1, 2.0, 8)
    found = best_steps(residuals @ residuals.T, weights, count)
    others = [(0, 1, *middle, 7) for middle in combinations(range(2, 7), count - 3)]
    assert found in others
    assert error_of(found, residuals, weights) == pytest.approx(min(error_of(o, residuals, weights) for o in others))


def test_steps_lie_where_the_residual_bends() -> None:
    bend = np.maximum(np.arange(20) - 12, 0.0)[:, None]
    found = best_steps(bend @ bend.T, np.ones(20), 5)
    assert error_of(found, bend, np.ones(20)) == 0
    assert {12, 13} <= set(found)


def test_an_error_weighs_what_it_moves() -> None:
    schedule = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
    for clipped in (True, False):
        weights = step_weights({**schedule, "clip_sample": clipped, "timestep_spacing": "trailing"}, 10)
        assert (weights > 0).all()
        assert weights[0] == weights.max()  # the noisiest step divides by the least signal


@pytest.fixture(scope="module")
def model() -> DiTModel:
    return build_tiny_dit()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_model_chooses_its_steps(model: DiTModel, guidance: float) -> None:
    method = find_method("solved:5")
    with open_parts(model, method, engine="torch") as executor:
        how = {"steps": 9, "sampler": "ddim", "guidance": guidance}
        found = solve_steps(executor, model.spec, model.schedule, method, **how)
        assert found == solve_steps(executor, model.spec, model.schedule, method, **how)
    assert found.mask is not None
    assert len(found.mask) == 5
    assert {0, 1, 8} <= set(found.mask)
    assert sum(full_steps(found, 9)) == 5
    with pytest.raises(RecipeError, match="full steps of solved:5 are chosen for 9, not for 10; leave out --steps"):
        full_steps(found, 10)
    with pytest.raises(RecipeError, match="not chosen yet"):
        full_steps(method, 9)


def test_more_steps_in_full_than_there_are(model: DiTModel) -> None:
    asked = SamplingConfig(labels=(0,), seed=0, steps=5, sampler="ddim", guidance=2.0, batch=1)
    with pytest.raises(RecipeError, match="solved:18 computes 18 steps in full, and there are 5; name fewer"):
        diffuse(model, [find_method("solved")], asked, engine="torch", trials=1)


def test_chosen_steps_draw_beside_plain_ones(model: DiTModel) -> None:
    asked = SamplingConfig(labels=(0, 2), seed=0, steps=8, sampler="ddim", guidance=2.0, batch=2)
    rows = diffuse(model, [find_method("solved:5")], asked, engine="torch", trials=1)
    assert [row.name for row in rows] == ["none", "solved:5", "none, 5 steps"]
    assert (rows[1].sampled.full_steps, rows[1].sampled.reused_steps) == (5, 3)
    assert rows[1].psnr_db is not None
