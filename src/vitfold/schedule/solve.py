"""Schedules for processors where every merge costs kernels: few and large where that wins.

What a block costs and what a schedule distorts are handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vitfold.recipe import largest_r
from vitfold.schedule.landing import landings

STEP = 4
MOST_MERGES = 4
_ROUNDS = 10
_STRIDE = 0.6
_MARGIN = 1.03
_WORST = 4.0
Seconds = Callable[[int, int, bool], float]
"""What a block costs: tokens that enter, tokens merged in it, whether any were merged before."""
Distortion = Callable[[tuple[int, ...]], float]
"""What a schedule does to the output, measured: 1 - cosine, averaged over images."""
Point = tuple[float, float, tuple[int, ...]]
"""Seconds, summed distortion, schedule."""


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

    Merges are multiples of `step`, or, where lengths are `aligned`, what they lead to is; at most `most_merges` of
    them. `single[block][share]` is the distortion of merging that share of the tokens in that block alone.
    """

    depth: int
    tokens: int
    prefix: int
    single: Sequence[Mapping[float, float]]
    step: int = STEP
    most_merges: int = MOST_MERGES
    aligned: bool = False

    def merges(self, tokens: int) -> range:
        """Return how many of so many tokens may merge."""
        if self.aligned:
            return landings(tokens, self.prefix, self.step)
        return range(self.step, largest_r(tokens, self.prefix) + 1, self.step)

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
    known = frontier(space, seconds, _WORST * bound)
    best: Solved | None = None
    factor, kept, broken, measured = 1.0, float("inf"), 0.0, 0
    for _ in range(_ROUNDS):
        cost, _, r = min(point for point in known if point[1] * factor <= bound)
        if cost >= plain:
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


def frontier(space: Space, seconds: Seconds, most: float) -> list[Point]:
    """Return schedules that none beats in both seconds and summed distortion, up to `most` of it.

    Dynamic programming over blocks; a state is how many merges there were and how many tokens are left.
    """
    states: dict[tuple[int, int], list[Point]] = {(0, space.tokens): [(0.0, 0.0, ())]}
    for block in range(space.depth):
        following: dict[tuple[int, int], list[Point]] = {}
        for (merges, tokens), points in states.items():
            for merged in (0, *(space.merges(tokens) if merges < space.most_merges else ())):
                cost = seconds(tokens, merged, merges > 0)
                worse = space.distortion(block, tokens, merged) if merged else 0.0
                reached = following.setdefault((merges + (merged > 0), tokens - merged), [])
                reached += [(t + cost, d + worse, (*r, merged)) for t, d, r in points if d + worse <= most]
        states = {state: _unbeaten(points) for state, points in following.items() if points}
    return _unbeaten([point for points in states.values() for point in points], limit=None)


def _unbeaten(points: list[Point], limit: int | None = 32) -> list[Point]:
    """Leave out points that another one beats in both numbers; of many, keep some along the whole frontier."""
    kept: list[Point] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    if limit is None or len(kept) <= limit:
        return kept
    return [kept[round(index * (len(kept) - 1) / (limit - 1))] for index in range(limit)]
