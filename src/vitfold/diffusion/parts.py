"""A denoising step cut into parts, each a program with named inputs and outputs, so that steps can share results.

What every part computes and what it hands on: predictions, and the few tensors that caches hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
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
from vitfold.diffusion.token_refresh import predictor_shapes, renewed
from vitfold.model.dit import MODULATIONS, DiTSpec, dit_param_shapes
from vitfold.ops.protocol import Ops, Port, T
from vitfold.program import Program, replay, trace
from vitfold.transforms.merging import merged_around_attention

Cut = Literal["whole", "stack", "modules", "first", "tokens"]
"""What of a step is kept: nothing, the residual of all blocks, every module's output, of all blocks but the first; or
of every block, to be renewed token by token."""

WEIGHTS = "weights"
RESIDUAL = "residual"
PREDICTION = "prediction"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A program with named inputs and outputs, which are tensors that a sampler hands from part to part."""

    program: Program

    @property
    def inputs(self) -> tuple[Port, ...]:
        """What it reads."""
        return self.program.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """What it makes."""
        shapes = self.program.shapes
        return tuple(Port(name=name, shape=shapes[ref][1:]) for name, ref in self.program.outputs.items())

    def run(self, ops: Ops[T], *inputs: T) -> tuple[T, ...]:
        """Run it under an interpreter."""
        return replay(self.program, ops, *inputs)


@functools.lru_cache(maxsize=32)
def parts(spec: DiTSpec, cut: Cut, *, history: int = 1, counts: tuple[int, ...] = (), r: int = 0) -> Mapping[str, Part]:
    """Return the parts of a step: always `condition` and `step`, the whole of it, and others by what is kept.

    stack: `full` (also hands out the residual of all blocks) and `resume` (takes a weighted sum of `history` of them);
    modules: the same with the output of every attention and MLP before its gate, of the last full step only;
    first: `front` (the first block and how far its residual is from the last full step's), `rest` and `resume`;
    tokens: `full` (also hands out what each block adds) and `refresh`, which renews it for `counts` tokens per block.

    Where whole blocks run, `r` tokens less enter their attention.
    """
    written = {**_always(spec), **_CUTS[cut](spec, history, counts)}
    required, optional = dit_param_shapes(spec)
    shapes = {**required, **optional, **predictor_shapes(spec)}
    found = {}
    for name, (inputs, outputs, run) in written.items():
        program = trace(run, shapes, inputs=inputs, outputs=outputs)
        merges = name not in ("condition", "resume", "refresh")
        found[name] = Part(program=merged_around_attention(program, shapes, r) if merges else program)
    return MappingProxyType(found)


Written = Mapping[str, tuple[Sequence[Port], Sequence[str], Callable[..., Any]]]
"""Parts as they are written: inputs, names of outputs, and `run(ops, *inputs)`."""


def _image(spec: DiTSpec) -> tuple[Port, Port]:
    """What every part that embeds the image reads."""
    image = Port(name="image", shape=(spec.channels, spec.image_size, spec.image_size))
    return image, Port(name="given", shape=(spec.modulations, spec.embed_dim))


def _of_tokens(spec: DiTSpec, *names: str) -> tuple[Port, ...]:
    return tuple(Port(name=name, shape=(spec.tokens, spec.embed_dim)) for name in names)


def _kept(spec: DiTSpec, history: int) -> tuple[Port, ...]:
    """The weights of a forecast, and the residuals that it sums up."""
    weights = Port(name=WEIGHTS, shape=(history, 1), batch=1)
    return (weights, *_of_tokens(spec, *(f"{RESIDUAL}.{k}" for k in range(history))))


def _always(spec: DiTSpec) -> Written:
    image, given = _image(spec)

    def step(ops: Ops[T], x: T, m: T) -> T:
        vectors = modulations(ops, spec, m)
        return head(ops, spec, blocks(ops, spec, embed(ops, x), vectors, range(spec.num_layers)), vectors)

    # Bundles call `t_freq` "waves".
    conditions = (Port(name="waves", shape=(spec.freq_dim,)), Port(name="label", shape=(spec.classes + 1,)))
    return {
        "condition": (conditions, ("given",), lambda ops, t_freq, label: condition(ops, spec, t_freq, label)),
        "step": ((image, given), (PREDICTION,), step),
    }


def _stack(spec: DiTSpec, history: int) -> Written:
    image, given = _image(spec)
    return {
        "full": (
            (image, given),
            (PREDICTION, RESIDUAL),
            lambda ops, x, m: _rest(ops, spec, embed(ops, x), m, 0),
        ),
        "resume": (
            (image, given, *_kept(spec, history)),
            (PREDICTION,),
            lambda ops, x, m, w, *kept: _resumed(ops, spec, embed(ops, x), m, w, kept),
        ),
    }


def _modules(spec: DiTSpec) -> Written:
    image, given = _image(spec)
    names = [f"{RESIDUAL}.{kind}.{block}" for block in range(spec.num_layers) for kind in ("attn", "mlp")]
    return {
        "full": ((image, given), (PREDICTION, *names), lambda ops, x, m: _every_module(ops, spec, x, m)),
        "resume": (
            (image, given, *_of_tokens(spec, *names)),
            (PREDICTION,),
            lambda ops, x, m, *kept: _from_modules(ops, spec, x, m, kept),
        ),
    }


