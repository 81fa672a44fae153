"""Token merging and a small Vision Transformer as loops over one image, in float64.

Owns the answer that the interpreters are compared with. Written from ToMe (2210.09461), sections 3.1 and
3.2, in its own formulation: the whole sequence splits into even (A) and odd (B) positions, and scores of
-inf keep the class token (row 0 of A) a non-source and the distillation token (column 0 of B) a
non-destination. For other numbers of prefix tokens the same rule covers every prefix row and column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Params = Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Plan:
    """A merge in sequence positions: `moved[i]` joins `into[i]`; `order` lists the rows that remain."""

    moved: list[int]
    into: list[int]
    order: list[int]


@dataclass(frozen=True)
class Rows:
    """Tokens x (N, D), how many originals each row holds (N,), and which (N, N_0)."""

    x: Array
    size: Array
    source: Array


def fresh_rows(x: NDArray[np.floating]) -> Rows:
    """Return tokens before any merge."""
    count = len(x)
    return Rows(np.asarray(x, np.float64), np.ones(count), np.eye(count))


def cosine(a: Array, b: Array) -> float:
    """a b / (||a|| ||b||)."""
    dot = sum(float(p) * float(q) for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(float(p) ** 2 for p in a)) / math.sqrt(sum(float(q) ** 2 for q in b))


def plan_merge(metric: NDArray[np.floating], r: int, prefix: int) -> Plan:
    """Bipartite soft matching of one image: the r best pairs, A into B."""
    count = len(metric)
    metric = np.asarray(metric, np.float64)
    r = min(r, (count - prefix) // 2)
    set_a = [i for i in range(count) if i % 2 == 0]
    set_b = [j for j in range(count) if j % 2 == 1]
    best: list[tuple[float, int | None]] = []
    for i in set_a:
        score, partner = -math.inf, None
        for j in set_b:
            s = -math.inf if i < prefix or j < prefix else cosine(metric[i], metric[j])
            if s > score:
                score, partner = s, j
        best.append((score, partner))
    ranking = sorted(range(len(set_a)), key=lambda a: -best[a][0])
    moved, into = [], []
    for a in ranking[: max(r, 0)]:
        partner = best[a][1]
        assert partner is not None, "a protected token was asked to merge"
        moved.append(set_a[a])
        into.append(partner)
    protected = list(range(prefix))
    unmerged = [i for i in set_a if i not in moved and i not in protected]
    destinations = [j for j in set_b if j not in protected]
    return Plan(moved, into, protected + unmerged + destinations)


def apply_merge(rows: Rows, plan: Plan) -> Rows:
    """Weighted average: x_j = (s_j x_j + sum s_i x_i) / (s_j + sum s_i), over the i that join j."""
    x, size, source = [], [], []
    for j in plan.order:
        joining = [i for i, target in zip(plan.moved, plan.into, strict=True) if target == j]
        total = rows.size[j]
        weighted = rows.size[j] * rows.x[j]
        members = rows.source[j].copy()
        for i in joining:
            total = total + rows.size[i]
            weighted = weighted + rows.size[i] * rows.x[i]
            members = np.maximum(members, rows.source[i])
        x.append(weighted / total)
        size.append(total)
        source.append(members)
    return Rows(np.array(x), np.array(size), np.array(source))


def layer_norm(x: Array, params: Params, name: str, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) * w + b, row by row."""
    weight, bias = np.float64(params[f"{name}.weight"]), np.float64(params[f"{name}.bias"])
    rows = []
    for row in x:
        centered = row - row.sum() / len(row)
        variance = (centered**2).sum() / len(row)
        rows.append(centered / math.sqrt(variance + eps) * weight + bias)
    return np.array(rows)


def linear(x: Array, params: Params, name: str) -> Array:
    """x W^T + b."""
    weight = np.float64(params[f"{name}.weight"])
    y = np.array([[sum(row * out) for out in weight] for row in x])
    return y + np.float64(params[f"{name}.bias"]) if f"{name}.bias" in params else y


def attend(q: Array, k: Array, v: Array, log_size: Array) -> Array:
    """softmax(q k^T / sqrt(d) + log s) v of one head, query by query."""
    rows = []
    for query in q:
        scores = np.array([float(query @ key) / math.sqrt(len(query)) for key in k]) + log_size
        weights = np.exp(scores - scores.max())
        rows.append(sum(w * value for w, value in zip(weights / weights.sum(), v, strict=True)))
    return np.array(rows)


def gelu(x: Array) -> Array:
    """x Phi(x)."""
    return np.vectorize(lambda t: 0.5 * t * (1.0 + math.erf(t / math.sqrt(2.0))))(x)


def embed(params: Params, image: NDArray[np.floating], patch: tuple[int, int]) -> Array:
    """Patches in raster order, prefix tokens in front, position embeddings on all: (N, D)."""
    weight = np.float64(params["patch_embed.weight"])
    height, width = patch
    tokens = []
    for top in range(0, image.shape[1], height):
        for left in range(0, image.shape[2], width):
            tile = np.float64(image[:, top : top + height, left : left + width])
            tokens.append(np.array([(tile * kernel).sum() for kernel in weight]))
    x = np.array(tokens) + np.float64(params["patch_embed.bias"])
    prefix = [np.float64(params[name][0]) for name in ("cls_token", "dist_token", "reg_token") if name in params]
    return np.concatenate([*prefix, x]) + np.float64(params["pos_embed"][0])


def forward(
    params: Params,
    image: NDArray[np.floating],
    *,
    patch: tuple[int, int],
    heads: int,
    prefix: int,
    r: Sequence[int],
    prop_attn: bool = True,
    eps: float = 1e-6,
    observe: Callable[[Rows], None] = lambda rows: None,
) -> Array:
    """Logits (C,) of one image (3, H, W) of a plain ViT with class token, merging r[l] tokens in block l."""
    rows = fresh_rows(embed(params, image, patch))
    for block, removed in enumerate(r):
        name = f"blocks.{block}"
        qkv = linear(layer_norm(rows.x, params, f"{name}.norm1", eps), params, f"{name}.attn.qkv")
        q, k, v = np.split(qkv, 3, axis=1)
        queries, keys, values = (np.split(part, heads, axis=1) for part in (q, k, v))
        log_size = np.log(rows.size) if prop_attn else np.zeros(len(rows.size))
        mixed = [attend(*head, log_size) for head in zip(queries, keys, values, strict=True)]
        x = rows.x + linear(np.concatenate(mixed, axis=1), params, f"{name}.attn.proj")
        rows = Rows(x, rows.size, rows.source)
        if removed:
            rows = apply_merge(rows, plan_merge(sum(keys) / heads, removed, prefix))
        hidden = gelu(linear(layer_norm(rows.x, params, f"{name}.norm2", eps), params, f"{name}.mlp.fc1"))
        rows = Rows(rows.x + linear(hidden, params, f"{name}.mlp.fc2"), rows.size, rows.source)
        observe(rows)
    final = layer_norm(rows.x[:1], params, "norm", eps)
    return linear(final, params, "head")[0]
