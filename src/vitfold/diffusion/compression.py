"""What makes every step of a diffusion model cheaper: merged attention and integer linear layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vitfold.artifacts.cache import key_of
from vitfold.diffusion.conditions import Conditions
from vitfold.diffusion.denoiser_parts import denoiser_parts, inner_layers
from vitfold.diffusion.eager import eager
from vitfold.diffusion.methods import find_method
from vitfold.diffusion.parts import Part, parts
from vitfold.diffusion.sampling import conditions_of, sample
from vitfold.diffusion.schedulers import build_scheduler
from vitfold.engines import DEFAULT, quantized_target
from vitfold.errors import RecipeError
from vitfold.model import Array, DenoiserModel, DiTModel
from vitfold.ops.protocol import Ops
from vitfold.ops.run import Run
from vitfold.quant import Progress, QuantConstraints, calibrate_network
from vitfold.quant import find_method as find_quant_method
from vitfold.quant.network import ArrayExamples, Network
from vitfold.quant.sites import sites_of
from vitfold.quantizer import Quantizer
from vitfold.recipe import QuantRecipe, quant_from_scheme
from vitfold.target import Target

TRAJECTORIES = 4
DEFAULT_METHOD = "gptq"
"""Ranges that clip cost a diffusion model more than they gain: errors of fifty steps add up."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Compression:
    """What a step costs less by itself: `r` tokens merged before every attention, integer linear layers in blocks.

    `params` are then the weights on the grids of `quantizers`, found by `recipe`.
    """

    r: int = 0
    recipe: QuantRecipe | None = None
    quantizers: Mapping[str, Quantizer] | None = None
    params: Mapping[str, Array] | None = None

    @property
    def quant(self) -> str:
        """The bits that were asked for."""
        return "none" if self.recipe is None else self.recipe.scheme.lower()

    def to_dict(self) -> dict[str, Any]:
        """Return what a plan says of it, as plain JSON values."""
        return {"merge": self.r, "quant": self.quant, "method": None if self.recipe is None else self.recipe.method}

    @property
    def suffix(self) -> str:
        """How tables call it, behind the name of a method."""
        return (f", r={self.r}" if self.r else "") + (f", {self.quant}" if self.recipe is not None else "")


def compress(
    model: DiTModel | DenoiserModel,
    *,
    r: int = 0,
    quant: str = "none",
    method: str | None = None,
    steps: int = 50,
    guidance: float = 1.5,
    sampler: str = "ddim",
    conditions: Conditions | None = None,
    target: Target | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Compression:
    """Merge and quantize by any method of `quant`, calibrated along a few trajectories, with merging on.

    Trajectories are of some of the model's classes, or of the `conditions`, from `seed` on. What stands around the
    blocks stays float, and so do the products of attention.

    Args:
        quant: "none", or bits of weights and activations such as "w8a8".
        method: a method of `vitfold.quant`; None: `DEFAULT_METHOD`.
        target: what graphs will be written for; None: this processor.

    Raises:
        RecipeError: if a block cannot merge that many tokens, or the bits or the method are unknown.
    """
    most = model.spec.tokens // 2 if isinstance(model, DiTModel) else 0
    if not 0 <= r <= most:
        raise RecipeError(f"--merge {r} is out of range; {model.spec.tokens} tokens can merge 0 to {most} per block")
    recipe = check_scheme(quant, method)
    if recipe is None:
        return Compression(r=r)
    recipe = replace(recipe, seed=seed)
    states = states_along(
        model,
        recipe.calibration_size,
        r=r,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        conditions=conditions,
        seed=seed,
    )
    limits = QuantConstraints.of(target or quantized_target(DEFAULT))
    done = calibrate_network(network_of_step(model, r), recipe, states, scheme=limits, progress=progress)
    return Compression(r=r, recipe=recipe, quantizers=done.quantizers, params=done.params)


def check_scheme(quant: str, method: str | None) -> QuantRecipe | None:
    """Return what bits and a method stand for; None where nothing is quantized.

    Raises:
        RecipeError: if one of them is unknown, or does not run.
    """
    recipe = quant_from_scheme(quant)
    if recipe is None:
        return None
    if recipe.format == "float8" or not recipe.executable:
        raise RecipeError(f"{quant} does not run: integer kernels take activations of 8 bits; use w8a8, w6a8 or w4a8")
    chosen = find_quant_method(method or DEFAULT_METHOD)
    return QuantRecipe(weights=recipe.weights, activations=recipe.activations, method=chosen.name, attention=False)


def network_of_step(model: DiTModel | DenoiserModel, r: int) -> Network:
    """Return one whole step, with merging; the linear layers and attentions of its blocks can be rounded."""
    program = _whole(model, r)["step"].program
    linears, attentions = sites_of(program)
    if isinstance(model, DenoiserModel):
        inner = inner_layers(model)
        linears = tuple(site for site in linears if site.layer in inner)
    else:
        linears = tuple(site for site in linears if site.block is not None)
    return Network(
        program=program,
        params=model.params,
        linears=linears,
        attentions=attentions,
        digest=key_of(model.digest(), r),
    )


def _whole(model: DiTModel | DenoiserModel, r: int) -> Mapping[str, Part]:
    if isinstance(model, DenoiserModel):
        return denoiser_parts(model, find_method("none"))
    return parts(model.spec, "whole", r=r)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watched(Part):
    """A part that keeps what it is run on."""

    seen: list[tuple[Array, ...]] = field(default_factory=list)

    def run(self, ops: Ops[Any], *inputs: Any) -> tuple[Any, ...]:
        """Keep the inputs, then run."""
        self.seen.append(tuple(value.numpy().copy() for value in inputs))
        return Part.run(self, ops, *inputs)


def states_along(
    model: DiTModel | DenoiserModel,
    count: int,
    *,
    r: int,
    steps: int,
    guidance: float,
    seed: int,
    sampler: str = "ddim",
    conditions: Conditions | None = None,
) -> ArrayExamples:
    """Return what whole steps read, from all over the trajectories of a few conditions: `count`, drawn evenly."""
    whole = _whole(model, r)
    step = _Watched(program=whole["step"].program)
    executor = eager({**whole, "step": step}, Run(model.params))
    number = (conditions or conditions_of(model.spec)).count
    labels = np.linspace(0, number - 1, TRAJECTORIES).round().astype(int).tolist()
    scheduler = build_scheduler(sampler, model.schedule, steps)
    plain = find_method("none")
    sample(executor, model.spec, scheduler, plain, labels, seed=seed, guidance=guidance, conditions=conditions)
    every = [np.concatenate(kept) for kept in zip(*step.seen, strict=True)]
    chosen = np.linspace(0, len(every[0]) - 1, min(count, len(every[0]))).round().astype(int)
    return ArrayExamples(arrays=tuple(array[chosen] for array in every), name="state")
