"""What the program does about sink tokens: cached registers, deletions, tokens that go apart, moved neurons.

Owns the forward pass of every field of `model.Sinks`; a model without one never comes here. Registers are keys and
values only: they have no query, no residual stream and no MLP, and take no part in matching.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from vitfold.architectures.tokens import Tokens
from vitfold.model import Array, ViTSpec
from vitfold.ops.protocol import Ops, T
from vitfold.recipe import Order

PREFIX_ROWS = "prefix"
SINK_ROWS = "sinks"
PARTS = ("attn.qkv", "mlp.fc1", "mlp.fc2")
"""Layers of a block in which tokens can go apart. The projection sees averages of values, which have no outliers."""


def attend_registers(
    ops: Ops[T], spec: ViTSpec, block: int, k: T, v: T, bias: T | None, *, count: int
) -> tuple[T, T, T | None]:
    """Put the cached keys and values (1, H, R, K) in front of a block's own, each counted tau times.

    tau copies of a key and its value are one with log tau on its logit: tau e^s = e^(s + log tau). Where scores have no
    bias yet, a few whole copies stand there instead: a bias is one more pass over all scores, a copy one more key.

    Source: RegCache (2510.04547), section 4.2; the single row is algebra and lets tau be any positive number.
    """
    sinks = spec.sinks
    rows = 0 if sinks is None else sinks.cached(block)
    if sinks is None or not rows:
        return k, v, bias
    site = f"blocks.{block}.attn"
    copies = sinks.copies if bias is None else 1
    k, v = (
        ops.prepend_rows(cached if copies == 1 else ops.concat((cached,) * copies, 2), own)
        for cached, own in ((ops.param(f"{site}.cached_k"), k), (ops.param(f"{site}.cached_v"), v))
    )
    if copies > 1:
        return k, v, None
    weight = np.full((1, rows, 1), math.log(sinks.tau), np.float32)
    if bias is not None:
        column = ops.prepend_rows(ops.constant(weight), ops.reshape(bias, (count, 1)))
        bias = ops.reshape(column, (1, 1, rows + count))
    elif sinks.tau != 1.0:
        weights = np.concatenate((weight, np.zeros((1, count, 1), np.float32)), 1)
        bias = ops.constant(weights.reshape(1, 1, 1, rows + count))
    return k, v, bias


def delete_sinks(
    ops: Ops[T], spec: ViTSpec, block: int, tokens: Tokens[T], *, order: Order | None, trace: bool
) -> Tokens[T]:
    """Drop the patch tokens of largest norm in front of a block; never a prefix token, always equally many.

    Equation: N' = N - d, without argtop-d of max_c |x_nc| over patch tokens n.

    Source: RegCache (2510.04547), section 4.3.
    """
    deleted = 0 if spec.sinks is None else spec.sinks.deleted(block)
    if not deleted:
        return tokens
    ops.scope(f"blocks.{block}.delete", block, "merge")
    norms = ops.abs_max(ops.slice(tokens.x, 1, tokens.prefix, tokens.count))
    _, kept = ops.topk_split(norms, deleted, by_score=order == "score")
    survivors = ops.pad_index(ops.affine_index(kept, 1, tokens.prefix), range(tokens.prefix), range(0))
    source = tokens.source
    if trace:
        source = source if source is not None else ops.identity_like(ops.slice(tokens.x, 2, 0, 1))
        source = ops.take(source, survivors)
    return replace(
        tokens,
        x=ops.take(tokens.x, survivors),
        count=tokens.count - deleted,
        size=None if tokens.size is None else ops.take(tokens.size, survivors),
        source=source,
    )


def linear_apart(ops: Ops[T], spec: ViTSpec, layer: str, x: T, *, count: int, prefix: int) -> T:
    """Apply a linear layer in which some tokens are apart, so that they do not decide the range of the others.

    Prefix tokens get a range of their own; or the largest tokens stay float: y = Q(x) W^T + b everywhere but there.
    """
    sinks = spec.sinks
    if sinks is None or layer not in sinks.layers:
        return ops.linear(layer, x)
    if sinks.split_prefix:
        front = ops.linear(layer, ops.slice(x, 1, 0, prefix), PREFIX_ROWS)
        return ops.concat((front, ops.linear(layer, ops.slice(x, 1, prefix, count))), 1)
    site = f"{layer}.{SINK_ROWS}"
    largest, _ = ops.topk_split(ops.abs_max(x), sinks.apart)
    rows = ops.take(x, largest)
    y = ops.linear(layer, ops.scatter_add(site, x, largest, ops.scale(rows, -1.0)))
    change = ops.add(ops.linear(layer, rows, SINK_ROWS), ops.scale(ops.take(y, largest), -1.0))
    return ops.scatter_add(site, y, largest, change)


def move_neurons(ops: Ops[T], spec: ViTSpec, block: int, hidden: T, *, count: int, prefix: int) -> T:
    """Move hidden units of an MLP to the model's last register: it gets their maximum, every other token zero.

    Source: test-time registers (2506.08010), section 4.
    """
    units = () if spec.sinks is None else spec.sinks.moved(block)
    if not units:
        return hidden
    moved, register = np.zeros((1, 1, spec.mlp_dim), np.float32), np.zeros((1, count, 1), np.float32)
    moved[..., list(units)], register[:, prefix - 1] = 1.0, 1.0
    top = ops.reshape(ops.reduce_max(hidden, 1), (1, spec.mlp_dim))
    onto = ops.multiply(ops.constant(register), ops.multiply(top, ops.constant(moved)))
    return ops.add(ops.multiply(hidden, ops.constant(1.0 - moved)), onto)


def refill(ops: Ops[T], spec: ViTSpec, tokens: Tokens[T], x: T) -> T:
    """Give deleted places (zero rows of x, in raster order) the mean of their neighbours: (B, N_0, D).

    Equation: x_n + (1 - c_n) sum_m w_nm c_m x_m / sum_m w_nm c_m with c_m = 1 where m was not deleted.

    Source: RegCache (2510.04547), appendix on dense tasks.
    """
    if spec.sinks is None or not spec.sinks.deletions or tokens.source is None:
        return x
    ops.scope("pool.refill")
    originals = spec.tokens
    covered = ops.reshape(ops.sum(tokens.source, 1), (originals, 1))
    weights = ops.constant(neighbour_weights(spec))
    near = ops.divide(ops.matmul("pool.refill", weights, x), ops.matmul("pool.refill.weights", weights, covered))
    missing = ops.add_scalar(ops.scale(covered, -1.0), 1.0)
    return ops.add(x, ops.multiply(missing, near))


def neighbour_weights(spec: ViTSpec) -> Array:
    """Return (1, N_0, N_0): 1 between the eight neighbours of the grid, 16 times less per step beyond, 2^-12 at least.

    What lies beyond counts only where all nearer places were deleted too. Prefix tokens are nobody's neighbours.
    """
    rows, columns = np.divmod(np.arange(spec.patches), spec.grid[1])
    steps = np.maximum(np.abs(rows[:, None] - rows), np.abs(columns[:, None] - columns))
    weights = np.zeros((1, spec.tokens, spec.tokens), np.float32)
    weights[0, : spec.prefix, : spec.prefix] = 1.0
    near = np.maximum(16.0 ** (1.0 - np.maximum(steps, 1)), 2.0**-12)
    weights[0, spec.prefix :, spec.prefix :] = np.where(steps == 0, 0.0, near)
    return weights


def without_register(ops: Ops[T], spec: ViTSpec, x: T) -> T:
    """Leave the register that neurons moved to out of a dense output, which has as many rows as the model had."""
    if spec.sinks is None or not spec.sinks.neurons:
        return x
    last = spec.prefix
    rest = ops.slice(x, 1, last, spec.tokens)
    return rest if last == 1 else ops.concat((ops.slice(x, 1, 0, last - 1), rest), 1)
