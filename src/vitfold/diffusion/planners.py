"""Which steps are computed in full, and by what weights the others are forecast: from products of a trajectory.

Runs no model. A planner takes the products of what all blocks added at every step and returns a plan that holds for
every image: the schedule is static, so graphs of it can be exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from vitfold.diffusion.forecast import Weights, ridge_chebyshev, taylor

WARM_UP = 2
"""First steps that are always computed: everything changes there."""
FORCED = 3
"""First steps that DPCache always computes."""
SPECTRUM_WARM_UP = 5
_RIDGE = 1e-6
"""Of a fitted forecast, as a share of the mean squared norm of what is kept."""
_REACH = 6
"""So many steps a full step is moved at most at a time by `fitted`."""
_LEAST_SNAPSHOTS = 4
_RANK = 1e-3
"""Singular values below this share of the largest are noise to DMD."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Products:
    """What all blocks added at the steps of some trajectories: the Gram matrix, and how much an error at each weighs.

    `places` are what forecasts count by; None: step numbers.
    """

    gram: Float[np.ndarray, "T T"]
    weights: Float[np.ndarray, " T"]
    places: Float[np.ndarray, " T"] | None = None

    @property
    def steps(self) -> int:
        """How many there are."""
        return len(self.gram)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Full steps, and for every step the weights of what the newest full steps before it kept; none where it is full.

    Without `rows` the forecast is the method's own.
    """

    mask: tuple[int, ...]
    rows: tuple[Weights, ...] = ()


Planner = Callable[[Products], Plan]


def evenly(steps: int, interval: int, late_interval: int | None = None) -> tuple[int, ...]:
    """Return the first two steps, every interval-th behind them, and the last; in the second half `late_interval`."""
    found: list[int] = []
    for step in range(steps):
        gap = interval if late_interval is None or 2 * step < steps else late_interval
        if step < WARM_UP or step - found[-1] >= gap or step == steps - 1:
            found.append(step)
    return tuple(found)


def spread(steps: int, count: int) -> tuple[int, ...]:
    """Return the first two steps, the last, and as many between them, evenly, as make `count` in all."""
    places = np.linspace(WARM_UP - 1, steps - 1, max(count - WARM_UP + 1, 1))
    return tuple(sorted({*range(min(WARM_UP, steps)), *(round(float(place)) for place in places)} & set(range(steps))))


def rows_of(steps: int, mask: Sequence[int], history: int, forecast: Callable[[Sequence[int], int], Any]) -> Plan:
    """Return a plan whose weights are `forecast(newest full steps, step)`, of at most `history` of them."""
    full = set(mask)
    rows = [
        () if t in full else tuple(float(w) for w in forecast([p for p in mask if p < t][-history:], t))
        for t in range(steps)
    ]
    return Plan(mask=tuple(mask), rows=tuple(rows))


def line(products: Products, count: int) -> Plan:
    """Choose `count` steps so that lines through the last two err least; they are the forecast."""
    return Plan(mask=best_steps(products.gram, products.weights, count, products.places))


def fitted(products: Products, count: int, history: int) -> Plan:
    """Choose `count` steps and fit the weights by which the last `history` of them tell the others.

    Equation: w_t = argmin_w |R_t - sum_k w_k R_(c_k)|^2 + 1e-6 mean |R_(c_k)|^2 |w|^2, in closed form from the Gram
    matrix. Steps: an exact dynamic program for two kept steps, then moves of one step at a time while the error of
    `history` kept ones, weighted by what an error moves the sample, falls.
    """
    return fit_rows(products, moved(products, pairs(products, count, fit=True)[count][1], history), history)


def fit_rows(products: Products, mask: Sequence[int], history: int) -> Plan:
    """Return a plan with fitted weights for given full steps."""
    return rows_of(products.steps, mask, history, lambda kept, t: _fit(products.gram, kept)[:, t])


def moved(products: Products, mask: Sequence[int], history: int) -> tuple[int, ...]:
    """Move full steps, one at a time and the best move first, until no move lowers the error of fitted forecasts."""
    gram, steps = products.gram, products.steps
    known: dict[tuple[int, ...], Float[np.ndarray, " T"]] = {}

    def behind(kept: tuple[int, ...]) -> Float[np.ndarray, " T"]:
        """The errors of all steps behind the newest that is kept, summed up from there."""
        if kept not in known:
            w = _fit(gram, kept)
            error = np.diag(gram) - 2 * (w * gram[list(kept)]).sum(0) + (w * (gram[np.ix_(kept, kept)] @ w)).sum(0)
            weighted = np.where(np.arange(steps) > kept[-1], products.weights * np.maximum(error, 0.0), 0.0)
            known[kept] = np.cumsum(weighted)
        return known[kept]

    def error_of(chosen: tuple[int, ...]) -> float:
        return float(
            sum(
                behind(chosen[max(0, i + 1 - history) : i + 1])[chosen[i + 1] - 1]
                for i in range(WARM_UP - 1, len(chosen) - 1)
            )
        )

    best = tuple(mask)
    least = error_of(best)
    while True:
        others = [
            tuple(sorted({*best, new} - {old}))
            for old in best[WARM_UP:-1]
            for new in range(max(WARM_UP, old - _REACH), min(steps - 1, old + _REACH + 1))
            if new not in best
        ]
        found = min(((error_of(other), other) for other in others), default=(math.inf, best))
        if not found[0] < least * (1 - 1e-6):
            return best
        least, best = found


def _fit(gram: Float[np.ndarray, "T T"], kept: Sequence[int]) -> Float[np.ndarray, "K T"]:
    """The weights by which what is kept tells every step, by ridge regression."""
    own = gram[np.ix_(kept, kept)]
    ridge = _RIDGE * max(float(np.trace(own)) / len(own), 1e-30)
    found: Float[np.ndarray, "K T"] = np.linalg.solve(own + ridge * np.eye(len(own)), gram[list(kept)])
    return found


def path_aware(products: Products, count: int, order: int) -> Plan:
    """Choose `count` steps by DPCache's tensor of costs and its recurrence; forecast by a Taylor series.

    Equation: C[i, j, k] = sum_(j < t < k) |R_t - forecast of t from i and j|; D[m, k] = min_j D[m - 1, j] +
    C[P[m - 1, j], j, k], P the step before j on the best path to it. The first three steps are computed.

    A path knows two steps, so the costs are of lines; norms are Euclidean, which products say, and not sums of absolute
    values. Neither weighs what an error does to the sample.

    Source: DPCache (2602.22654).
    """
    steps = products.steps
    at = np.arange(steps, dtype=float)
    costs = [
        None if j < FORCED - 1 else _summed(np.sqrt(_errors(products.gram, at, j, fit=False)), j)
        for j in range(steps - 1)
    ]
    best, before = np.full((count, steps), np.inf), np.zeros((count, steps), int)
    best[FORCED - 1, FORCED - 1], before[FORCED - 1, FORCED - 1] = 0.0, FORCED - 2
    for m in range(FORCED, count):
        for k in range(m, steps):
            totals = {
                j: best[m - 1, j] + float(table[before[m - 1, j], k - j - 1])
                for j, table in enumerate(costs[:k])
                if table is not None and np.isfinite(best[m - 1, j])
            }
            if totals:
                before[m, k] = min(totals, key=lambda j: totals[j])
                best[m, k] = totals[before[m, k]]
    chosen = [steps - 1]
    for m in range(count - 1, FORCED - 1, -1):
        chosen.append(int(before[m, chosen[-1]]))
    mask = sorted({*range(FORCED), *chosen})
    return rows_of(steps, mask, order + 1, lambda kept, t: taylor(kept, t, order=order))


def magnitude(products: Products, threshold: float, most: int, retained: float) -> Plan:
    """Hold what is kept as long as the ratios of magnitudes since then stay near one, at most `most` times.

    Equation: g_t = |R_t| / |R_(t-1)|; E_t = sum of |1 - prod g| over reused steps; reused while E_t <= threshold. The
    first share `retained` of the steps is computed.

    Ratios are of whole residuals of the trajectory, not means over tokens.

    Source: MagCache (2506.09045).
    """
    norms = np.sqrt(np.maximum(np.diag(products.gram), 1e-30))
    steps, mask, total, reused = products.steps, [0, 1], 0.0, 0
    for step in range(WARM_UP, steps):
        total += abs(1 - norms[step] / norms[mask[-1]])
        reused += 1
        if step < retained * steps or total > threshold or reused > most or step == steps - 1:
            mask.append(step)
            total, reused = 0.0, 0
    return rows_of(steps, mask, 1, lambda kept, _: [1.0] * len(kept))


def modes(products: Products, interval: int, history: int) -> Plan:
    """Forecast by dynamic mode decomposition of the last `history` full steps, as far as they are evenly spaced.

    Equation: F_(i+1) = A F_i by a truncated singular value decomposition; F(x) = Phi lambda^x Phi^+ F_now.

    The modes are in the span of what is kept, so their weights follow from products. These are of the trajectories that
    the plan was made on; cache-dit fits them to every image. With fewer than four snapshots it is a line.

    Source: Schmid (2010), J. Fluid Mech. 656; as a forecast of caches: cache-dit's DMD calibrator.
    """

    def forecast(kept: Sequence[int], t: int) -> Weights:
        gap, even = kept[-1] - kept[-2], 1
        while even < len(kept) and kept[-even] - kept[-even - 1] == gap:
            even += 1
        if even < _LEAST_SNAPSHOTS:
            return taylor(kept, t, order=1)
        newest = list(kept[-even:])
        found = _mode_weights(products.gram[np.ix_(newest, newest)], (t - kept[-1]) / gap)
        return (*(0.0,) * (len(kept) - even), *found)

    return rows_of(products.steps, evenly(products.steps, interval), history, forecast)


def _mode_weights(own: Float[np.ndarray, "K K"], ahead: float) -> Weights:
    """Weights of snapshots that go on by their own modes, `ahead` in units of their distance: from their products."""
    before, cross, after = own[:-1, :-1], own[:-1, 1:], own[1:, 1:]
    squares, v = np.linalg.eigh(before)
    able = squares > _RANK**2 * squares.max()
    projected = v[:, able] / np.sqrt(squares[able])
    values, vectors = np.linalg.eig(projected.T @ cross @ projected)
    found = projected @ vectors  # modes as sums of the later snapshots
    amounts = np.linalg.lstsq(found.conj().T @ after @ found, found.conj().T @ after[:, -1], rcond=None)[0]
    values = values / np.maximum(np.abs(values), 1.0)  # none grows
    weights = (found @ (values.astype(complex) ** ahead * amounts)).real
    return (0.0, *(float(w) for w in weights))


def spectrum(products: Products, window: float, growth: float, degree: int, history: int) -> Plan:
    """Forecast by a ridge regression onto Chebyshev polynomials over all steps, half and half with a line.

    The first five steps are computed, then every `window`-th, rounded down, which grows by `growth` at every one.

    Source: Spectrum (2603.01623), which keeps all full steps where this keeps the last `history`.
    """
    steps, mask = products.steps, []
    for step in range(steps):
        if step < min(SPECTRUM_WARM_UP, steps):
            mask.append(step)
        elif step - mask[-1] >= math.floor(window) or step == steps - 1:
            mask.append(step)
            window += growth
    return rows_of(steps, mask, history, lambda kept, t: ridge_chebyshev(kept, t, steps=steps, degree=degree))


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
    """Return for every count from three to `most` the least error and the steps to compute in full, by lines.

    Equation: least sum_t w_t |R_t - R_c - (x_t - x_c) / (x_c - x_p) (R_c - R_p)|^2 over reused steps t, p < c the full
    steps before; all norms follow from the Gram matrix of the residuals R. The places x are step numbers, or what a
    sampler counts by. An error is taken to reach the image on its own.
    """
    return pairs(Products(gram=gram, weights=weights, places=places), most, fit=False)


def pairs(products: Products, most: int, *, fit: bool) -> dict[int, tuple[float, tuple[int, ...]]]:
    """Return what `steps_by_count` does; with `fit` the error of the best weights of two full steps, not of a line.

    Exact, by dynamic programming over (p, c): O(most T^3) time and O(most T^2) memory.
    """
    steps = products.steps
    at = np.arange(steps, dtype=float) if products.places is None else products.places
    best = np.full((most - 1, steps, steps), np.inf, np.float32)  # by count - 2, and (p, c)
    best[0, 0, WARM_UP - 1] = 0.0
    before = np.zeros(best.shape, np.int16)
    for c in range(WARM_UP - 1, steps - 1):
        cost = _summed(products.weights[c + 1 :] * _errors(products.gram, at, c, fit=fit), c)
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


def _errors(
    gram: Float[np.ndarray, "T T"], at: Float[np.ndarray, " T"], c: int, *, fit: bool
) -> Float[np.ndarray, "P N"]:
    """The squared error of every step behind c, forecast from every p < c and c: by a line, or by the best weights."""
    t, p = np.arange(c + 1, len(gram)), np.arange(c)[:, None]
    if fit:
        ridge = _RIDGE * (gram[p, p] + gram[c, c]) / 2
        a, b, both = gram[c, c] + ridge, gram[p, p] + ridge, gram[c, p]
        scale = np.maximum(a * b - both**2, 1e-30)
        newest, older = (b * gram[c, t] - both * gram[p, t]) / scale, (a * gram[p, t] - both * gram[c, t]) / scale
    else:
        slope = (at[t] - at[c]) / (at[c] - at[p])
        newest, older = 1 + slope, -slope
    terms: Sequence[tuple[Any, Any]] = ((newest, c), (older, p), (-1.0, t))
    error = sum(a * b * gram[i, j] for a, i in terms for b, j in terms)
    found: Float[np.ndarray, "P N"] = np.maximum(error, 0.0)
    return found


def _summed(errors: Float[np.ndarray, "P N"], c: int) -> Float[np.ndarray, "P N"]:
    """The errors of all steps between c and n, for every n behind c."""
    summed = np.cumsum(errors, axis=1)
    return np.concatenate([np.zeros((c, 1)), summed[:, :-1]], axis=1).astype(np.float32)
