"""Full steps chosen for a model: against every other choice, and through to what is drawn."""

from __future__ import annotations

import tracemalloc
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
from vitfold.diffusion.planners import best_steps
from vitfold.diffusion.schedulers import build_scheduler
from vitfold.diffusion.solving import step_weights
from vitfold.errors import RecipeError
from vitfold.model import DiTModel


def error_of(
    chosen: tuple[int, ...],
    residuals: Float[np.ndarray, "T F"],
    weights: Float[np.ndarray, " T"],
    at: Float[np.ndarray, " T"] | None = None,
) -> float:
    """What the objective says, forecast by forecast."""
    total = 0.0
    at = np.arange(len(residuals)) if at is None else at
    for t in range(len(residuals)):
        if t not in chosen:
            places = [place for place in chosen if place < t][-2:]
            line = taylor([float(at[place]) for place in places], float(at[t]), order=1)
            forecast = sum(w * residuals[place] for w, place in zip(line, places, strict=True))
            total += float(weights[t] * np.sum((residuals[t] - forecast) ** 2))
    return total


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(3, 6), falling=st.booleans())
def test_no_other_choice_has_a_smaller_error(seed: int, count: int, falling: bool) -> None:
    rng = np.random.default_rng(seed)
    at = np.cumsum(-rng.uniform(0.1, 1.0, 8)) if falling else np.arange(8.0)
    residuals, weights = np.cumsum(rng.standard_normal((8, 3)), 0), rng.uniform(0.1, 2.0, 8)
    found = best_steps(residuals @ residuals.T, weights, count, at)
    others = [(0, 1, *middle, 7) for middle in combinations(range(2, 7), count - 3)]
    assert found in others
    least = min(error_of(other, residuals, weights, at) for other in others)
    assert error_of(found, residuals, weights, at) == pytest.approx(least, rel=1e-5)


def test_steps_lie_where_the_residual_bends() -> None:
    bend = np.maximum(np.arange(20) - 12, 0.0)[:, None]
    found = best_steps(bend @ bend.T, np.ones(20), 5)
    assert error_of(found, bend, np.ones(20)) == 0
    assert {12, 13} <= set(found)


def test_flow_matching_weighs_by_differences_of_sigma() -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    expected = np.diff(scheduler.sigmas.numpy()) ** 2
    np.testing.assert_allclose(step_weights(scheduler), expected, rtol=1e-3)
    assert scheduler.step_index is None  # the pipeline's own scheduler is left as it was


def test_a_thousand_steps_are_solved_in_bounded_memory() -> None:
    t = np.linspace(0, 1, 1000)
    residuals = np.stack([np.sin(9 * t**2), np.cos(3 * t)], 1)
    tracemalloc.start()
    found = best_steps(residuals @ residuals.T, np.ones(1000), 8)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 8
    assert most < 300e6


def test_an_error_weighs_what_it_moves() -> None:
    schedule = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
    for clipped in (True, False):
        own = {**schedule, "clip_sample": clipped, "timestep_spacing": "trailing"}
        weights = step_weights(build_scheduler("ddim", own, 10))
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
