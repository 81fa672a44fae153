"""Which steps are computed in full, solved for one trajectory of the model instead of spread evenly."""

from __future__ import annotations

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
    return replace(method, mask=best_steps(gram, step_weights(schedule, steps), method.budget))


def step_weights(schedule: Mapping[str, Any], steps: int) -> Float[np.ndarray, " T"]:
    """Return how much an error of each prediction moves the sample, squared: by DDIM, whatever sampler draws."""
    scheduler, small, found = build_scheduler("ddim", schedule, steps), 1e-3, []
    still = torch.zeros(1, 1, 1, 1)
    for t in scheduler.timesteps:
        moved = [scheduler.step(torch.full_like(still, by), t, still).prev_sample.item() for by in (small, 0.0)]
        found.append(((moved[0] - moved[1]) / small) ** 2)
    return np.array(found)


def best_steps(gram: Float[np.ndarray, "T T"], weights: Float[np.ndarray, " T"], count: int) -> tuple[int, ...]:
    """Return the `count` steps to compute in full, the first two and the last among them.

    Equation: least sum_t w_t |R_t - R_c - (t - c) / (c - p) (R_c - R_p)|^2 over reused steps t, p < c the full steps
    before; all norms follow from the Gram matrix of the residuals R. An error is taken to reach the image on its own.

    Exact, by dynamic programming over (p, c): O(count T^3).
    """
    steps = len(gram)
    cost = _costs(gram, weights)
    best = np.full((steps, steps), np.inf)
    best[0, WARM_UP - 1] = 0.0
    before: list[Float[np.ndarray, "T T"]] = []
    for _ in range(count - WARM_UP):
        total = best[:, :, None] + cost  # of (p, c) and the full step behind c
        before.append(total.argmin(0))
        best = total.min(0)
    found = [steps - 1, int(best[:, steps - 1].argmin())]
    for chosen in reversed(before):
        found.append(int(chosen[found[-1], found[-2]]))
    return tuple(sorted(found[:count]))


def _costs(gram: Float[np.ndarray, "T T"], weights: Float[np.ndarray, " T"]) -> Float[np.ndarray, "T T T"]:
    """The weighted error of all steps between c and n, forecast from p and c; infinite unless p < c < n."""
    steps = len(gram)
    cost = np.full((steps, steps, steps), np.inf)
    for c in range(1, steps):
        for p in range(c):
            t = np.arange(c + 1, steps)
            slope = (t - c) / (c - p)
            terms: Sequence[tuple[Any, int | Array]] = ((1 + slope, c), (-slope, p), (-1.0, t))
            error = sum(a * b * gram[i, j] for a, i in terms for b, j in terms)
            cost[p, c, c + 1 :] = np.concatenate([[0.0], np.cumsum(weights[t] * np.maximum(error, 0.0))[:-1]])
    return cost
