"""Full steps for a pipeline: solved per transformer, since a forecast reaches over no change of model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from vitfold.diffusion.forecast import Weights
from vitfold.diffusion.methods import ReuseMethod
from vitfold.diffusion.pipelines.drawing import Rest
from vitfold.diffusion.pipelines.recording import Trace
from vitfold.diffusion.planners import Plan, Products, steps_by_count
from vitfold.diffusion.solving import plan_of

LEAST = 3
"""The first two steps of a transformer and its last."""
_MOST_BYTES = 10**9
_BYTES = 6

Solutions = dict[int, tuple[float, tuple[int, ...]]]


def solve(trace: Trace, most: int | None = None) -> dict[int, tuple[str, tuple[int, ...]]]:
    """Return for every number of full steps what forecasts count by and which steps they are.

    Without `most` the solver takes as many as fit a gigabyte: all of some 500 steps, 166 of 1,000.
    """
    steps = len(trace.gram)
    most = min(steps - 1, most or max(LEAST, _MOST_BYTES // (_BYTES * steps**2)))
    by_position = {position: _all_parts(trace, places, most) for position, places in trace.places.items()}
    found = {}
    for count in sorted(set().union(*by_position.values())):
        errors = {position: one[count][0] for position, one in by_position.items() if count in one}
        best = min(errors, key=lambda position: errors[position])
        found[count] = (best, by_position[best][count][1])
    return found


def planned(trace: Trace, method: ReuseMethod, full: Sequence[int] = ()) -> Rest:
    """Return a method's full steps and weights; where it takes a number of them, as many as `full` per transformer."""
    mask: list[int] = []
    rows: list[Weights] = []
    for part in _stretches(trace):
        steps = part.stop - part.start
        count = sum(part.start <= step < part.stop for step in full)
        plan = Plan(mask=tuple(range(steps)), rows=((),) * steps)
        if steps > LEAST and (method.budget is None or count < steps):
            one = method
            if method.budget is not None:
                assert isinstance(method.planner, partial)
                one = replace(method, planner=partial(method.planner, count=count))
            plan = plan_of(one, Products(gram=trace.gram[part, part], weights=trace.weights[part]))
        mask += [part.start + step for step in plan.mask]
        rows += plan.rows
    return Rest(full=tuple(mask), rows=tuple(rows))


def _stretches(trace: Trace) -> list[slice]:
    """The steps of one transformer each: a forecast reaches over no change of model."""
    bounds = [0, *(np.flatnonzero(np.diff(trace.active)) + 1).tolist(), len(trace.active)]
    return [slice(low, high) for low, high in pairwise(bounds)]


def _all_parts(trace: Trace, places: Float[np.ndarray, " T"], most: int) -> Solutions:
    """Solve the stretches of one transformer each, and share out the full steps among them."""
    found: Solutions = {0: (0.0, ())}
    for part in _stretches(trace):
        low = part.start
        own = _one_part(trace.gram[part, part], trace.weights[part], places[part], most)
        shared: Solutions = {}
        for count, (error, chosen) in found.items():
            for more, (extra, added) in own.items():
                total = error + extra
                if count + more <= most and (count + more not in shared or total < shared[count + more][0]):
                    shared[count + more] = (total, (*chosen, *(low + step for step in added)))
        found = shared
    return found


def _one_part(
    gram: Float[np.ndarray, "T T"], weights: Float[np.ndarray, " T"], places: Float[np.ndarray, " T"], most: int
) -> Solutions:
    steps = len(gram)
    everything = {steps: (0.0, tuple(range(steps)))}
    if steps <= LEAST:
        return everything
    return {**steps_by_count(gram, weights, max(LEAST, min(most, steps - 1)), places), **everything}
