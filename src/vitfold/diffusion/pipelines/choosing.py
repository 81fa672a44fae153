"""Full steps for a pipeline: solved per transformer, since a forecast reaches over no change of model."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from jaxtyping import Float

from vitfold.diffusion.pipelines.recording import Trace
from vitfold.diffusion.planners import steps_by_count

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


def _all_parts(trace: Trace, places: Float[np.ndarray, " T"], most: int) -> Solutions:
    """Solve the stretches of one transformer each, and share out the full steps among them."""
    bounds = [0, *(np.flatnonzero(np.diff(trace.active)) + 1).tolist(), len(trace.active)]
    found: Solutions = {0: (0.0, ())}
    for low, high in pairwise(bounds):
        part = slice(low, high)
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
