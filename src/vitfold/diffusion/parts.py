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
    modulated,
    modulations,
)
from vitfold.diffusion.token_choice import Scoring
from vitfold.diffusion.token_refresh import norm_scores, predicted_scores, predictor_shapes, renewed
from vitfold.model.dit import MODULATIONS, DiTSpec, dit_param_shapes
from vitfold.ops.protocol import Ops, Port, T
from vitfold.program import Program, replay, trace
from vitfold.transforms.merging import merged_around_attention

Cut = Literal["whole", "stack", "modules", "first", "input", "filtered", "verified", "tokens", "blocks"]
"""What of a step is kept: nothing, the residual of all blocks, every module's output, of all blocks but the first; of
all, with what the first one reads (as it is or filtered) or with what the last one adds apart; or of every block, to be
renewed token by token, in one graph or in one for each block."""

WEIGHTS = "weights"
RESIDUAL = "residual"
LAST = "last"
CHANGE = "change"
FILTER = "filter"
SCORES = "scores"
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
def parts(
    spec: DiTSpec,
    cut: Cut,
    *,
    history: int = 1,
    counts: tuple[int, ...] = (),
    scoring: Scoring = "predictor",
    r: int = 0,
) -> Mapping[str, Part]:
    """Return the parts of a step: always `condition` and `step`, the whole of it, and others by what is kept.

    stack: `full` (also hands out the residual of all blocks) and `resume` (takes a weighted sum of `history` of them);
    modules: the same with the output of every attention and MLP before its gate;
    first: `front` (the first block and how far its residual is from the last full step's), `rest` and `resume`;
    input: `front` says how far what the first block reads is from that of the step before; filtered: its tokens are
    mixed by a matrix before; verified: `front` runs the last block on a forecast and says how far off that is;
    tokens: `full` (also hands out what each block adds) and `refresh`, which renews it for `counts` tokens per block;
    blocks: `full`, `front` (the embedded image, and a score for every token of every block) and for each block
    `whole.N` and `renew.N`, which computes `counts` tokens; the last block's also make the prediction.

    Where whole blocks run, `r` tokens less enter their attention.
    """
    written = {**_always(spec), **_CUTS[cut](spec, history, counts)}
    if cut == "blocks":
        written["front"] = _scored(spec, scoring)
    required, optional = dit_param_shapes(spec)
    shapes = {**required, **optional, **predictor_shapes(spec)}
    found = {}
    for name, (inputs, outputs, run) in written.items():
        program = trace(run, shapes, inputs=inputs, outputs=outputs)
        merges = name not in ("condition", "resume", "refresh") and not name.startswith("renew.")
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


def module_names(spec: DiTSpec) -> list[str]:
    """Return the names of what all attentions and MLPs give, in their order."""
    return [f"{RESIDUAL}.{kind}.{block}" for block in range(spec.num_layers) for kind in ("attn", "mlp")]


def _modules(spec: DiTSpec, history: int) -> Written:
    image, given = _image(spec)
    names = module_names(spec)
    if history > 1:
        kept = _of_tokens(spec, *(f"{name}.{k}" for name in names for k in range(history)))
        weights = _kept(spec, history)[0]
        return {
            "full": ((image, given), (PREDICTION, *names), lambda ops, x, m: _every_module(ops, spec, x, m)),
            "resume": (
                (image, given, weights, *kept),
                (PREDICTION,),
                lambda ops, x, m, w, *f: _from_modules(ops, spec, x, m, weighted_sums(ops, w, f, history)),
            ),
        }
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
            ("x", "own", CHANGE),
            lambda ops, x, m, before: _front(ops, spec, x, m, before),
        ),
        "rest": ((x, given), (PREDICTION, RESIDUAL), lambda ops, x, m: _rest(ops, spec, x, m, 1)),
        "resume": (
            (x, given, *_kept(spec, history)),
            (PREDICTION,),
            lambda ops, x, m, w, *kept: _resumed(ops, spec, x, m, w, kept),
        ),
    }


def _input(spec: DiTSpec, history: int, *, filtered: bool) -> Written:
    image, given = _image(spec)
    (x,) = _of_tokens(spec, "x")
    mixing = (Port(name=FILTER, shape=(spec.tokens, spec.tokens), batch=1),) if filtered else ()
    return {
        **_first(spec, history),
        "front": (
            (image, given, *_of_tokens(spec, "before"), *mixing),
            ("x", "own", CHANGE),
            lambda ops, x, m, before, *mixed: _read(ops, spec, x, m, before, mixed),
        ),
        "rest": ((x, given), (PREDICTION, RESIDUAL), lambda ops, x, m: _rest(ops, spec, x, m, 0)),
    }


