"""What a block takes at every length, from a few measured schedules of the whole model.

Owns which schedules to time and the fit. Timing them is the caller's business; the search that uses the table is
`solve`'s. Whole models are timed, not blocks on their own, because a block alone finds its weights in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vitfold.recipe import largest_r

Schedule = tuple[int, ...]
_HALVINGS = (0.25, 0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyTable:
    """Seconds of one block that `lengths` tokens pass, linear in between, and what a merge costs beside.

    What is outside the blocks is spread over them. `attention_ratio` is the share of a block's time that goes with the
    tokens that enter it; the rest goes with those that leave its merge.
    """

    lengths: tuple[int, ...]
    seconds: tuple[float, ...]
    merge_seconds: float
    attention_ratio: float

    def block(self, tokens: int, merged: int) -> float:
        """Return the seconds of a block that `tokens` enter and `tokens - merged` leave."""
        before, after = (float(np.interp(count, self.lengths, self.seconds)) for count in (tokens, tokens - merged))
        merging = self.merge_seconds if merged else 0.0
        return self.attention_ratio * before + (1 - self.attention_ratio) * after + merging

    def total(self, r: Sequence[int], tokens: int) -> float:
        """Return the seconds of a whole schedule."""
        total = 0.0
        for merged in r:
            total, tokens = total + self.block(tokens, merged), tokens - merged
        return total


def probe_schedules(depth: int, tokens: int, prefix: int) -> tuple[Schedule, ...]:
    """Return schedules whose times tell the table: no merging, large merges at the very start, one token everywhere.

    Raises:
        ValueError: if the model has fewer than three blocks, which leaves nothing to tell apart.
    """
    if depth < 3:
        raise ValueError("a table needs a model of at least three blocks")
    found: list[Schedule] = [(0,) * depth]
    for share in _HALVINGS:
        found.append(_front(depth, tokens, prefix, (share,)))
    for share in _HALVINGS:
        found.append(_front(depth, tokens, prefix, (0.5, share)))
    few = [min(1, largest_r(tokens - block, prefix)) for block in range(depth)]
    return (*dict.fromkeys(found), tuple(few))


def fit_table(times: Mapping[Schedule, float], *, tokens: int, attention_ratio: float) -> LatencyTable:
    """Fit a table to the seconds that whole schedules took, by least squares of relative errors.

    Equation: T(r) = sum_l [a f(N_l) + (1 - a) f(N_l - r_l) + g (r_l > 0)], f linear between the lengths at which the
    schedules end; f is made to rise with N and g is at least 0.
    """
    lengths = sorted({tokens - sum(r) for r in times if sum(1 for merged in r if merged) <= 2})
    rows = [_row(r, tokens, lengths, attention_ratio) for r in times]
    seconds = np.array(list(times.values()))
    solution = np.linalg.lstsq(np.array(rows) / seconds[:, None], np.ones(len(seconds)), rcond=None)[0]
    rising = np.maximum.accumulate(np.maximum(solution[:-1], 0.0))
    return LatencyTable(
        lengths=tuple(lengths),
        seconds=tuple(float(value) for value in rising),
        merge_seconds=max(0.0, float(solution[-1])),
        attention_ratio=attention_ratio,
    )


def _front(depth: int, tokens: int, prefix: int, shares: Sequence[float]) -> Schedule:
    """Merges of these shares of the tokens in the first blocks."""
    r = []
    for share in shares:
        r.append(min(largest_r(tokens, prefix), round(share * tokens)))
        tokens -= r[-1]
    return (*r, *(0,) * (depth - len(r)))


def _row(r: Schedule, tokens: int, lengths: Sequence[int], attention_ratio: float) -> list[float]:
    """The coefficients of f at every length, and of g, in the time of a schedule."""
    row = np.zeros(len(lengths) + 1)
    knots = np.eye(len(lengths))
    for merged in r:
        for share, count in ((attention_ratio, tokens), (1 - attention_ratio, tokens - merged)):
            row[:-1] += share * np.array([np.interp(count, lengths, knot) for knot in knots])
        row[-1] += merged > 0
        tokens -= merged
    return row.tolist()
