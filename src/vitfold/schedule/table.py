"""What a block takes at every length, from a few measured schedules of the whole model.

Whole models are timed, not blocks on their own, because a block alone finds its weights in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from jaxtyping import Float

from vitfold.recipe import largest_r
from vitfold.schedule.landing import landings, leftover

Schedule = tuple[int, ...]
_HALVINGS = (0.25, 0.5)
_MANY = 8
"""So many times `rows` tokens are enough for probes that lead to multiples of it."""


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

    def narrowed(self, ratio: float) -> LatencyTable:
        """Return the table of narrower blocks, whose work takes `ratio` of the time; their merges take as long."""
        return replace(self, seconds=tuple(ratio * value for value in self.seconds))

    def total(self, r: Sequence[int], tokens: int) -> float:
        """Return the seconds of a whole schedule."""
        total = 0.0
        for merged in r:
            total, tokens = total + self.block(tokens, merged), tokens - merged
        return total


def probe_schedules(depth: int, tokens: int, prefix: int, rows: int = 1) -> tuple[Schedule, ...]:
    """Return schedules whose times tell the table: no merging, few and large merges at the very start, many small ones.

    They lead to multiples of `rows` tokens, or of half of them where there are few; one of them merges in the first
    block what is left over, no more.

    Raises:
        ValueError: if the model has fewer than three blocks, which leaves nothing to tell apart.
    """
    if depth < 3:
        raise ValueError("a table needs a model of at least three blocks")
    found: list[Schedule] = [(0,) * depth]
    over = leftover(tokens, prefix, rows)
    if over:
        found.append((over, *(0,) * (depth - 1)))
    rows = rows if tokens >= _MANY * rows else max(1, rows // 2)
    for share in _HALVINGS:
        found.append(_front(depth, tokens, prefix, (share,), rows))
    for share in _HALVINGS:
        found.append(_front(depth, tokens, prefix, (0.5, share), rows))
    found.append(_many(depth, tokens, prefix, rows))
    return tuple(dict.fromkeys(found))


def fit_table(times: Mapping[Schedule, float], *, tokens: int, attention_ratio: float) -> LatencyTable:
    """Fit a table to the seconds that whole schedules took, by least squares of relative errors.

    Equation: T(r) = sum_l [a f(N_l) + (1 - a) f(N_l - r_l) + g (r_l > 0)],
    f(N) = c_0 + c_1 N + c_2 N^2 + c_3 [N = N_0], all coefficients at least 0: fewer of them than times, so that noise
    does not become a staircase. c_3 is what the model's own number of tokens N_0 costs beyond its neighbours, which
    are multiples of what kernels work on.
    """
    lengths = sorted({tokens - sum(r) for r in times if sum(1 for merged in r if merged) <= 2})
    seconds = np.array(list(times.values()))
    rows = np.array([_row(r, tokens, attention_ratio) for r in times]) / seconds[:, None]
    coefficients = _nonnegative(rows, np.ones(len(seconds)))
    at = np.array(lengths) / tokens
    return LatencyTable(
        lengths=tuple(lengths),
        seconds=tuple(float(value) for value in np.stack((at**0, at, at**2, at == 1), 1) @ coefficients[:4]),
        merge_seconds=float(coefficients[4]),
        attention_ratio=attention_ratio,
    )


def _nonnegative(a: Float[np.ndarray, "T C"], b: Float[np.ndarray, " T"]) -> Float[np.ndarray, " C"]:
    """Least squares with no coefficient below 0: the best of all choices of which are 0, of few coefficients."""
    best, least = np.zeros(a.shape[1]), float(b @ b)
    for chosen in product((False, True), repeat=a.shape[1]):
        columns = np.flatnonzero(chosen)
        if not len(columns):
            continue
        found = np.linalg.lstsq(a[:, columns], b, rcond=None)[0]
        error = float(np.sum((a[:, columns] @ found - b) ** 2))
        if (found >= 0).all() and error < least:
            best, least = np.zeros(a.shape[1]), error
            best[columns] = found
    return best


def _front(depth: int, tokens: int, prefix: int, shares: Sequence[float], rows: int) -> Schedule:
    """Merges of about these shares of the tokens in the first blocks."""
    r = []
    for share in shares:
        wanted = round(share * tokens)
        near = min(landings(tokens, prefix, rows), key=lambda merged: abs(merged - wanted), default=None)
        r.append(min(largest_r(tokens, prefix), wanted) if near is None else near)
        tokens -= r[-1]
    return (*r, *(0,) * (depth - len(r)))


def _many(depth: int, tokens: int, prefix: int, rows: int) -> Schedule:
    """The smallest merges in as many blocks as they go on."""
    r = []
    for _ in range(depth):
        r.append(min(landings(tokens, prefix, rows), default=0))
        tokens -= r[-1]
    return tuple(r)


def _row(r: Schedule, tokens: int, attention_ratio: float) -> list[float]:
    """The coefficients of c_0 to c_3 and g in the time of a schedule, with lengths in shares of the first one."""
    row, count = np.zeros(5), tokens
    for merged in r:
        for share, length in ((attention_ratio, count), (1 - attention_ratio, count - merged)):
            row[:4] += share * np.array([1.0, length / tokens, (length / tokens) ** 2, length == tokens])
        row[4] += merged > 0
        count -= merged
    return row.tolist()
