"""What single tokens cost on this machine: a model timed at many lengths, to see whether kernels round them up.

Kernels work in tiles of rows. Where a tile is as long as several tokens, time goes up in steps, and some lengths are
better than their neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from vitfold.bench.measurement import paired_ratios
from vitfold.bench.statistics import median_interval
from vitfold.bench.timing import Protocol
from vitfold.errors import RecipeError
from vitfold.model import Architecture
from vitfold.pipeline.latency import with_schedule
from vitfold.pipeline.plan import Plan
from vitfold.pipeline.trial import opened, timed
from vitfold.progress import Say
from vitfold.recipe import largest_r
from vitfold.schedule.table import Schedule

ROUND = Protocol(trials=5, seconds=0.5)
ROUNDS = 6
_TOGETHER = 8
"""How many sessions are open at a time."""
_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthTime:
    """What a length takes, as a share of the longest one's time, with a 95 % interval over rounds of fresh sessions.

    `beside_line` is by how much of its time it lies above the straight line through all lengths, negative below it;
    `stands_out` says that the interval does not reach the line.
    """

    tokens: int
    ratio: float
    low: float
    high: float
    beside_line: float

    @property
    def stands_out(self) -> bool:
        """Whether the length is surely cheaper or dearer than its neighbours say; of the longest nobody knows."""
        line = self.ratio / (1 + self.beside_line)
        return self.low < self.high and not self.low <= line <= self.high

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "stands_out": self.stands_out}


def check_lengths(spec: Architecture, lengths: Sequence[int]) -> None:
    """Check that at most one merge in the first block leads to every length, and that there are enough for a line.

    Raises:
        RecipeError: naming the lengths that can be.
    """
    least, most = spec.tokens - largest_r(spec.tokens, spec.fixed), spec.tokens
    wrong = [length for length in lengths if not least <= length <= most]
    if wrong or len(set(lengths)) < 3:
        shown = [str(length) for length in wrong or lengths]
        raise RecipeError(
            f"lengths are at least three numbers of tokens from {least} to {most}, which one merge in the first block "
            f"leaves, or none; found {', '.join(shown[:_SHOWN])}{', ...' if len(shown) > _SHOWN else ''}"
        )


def measure_lengths(
    plan: Plan,
    lengths: Sequence[int],
    *,
    batch: int = 1,
    rounds: int = ROUNDS,
    say: Say = lambda _: None,
) -> tuple[LengthTime, ...]:
    """Time the model at lengths, the longest first, each interleaved with the longest.

    A merge in the first block leads to the length, so that every graph merges once, but for the model's own. Where its
    memory lies moves the time of a session by some per cent; every round therefore opens all of them anew. The plan is
    calibrated where it quantizes; its own schedule is not looked at.

    Raises:
        RecipeError: on lengths that cannot be.
    """
    check_lengths(plan.model.spec, lengths)
    protocol = replace(ROUND, batch=batch)
    longest, *others = sorted(set(lengths), reverse=True)
    found: dict[int, list[Float[np.ndarray, " T"]]] = {length: [] for length in others}
    for number in range(rounds):
        for start in range(0, len(others), _TOGETHER - 1):
            say(f"timing lengths, round {number + 1} of {rounds} {start}/{len(others)}")
            some = others[start : start + _TOGETHER - 1]
            for length, ratios in _timed(plan, longest, some, protocol).items():
                found[length].append(ratios)
    shares = {length: np.stack(of) for length, of in found.items()}
    return _beside_a_line(longest, shares)


def _timed(plan: Plan, longest: int, some: Sequence[int], protocol: Protocol) -> dict[int, Float[np.ndarray, " T"]]:
    """Return what lengths take as shares of the longest one's time, trial by trial."""
    with ExitStack() as closing:
        plans = {str(at): with_schedule(plan, _to_length(plan.model.spec, at)) for at in (longest, *some)}
        sessions = {name: closing.enter_context(opened(one)) for name, one in plans.items()}
        times = timed(sessions, plan.model.spec, protocol=protocol)
    return {at: 1 / paired_ratios(times[str(longest)], times[str(at)]) for at in some}


def _to_length(spec: Architecture, length: int) -> Schedule:
    """One merge in the first block; none where the model has so many tokens."""
    return (spec.tokens - length, *(0,) * (spec.num_layers - 1))


def _beside_a_line(longest: int, shares: dict[int, Float[np.ndarray, "R T"]]) -> tuple[LengthTime, ...]:
    """Return the median over rounds of each length, its interval by resampling rounds, and where it lies by a line."""
    medians = {longest: np.ones(1)} | {length: np.median(of, axis=1) for length, of in shares.items()}
    middle = {length: float(np.median(of)) for length, of in medians.items()}
    slope, offset = np.polyfit(list(middle), list(middle.values()), 1)
    rng, rows = np.random.default_rng(0), []
    for length, of in medians.items():
        found = median_interval(of, rng)
        beside = found["median"] / float(slope * length + offset) - 1
        rows.append(
            LengthTime(tokens=length, ratio=found["median"], low=found["low"], high=found["high"], beside_line=beside)
        )
    return tuple(rows)
