"""Plans from products of a trajectory: against slow loops over the trajectory itself."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitfold.diffusion import find_method
from vitfold.diffusion.forecast import corrected, ridge_chebyshev, taylor
from vitfold.diffusion.planners import Plan, Products, best_steps, evenly, fit_rows, moved
from vitfold.diffusion.solving import fit_changes, follow
from vitfold.errors import RecipeError


def trajectory(seed: int, steps: int = 16, size: int = 24) -> tuple[Any, Products]:
    """A smooth random one, its products and weights."""
    rng = np.random.default_rng(seed)
    waves = np.sin(np.outer(np.linspace(0, 2.5, steps), rng.uniform(0.3, 2, 6)) + rng.uniform(0, 3, 6))
    residuals = 3 + waves @ rng.standard_normal((6, size))
    return residuals, Products(gram=residuals @ residuals.T, weights=rng.uniform(0.2, 2, steps))


def plan_of(text: str, products: Products) -> Plan:
    method = follow(find_method(text), products)
    assert method.mask is not None
    return Plan(mask=method.mask, rows=method.rows)


def error_of(plan: Plan, residuals: Any, weights: Any) -> float:
    total = 0.0
    for t, row in enumerate(plan.rows):
        if row:
            kept = [p for p in plan.mask if p < t][-len(row) :]
            forecast = sum(w * residuals[p] for w, p in zip(row[-len(kept) :], kept, strict=True))
            total += weights[t] * float(np.sum((residuals[t] - forecast) ** 2))
    return total


@given(st.integers(0, 10_000), st.integers(4, 9), st.integers(2, 4))
@settings(max_examples=15, deadline=None)
def test_fitted_weights_are_the_least_squares_ones(seed: int, count: int, history: int) -> None:
    residuals, products = trajectory(seed)
    plan = plan_of(f"fitted:{count}:{history}", products)
    assert len(plan.mask) == count
    assert {0, 1, 15} <= set(plan.mask)
    for t, row in enumerate(plan.rows):
        assert bool(row) == (t not in plan.mask)
        if row:
            kept = [p for p in plan.mask if p < t][-history:]
            best = np.linalg.lstsq(residuals[kept].T, residuals[t], rcond=None)[0] @ residuals[kept]
            least = float(np.sum((residuals[t] - best) ** 2))
            found = float(np.sum((residuals[t] - np.array(row) @ residuals[kept]) ** 2))
            assert least - 1e-6 <= found <= least + 1e-4 * float(np.sum(residuals[kept] ** 2))


@given(st.integers(0, 10_000), st.integers(4, 9))
@settings(max_examples=15, deadline=None)
def test_moving_steps_and_fitting_weights_never_errs_more(seed: int, count: int) -> None:
    residuals, products = trajectory(seed)
    start = best_steps(products.gram, products.weights, count)
    plans = [fit_rows(products, mask, 3) for mask in (start, moved(products, start, 3))]
    before, after = (error_of(plan, residuals, products.weights) for plan in plans)
    assert after <= before * 1.001 + 1e-6
    lines = Plan(
        mask=start,
        rows=tuple(
            () if t in start else taylor([p for p in start if p < t][-2:], t, order=1) for t in range(products.steps)
        ),
    )
    assert before <= error_of(lines, residuals, products.weights) * 1.001 + 1e-3


@pytest.mark.parametrize("count", [5, 8])
def test_dpcache_is_its_recurrence(count: int) -> None:
    residuals, products = trajectory(3, steps=12)
    steps = 12

    def cost(i: int, j: int, k: int) -> float:
        return sum(
            float(np.linalg.norm(residuals[t] - residuals[j] - (t - j) / (j - i) * (residuals[j] - residuals[i])))
            for t in range(j + 1, k)
        )

    known = {(3, 2): (0.0, (0, 1, 2))}
    for m in range(4, count + 1):
        for k in range(m - 1, steps):
            ways = [
                (total + cost(path[-2], path[-1], k), (*path, k))
                for (at, j), (total, path) in known.items()
                if at == m - 1 and j < k
            ]
            if ways:
                known[m, k] = min(ways)
    plan = plan_of(f"dpcache:{count}:2", products)
    assert plan.mask == known[count, steps - 1][1]
    late = max(t for t in range(steps) if t not in plan.mask)
    kept = [p for p in plan.mask if p < late][-3:]
    assert plan.rows[late] == pytest.approx(taylor(kept, late, order=2))


@pytest.mark.parametrize(("threshold", "most"), [(0.0, 5), (0.05, 3), (0.2, 5), (100.0, 4)])
def test_magcache_holds_while_magnitudes_stay(threshold: float, most: int) -> None:
    residuals, products = trajectory(5)
    norms, mask, product, total, reused = np.linalg.norm(residuals, axis=1), [0, 1], 1.0, 0.0, 0
    for t in range(2, 16):
        product *= norms[t] / norms[t - 1]
        total, reused = total + abs(1 - product), reused + 1
        if t < 3.2 or total > threshold or reused > most or t == 15:
            mask.append(t)
            product, total, reused = 1.0, 0.0, 0
    plan = plan_of(f"magcache:{threshold}:{most}:0.2", products)
    assert list(plan.mask) == mask
    assert all(row in ((), (1.0,)) for row in plan.rows)


@pytest.mark.parametrize("interval", [2, 3])
def test_modes_go_on_with_damped_waves(interval: int) -> None:
    """Exact on sums of exponentials, from the fourth snapshot on; a line is not."""
    t = np.arange(24)[:, None]
    residuals = 0.97**t * np.cos(0.11 * t + np.linspace(0, 3, 9)) + 0.9**t * np.linspace(1, 2, 9)
    products = Products(gram=residuals @ residuals.T, weights=np.ones(24))
    plan = plan_of(f"dmd:{interval}:6", products)
    assert plan.mask == evenly(24, interval)
    late = [t for t in range(14, 23) if plan.rows[t]]
    assert late
    for step in late:
        kept = [p for p in plan.mask if p < step][-6:]
        scale = float(np.linalg.norm(residuals[step]))
        assert np.linalg.norm(np.array(plan.rows[step]) @ residuals[kept] - residuals[step]) < 1e-3 * scale
        line = np.array(taylor(kept, step, order=1)) @ residuals[kept]
        assert np.linalg.norm(line - residuals[step]) > 1e-3 * scale


def test_spectrum_computes_less_and_less_often() -> None:
    products = Products(gram=np.eye(24), weights=np.ones(24))
    shown = "".join("." if row else "F" for row in plan_of("spectrum:2:0.75:4:10", products).rows)
    assert shown == "FFFFF.F.F..F...F....F..F"
    places, values = [0, 1, 2, 3, 4, 6, 8, 11], np.cos(np.arange(8.0))
    basis = np.polynomial.chebyshev.chebvander(2 * np.array([*places, 13]) / 23 - 1, 4)
    stacked = np.concatenate([basis[:-1], math.sqrt(0.1) * np.eye(5)])
    fit = basis[-1] @ np.linalg.lstsq(stacked, np.concatenate([values, np.zeros(5)]), rcond=None)[0]
    line = np.array(taylor(places, 13, order=1)) @ values
    assert np.array(ridge_chebyshev(places, 13, steps=24, degree=4)) @ values == pytest.approx((fit + line) / 2)


@given(st.lists(st.integers(0, 40), min_size=2, max_size=5, unique=True).map(sorted), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_a_corrected_forecast_goes_on_with_a_line(places: list[int], ahead: int) -> None:
    weights = np.array(corrected(places, places[-1] + ahead))
    scale = 1 + float(np.abs(weights).sum())
    assert weights.sum() == pytest.approx(1, abs=1e-6 * scale)
    assert weights @ np.array(places) == pytest.approx(places[-1] + ahead, abs=1e-5 * scale)


def test_a_corrected_forecast_follows_a_curve_further_than_a_line() -> None:
    places, at = [3, 6, 9], 11
    curve = np.array(places, float) ** 2
    line, found = (np.array(w) @ curve for w in (taylor(places, at, order=1), corrected(places, at)))
    assert abs(found - at**2) < abs(line - at**2)
    assert corrected([4], 6) == (1.0,)


def test_a_polynomial_makes_changes_of_inputs_those_of_outputs() -> None:
    kept = [np.full(4, value) for value in np.cumprod([1.0, 1.5, 1.3, 1.2, 1.1, 1.05, 1.02])]
    outputs = np.array([0.5, 0.3, 0.2, 0.1, 0.05, 0.02])
    inputs = [0.0, *np.sqrt(outputs)]
    found = fit_changes(inputs, kept)
    assert len(found) == 5
    np.testing.assert_allclose(np.polyval(found, np.sqrt(outputs)), outputs, atol=1e-6)


def test_dpcache_needs_a_step_behind_its_first_three() -> None:
    _, products = trajectory(0)
    assert len(plan_of("dpcache:4", products).mask) == 4
    with pytest.raises(RecipeError, match="3 is out of range; from 4 to 1000"):
        find_method("dpcache:3")