def _first(spec: DiTSpec, history: int) -> Written:
    image, given = _image(spec)
    (x,) = _of_tokens(spec, "x")
    return {
        "front": (
            (image, given, *_of_tokens(spec, "before")),
            ("x", "own", "change"),
            lambda ops, x, m, before: _front(ops, spec, x, m, before),
        ),
        "rest": ((x, given), (PREDICTION, RESIDUAL), lambda ops, x, m: _rest(ops, spec, x, m, 1)),
        "resume": (
            (x, given, *_kept(spec, history)),
            (PREDICTION,),
            lambda ops, x, m, w, *kept: _resumed(ops, spec, x, m, w, kept),
        ),
    }


def _tokens(spec: DiTSpec, counts: tuple[int, ...]) -> Written:
    image, given = _image(spec)
    added = [f"{RESIDUAL}.{block}" for block in range(spec.num_layers)]
    kept = _of_tokens(spec, *(f"kept.{block}" for block in range(spec.num_layers)))
    return {
        "full": ((image, given), (PREDICTION, *added), lambda ops, x, m: _added(ops, spec, x, m)),
        "refresh": (
            (image, given, *kept),
            (PREDICTION, *added),
            lambda ops, x, m, *f: _refreshed(ops, spec, counts, x, m, f),
        ),
    }


_CUTS: Mapping[Cut, Callable[[DiTSpec, int, tuple[int, ...]], Written]] = {
    "whole": lambda _spec, _history, _counts: {},
    "stack": lambda spec, history, _counts: _stack(spec, history),
    "modules": lambda spec, _history, _counts: _modules(spec),
    "first": lambda spec, history, _counts: _first(spec, history),
    "tokens": lambda spec, _history, counts: _tokens(spec, counts),
}


def _rest(ops: Ops[T], spec: DiTSpec, x: T, m: T, first: int) -> tuple[T, T]:
    """The blocks from `first` on and the head; the residual is what those blocks add to x."""
    vectors = modulations(ops, spec, m)
    y = blocks(ops, spec, x, vectors, range(first, spec.num_layers))
    ops.scope("residual", role="reuse")
    return head(ops, spec, y, vectors), minus(ops, y, x)


def _resumed(ops: Ops[T], spec: DiTSpec, x: T, m: T, weights: T, kept: tuple[T, ...]) -> tuple[T]:
    """The head of x + sum_k w_k R_k: every forecast that is linear in what is kept."""
    vectors = modulations(ops, spec, m)
    ops.scope("forecast", role="reuse")
    terms = ops.split(weights, len(kept), 1) if len(kept) > 1 else (weights,)
    for weight, residual in zip(terms, kept, strict=True):
        x = ops.add(x, ops.multiply(weight, residual))
    return (head(ops, spec, x, vectors),)


def _every_module(ops: Ops[T], spec: DiTSpec, image: T, m: T) -> tuple[T, ...]:
    vectors, found = modulations(ops, spec, m), []
    x = embed(ops, image)
    for block in range(spec.num_layers):
        found.append(attention(ops, spec, block, x, vectors))
        x = add_gated(ops, x, found[-1], vectors[MODULATIONS * block + 2])
        found.append(mlp(ops, spec, block, x, vectors))
        x = add_gated(ops, x, found[-1], vectors[MODULATIONS * block + 5])
    return (head(ops, spec, x, vectors), *found)


def _from_modules(ops: Ops[T], spec: DiTSpec, image: T, m: T, kept: tuple[T, ...]) -> tuple[T]:
    vectors = modulations(ops, spec, m)
    x = embed(ops, image)
    ops.scope("reused", role="reuse")
    for block in range(spec.num_layers):
        x = add_gated(ops, x, kept[2 * block], vectors[MODULATIONS * block + 2])
        x = add_gated(ops, x, kept[2 * block + 1], vectors[MODULATIONS * block + 5])
    return (head(ops, spec, x, vectors),)


def _added(ops: Ops[T], spec: DiTSpec, image: T, m: T) -> tuple[T, ...]:
    vectors, found = modulations(ops, spec, m), []
    x = embed(ops, image)
    for block in range(spec.num_layers):
        y = blocks(ops, spec, x, vectors, range(block, block + 1))
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


def _front(ops: Ops[T], spec: DiTSpec, image: T, m: T, before: T) -> tuple[T, T, T]:
    """The first block, its residual R, and |R - R'|^2 / |R'|^2 per row, (B, 1, 1), with R' of the last full step."""
    vectors = modulations(ops, spec, m)
    entering = embed(ops, image)
    x = blocks(ops, spec, entering, vectors, range(1))
    ops.scope("change", role="reuse")
    own = minus(ops, x, entering)
    moved = minus(ops, own, before)
    ratio = ops.divide(_energy(ops, spec, moved), ops.add_scalar(_energy(ops, spec, before), 1e-12))
    return x, own, ratio


def _energy(ops: Ops[T], spec: DiTSpec, x: T) -> T:
    return ops.reshape(ops.sum(ops.reshape(ops.multiply(x, x), (spec.tokens * spec.embed_dim,)), 1), (1, 1))
