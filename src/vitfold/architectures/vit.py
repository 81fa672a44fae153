"""The forward pass of a plain Vision Transformer, as its paper has it, written once over `Ops`.

Merging, deletions, registers and quantization are no part of it: they are changes of its program (`transforms`).
"""

from __future__ import annotations

from vitfold.model import ViTSpec
from vitfold.model.spec import hidden_state
from vitfold.ops.protocol import Ops, T


def vit(ops: Ops[T], spec: ViTSpec, image: T) -> tuple[T, ...]:
    """Return the model's outputs for images (B, 3, H, W), in the order of `spec.output_names`.

    Vectors are (B, C); tokens, and the output of a model that pools nothing, (B, N, D).

    Source: ViT (2010.11929), equations 1-4.
    """
    x = embed(ops, spec, image)
    made: dict[str, T] = {}
    for block in range(spec.num_layers):
        x = transformer_block(ops, spec, block, x)
        made[hidden_state(block + 1)] = x
    whole = "last_hidden_state" in spec.also
    if whole:
        x = made["last_hidden_state"] = final_norm(ops, spec, x)
    x = pool(ops, spec, x, normed=whole)
    if "image_embeds" in spec.also:
        made["image_embeds"] = ops.mean(x, 1) if spec.pool == "token_dist" else x
    made[spec.output] = head(ops, spec, x)
    return tuple(made[name] for name in spec.output_names)


def embed(ops: Ops[T], spec: ViTSpec, image: T) -> T:
    """Patches, prefix tokens and positions: (B, 3, H, W) -> (B, N, D)."""
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
    return ops.layer_norm("pre_norm", x, spec.norm_eps) if spec.pre_norm else x


def transformer_block(ops: Ops[T], spec: ViTSpec, block: int, x: T) -> T:
    """Attention, then MLP, each behind a norm and added to the residual stream: (B, N, D) -> (B, N, D)."""
    site = f"blocks.{block}"
    ops.scope(f"{site}.attn", block, "attention")
    q, k, v = ops.heads(f"{site}.attn.qkv", ops.layer_norm(f"{site}.norm1", x, spec.norm_eps), 3, spec.heads_of(block))
    if spec.qk_norm:
        q = ops.layer_norm(f"{site}.attn.q_norm", q, spec.norm_eps)
        k = ops.layer_norm(f"{site}.attn.k_norm", k, spec.norm_eps)
    y = ops.attention(f"{site}.attn", q, k, v, None)
    y = ops.reshape(ops.transpose(y, (0, 2, 1, 3)), (spec.tokens, spec.attention_dim_of(block)))
    y = ops.linear(f"{site}.attn.proj", y)
    if spec.layer_scale:
        y = ops.multiply(y, ops.param(f"{site}.ls1"))
    x = ops.add(x, y)
    ops.scope(f"{site}.mlp", block, "mlp")
    y = mlp(ops, spec, block, ops.layer_norm(f"{site}.norm2", x, spec.norm_eps))
    if spec.layer_scale:
        y = ops.multiply(y, ops.param(f"{site}.ls2"))
    return ops.add(x, y)


def mlp(ops: Ops[T], spec: ViTSpec, block: int, x: T) -> T:
    """fc2(act(fc1 x)), or fc2(act(g) * u) with (g, u) = fc1 x for SwiGLU (2002.05202)."""
    site = f"blocks.{block}.mlp"
    hidden = ops.linear(f"{site}.fc1", x)
    if spec.mlp == "swiglu":
        gate, up = ops.split(hidden, 2, 2)
        hidden = ops.multiply(ops.activation(spec.activation, gate, f"{site}.act"), up)
    else:
        hidden = ops.activation(spec.activation, hidden, f"{site}.act")
    return ops.linear(f"{site}.fc2", hidden)


def final_norm(ops: Ops[T], spec: ViTSpec, x: T) -> T:
    """The norm behind the last block, where the model has one."""
    ops.scope("pool", role="pool")
    return ops.layer_norm("norm", x, spec.norm_eps) if spec.final_norm else x


def pool(ops: Ops[T], spec: ViTSpec, x: T, *, normed: bool = False) -> T:
    """Final norm, unless that is done, and pooling: (B, D), (B, 2 D) or, without pooling, (B, N, D)."""
    ops.scope("pool", role="pool")
    read = {"token": 1, "token_dist": 2}.get(spec.pool)
    if read is not None:
        x = ops.slice(x, 1, 0, read)
    if not normed:
        x = final_norm(ops, spec, x)
    if spec.pool == "map":
        x = attention_pool(ops, spec, x)
    elif spec.pool == "avg":
        x = ops.mean(x if spec.pool_prefix else _patches(ops, spec, x), 1)
    elif spec.pool == "token_avg":
        mean = ops.mean(_patches(ops, spec, x), 1)
        x = ops.concat((_row(ops, spec, x, 0), mean), 1)
    elif spec.pool == "token":
        x = _row(ops, spec, x, 0)
    return ops.layer_norm("pool_norm", x, spec.norm_eps) if spec.pool_norm else x


def attention_pool(ops: Ops[T], spec: ViTSpec, x: T) -> T:
    """Let one learned query attend to the tokens, then an MLP with residual: (B, N, D) -> (B, D).

    It sees the prefix tokens only where `spec.pool_prefix` says so.

    Source: SigLIP (2303.15343) and its MAP head (2106.04560, section 3).
    """
    heads, head_dim = spec.map_heads, spec.embed_dim // spec.map_heads
    if not spec.pool_prefix:
        x = _patches(ops, spec, x)
    q = ops.linear("pool.q", ops.param("pool.latent"))
    q = ops.transpose(ops.reshape(q, (1, heads, head_dim)), (0, 2, 1, 3))
    k, v = ops.heads("pool.kv", x, 2, heads)
    y = ops.attention("pool.attn", q, k, v, None)
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


def _patches(ops: Ops[T], spec: ViTSpec, x: T) -> T:
    """The rows behind the prefix."""
    return ops.slice(x, 1, spec.prefix, spec.tokens) if spec.prefix else x


def _row(ops: Ops[T], spec: ViTSpec, x: T, row: int) -> T:
    return ops.reshape(ops.slice(x, 1, row, row + 1), (spec.embed_dim,))
