"""Schedules for processors where every merge costs kernels: few and large where that wins.

Owns the search. What a block costs and what a schedule distorts are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vitfold.recipe import largest_r

STEP = 4
MOST_MERGES = 4
_ROUNDS = 10
_STRIDE = 0.6
_MARGIN = 1.03
_HALVINGS = 40
Seconds = Callable[[int, int, bool], float]
"""What a block costs: tokens that enter, tokens merged in it, whether any were merged before."""
Distortion = Callable[[tuple[int, ...]], float]
"""What a schedule does to the output, measured: 1 - cosine, averaged over images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A schedule, its distortion as measured, and the bound that it had to keep."""

    r: tuple[int, ...]
    seconds: float
    distortion: float
    bound: float
    measured: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Where the search looks: blocks, tokens of which `prefix` never merge, and how strongly each merge distorts.

    `single[block][share]` is the distortion of merging that share of the tokens in that block alone.
    """

    depth: int
    tokens: int
    prefix: int
    single: Sequence[Mapping[float, float]]

    def distortion(self, block: int, tokens: int, merged: int) -> float:
        """Interpolate linearly in the share of the tokens that are there."""
        share, known = merged / tokens, sorted(self.single[block].items())
        before = (0.0, 0.0)
        for point in known:
            if share <= point[0]:
                return before[1] + (point[1] - before[1]) * (share - before[0]) / (point[0] - before[0])
            before = point
        return before[1] * share / before[0]


def schedule_seconds(r: Sequence[int], tokens: int, seconds: Seconds) -> float:
    """Sum what the blocks of a schedule cost."""
    total, sizes = 0.0, False
    for merged in r:
        total += seconds(tokens, merged, sizes)
        tokens, sizes = tokens - merged, sizes or merged > 0
    return total


def solve(space: Space, seconds: Seconds, measure: Distortion, bound: float) -> Solved | None:
    """Return the fastest schedule found that distorts at most `bound`, None if merging nothing is fastest.

    Single merges' distortions are taken to add up, times a factor: bisection finds the smallest with which the fastest
    schedule still keeps the bound as measured.
    """
    plain = schedule_seconds((0,) * space.depth, space.tokens, seconds)
    best: Solved | None = None
    factor, kept, broken, measured = 1.0, float("inf"), 0.0, 0
    for _ in range(_ROUNDS):
        r = _cheapest(space, seconds, bound / factor)
        cost = schedule_seconds(r, space.tokens, seconds)
        if not any(r) or cost >= plain:
            break
        found, measured = measure(r), measured + 1
        if found <= bound:
            kept = factor
            if best is None or cost < best.seconds:
                best = Solved(r=r, seconds=cost, distortion=found, bound=bound, measured=measured)
            factor *= max(_STRIDE, found / bound)
        else:
            broken = factor
            factor *= min(1 / _STRIDE, _MARGIN * found / bound)
        if broken > 0 and kept < float("inf"):
            if kept / broken < _MARGIN:
                break
            factor = (kept * broken) ** 0.5
    return best


def _sum(space: Space, r: Sequence[int]) -> float:
    total, tokens = 0.0, space.tokens
    for block, merged in enumerate(r):
        if merged:
            total += space.distortion(block, tokens, merged)
        tokens -= merged
    return total


def _cheapest(space: Space, seconds: Seconds, bound: float) -> tuple[int, ...]:
    """The fastest schedule whose summed distortion keeps the bound, over the weights of a Lagrangian."""
    low, high = 0.0, 1e6
    best = (0,) * space.depth
    for _ in range(_HALVINGS):
        weight = (low * high) ** 0.5 if low else high / 1e6
        r = _weighted(space, seconds, weight)
        if _sum(space, r) <= bound:
            best, high = r, weight
        else:
            low = weight
        if low and high / low < 1.02:
            break
    return best


def _weighted(space: Space, seconds: Seconds, weight: float) -> tuple[int, ...]:
    """Minimize seconds + weight * distortion by dynamic programming over (merges, tokens) behind each block."""
    states: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, space.tokens): (0.0, ())}
    for block in range(space.depth):
        following: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (merges, tokens), (cost, r) in states.items():
            most = largest_r(tokens, space.prefix) if merges < MOST_MERGES else 0
            for merged in range(0, most + 1, STEP):
                total = cost + seconds(tokens, merged, merges > 0)
                if merged:
                    total += weight * space.distortion(block, tokens, merged)
                key = (merges + (merged > 0), tokens - merged)
                if key not in following or total < following[key][0]:
                    following[key] = (total, (*r, merged))
        states = following
    return min(states.values())[1]
