"""Which steps are computed in full, solved for one trajectory of the model instead of spread evenly."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from vitfold.diffusion.methods import WARM_UP, ReuseMethod, every_step
from vitfold.diffusion.sampling import sample
from vitfold.diffusion.schedulers import build_scheduler
from vitfold.engines import Session
from vitfold.errors import RecipeError
from vitfold.model import Array, DiTSpec

LABELS = 8
SEED = 1_000_000
"""Far from the seeds that anyone draws with."""


def solve_steps(
    executor: Session,
    spec: DiTSpec,
    schedule: Mapping[str, Any],
    method: ReuseMethod,
    *,
    steps: int,
    sampler: str,
    guidance: float,
) -> ReuseMethod:
    """Return the method with its full steps chosen for as many steps; of eight images, drawn in full once.

    Raises:
        RecipeError: if there are not more steps than are to be computed in full.
    """
    assert method.budget is not None
    if method.budget >= steps:
        raise RecipeError(f"{method.text} computes {method.budget} steps in full, and there are {steps}; name fewer")
    labels = np.linspace(0, spec.classes - 1, LABELS).round().astype(int).tolist()
    kept: list[Array] = []

    def keep(residual: Array) -> None:
        with_class, without = (residual, residual) if guidance == 1.0 else np.split(residual, 2)
        kept.append((without + guidance * (with_class - without)).reshape(-1))

    scheduler = build_scheduler(sampler, schedule, steps, learned_sigma=spec.learned_sigma)
    sample(executor, spec, scheduler, every_step(method), labels, seed=SEED, guidance=guidance, watch=keep)
    found = np.stack(kept).astype(np.float32)
    gram = (found @ found.T).astype(np.float64)
    return replace(method, mask=best_steps(gram, step_weights(build_scheduler("ddim", schedule, steps)), method.budget))


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


def best_steps(
    gram: Float[np.ndarray, "T T"],
    weights: Float[np.ndarray, " T"],
    count: int,
    places: Float[np.ndarray, " T"] | None = None,
) -> tuple[int, ...]:
    """Return the `count` steps to compute in full, the first two and the last among them: see `steps_by_count`."""
    return steps_by_count(gram, weights, count, places)[count][1]


def steps_by_count(
    gram: Float[np.ndarray, "T T"],
    weights: Float[np.ndarray, " T"],
    most: int,
    places: Float[np.ndarray, " T"] | None = None,
) -> dict[int, tuple[float, tuple[int, ...]]]:
    """Return for every count from three to `most` the least error and the steps to compute in full.

    Equation: least sum_t w_t |R_t - R_c - (x_t - x_c) / (x_c - x_p) (R_c - R_p)|^2 over reused steps t, p < c the full
    steps before; all norms follow from the Gram matrix of the residuals R. The places x are step numbers, or what a
    sampler counts by. An error is taken to reach the image on its own.

    Exact, by dynamic programming over (p, c): O(most T^3) time and O(most T^2) memory.
    """
    steps = len(gram)
    at = np.arange(steps, dtype=float) if places is None else places
    best = np.full((most - 1, steps, steps), np.inf, np.float32)  # by count - 2, and (p, c)
    best[0, 0, WARM_UP - 1] = 0.0
    before = np.zeros(best.shape, np.int16)
    for c in range(WARM_UP - 1, steps - 1):
        cost = _costs(gram, weights, at, c)
        for k in range(1, most - 1):
            total = best[k - 1, :c, c, None] + cost  # of p and the full step behind c
            before[k, c, c + 1 :] = total.argmin(0)
            best[k, c, c + 1 :] = total.min(0)
    found = {}
    for k in range(1, most - 1):
        c = int(best[k, :, -1].argmin())
        chosen = [steps - 1, c]
        for i in range(k, 0, -1):
            chosen.append(int(before[i, chosen[-1], chosen[-2]]))
        found[k + 2] = (float(best[k, c, -1]), tuple(sorted(chosen)))
    return found


def _costs(
    gram: Float[np.ndarray, "T T"], weights: Float[np.ndarray, " T"], at: Float[np.ndarray, " T"], c: int
) -> Float[np.ndarray, "P N"]:
    """The weighted error of all steps between c and n, forecast from p < c and c, for every n behind c."""
    t, p = np.arange(c + 1, len(gram)), np.arange(c)[:, None]
    slope = (at[t] - at[c]) / (at[c] - at[p])
    terms: Sequence[tuple[Any, Any]] = ((1 + slope, c), (-slope, p), (-1.0, t))
    error = sum(a * b * gram[i, j] for a, i in terms for b, j in terms)
    summed = np.cumsum(weights[t] * np.maximum(error, 0.0), axis=1)
    return np.concatenate([np.zeros((c, 1)), summed[:, :-1]], axis=1).astype(np.float32)
