"""What a block adds to each token, renewed for some of them: the token operations of TokenCache."""

from __future__ import annotations

from collections.abc import Sequence

from vitfold.architectures.dit import add_gated, blocks, minus, modulated
from vitfold.model.dit import MODULATIONS, DiTSpec
from vitfold.ops.protocol import Ops, T

HIDDEN = 16


def predictor_shapes(spec: DiTSpec) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a predictor's weights."""
    found: dict[str, tuple[int, ...]] = {}
    for block in range(spec.num_layers):
        site = f"blocks.{block}.predictor"
        found |= {f"{site}.fc1.weight": (HIDDEN, spec.embed_dim), f"{site}.fc1.bias": (HIDDEN,)}
        found |= {f"{site}.fc2.weight": (1, HIDDEN), f"{site}.fc2.bias": (1,)}
    return found


def scores(ops: Ops[T], spec: DiTSpec, block: int, x: T, given: Sequence[T]) -> T:
    """Return how far each token's part of the block should be computed anew, in (0, 1): (B, N, 1).

    Equation: a = sigmoid(fc2 silu(fc1 u)), u what the block's attention reads, which knows timestep and class.

    Source: TokenCache (2409.18523); the network is ours.
    """
    site = f"blocks.{block}.predictor"
    ops.scope(site, block, "reuse")
    shift, scale = given[MODULATIONS * block : MODULATIONS * block + 2]
    read = modulated(ops, x, shift, scale, spec.norm_eps)
    hidden = ops.activation("silu", ops.linear(f"{site}.fc1", read), f"{site}.act")
    logits = ops.linear(f"{site}.fc2", hidden)
    return ops.scale(ops.add_scalar(ops.tanh(ops.scale(logits, 0.5)), 1.0), 0.5)


def renewed(ops: Ops[T], spec: DiTSpec, block: int, x: T, given: Sequence[T], kept: T, count: int) -> T:
    """Return what a block adds to its tokens: as kept, but anew for the `count` tokens that score highest (B, N, D).

    Equation: f = f_new on those tokens, kept on the others.

    They attend to all tokens as they are now; the others run neither attention's queries nor the MLP.

    Source: TokenCache (2409.18523).
    """
    if count == 0:
        return kept
    if count == spec.tokens:
        return minus(ops, blocks(ops, spec, x, given, range(block, block + 1)), x)
    weights = scores(ops, spec, block, x, given)
    ops.scope(f"blocks.{block}.chosen", block, "reuse")
    index, _ = ops.topk_split(weights, count)
    moved = minus(ops, _new_rows(ops, spec, block, x, given, index, count), ops.take(kept, index))
    return ops.scatter_add(f"blocks.{block}.renewed", kept, index, moved)


def blended(ops: Ops[T], spec: DiTSpec, block: int, x: T, given: Sequence[T], kept: T) -> T:
    """Return what a block adds to its tokens where every token is renewed as far as its score says: for training.

    Equation: f = kept + a (f_new - kept), which a gradient with respect to the scores can be taken of.

    Source: TokenCache (2409.18523).
    """
    weights = scores(ops, spec, block, x, given)
    new = minus(ops, blocks(ops, spec, x, given, range(block, block + 1)), x)
    return ops.add(kept, ops.multiply(weights, minus(ops, new, kept)))


def _new_rows(ops: Ops[T], spec: DiTSpec, block: int, x: T, given: Sequence[T], index: T, count: int) -> T:
    """What the block adds to the rows at `index` (B, R, 1), computed for them alone: (B, R, D)."""
    site, first = f"blocks.{block}", MODULATIONS * block
    ops.scope(f"{site}.attn", block, "attention")
    read = modulated(ops, x, given[first], given[first + 1], spec.norm_eps)
    q, k, v = ops.heads(f"{site}.attn.qkv", read, 3, spec.num_heads)
    q = ops.take(ops.reshape(ops.transpose(q, (0, 2, 1, 3)), (spec.tokens, spec.embed_dim)), index)
    q = ops.transpose(ops.reshape(q, (count, spec.num_heads, spec.embed_dim // spec.num_heads)), (0, 2, 1, 3))
    y = ops.transpose(ops.attention(f"{site}.attn", q, k, v, None), (0, 2, 1, 3))
    y = ops.linear(f"{site}.attn.proj", ops.reshape(y, (count, spec.embed_dim)))
    ops.scope(f"{site}.mlp", block, "mlp")
    before = ops.take(x, index)
    rows = add_gated(ops, before, y, given[first + 2])
    read = modulated(ops, rows, given[first + 3], given[first + 4], spec.mlp_norm_eps)
    hidden = ops.activation(spec.activation, ops.linear(f"{site}.mlp.fc1", read), f"{site}.mlp.act")
    rows = add_gated(ops, rows, ops.linear(f"{site}.mlp.fc2", hidden), given[first + 5])
    return minus(ops, rows, before)
