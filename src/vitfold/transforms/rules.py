"""Which tokens of a block become one, or go: merging rules behind one interface.

A rule takes r rows away, always as many, whatever the image. What it needs and promises stands in `recipe.RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic

import numpy as np

from vitfold.errors import RecipeError
from vitfold.ops.protocol import Ops, T
from vitfold.recipe import Order
from vitfold.transforms.tokens import Match, Tokens, match, merge, places

_PRUNED_BLOCKS = 0.5
_MARGIN = 0.9
_BEYOND = -4.0
"""What is added to a cosine that does not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction(Generic[T]):
    """A block that takes r tokens away: its attention's q and k (B, H, N, K), and where in the model it stands.

    `depth_ratio` is 0 in the first block and below 1 in the last; `originals` is N_0. Keys of `narrow_heads` are looked
    at side by side, others by their mean.
    """

    tokens: Tokens[T]
    q: T
    k: T
    r: int
    width: int
    head_width: int
    originals: int
    depth_ratio: float
    order: Order | None
    trace: bool
    narrow_heads: bool = False


def reduce_tokens(ops: Ops[T], rule: str, site: str, here: Reduction[T]) -> Tokens[T]:
    """Take r tokens away by a rule.

    Raises:
        RecipeError: if it would move tokens that stand behind the patches.
    """
    if here.tokens.suffix and rule not in ("tome", "nearest", "greedy", "tofu"):
        raise RecipeError(
            f"the rule {rule} keeps no tokens behind the patches, which this model has; take tome, nearest, greedy or "
            "tofu"
        )
    reduced: Tokens[T] = RULES[rule](ops, site, here)
    return reduced


def tome(ops: Ops[T], site: str, here: Reduction[T]) -> Tokens[T]:
    """Merge the most similar pairs into their size-weighted mean.

    Source: ToMe (2210.09461), section 3.1.
    """
    return merge(ops, site, here.tokens, _matched(ops, site, here), r=here.r, trace=here.trace)


def nearest(ops: Ops[T], site: str, here: Reduction[T]) -> Tokens[T]:
    """Let any token join any other: the r that are most like one before them join the nearest of those that stay.

    Equation: moved are the r largest max_{j < i} s_ij; i goes to argmax_j s_ij, j among those that stay; s_ij =
    cos(x_i, x_j), x the tokens behind attention. "Before" is what keeps a pair from moving both.
    """
    ops.scope(site)
    tokens, r, prefix = here.tokens, here.r, here.tokens.prefix
    patches = range(prefix, tokens.count - tokens.suffix)
    count = len(patches)
    likeness = ops.similarity(f"{site}.likeness", tokens.x, patches, patches)
    before = np.where(np.tri(count, k=-1, dtype=bool), 0.0, _BEYOND).astype(np.float32)
    best, _ = ops.argmax(ops.add(likeness, ops.constant(before[None])))
    moved, kept = (
        ops.affine_index(some, 1, prefix) for some in ops.topk_split(best, r, by_score=here.order == "score")
    )
    both = ops.concat((ops.take(tokens.x, moved), ops.take(tokens.x, kept)), 1)
    _, joined = ops.argmax(ops.similarity(f"{site}.scores", both, range(r), range(r, count)))
    survivors = ops.pad_index(kept, range(prefix), range(patches.stop, tokens.count))
    pairs = Match(moved=moved, into=ops.affine_index(joined, 1, prefix), survivors=survivors)
    return merge(ops, site, tokens, pairs, r=r, trace=here.trace)


