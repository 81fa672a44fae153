"""What a block adds to each token, renewed for some of them: the token operations of TokenCache."""

from __future__ import annotations

from collections.abc import Sequence

from vitfold.architectures.dit import add_gated, blocks, minus, modulated
from vitfold.model.dit import MODULATIONS, DiTSpec
from vitfold.ops.protocol import Ops, T

HIDDEN = 64


def predictor_shapes(spec: DiTSpec) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a predictor's weights."""
    return {
        "predictor.fc1.weight": (HIDDEN, spec.embed_dim),
        "predictor.fc1.bias": (HIDDEN,),
        "predictor.fc2.weight": (spec.num_layers, HIDDEN),
        "predictor.fc2.bias": (spec.num_layers,),
    }


def predicted_scores(ops: Ops[T], spec: DiTSpec, x: T, shift: T, scale: T) -> T:
    """Return how much each token's part of every block should be computed anew: (B, N, L), from tokens (B, N, D).

    Equation: s = fc2 silu(fc1 u), u what the first block's attention reads, which knows timestep and class. Scores in
    (0, 1) are sigmoid(s); tokens are ranked by s itself, which has no ties where a sigmoid saturates.

    Source: TokenCache (2409.18523): a score for every token of every block, from the step's input; the network is ours.
    """
    ops.scope("predictor", role="reuse")
    read = modulated(ops, x, shift, scale, spec.norm_eps)
    hidden = ops.activation("silu", ops.linear("predictor.fc1", read), "predictor.act")
    return ops.linear("predictor.fc2", hidden)


def norm_scores(ops: Ops[T], kept: Sequence[T]) -> T:
    """Return the norms of what every block last added to each token, L tensors (B, N, D): (B, N, L)."""
    ops.scope("norms", role="reuse")
    return ops.concat(tuple(ops.norm(one) for one in kept), 2)


def renewed(ops: Ops[T], spec: DiTSpec, block: int, x: T, given: Sequence[T], kept: T, scored: T, count: int) -> T:
    """Return what a block adds to its tokens (B, N, D): as kept, but anew for the `count` tokens that score highest.

    Equation: f = f_new on those tokens, kept on the others.

    They attend to all tokens as they are now; the others run neither attention's queries nor the MLP.

    Source: TokenCache (2409.18523).
    """
    if count == 0:
        return kept
    if count == spec.tokens:
        return minus(ops, blocks(ops, spec, x, given, range(block, block + 1)), x)
    ops.scope(f"blocks.{block}.chosen", block, "reuse")
    index, _ = ops.topk_split(scored, count)
    moved = minus(ops, _new_rows(ops, spec, block, x, given, index, count), ops.take(kept, index))
    return ops.scatter_add(f"blocks.{block}.renewed", kept, index, moved)


def blended(ops: Ops[T], spec: DiTSpec, block: int, x: T, given: Sequence[T], kept: T, weights: T) -> T:
    """Return what a block adds to its tokens where every token is renewed as far as its score says: for training.

    Equation: f = kept + a (f_new - kept), which a gradient with respect to the scores can be taken of.

    Source: TokenCache (2409.18523).
    """
    new = minus(ops, blocks(ops, spec, x, given, range(block, block + 1)), x)
    return ops.add(kept, ops.multiply(weights, minus(ops, new, kept)))


def _new_rows(ops: Ops[T], spec: DiTSpec, block: int, x: T, given: Sequence[T], index: T, count: int) -> T:
    """What the block adds to the rows at `index` (B, R, 1), computed for them alone: (B, R, D)."""
    site, first = f"blocks.{block}", MODULATIONS * block
    ops.scope(f"{site}.attn", block, "attention")
    read = modulated(ops, x, given[first], given[first + 1], spec.norm_eps)
    q, k, v = ops.split(ops.linear(f"{site}.attn.qkv", read), 3, 2)
    q, k, v = _heads(ops, spec, ops.take(q, index), count), *(_heads(ops, spec, one, spec.tokens) for one in (k, v))
    y = ops.transpose(ops.attention(f"{site}.attn", q, k, v, None), (0, 2, 1, 3))
    y = ops.linear(f"{site}.attn.proj", ops.reshape(y, (count, spec.embed_dim)))
    ops.scope(f"{site}.mlp", block, "mlp")
    attended = ops.multiply(given[first + 2], y)
    rows = ops.add(ops.take(x, index), attended)
    read = modulated(ops, rows, given[first + 3], given[first + 4], spec.mlp_norm_eps)
    hidden = ops.activation(spec.activation, ops.linear(f"{site}.mlp.fc1", read), f"{site}.mlp.act")
    return add_gated(ops, attended, ops.linear(f"{site}.mlp.fc2", hidden), given[first + 5])


def _heads(ops: Ops[T], spec: DiTSpec, x: T, count: int) -> T:
    """Rows (B, R, D) part by part: (B, H, R, K)."""
    parted = ops.reshape(x, (count, spec.num_heads, spec.embed_dim // spec.num_heads))
    return ops.transpose(parted, (0, 2, 1, 3))
