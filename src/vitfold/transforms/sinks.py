"""What a program does about sink tokens: cached registers, deletions, tokens that go apart, moved neurons.

Each field of `model.Sinks` is a change of any program. Registers are keys and values only: they have no query, no
residual stream and no MLP, and take no part in matching.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from vitfold.model import Array, Sinks
from vitfold.ops.protocol import Ops, T
from vitfold.program import Node, Program
from vitfold.program.program import Shape
from vitfold.program.trace import Recorder, Traced, replay
from vitfold.recipe import Order
from vitfold.transforms.rewriting import rewrite
from vitfold.transforms.tokens import Tokens, places

PREFIX_ROWS = "prefix"
SINK_ROWS = "sinks"


def with_sinks(program: Program, shapes: Mapping[str, Shape], sinks: Sinks, prefix: int) -> Program:
    """Return the program with cached registers, tokens apart and moved neurons; deletions are `merged`'s.

    Args:
        shapes: those of the parameters, cached keys and values among them.
        prefix: rows that stand in front of the patches.
    """
    last = {node.block: node for node in program.nodes if node.op == "linear" and node.role == "mlp"}

    def change(ops: Ops[Traced], node: Node, given: Mapping[str, object]) -> tuple[Traced, ...] | None:
        if node.op == "attention" and node.block is not None and sinks.cached(node.block):
            q, k, v, bias = (given[name] for name in ("q", "k", "v", "bias"))
            assert isinstance(q, Traced)
            assert isinstance(k, Traced)
            assert isinstance(v, Traced)
            assert bias is None or isinstance(bias, Traced)
            keys, values, bias = attend_registers(ops, sinks, node.block, node.site, k, v, bias, count=k.shape[2])
            return (ops.attention(node.attributes["site"], q, keys, values, bias),)
        units = sinks.moved(node.block) if node.block is not None and last.get(node.block) is node else ()
        apart = node.op in ("linear", "heads") and node.attributes["layer"] in sinks.layers
        if not units and not apart:
            return None
        x, layer = given["x"], node.attributes["layer"]
        assert isinstance(x, Traced)
        if units:
            x = move_neurons(ops, units, x, count=x.shape[1], width=x.shape[2], register=prefix - 1)
        if not apart:
            return (ops.linear(layer, x, node.attributes["rows"]),)
        y = linear_apart(ops, sinks, layer, x, count=x.shape[1], prefix=prefix)
        if node.op == "linear":
            return (y,)
        parts, heads = node.attributes["parts"], node.attributes["heads"]
        rows = ops.reshape(y, (x.shape[1], parts * heads, y.shape[2] // (parts * heads)))
        return ops.split(ops.transpose(rows, (0, 2, 1, 3)), parts, 1)

    return rewrite(program, shapes, change)


def attend_registers(
    ops: Ops[T], sinks: Sinks, block: int, site: str, k: T, v: T, bias: T | None, *, count: int
) -> tuple[T, T, T | None]:
    """Put the cached keys and values (1, H, R, K) in front of a block's own, each counted tau times.

    tau copies of a key and its value are one with log tau on its logit: tau e^s = e^(s + log tau). Where scores have no
    bias yet, a few whole copies stand there instead: a bias is one more pass over all scores, a copy one more key.

    Source: RegCache (2510.04547), section 4.2; the single row is algebra and lets tau be any positive number.
    """
    rows = sinks.cached(block)
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


def delete_largest(ops: Ops[T], tokens: Tokens[T], count: int, *, order: Order | None, trace: bool) -> Tokens[T]:
    """Drop the `count` patch tokens of largest norm; never a prefix token, always equally many.

    Equation: N' = N - d, without argtop-d of max_c |x_nc| over patch tokens n.

    Source: RegCache (2510.04547), section 4.3.
    """
    return without_rows(ops, tokens, largest_left(ops, tokens.x, tokens, count, order=order), count, trace=trace)


def largest_left(ops: Ops[T], x: T, tokens: Tokens[T], count: int, *, order: Order | None) -> T:
    """Return the rows (B, N - d, 1) that stay where the `count` patches of largest max_c |x_nc| go; x is (B, N, C)."""
    norms = ops.abs_max(ops.slice(x, 1, tokens.prefix, tokens.count))
    _, kept = ops.topk_split(norms, count, by_score=order == "score")
    return ops.pad_index(ops.affine_index(kept, 1, tokens.prefix), range(tokens.prefix), range(0))


def without_rows(ops: Ops[T], tokens: Tokens[T], survivors: T, count: int, *, trace: bool) -> Tokens[T]:
    """Return the tokens without the `count` that are not among the survivors (B, N - d, 1)."""
    source = tokens.source
    if trace:
        source = source if source is not None else ops.identity_like(ops.slice(tokens.x, 2, 0, 1))
        source = ops.take(source, survivors)
    return replace(
        tokens,
        x=ops.take(tokens.x, survivors),
        count=tokens.count - count,
        size=None if tokens.size is None else ops.take(tokens.size, survivors),
        source=source,
        origin=places(ops, tokens, survivors),
    )


def linear_apart(ops: Ops[T], sinks: Sinks, layer: str, x: T, *, count: int, prefix: int) -> T:
    """Apply a linear layer in which some tokens are apart, so that they do not decide the range of the others.

    Prefix tokens get a range of their own; or the largest tokens stay float: y = Q(x) W^T + b everywhere but there.
    """
    if sinks.split_prefix:
        front = ops.linear(layer, ops.slice(x, 1, 0, prefix), PREFIX_ROWS)
        return ops.concat((front, ops.linear(layer, ops.slice(x, 1, prefix, count))), 1)
    site = f"{layer}.{SINK_ROWS}"
    largest, _ = ops.topk_split(ops.abs_max(x), sinks.apart)
    rows = ops.take(x, largest)
    y = ops.linear(layer, ops.scatter_add(site, x, largest, ops.scale(rows, -1.0)))
    change = ops.add(ops.linear(layer, rows, SINK_ROWS), ops.scale(ops.take(y, largest), -1.0))
    return ops.scatter_add(site, y, largest, change)


def move_neurons(ops: Ops[T], units: tuple[int, ...], hidden: T, *, count: int, width: int, register: int) -> T:
    """Move hidden units (B, N, D) of an MLP to row `register`: it gets their maximum, every other token zero.

    Source: test-time registers (2506.08010), section 4.
    """
    moved, row = np.zeros((1, 1, width), np.float32), np.zeros((1, count, 1), np.float32)
    moved[..., list(units)], row[:, register] = 1.0, 1.0
    top = ops.reshape(ops.reduce_max(hidden, 1), (1, width))
    onto = ops.multiply(ops.constant(row), ops.multiply(top, ops.constant(moved)))
    return ops.add(ops.multiply(hidden, ops.constant(1.0 - moved)), onto)


def refill(ops: Ops[T], prefix: int, grid: tuple[int, int], source: T, x: T) -> T:
    """Give deleted places (zero rows of x, in raster order) the mean of their neighbours: (B, N_0, D).

    Equation: x_n + (1 - c_n) sum_m w_nm c_m x_m / sum_m w_nm c_m with c_m = 1 where m was not deleted.

    Source: RegCache (2510.04547), appendix on dense tasks.
    """
    ops.scope("pool.refill")
    covered = ops.reshape(ops.sum(source, 1), (prefix + grid[0] * grid[1], 1))
    weights = ops.constant(neighbour_weights(prefix, grid))
    near = ops.divide(ops.matmul("pool.refill", weights, x), ops.matmul("pool.refill.weights", weights, covered))
    missing = ops.add_scalar(ops.scale(covered, -1.0), 1.0)
    return ops.add(x, ops.multiply(missing, near))


def neighbour_weights(prefix: int, grid: tuple[int, int]) -> Array:
    """Return (1, N_0, N_0): 1 between the eight neighbours of the grid, 16 times less per step beyond, 2^-12 at least.

    What lies beyond counts only where all nearer places were deleted too. Prefix tokens are nobody's neighbours.
    """
    patches = grid[0] * grid[1]
    rows, columns = np.divmod(np.arange(patches), grid[1])
    steps = np.maximum(np.abs(rows[:, None] - rows), np.abs(columns[:, None] - columns))
    weights = np.zeros((1, prefix + patches, prefix + patches), np.float32)
    weights[0, :prefix, :prefix] = 1.0
    near = np.maximum(16.0 ** (1.0 - np.maximum(steps, 1)), 2.0**-12)
    weights[0, prefix:, prefix:] = np.where(steps == 0, 0.0, near)
    return weights


def without_row(program: Program, shapes: Mapping[str, Shape], name: str, row: int) -> Program:
    """Leave a row of an output (B, N, D) out: that of a register which the model did not have."""
    recorder = Recorder(shapes, program.inputs)
    whole = dict(zip(program.outputs, replay(program, recorder.ops, *recorder.enter()), strict=True))
    ops, x = recorder.ops, whole[name]
    rest = ops.slice(x, 1, row + 1, x.shape[1])
    whole[name] = rest if row == 0 else ops.concat((ops.slice(x, 1, 0, row), rest), 1)
    return recorder.program(whole)