def _verified(spec: DiTSpec, history: int) -> Written:
    image, given = _image(spec)
    kept = (*_kept(spec, history), *_of_tokens(spec, *(f"{LAST}.{k}" for k in range(history))))
    return {
        "full": ((image, given), (PREDICTION, RESIDUAL, LAST), lambda ops, x, m: _last_apart(ops, spec, x, m)),
        "front": (
            (image, given, *kept),
            (PREDICTION, CHANGE),
            lambda ops, x, m, w, *f: _verify(ops, spec, x, m, w, f),
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


def _scored(spec: DiTSpec, scoring: Scoring) -> tuple[Sequence[Port], Sequence[str], Callable[..., Any]]:
    """The part in front of blocks that are chosen as they go; scores by chance come from outside."""
    image, given = _image(spec)
    if scoring == "random":
        return (image,), ("x",), embed
    if scoring == "norm":
        kept = _of_tokens(spec, *(f"kept.{block}" for block in range(spec.num_layers)))
        return (image, *kept), ("x", SCORES), lambda ops, x, *f: (embed(ops, x), norm_scores(ops, f))
    return (image, given), ("x", SCORES), lambda ops, x, m: _predicted(ops, spec, x, m)


def _blocks(spec: DiTSpec, counts: tuple[int, ...]) -> Written:
    image, given = _image(spec)
    added = [f"{RESIDUAL}.{block}" for block in range(spec.num_layers)]
    scored = Port(name=SCORES, shape=(spec.tokens, spec.num_layers))
    found: dict[str, Any] = {"full": ((image, given), (PREDICTION, *added), lambda ops, x, m: _added(ops, spec, x, m))}
    for block, count in enumerate(counts):
        x, kept = _of_tokens(spec, "x", f"kept.{block}")
        made = (PREDICTION if block == spec.num_layers - 1 else "y", added[block])
        reads = (x, given, kept, *((scored,) if 0 < count < spec.tokens else ()))
        found[f"whole.{block}"] = ((x, given), made, functools.partial(_one_block, spec=spec, block=block))
        found[f"renew.{block}"] = (reads, made, functools.partial(_one_renewed, spec=spec, block=block, count=count))
    return found


_CUTS: Mapping[Cut, Callable[[DiTSpec, int, tuple[int, ...]], Written]] = {
    "whole": lambda _spec, _history, _counts: {},
    "stack": lambda spec, history, _counts: _stack(spec, history),
    "modules": lambda spec, history, _counts: _modules(spec, history),
    "first": lambda spec, history, _counts: _first(spec, history),
    "input": lambda spec, history, _counts: _input(spec, history, filtered=False),
    "filtered": lambda spec, history, _counts: _input(spec, history, filtered=True),
    "verified": lambda spec, history, _counts: _verified(spec, history),
    "tokens": lambda spec, _history, counts: _tokens(spec, counts),
    "blocks": lambda spec, _history, counts: _blocks(spec, counts),
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
    (forecast,) = weighted_sums(ops, weights, kept, len(kept))
    return (head(ops, spec, ops.add(x, forecast), vectors),)


def weighted_sums(ops: Ops[T], weights: T, kept: tuple[T, ...], history: int) -> tuple[T, ...]:
    """Return sum_k w_k F_k of every tensor F of which `history` values are kept, side by side."""
    ops.scope("forecast", role="reuse")
    terms = ops.split(weights, history, 1) if history > 1 else (weights,)
    found = []
    for start in range(0, len(kept), history):
        total = ops.multiply(terms[0], kept[start])
        for weight, value in zip(terms[1:], kept[start + 1 : start + history], strict=True):
            total = ops.add(total, ops.multiply(weight, value))
        found.append(total)
    return tuple(found)


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
    scores = ops.split(predicted_scores(ops, spec, x, *vectors[:2]), spec.num_layers, 2)
    for block, (count, before) in enumerate(zip(counts, kept, strict=True)):
        found.append(renewed(ops, spec, block, x, vectors, before, scores[block], count))
        x = ops.add(x, found[-1])
    return (head(ops, spec, x, vectors), *found)


def _predicted(ops: Ops[T], spec: DiTSpec, image: T, m: T) -> tuple[T, T]:
    x = embed(ops, image)
    return x, predicted_scores(ops, spec, x, *_vectors_of(ops, m, 0)[:2])


def _vectors_of(ops: Ops[T], m: T, block: int) -> tuple[T, ...]:
    """The six vectors of a block at the places where those of all blocks stand; what is in front of them isn't read."""
    first = MODULATIONS * block
    ops.scope("modulations", role="condition")
    return ops.split(ops.slice(m, 1, first, first + MODULATIONS), MODULATIONS, 1) * (block + 1)


def _one_block(ops: Ops[T], x: T, m: T, *, spec: DiTSpec, block: int) -> tuple[T, T]:
    y = blocks(ops, spec, x, _vectors_of(ops, m, block), range(block, block + 1))
    ops.scope("residual", role="reuse")
    return _ended(ops, spec, block, y, m), minus(ops, y, x)


def _one_renewed(ops: Ops[T], x: T, m: T, kept: T, *scores: T, spec: DiTSpec, block: int, count: int) -> tuple[T, T]:
    scored = ops.slice(scores[0], 2, block, block + 1) if scores else kept
    found = renewed(ops, spec, block, x, _vectors_of(ops, m, block), kept, scored, count)
    return _ended(ops, spec, block, ops.add(x, found), m), found


def _ended(ops: Ops[T], spec: DiTSpec, block: int, y: T, m: T) -> T:
    """The prediction behind the last block, what it was given behind the others."""
    if block < spec.num_layers - 1:
        return y
    first = MODULATIONS * spec.num_layers
    return head(ops, spec, y, ops.split(ops.slice(m, 1, first, first + 2), 2, 1))


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


def _read(ops: Ops[T], spec: DiTSpec, image: T, m: T, before: T, mixing: tuple[T, ...]) -> tuple[T, T, T]:
    """The embedded image, what the first block reads of it U, and |U - U'|_1 / |U'|_1 per row, (B, 1, 1)."""
    vectors = modulations(ops, spec, m)
    x = embed(ops, image)
    ops.scope("change", role="reuse")
    own = modulated(ops, x, vectors[0], vectors[1], spec.norm_eps)
    for matrix in mixing:
        own = ops.matmul("filter", matrix, own)
    moved = _size(ops, spec, minus(ops, own, before))
    return x, own, ops.divide(moved, ops.add_scalar(_size(ops, spec, before), 1e-12))


def _last_apart(ops: Ops[T], spec: DiTSpec, image: T, m: T) -> tuple[T, T, T]:
    """The prediction, what the blocks before the last add, and what that one adds."""
    vectors, last = modulations(ops, spec, m), spec.num_layers - 1
    x = embed(ops, image)
    entering = blocks(ops, spec, x, vectors, range(last))
    y = blocks(ops, spec, entering, vectors, range(last, last + 1))
    ops.scope("residual", role="reuse")
    return head(ops, spec, y, vectors), minus(ops, entering, x), minus(ops, y, entering)


def _verify(ops: Ops[T], spec: DiTSpec, image: T, m: T, weights: T, kept: tuple[T, ...]) -> tuple[T, T]:
    """The prediction of the last block on a forecast, and |F - F'|^2 / |F|^2 per row of what it adds F, forecast F'."""
    vectors, last = modulations(ops, spec, m), spec.num_layers - 1
    before, forecast = weighted_sums(ops, weights, kept, len(kept) // 2)
    entering = ops.add(embed(ops, image), before)
    y = blocks(ops, spec, entering, vectors, range(last, last + 1))
    ops.scope("change", role="reuse")
    own = minus(ops, y, entering)
    moved = _energy(ops, spec, minus(ops, own, forecast))
    return head(ops, spec, y, vectors), ops.divide(moved, ops.add_scalar(_energy(ops, spec, own), 1e-12))


def _size(ops: Ops[T], spec: DiTSpec, x: T) -> T:
    total = ops.sum(ops.reshape(ops.elementwise("abs", x), (spec.tokens * spec.embed_dim,)), 1)
    return ops.reshape(total, (1, 1))


def _energy(ops: Ops[T], spec: DiTSpec, x: T) -> T:
    return ops.reshape(ops.sum(ops.reshape(ops.multiply(x, x), (spec.tokens * spec.embed_dim,)), 1), (1, 1))
