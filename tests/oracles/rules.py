"""Merging rules as loops over one image, in float64, each from its paper's text.

A rule returns the new rows and, for every new row, the original rows that it holds.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Reduced = tuple[list[Array], list[set[int]]]


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def pitome(x: Array, keys: Array, r: int, prefix: int, depth_ratio: float) -> Reduced:
    """2405.16148, section 3.2: of the 2r tokens of largest energy every second joins its most similar of the others."""
    margin = 0.9 - 0.9 * depth_ratio
    patches = range(prefix, len(x))
    energy = {}
    for i in patches:
        terms = [cosine(keys[i], keys[j]) - margin for j in patches]
        energy[i] = sum(t if t > 0 else math.exp(t) - 1 for t in terms) / len(terms)
    ranked = sorted(patches, key=lambda i: (-energy[i], i))[: 2 * r]
    moved, stays = ranked[0::2], ranked[1::2]
    members = {i: [i] for i in stays}
    for i in moved:
        members[max(stays, key=lambda j: (cosine(keys[i], keys[j]), -stays.index(j)))].append(i)
    kept = [i for i in range(len(x)) if i not in ranked]
    groups = [[i] for i in kept] + [members[i] for i in stays]
    return [np.mean(x[group], 0) for group in groups], [set(group) for group in groups]


def nearest(x: Array, r: int, prefix: int) -> Reduced:
    """The r patches most like one before them join the most similar patch that stays."""
    likeness = {i: max(cosine(x[i], x[j]) for j in range(prefix, i)) for i in range(prefix + 1, len(x))}
    moved = sorted(likeness, key=lambda i: (-likeness[i], i))[:r]
    kept = [i for i in range(len(x)) if i not in moved]
    members = {i: [i] for i in kept}
    for i in moved:
        members[max(kept[prefix:], key=lambda j: cosine(x[i], x[j]))].append(i)
    return [np.mean(x[group], 0) for group in members.values()], [set(group) for group in members.values()]


def greedy(x: Array, r: int, prefix: int, suffix: int) -> Reduced:
    """The report's algorithm 2: A names its best B, pairs are taken by score where B is free; B goes into A.

    With fewer than r pairs, B that nobody named join the A that they are most like, the most alike first.
    """
    end = len(x) - suffix
    a, b = list(range(prefix, end, 2)), list(range(prefix + 1, end, 2))
    pairs = []
    for i in a:
        j = max(b, key=lambda j: cosine(x[i], x[j]))
        pairs.append((cosine(x[i], x[j]), i, j))
    partner: dict[int, int] = {}
    for _, i, j in sorted(pairs, reverse=True):
        if j not in partner and len(partner) < r:
            partner[j] = i
    left = [max((cosine(x[i], x[j]), i, j) for i in a) for j in b if j not in {pair[2] for pair in pairs}]
    for _, i, j in sorted(left, reverse=True)[: r - len(partner)]:
        partner[j] = i
    groups = [[i] for i in range(prefix)]
    groups += [[i, *(j for j in b if partner.get(j) == i)] for i in a]
    groups += [[j] for j in [*b, *range(end, len(x))] if j not in partner]
    return [np.mean(x[group], 0) for group in groups], [set(group) for group in groups]


def evit(x: Array, q: Array, k: Array, r: int, prefix: int) -> Reduced:
    """2202.07800: the r + 1 patch tokens that the class token attends to least become their attention-weighted mean."""
    attention = np.zeros(len(x))
    for head in range(len(q)):
        scores = np.array([q[head, 0] @ k[head, j] for j in range(len(x))]) / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        attention += weights / weights.sum() / len(q)
    dropped = sorted(range(prefix, len(x)), key=lambda i: (attention[i], i))[: r + 1]
    kept = [i for i in range(len(x)) if i not in dropped]
    fused = sum(attention[i] * x[i] for i in dropped) / sum(attention[i] for i in dropped)
    return [*(x[i] for i in kept), fused], [*({i} for i in kept), set(dropped)]