def greedy(ops: Ops[T], site: str, here: Reduction[T]) -> Tokens[T]:
    """Merge pairs none of which share a token: every A names its most similar B, every B takes the best of those.

    Equation: j_i = argmax_j s_ij, s_ij = cos(x_i, x_j), x the tokens behind attention, i at even and j at odd
    positions of the patches; of pairs (i, j_i), in descending order of s, the r first whose j is free join x_j to x_i.

    An A names one B, so only a B can be asked for twice, and the best pair of every B is what the greedy choice takes.
    Where fewer than r B are named, the B that are most like any A join it too: then an A may take two. Ties name all.

    Source: Feng Mingyu, Token Merging and Post-Training Quantization (JAIST 2026), algorithm 2.
    """
    ops.scope(site)
    tokens, r, prefix, end = here.tokens, here.r, here.tokens.prefix, here.tokens.count - here.tokens.suffix
    a, b = range(prefix, end, 2), range(prefix + 1, end, 2)
    scores = ops.similarity(f"{site}.scores", tokens.x, b, a)
    best = ops.reshape(ops.reduce_max(scores, 1), (1, len(a)))
    named = ops.elementwise("floor", ops.scale(ops.elementwise("subtract", scores, best), 0.5))
    taken, partner = ops.argmax(ops.add(scores, ops.scale(named, -_BEYOND)))
    moved, kept = ops.topk_split(taken, r, by_score=here.order == "score")
    survivors = ops.pad_index(ops.affine_index(kept, b.step, b.start), a, range(0))
    pairs = Match(
        moved=ops.affine_index(moved, b.step, b.start),
        into=ops.affine_index(ops.take(partner, moved), 1, prefix),
        survivors=ops.pad_index(survivors, range(prefix), range(end, tokens.count)),
    )
    return merge(ops, site, tokens, pairs, r=r, trace=here.trace)


def tofu(ops: Ops[T], site: str, here: Reduction[T]) -> Tokens[T]:
    """Prune the pair's first token in the first half of the blocks, merge and keep the norm in the second.

    Equation: x* = m (sum_i s_i |x_i| / sum_i s_i) / |m|, m the size-weighted mean.

    Source: ToFu (2312.01026), sections 3.2 and 3.3. It keeps the largest norm of the pair; the mean of the norms is
    what sums alone can carry, and the same where both are equal.
    """
    pairs = _matched(ops, site, here)
    if here.depth_ratio < _PRUNED_BLOCKS:
        return _pruned(ops, site, here, pairs)
    tokens = here.tokens
    size = ops.ones_like(ops.slice(tokens.x, 2, 0, 1)) if tokens.size is None else tokens.size
    weighted = replace(tokens, x=ops.concat((tokens.x, ops.norm(tokens.x)), 2), size=size)
    merged = merge(ops, site, weighted, pairs, r=here.r, trace=here.trace)
    mean = ops.slice(merged.x, 2, 0, here.width)
    norm = ops.slice(merged.x, 2, here.width, here.width + 1)
    return replace(merged, x=ops.multiply(mean, ops.divide(norm, ops.norm(mean))))


def pitome(ops: Ops[T], site: str, here: Reduction[T]) -> Tokens[T]:
    """Let only tokens merge that have many near-duplicates: the 2 r of largest energy, split alternately.

    Equation: E_i = mean_j elu(cos(k_i, k_j) - m), m = 0.9 - 0.9 l / L, over patch tokens j.

    Source: PiToMe (2405.16148), section 3.2.
    """
    ops.scope(site)
    tokens, r = here.tokens, here.r
    prefix, count = tokens.prefix, tokens.count
    metric = _keys(ops, here)
    patches = range(prefix, count)
    cosines = ops.similarity(f"{site}.energy", metric, patches, patches)
    raised = ops.activation("elu", ops.add_scalar(cosines, _MARGIN * (here.depth_ratio - 1.0)), f"{site}.elu")
    energy = ops.reshape(ops.mean(raised, 2), (count - prefix, 1))
    chosen, kept = ops.topk_split(energy, 2 * r, by_score=here.order == "score")
    moved, stays = (ops.affine_index(ops.slice(chosen, 1, first, 2 * r, 2), 1, prefix) for first in (0, 1))
    pair = ops.concat((ops.take(metric, moved), ops.take(metric, stays)), 1)
    _, nearest = ops.argmax(ops.similarity(f"{site}.scores", pair, range(r), range(r, 2 * r)))
    survivors = ops.concat((ops.pad_index(ops.affine_index(kept, 1, prefix), range(prefix), range(0)), stays), 1)
    pairs = Match(moved=moved, into=ops.affine_index(nearest, 1, count - 2 * r), survivors=survivors)
    return merge(ops, site, tokens, pairs, r=r, trace=here.trace)


