"""A denoising step cut into parts, each a program with named inputs and outputs, so that steps can share results.

Owns what every part computes and what it hands on: predictions, and the few tensors that caches hold. When which part
runs is a plan's choice, where it runs an executor's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from vitfold.architectures.dit import (
    add_gated,
    attention,
    blocks,
    condition,
    embed,
    head,
    minus,
    mlp,
    modulations,
)
from vitfold.diffusion.token_refresh import renewed
from vitfold.model.dit import MODULATIONS, DiTSpec
from vitfold.ops.protocol import Ops, Port, T

Cut = Literal["whole", "stack", "modules", "first", "tokens"]
"""What of a step is kept: nothing, the residual of all blocks, every module's output, of all blocks but the first; or
of every block, to be renewed token by token."""

WEIGHTS = "weights"
RESIDUAL = "residual"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A program `run(ops, *inputs) -> outputs`."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    run: Callable[..., tuple[Any, ...]]


def parts(spec: DiTSpec, cut: Cut, *, history: int = 1, counts: tuple[int, ...] = (), r: int = 0) -> dict[str, Part]:
    """Return the parts of a step: always `condition` and `step`, the whole of it, and others by what is kept.

    stack: `full` (also hands out the residual of all blocks) and `resume` (takes a weighted sum of `history` of them);
    modules: the same with the output of every attention and MLP before its gate, of the last full step only;
    first: `front` (the first block and how far its residual is from the last full step's), `rest` and `resume`;
    tokens: `full` (also hands out what each block adds) and `refresh`, which renews it for `counts` tokens per block.

    Where whole blocks run, `r` tokens less enter their attention.
    """
    image = Port(name="image", shape=(spec.channels, spec.image_size, spec.image_size))
    given = Port(name="given", shape=(spec.modulations, spec.embed_dim))
    prediction = Port(name="prediction", shape=(spec.outputs, spec.image_size, spec.image_size))
    tokens = (spec.tokens, spec.embed_dim)
    weights = Port(name=WEIGHTS, shape=(history, 1), batch=1)
    kept = tuple(Port(name=f"{RESIDUAL}.{k}", shape=tokens) for k in range(history))
    residual = Port(name=RESIDUAL, shape=tokens)
    found = {"condition": _condition(spec, given), "step": _step(spec, image, given, prediction, r)}
    if cut == "stack":
        found["full"] = Part(
            inputs=(image, given),
            outputs=(prediction, residual),
            run=lambda ops, x, m: _rest(ops, spec, embed(ops, x), m, 0, r),
        )
        found["resume"] = Part(
            inputs=(image, given, weights, *kept),
            outputs=(prediction,),
            run=lambda ops, x, m, w, *r: _resumed(ops, spec, embed(ops, x), m, w, r),
        )
    elif cut == "modules":
        modules = tuple(
            Port(name=f"{RESIDUAL}.{kind}.{block}", shape=tokens)
            for block in range(spec.num_layers)
            for kind in ("attn", "mlp")
        )
        found["full"] = Part(
            inputs=(image, given), outputs=(prediction, *modules), run=lambda ops, x, m: _modules(ops, spec, x, m, r)
        )
        found["resume"] = Part(
            inputs=(image, given, *modules),
            outputs=(prediction,),
            run=lambda ops, x, m, *y: _from_modules(ops, spec, x, m, y),
        )
    elif cut == "first":
        x, change = Port(name="x", shape=tokens), Port(name="change", shape=(1, 1))
        before = Port(name="before", shape=tokens)
        found["front"] = Part(
            inputs=(image, given, before),
            outputs=(x, Port(name="own", shape=tokens), change),
            run=lambda ops, x, m, before: _front(ops, spec, x, m, before, r),
        )
        found["rest"] = Part(
            inputs=(x, given), outputs=(prediction, residual), run=lambda ops, x, m: _rest(ops, spec, x, m, 1, r)
        )
        found["resume"] = Part(
            inputs=(x, given, weights, *kept),
            outputs=(prediction,),
            run=lambda ops, x, m, w, *r: _resumed(ops, spec, x, m, w, r),
        )
    elif cut == "tokens":
        added = tuple(Port(name=f"{RESIDUAL}.{block}", shape=tokens) for block in range(spec.num_layers))
        kept = tuple(Port(name=f"kept.{block}", shape=tokens) for block in range(spec.num_layers))
        found["full"] = Part(
            inputs=(image, given), outputs=(prediction, *added), run=lambda ops, x, m: _added(ops, spec, x, m, r)
        )
        found["refresh"] = Part(
            inputs=(image, given, *kept),
            outputs=(prediction, *added),
            run=lambda ops, x, m, *f: _refreshed(ops, spec, counts, x, m, f),
        )
    return found


def _condition(spec: DiTSpec, given: Port) -> Part:
    return Part(
        inputs=(Port(name="waves", shape=(spec.freq_dim,)), Port(name="label", shape=(spec.classes + 1,))),
        outputs=(given,),
        run=lambda ops, waves, label: (condition(ops, spec, waves, label),),
    )


def _step(spec: DiTSpec, image: Port, given: Port, prediction: Port, r: int) -> Part:
    def run(ops: Ops[T], x: T, m: T) -> tuple[T, ...]:
        vectors = modulations(ops, spec, m)
        return (head(ops, spec, blocks(ops, spec, embed(ops, x), vectors, range(spec.num_layers), r=r), vectors),)

    return Part(inputs=(image, given), outputs=(prediction,), run=run)


def _rest(ops: Ops[T], spec: DiTSpec, x: T, m: T, first: int, r: int) -> tuple[T, T]:
    """The blocks from `first` on and the head; the residual is what those blocks add to x."""
    vectors = modulations(ops, spec, m)
    y = blocks(ops, spec, x, vectors, range(first, spec.num_layers), r=r)
    ops.scope("residual")
    return head(ops, spec, y, vectors), minus(ops, y, x)


def _resumed(ops: Ops[T], spec: DiTSpec, x: T, m: T, weights: T, kept: tuple[T, ...]) -> tuple[T]:
    """The head of x + sum_k w_k R_k: every forecast that is linear in what is kept."""
    vectors = modulations(ops, spec, m)
    ops.scope("forecast")
    terms = ops.split(weights, len(kept), 1) if len(kept) > 1 else (weights,)
    for weight, residual in zip(terms, kept, strict=True):
        x = ops.add(x, ops.multiply(weight, residual))
    return (head(ops, spec, x, vectors),)


def _modules(ops: Ops[T], spec: DiTSpec, image: T, m: T, r: int) -> tuple[T, ...]:
    vectors, found = modulations(ops, spec, m), []
    x = embed(ops, image)
    for block in range(spec.num_layers):
        found.append(attention(ops, spec, block, x, vectors, r=r))
        x = add_gated(ops, x, found[-1], vectors[MODULATIONS * block + 2])
        found.append(mlp(ops, spec, block, x, vectors))
        x = add_gated(ops, x, found[-1], vectors[MODULATIONS * block + 5])
    return (head(ops, spec, x, vectors), *found)


def _from_modules(ops: Ops[T], spec: DiTSpec, image: T, m: T, kept: tuple[T, ...]) -> tuple[T]:
    vectors = modulations(ops, spec, m)
    x = embed(ops, image)
    ops.scope("reused")
    for block in range(spec.num_layers):
        x = add_gated(ops, x, kept[2 * block], vectors[MODULATIONS * block + 2])
        x = add_gated(ops, x, kept[2 * block + 1], vectors[MODULATIONS * block + 5])
    return (head(ops, spec, x, vectors),)


def _added(ops: Ops[T], spec: DiTSpec, image: T, m: T, r: int) -> tuple[T, ...]:
    vectors, found = modulations(ops, spec, m), []
    x = embed(ops, image)
    for block in range(spec.num_layers):
        y = blocks(ops, spec, x, vectors, range(block, block + 1), r=r)
        found.append(minus(ops, y, x))
        x = y
    return (head(ops, spec, x, vectors), *found)


def _refreshed(
    ops: Ops[T], spec: DiTSpec, counts: tuple[int, ...], image: T, m: T, kept: tuple[T, ...]
) -> tuple[T, ...]:
    vectors, found = modulations(ops, spec, m), []
    x = embed(ops, image)
    for block, (count, before) in enumerate(zip(counts, kept, strict=True)):
        found.append(renewed(ops, spec, block, x, vectors, before, count))
        x = ops.add(x, found[-1])
    return (head(ops, spec, x, vectors), *found)


def _front(ops: Ops[T], spec: DiTSpec, image: T, m: T, before: T, r: int) -> tuple[T, T, T]:
    """The first block, its residual R, and |R - R'|^2 / |R'|^2 per row, (B, 1, 1), with R' of the last full step."""
    vectors = modulations(ops, spec, m)
    entering = embed(ops, image)
    x = blocks(ops, spec, entering, vectors, range(1), r=r)
    ops.scope("change")
    own = minus(ops, x, entering)
    moved = minus(ops, own, before)
    ratio = ops.divide(_energy(ops, spec, moved), ops.add_scalar(_energy(ops, spec, before), 1e-12))
    return x, own, ratio


def _energy(ops: Ops[T], spec: DiTSpec, x: T) -> T:
    return ops.reshape(ops.sum(ops.reshape(ops.multiply(x, x), (spec.tokens * spec.embed_dim,)), 1), (1, 1))
