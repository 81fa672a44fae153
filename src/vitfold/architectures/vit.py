"""The forward pass of a plain Vision Transformer, written once over `Ops`.

Owns the order of operations of every supported ViT feature. What an operation does is the
interpreter's business; which weights it has is the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vitfold.architectures.rules import Reduction, reduce_tokens
from vitfold.architectures.sinks import (
    attend_registers,
    delete_sinks,
    linear_apart,
    move_neurons,
    refill,
    without_register,
)
from vitfold.architectures.tokens import Tokens, log_size, unmerge, weighted_mean, without_prefix
from vitfold.model import ViTSpec
from vitfold.ops.protocol import Ops, T
from vitfold.recipe import MergeRecipe, tokens_per_block

Observe = Callable[[int, Tokens[T]], None]


def vit(
    ops: Ops[T],
    spec: ViTSpec,
    recipe: MergeRecipe,
    image: T,
    *,
    trace: bool = False,
    observe: Observe[T] | None = None,
) -> T:
    """Return the model's output (B, C) for images (B, 3, H, W); (B, N_0, C) where it pools nothing.

    With `trace`, tokens carry the source matrix; `observe(l, tokens)` sees them after block l.

    Source: ViT (2010.11929), equations 1-4; merging between attention and MLP as ToMe (2210.09461).
    """
    return resume(ops, spec, recipe, embed(ops, spec, image), 0, trace=trace, observe=observe)


def resume(
    ops: Ops[T],
    spec: ViTSpec,
    recipe: MergeRecipe,
    tokens: Tokens[T],
    first: int,
    *,
    trace: bool = False,
    observe: Observe[T] | None = None,
) -> T:
    """Return the output of the blocks from `first` on, of pooling and of the head, for the tokens that enter there.

    `observe(first - 1, tokens)` saw these tokens; what stands in front of a block, as deletions do, is still to come.
    """
    tokens_per_block(spec, recipe.r)
    trace = trace or spec.pool == "none"
    for block in range(first, spec.num_layers):
        r = recipe.r[block] if recipe.r else 0
        tokens = delete_sinks(ops, spec, block, tokens, order=recipe.order, trace=trace)
        tokens = transformer_block(ops, spec, block, tokens, r=r, recipe=recipe, trace=trace)
        if observe is not None:
            observe(block, tokens)
    return head(ops, spec, pool(ops, spec, tokens, recipe))


def embed(ops: Ops[T], spec: ViTSpec, image: T) -> Tokens[T]:
    """Patches, prefix tokens and positions."""
    ops.scope("embed", role="embed")
    x = ops.patch_embed("patch_embed", image)
    if spec.pos_embed == "patches":
        x = ops.add(x, ops.param("pos_embed"))
    names = [
        name
        for name, present in (
            ("cls_token", spec.class_token),
            ("dist_token", spec.dist_token),
            ("reg_token", spec.registers),
        )
        if present
    ]
    if names:
        rows = tuple(ops.param(name) for name in names)
        x = ops.prepend_rows(rows[0] if len(rows) == 1 else ops.concat(rows, 1), x)
    if spec.pos_embed == "all":
        x = ops.add(x, ops.param("pos_embed"))
    if spec.pre_norm:
        x = ops.layer_norm("pre_norm", x, spec.norm_eps)
    return Tokens(x=x, count=spec.tokens, prefix=spec.prefix)


def transformer_block(
    ops: Ops[T], spec: ViTSpec, block: int, tokens: Tokens[T], *, r: int, recipe: MergeRecipe, trace: bool
) -> Tokens[T]:
    """Attention on N tokens, merging, MLP on N - r tokens."""
    site = f"blocks.{block}"
    ops.scope(f"{site}.attn", block, "attention")
    count = tokens.count
    x = ops.layer_norm(f"{site}.norm1", tokens.x, spec.norm_eps)
    q, k, v = _qkv(ops, spec, f"{site}.attn.qkv", x, tokens)
    if spec.qk_norm:
        q = ops.layer_norm(f"{site}.attn.q_norm", q, spec.norm_eps)
        k = ops.layer_norm(f"{site}.attn.k_norm", k, spec.norm_eps)
    bias = log_size(ops, tokens) if recipe.prop_attn else None
    keys, values, bias = attend_registers(ops, spec, block, k, v, bias, count=count)
    y = ops.attention(f"{site}.attn", q, keys, values, bias)
    y = ops.reshape(ops.transpose(y, (0, 2, 1, 3)), (count, spec.attention_dim))
    y = ops.linear(f"{site}.attn.proj", y)
    if spec.layer_scale:
        y = ops.multiply(y, ops.param(f"{site}.ls1"))
    tokens = replace(tokens, x=ops.add(tokens.x, y))
    if r:
        here = Reduction(
            tokens=tokens,
            q=q,
            k=k,
            r=r,
            width=spec.embed_dim,
            head_width=spec.head_dim,
            originals=spec.tokens,
            depth_ratio=block / spec.num_layers,
            order=recipe.order,
            trace=trace,
        )
        ops.scope(f"{site}.attn", block, "merge")
        tokens = reduce_tokens(ops, recipe.rule, f"{site}.merge", here)
    ops.scope(f"{site}.mlp", block, "mlp")
    y = mlp(ops, spec, block, tokens, ops.layer_norm(f"{site}.norm2", tokens.x, spec.norm_eps))
    if spec.layer_scale:
        y = ops.multiply(y, ops.param(f"{site}.ls2"))
    return replace(tokens, x=ops.add(tokens.x, y))


def _qkv(ops: Ops[T], spec: ViTSpec, layer: str, x: T, tokens: Tokens[T]) -> tuple[T, ...]:
    """Queries, keys and values (B, H, N, K), also where some tokens go apart."""
    if spec.sinks is None or layer not in spec.sinks.layers:
        return ops.heads(layer, x, 3, spec.num_heads)
    y = linear_apart(ops, spec, layer, x, count=tokens.count, prefix=tokens.prefix)
    rows = ops.reshape(y, (tokens.count, 3 * spec.num_heads, spec.head_dim))
    return ops.split(ops.transpose(rows, (0, 2, 1, 3)), 3, 1)


def mlp(ops: Ops[T], spec: ViTSpec, block: int, tokens: Tokens[T], x: T) -> T:
    """fc2(act(fc1 x)), or fc2(act(g) * u) with (g, u) = fc1 x for SwiGLU (2002.05202)."""
    site, rows = f"blocks.{block}.mlp", {"count": tokens.count, "prefix": tokens.prefix}
    hidden = linear_apart(ops, spec, f"{site}.fc1", x, **rows)
    if spec.mlp == "swiglu":
        gate, up = ops.split(hidden, 2, 2)
        hidden = ops.multiply(ops.activation(spec.activation, gate, f"{site}.act"), up)
    else:
        hidden = ops.activation(spec.activation, hidden, f"{site}.act")
    hidden = move_neurons(ops, spec, block, hidden, **rows)
    return linear_apart(ops, spec, f"{site}.fc2", hidden, **rows)


def pool(ops: Ops[T], spec: ViTSpec, tokens: Tokens[T], recipe: MergeRecipe) -> T:
    """Final norm and pooling: (B, D), (B, 2 D) or, without pooling, (B, N_0, D)."""
    ops.scope("pool", role="pool")
    read = {"token": 1, "token_dist": 2}.get(spec.pool)
    deletes = (spec.sinks is not None and spec.sinks.deletions > 0) or (recipe.rule == "tofu" and any(recipe.r))
    if read is not None:
        tokens = replace(tokens, x=ops.slice(tokens.x, 1, 0, read))
    if spec.final_norm:
        tokens = replace(tokens, x=ops.layer_norm("norm", tokens.x, spec.norm_eps))
    if spec.pool == "none":
        x = without_register(ops, spec, refill(ops, spec, tokens, unmerge(ops, "pool.unmerge", tokens)))
    elif spec.pool == "map":
        x = attention_pool(ops, spec, tokens, prop_attn=recipe.prop_attn)
    elif spec.pool == "avg":
        originals = spec.tokens if spec.pool_prefix else spec.patches
        x = weighted_mean(ops, tokens, originals=None if deletes else originals, with_prefix=spec.pool_prefix)
    elif spec.pool == "token_avg":
        mean = weighted_mean(ops, tokens, originals=None if deletes else spec.patches, with_prefix=False)
        x = ops.concat((_row(ops, spec, tokens.x, 0), mean), 1)
    elif spec.pool == "token_dist":
        x = tokens.x
    else:
        x = _row(ops, spec, tokens.x, 0)
    return ops.layer_norm("pool_norm", x, spec.norm_eps) if spec.pool_norm else x


def attention_pool(ops: Ops[T], spec: ViTSpec, tokens: Tokens[T], *, prop_attn: bool) -> T:
    """Let one learned query attend to the tokens, then an MLP with residual: (B, N, D) -> (B, D).

    It sees the prefix tokens only where `spec.pool_prefix` says so.

    Merged tokens count by their size in this attention too.

    Source: SigLIP (2303.15343) and its MAP head (2106.04560, section 3).
    """
    heads, head_width = spec.map_heads, spec.embed_dim // spec.map_heads
    if tokens.prefix and not spec.pool_prefix:
        tokens = without_prefix(ops, tokens)
    bias = log_size(ops, tokens) if prop_attn else None
    q = ops.linear("pool.q", ops.param("pool.latent"))
    q = ops.transpose(ops.reshape(q, (1, heads, head_width)), (0, 2, 1, 3))
    k, v = ops.heads("pool.kv", tokens.x, 2, heads)
    y = ops.attention("pool.attn", q, k, v, bias)
    y = ops.linear("pool.proj", ops.reshape(ops.transpose(y, (0, 2, 1, 3)), (1, spec.embed_dim)))
    if spec.map_mlp_width:
        hidden = ops.linear("pool.mlp.fc1", ops.layer_norm("pool.norm", y, spec.norm_eps))
        y = ops.add(y, ops.linear("pool.mlp.fc2", ops.activation(spec.map_activation, hidden, "pool.mlp.act")))
    return ops.reshape(y, (spec.embed_dim,))


def head(ops: Ops[T], spec: ViTSpec, x: T) -> T:
    """Classifier or projection, where the model has one."""
    ops.scope("head", role="head")
    if spec.pool == "token_dist" and spec.outputs:
        first = ops.linear("head", _row(ops, spec, x, 0))
        second = ops.linear("head_dist", _row(ops, spec, x, 1))
        return ops.scale(ops.add(first, second), 0.5)
    if spec.pool == "token_dist":
        return ops.mean(x, 1)
    if spec.outputs:
        x = ops.linear("head", x)
    return ops.tanh(x) if spec.head_activation == "tanh" else x


def _row(ops: Ops[T], spec: ViTSpec, x: T, row: int) -> T:
    return ops.reshape(ops.slice(x, 1, row, row + 1), (spec.embed_dim,))
