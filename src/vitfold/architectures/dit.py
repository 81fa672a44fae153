"""The forward pass of a Diffusion Transformer with adaLN-Zero blocks, as its paper has it, written once over `Ops`.

It comes in pieces, so that a step can take from earlier ones what it does not compute anew (`diffusion.parts`).
"""

from __future__ import annotations

from collections.abc import Sequence

from vitfold.model.dit import MODULATIONS, DiTSpec
from vitfold.ops.protocol import Ops, T


def dit(ops: Ops[T], spec: DiTSpec, image: T, t_freq: T, label: T) -> T:
    """Return the model's prediction (B, O, Y, X) for noisy images (B, C, Y, X) at a timestep, of a class.

    `t_freq` (B, W) are those of `timestep_embedding`, `label` (B, classes + 1) is one-hot.

    Source: DiT (2212.09748), section 3.2.
    """
    given = modulations(ops, spec, condition(ops, spec, t_freq, label))
    return head(ops, spec, blocks(ops, spec, embed(ops, image), given, range(spec.num_layers)), given)


def condition(ops: Ops[T], spec: DiTSpec, t_freq: T, label: T) -> T:
    """Return what timestep and class do to the model: (B, 6 L + 2, D), six vectors per block and two for the head.

    Equation: c = fc2(silu(fc1 t_freq)) + table[label]; m = W silu(c) + b.

    It does not depend on the image, so a sampler computes it for all its steps before the first one.
    """
    shared = spec.condition == "shared"
    vectors = []
    first = given = None
    for block in range(spec.num_layers):
        if given is None or not shared:
            given = _embedding(ops, "condition" if shared else f"blocks.{block}.condition", t_freq, label)
        first = given if first is None else first
        rows = ops.linear(f"blocks.{block}.modulation", given)
        vectors.append(ops.reshape(rows, (MODULATIONS, spec.embed_dim)))
    assert first is not None
    vectors.append(ops.reshape(ops.linear("head.modulation", first), (2, spec.embed_dim)))
    return ops.concat(tuple(vectors), 1)


def _embedding(ops: Ops[T], site: str, t_freq: T, label: T) -> T:
    ops.scope(site, role="condition")
    hidden = ops.activation("silu", ops.linear(f"{site}.time.fc1", t_freq), f"{site}.time.act")
    given = ops.add(ops.linear(f"{site}.time.fc2", hidden), ops.linear(f"{site}.label", label))
    return ops.activation("silu", given, f"{site}.act")


def modulations(ops: Ops[T], spec: DiTSpec, conditioned: T) -> tuple[T, ...]:
    """Part what `condition` returned into its vectors (B, 1, D)."""
    ops.scope("modulations", role="condition")
    return ops.split(conditioned, spec.modulations, 1)


def embed(ops: Ops[T], image: T) -> T:
    """Patches and positions: (B, C, Y, X) -> (B, N, D)."""
    ops.scope("embed", role="embed")
    return ops.add(ops.patch_embed("patch_embed", image), ops.param("pos_embed"))


def blocks(ops: Ops[T], spec: DiTSpec, x: T, given: Sequence[T], which: range) -> T:
    """Run some of the blocks."""
    for block in which:
        x = add_gated(ops, x, attention(ops, spec, block, x, given), given[MODULATIONS * block + 2])
        x = add_gated(ops, x, mlp(ops, spec, block, x, given), given[MODULATIONS * block + 5])
    return x


def attention(ops: Ops[T], spec: DiTSpec, block: int, x: T, given: Sequence[T]) -> T:
    """Self-attention of one block before its gate: (B, N, D)."""
    site = f"blocks.{block}.attn"
    ops.scope(site, block, "attention")
    shift, scale = given[MODULATIONS * block : MODULATIONS * block + 2]
    q, k, v = ops.heads(f"{site}.qkv", modulated(ops, x, shift, scale, spec.norm_eps), 3, spec.num_heads)
    y = ops.transpose(ops.attention(site, q, k, v, None), (0, 2, 1, 3))
    return ops.linear(f"{site}.proj", ops.reshape(y, (spec.tokens, spec.embed_dim)))


def mlp(ops: Ops[T], spec: DiTSpec, block: int, x: T, given: Sequence[T]) -> T:
    """The MLP of one block before its gate: (B, N, D)."""
    site = f"blocks.{block}.mlp"
    ops.scope(site, block, "mlp")
    shift, scale = given[MODULATIONS * block + 3 : MODULATIONS * block + 5]
    hidden = ops.linear(f"{site}.fc1", modulated(ops, x, shift, scale, spec.mlp_norm_eps))
    return ops.linear(f"{site}.fc2", ops.activation(spec.activation, hidden, f"{site}.act"))


def modulated(ops: Ops[T], x: T, shift: T, scale: T, eps: float) -> T:
    """norm(x) (1 + scale) + shift."""
    normal = ops.layer_norm("unit_norm", x, eps)
    return ops.add(ops.multiply(normal, ops.add_scalar(scale, 1.0)), shift)


def add_gated(ops: Ops[T], x: T, y: T, gate: T) -> T:
    """X + gate y."""
    return ops.add(x, ops.multiply(gate, y))


def minus(ops: Ops[T], a: T, b: T) -> T:
    """A - b."""
    return ops.elementwise("subtract", a, b)


def head(ops: Ops[T], spec: DiTSpec, x: T, given: Sequence[T]) -> T:
    """Final norm, projection, and patches back in their places: (B, N, D) -> (B, O, Y, X)."""
    ops.scope("head", role="head")
    shift, scale = given[-2:]
    pixels = ops.linear("head.proj", modulated(ops, x, shift, scale, spec.norm_eps))
    grid, patch = spec.grid, spec.patch_size
    parted = ops.reshape(pixels, (grid, grid, patch, patch, spec.outputs))
    return ops.reshape(ops.transpose(parted, (0, 5, 1, 3, 2, 4)), (spec.outputs, spec.image_size, spec.image_size))
