"""The token operations that programs share: matching, merging, unmerging."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic

from vitfold.ops.protocol import Ops, T
from vitfold.recipe import Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens(Generic[T]):
    """A sequence with what merging must remember.

    `x` is (B, N, D); its first `prefix` and its last `suffix` rows never merge and stay where they are. `size`
    (B, N, 1) counts the original tokens in each row, None before the first merge. `source` (B, N, N_0) is 1 where row n
    holds original token m, None unless traced. `origin` (B, N, 1) is the original token whose place row n keeps: the
    one that others joined; None where all are in their places, or where `placed` does not ask for it.
    """

    x: T
    count: int
    prefix: int
    suffix: int = 0
    size: T | None = None
    source: T | None = None
    origin: T | None = None
    placed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Match(Generic[T]):
    """Which rows merge: row `moved[i]` of the sequence joins row `into[i]` of the merged sequence.

    `survivors` are the rows that stay, in their new order: prefix, the rest of A, B, suffix. Indices are (B, r, 1),
    (B, r, 1) and (B, N - r, 1).
    """

    moved: T
    into: T
    survivors: T


def match(
    ops: Ops[T],
    site: str,
    metric: T,
    *,
    count: int,
    prefix: int,
    r: int,
    suffix: int = 0,
    order: Order | None = None,
) -> Match[T]:
    """Pair the r tokens of A that are most similar to a token of B with it; those of A that stay keep this order.

    Equation: s_ij = cos(m_i, m_j), i in A, j in B; the r largest max_j s_ij merge i into argmax_j s_ij.

    A and B are the even and the odd sequence positions between prefix and suffix: their tokens stay out of both, so
    none can merge or be merged into, however many there are.

    Source: ToMe (2210.09461), section 3.1; for one or two prefix tokens it chooses the same pairs and the
    same order.
    """
    ops.scope(site)
    end = count - suffix
    a = range(prefix + prefix % 2, end, 2)
    b = range(prefix + 1 - prefix % 2, end, 2)
    best, nearest = ops.argmax(ops.similarity(f"{site}.scores", metric, a, b))
    moved, kept = ops.topk_split(best, r, by_score=order == "score")
    leaving = ops.affine_index(moved, a.step, a.start)
    into = ops.affine_index(ops.take(nearest, moved), 1, prefix + len(a) - r)
    survivors = ops.pad_index(ops.affine_index(kept, a.step, a.start), range(prefix), b)
    if suffix:
        survivors = ops.pad_index(survivors, range(0), range(end, count))
    return Match(moved=leaving, into=into, survivors=survivors)


def merge(ops: Ops[T], site: str, tokens: Tokens[T], pairs: Match[T], *, r: int, trace: bool) -> Tokens[T]:
    """Replace every destination by the size-weighted mean of itself and what joins it.

    Equation: x_j = (s_j x_j + sum_i s_i x_i) / (s_j + sum_i s_i).

    The order afterwards is prefix, kept rows of A (as they were, or by score), rows of B as they were, suffix.

    Source: ToMe (2210.09461), section 3.1.
    """
    ops.scope(site)
    first = tokens.size is None
    size = ops.ones_like(ops.slice(tokens.x, 2, 0, 1)) if tokens.size is None else tokens.size
    x = tokens.x if first else ops.multiply(tokens.x, size)
    # Rows of `x` are sums so far; dividing all of them also restores those that nothing joined.
    summed, total = ops.merge_rows(f"{site}.x", (x, size), pairs.survivors, pairs.into, pairs.moved)
    source = tokens.source
    if trace:
        source = source if source is not None else ops.identity_like(size)
        (source,) = ops.merge_rows(f"{site}.source", (source,), pairs.survivors, pairs.into, pairs.moved)
    origin = places(ops, tokens, pairs.survivors)
    return replace(
        tokens, x=ops.divide(summed, total), count=tokens.count - r, size=total, source=source, origin=origin
    )


def places(ops: Ops[T], tokens: Tokens[T], rows: T) -> T | None:
    """Return the places that rows (B, R, 1) of a sequence keep, None where nobody asks."""
    if not tokens.placed:
        return None
    return rows if tokens.origin is None else ops.take(tokens.origin, rows)


def log_size(ops: Ops[T], tokens: Tokens[T]) -> T | None:
    """Return the bias of proportional attention, log s as (B, 1, 1, N), or None before the first merge.

    Source: ToMe (2210.09461), equation 1.
    """
    if tokens.size is None:
        return None
    return ops.log(ops.reshape(tokens.size, (1, 1, tokens.count)))


def unmerge(ops: Ops[T], site: str, tokens: Tokens[T]) -> T:
    """Give every original token the row that holds it: (B, N, D) -> (B, N_0, D), raster order.

    Equation: x_0 = source^T x.
    """
    if tokens.source is None:
        return tokens.x
    return ops.matmul(site, ops.transpose(tokens.source, (0, 2, 1)), tokens.x)
