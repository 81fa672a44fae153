"""The parts of a lifted denoiser's step: the whole, and what is computed where the stack of blocks is forecast."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from types import MappingProxyType

from vitfold.architectures.dit import minus
from vitfold.diffusion.methods import METHODS, ReuseMethod, find_method
from vitfold.diffusion.parts import PREDICTION, RESIDUAL, WEIGHTS, Part, weighted_sums
from vitfold.engines import Ends
from vitfold.errors import RecipeError
from vitfold.model import DenoiserModel, DenoiserSpec
from vitfold.model.denoiser import IMAGE, TIMESTEP
from vitfold.ops.protocol import Ops, Port, T
from vitfold.program import Ref, program_from_dict, replay, trace
from vitfold.program.queries import depending_on, linears_of
from vitfold.transforms.dead import without_dead_nodes
from vitfold.transforms.rewriting import only_outputs

ENTERED, LEFT = "entered", "left"
CUTS = ("whole", "stack")


def check_cut(module: str, method: ReuseMethod) -> None:
    """Check that a method keeps what all blocks add, or nothing.

    Raises:
        RecipeError: if it needs the inside of a block.
    """
    if method.cut not in CUTS:
        fitting = ", ".join(name for name in METHODS if find_method(name).cut in CUTS)
        raise RecipeError(
            f"{method.text} keeps more than what all blocks add, and the graphs of a {module} are cut around all "
            f"blocks; take one of {fitting}"
        )


def denoiser_ends(spec: DenoiserSpec, method: ReuseMethod) -> dict[str, Ends]:
    """Return the inputs and outputs of the parts that a method runs.

    Raises:
        RecipeError: if the method needs the inside of a block.
    """
    check_cut(spec.module, method)
    given = _given(spec)
    prediction = Port(name=PREDICTION, shape=spec.prediction_shape)
    residual = Port(name=RESIDUAL, shape=(spec.tokens, spec.embed_dim))
    if method.cut == "whole":
        return {"step": Ends(given, (prediction,))}
    return {
        "full": Ends(given, (prediction, residual)),
        "resume": Ends((*given, *_kept(spec, method.history)), (prediction,)),
    }


def denoiser_parts(model: DenoiserModel, method: ReuseMethod) -> dict[str, Part]:
    """Return the parts that a method runs.

    Equation: with f the tail behind the blocks, h what enters them and R_k what they added at full steps,
    full: (f(h + R), R); resume: f(h + sum_k w_k R_k).

    Raises:
        RecipeError: if the method needs the inside of a block.
    """
    check_cut(model.spec.module, method)
    return dict(_parts(model.spec, model.program, tuple(sorted(model.shapes.items())), method.cut, method.history))


def inner_layers(model: DenoiserModel) -> frozenset[str]:
    """Return the linear layers of the stack of blocks that read rows of tokens which depend on the image.

    So a text stream counts where it has met the image; what depends on the prompt alone, and vectors that modulate
    tokens, do not.
    """
    program = program_from_dict(json.loads(model.program))
    before, within = (
        {node.site for node in without_dead_nodes(only_outputs(program, name)).nodes} for name in (ENTERED, LEFT)
    )
    varying = depending_on(program, [Ref([port.name for port in program.inputs].index(IMAGE))])
    return frozenset(
        node.site
        for node in linears_of(program)
        if node.site in within - before and node.source in varying and len(program.shapes[node.source]) > 2
    )


@functools.lru_cache(maxsize=8)
def _parts(
    spec: DenoiserSpec, text: str, shapes: tuple[tuple[str, tuple[int, ...]], ...], cut: str, history: int
) -> Mapping[str, Part]:
    program, held, given = program_from_dict(json.loads(text)), dict(shapes), _given(spec)

    def step(ops: Ops[T], *inputs: T) -> tuple[T, ...]:
        return replay(program, ops, *inputs, only=(PREDICTION,))

    def full(ops: Ops[T], *inputs: T) -> tuple[T, ...]:
        prediction, entered, left = replay(program, ops, *inputs, only=(PREDICTION, ENTERED, LEFT))
        ops.scope("residual", role="reuse")
        return prediction, minus(ops, left, entered)

    def resume(ops: Ops[T], *inputs: T) -> tuple[T, ...]:
        own, (weights, *kept) = inputs[: len(given)], inputs[len(given) :]
        (entered,) = replay(program, ops, *own, only=(ENTERED,))
        (forecast,) = weighted_sums(ops, weights, tuple(kept), history)
        left = ops.add(entered, forecast)
        return replay(program, ops, *own, given={LEFT: left}, only=(PREDICTION,))

    if cut == "whole":
        return MappingProxyType({"step": Part(program=trace(step, held, inputs=given, outputs=(PREDICTION,)))})
    resumed = trace(resume, held, inputs=(*given, *_kept(spec, history)), outputs=(PREDICTION,))
    return MappingProxyType(
        {
            "full": Part(program=trace(full, held, inputs=given, outputs=(PREDICTION, RESIDUAL))),
            "resume": Part(program=without_dead_nodes(resumed)),
        }
    )


def _given(spec: DenoiserSpec) -> tuple[Port, ...]:
    """What every part reads: the image, its timestep and all conditions."""
    conditions = (Port(name=one.name, shape=one.shape) for one in spec.conditions)
    return (Port(name=IMAGE, shape=spec.image_shape), Port(name=TIMESTEP, shape=()), *conditions)


def _kept(spec: DenoiserSpec, history: int) -> tuple[Port, ...]:
    residuals = (Port(name=f"{RESIDUAL}.{k}", shape=(spec.tokens, spec.embed_dim)) for k in range(history))
    return (Port(name=WEIGHTS, shape=(history, 1), batch=1), *residuals)
