"""Which steps are computed in full, solved for one trajectory of the model instead of spread evenly."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from vitfold.diffusion.conditions import Conditions
from vitfold.diffusion.methods import ReuseMethod, every_step
from vitfold.diffusion.planners import Plan, Products, evenly, rows_of
from vitfold.diffusion.sampling import conditions_of, sample
from vitfold.diffusion.schedulers import build_scheduler
from vitfold.engines import Session
from vitfold.errors import RecipeError
from vitfold.model import Array, DenoiserSpec, DiTSpec

LABELS = 8
SEED = 1_000_000
"""Far from the seeds that anyone draws with."""


def solve_steps(
    executor: Session,
    spec: DiTSpec | DenoiserSpec,
    schedule: Mapping[str, Any],
    method: ReuseMethod,
    *,
    steps: int,
    sampler: str,
    guidance: float,
    known: dict[str, Products] | None = None,
    conditions: Conditions | None = None,
) -> ReuseMethod:
    """Return the method with what it leaves to the model chosen for as many steps; of eight images, drawn in full once.

    `known` keeps their products for other methods of the same model, steps, sampler and guidance.

    Raises:
        RecipeError: if there are not more steps than are to be computed in full.
    """
    check_budget(method, steps)
    if known and not method.fits:
        return follow(method, known["products"])
    conditions = conditions or conditions_of(spec)
    labels = np.linspace(0, conditions.count - 1, LABELS).round().astype(int).tolist()
    kept: list[Array] = []
    changes: list[float] = []

    def keep(residual: Array) -> None:
        with_class, without = (residual, residual) if guidance == 1.0 else np.split(residual, 2)
        kept.append((without + guidance * (with_class - without)).reshape(-1))
        if method.fits:
            changes.append(float(np.mean(executor.fetch("change")["change"])))

    scheduler = build_scheduler(sampler, schedule, steps, learned_sigma=spec.learned_sigma)
    sample(
        executor,
        spec,
        scheduler,
        every_step(method),
        labels,
        seed=SEED,
        guidance=guidance,
        conditions=conditions,
        watch=keep,
    )
    if method.fits:
        return replace(method, rescale=fit_changes(changes, kept))
    found = np.stack(kept).astype(np.float32)
    gram = (found @ found.T).astype(np.float64)
    products = Products(gram=gram, weights=step_weights(build_scheduler(_weighing(sampler), schedule, steps)))
    if known is not None:
        known["products"] = products
    return follow(method, products)


def _weighing(sampler: str) -> str:
    """The sampler that weighs an error: a first-order one of the same kind."""
    return sampler if sampler.startswith("flow") else "ddim"


def check_budget(method: ReuseMethod, steps: int) -> None:
    """Check that a method leaves a step to reuse.

    Raises:
        RecipeError: if it computes as many as there are.
    """
    if method.budget is not None and method.budget >= steps:
        raise RecipeError(f"{method.text} computes {method.budget} steps in full, and there are {steps}; name fewer")


def follow(method: ReuseMethod, products: Products) -> ReuseMethod:
    """Return a method of static schedule with the full steps and weights that its planner chooses."""
    plan = plan_of(method, products)
    return replace(method, mask=plan.mask, rows=plan.rows)


def plan_of(method: ReuseMethod, products: Products) -> Plan:
    """Return the full steps of a method of static schedule, and the weights of its forecasts.

    Without a planner they follow from the number of steps alone.
    """
    if method.planner is not None:
        return method.planner(products)
    mask = evenly(products.steps, method.interval, method.late_interval)
    return rows_of(products.steps, mask, method.history, method.forecast)


def fit_changes(changes: Sequence[float], kept: Sequence[Array]) -> tuple[float, ...]:
    """Return the polynomial of fourth degree, its constant last, that makes changes of an input those of what is kept.

    Changes are relative, in sums of absolute values, from one step to the next.

    Source: TeaCache (2411.19108).
    """
    moved = [float(np.abs(b - a).sum() / (np.abs(a).sum() + 1e-30)) for a, b in pairwise(kept)]
    degree = min(4, len(moved) - 1)
    found = np.polynomial.Polynomial.fit(changes[1:], moved, degree).convert()
    return tuple(float(c) for c in found.coef[::-1])


def step_weights(scheduler: Any) -> Float[np.ndarray, " T"]:
    """Return how much an error of each prediction moves the sample, squared, by a scheduler whose timesteps are set."""
    running, small, found = copy.deepcopy(scheduler), 1e-3, []
    still = torch.zeros(1, 1, 1, 1)
    with torch.random.fork_rng(devices=[]):
        for t in scheduler.timesteps:
            moved = []
            for one, by in ((copy.deepcopy(running), small), (running, 0.0)):
                torch.manual_seed(0)  # a sampler that draws noise draws the same for both
                moved.append(one.step(torch.full_like(still, by), t, still, return_dict=False)[0].item())
            found.append(((moved[0] - moved[1]) / small) ** 2)
    return np.array(found)