def evit(ops: Ops[T], site: str, here: Reduction[T]) -> Tokens[T]:
    """Keep what the class token attends to, and fuse the r + 1 others into one token by its attention.

    Equation: x_f = sum_i a_i x_i / sum_i a_i, a = mean over heads of softmax(q_cls k^T / sqrt(K)).

    Source: EViT (2202.07800), sections 3.2 and 3.3.
    """
    ops.scope(site)
    tokens, r = here.tokens, here.r
    prefix, count = tokens.prefix, tokens.count
    scores = ops.matmul(f"{site}.class", ops.slice(here.q, 2, 0, 1), here.k, transpose_b=True)
    attended = ops.softmax(f"{site}.softmax", ops.scale(scores, here.head_width**-0.5))
    weights = ops.reshape(ops.mean(attended, 1), (count, 1))
    patches = ops.slice(weights, 1, prefix, count)
    dropped, kept = ops.topk_split(ops.scale(patches, -1.0), r + 1, by_score=here.order == "score")
    dropped = ops.affine_index(dropped, 1, prefix)
    survivors = ops.pad_index(ops.affine_index(kept, 1, prefix), range(prefix), range(0))
    weight = ops.take(weights, dropped)
    total = _summed(ops, ops.multiply(ops.take(tokens.x, dropped), weight), here.width)
    fused = ops.divide(total, _summed(ops, weight, 1))

    def joined(rows: T, width: int) -> T:
        return ops.concat((ops.take(rows, survivors), _summed(ops, ops.take(rows, dropped), width)), 1)

    source = tokens.source
    if here.trace and source is None:
        source = ops.identity_like(ops.slice(tokens.x, 2, 0, 1))
    return replace(
        tokens,
        x=ops.concat((ops.take(tokens.x, survivors), fused), 1),
        count=count - r,
        size=None if tokens.size is None else joined(tokens.size, 1),
        source=None if source is None else joined(source, here.originals),
        origin=places(ops, tokens, ops.concat((survivors, ops.slice(dropped, 1, 0, 1)), 1)),
    )


RULES: Mapping[str, Callable[..., Any]] = {
    "tome": tome,
    "nearest": nearest,
    "greedy": greedy,
    "tofu": tofu,
    "pitome": pitome,
    "evit": evit,
}


def _keys(ops: Ops[T], here: Reduction[T]) -> T:
    """One row per token that stands for its keys: their mean over heads (2210.09461), or all of them."""
    if not here.narrow_heads:
        return ops.mean(here.k, 1)
    _, heads, rows, width = ops.shape(here.k)
    return ops.reshape(ops.transpose(here.k, (0, 2, 1, 3)), (rows, heads * width))


def _matched(ops: Ops[T], site: str, here: Reduction[T]) -> Match[T]:
    tokens = here.tokens
    metric = _keys(ops, here)
    return match(
        ops, site, metric, count=tokens.count, prefix=tokens.prefix, suffix=tokens.suffix, r=here.r, order=here.order
    )


def _pruned(ops: Ops[T], site: str, here: Reduction[T], pairs: Match[T]) -> Tokens[T]:
    """Drop the tokens that would have moved; in dense outputs their places show what they would have joined."""
    ops.scope(site)
    tokens, source = here.tokens, here.tokens.source
    if here.trace:
        source = source if source is not None else ops.identity_like(ops.slice(tokens.x, 2, 0, 1))
        (source,) = ops.merge_rows(f"{site}.source", (source,), pairs.survivors, pairs.into, pairs.moved)
    return replace(
        tokens,
        x=ops.take(tokens.x, pairs.survivors),
        count=tokens.count - here.r,
        size=None if tokens.size is None else ops.take(tokens.size, pairs.survivors),
        source=source,
        origin=places(ops, tokens, pairs.survivors),
    )


def _summed(ops: Ops[T], rows: T, width: int) -> T:
    """The sum over rows, as one row: (B, N, D) -> (B, 1, D)."""
    return ops.reshape(ops.sum(rows, 1), (1, width))
