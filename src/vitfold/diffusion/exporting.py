"""A pipeline of diffusers with a plan of its steps, written as a bundle that draws the same latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitfold.artifacts.bundle import Bundle
from vitfold.artifacts.steps import SamplingPlan
from vitfold.diffusion.compare import SamplingConfig, draw
from vitfold.diffusion.compression import Compression
from vitfold.diffusion.conditions import Prompts
from vitfold.diffusion.denoiser_parts import check_cut, denoiser_parts
from vitfold.diffusion.eager import eager
from vitfold.diffusion.lifting import call_arguments, embed_prompts, lift_pipeline, method_of_plan
from vitfold.diffusion.methods import find_method
from vitfold.diffusion.pipelines.step_plan import StepPlan, guidance_of, scheduler_facts, weights_digest
from vitfold.diffusion.pipelines.stepping import denoisers
from vitfold.diffusion.solving import check_budget
from vitfold.diffusion.writing import save_steps
from vitfold.errors import ArgumentError, RecipeError, UnsupportedError
from vitfold.model import DenoiserModel, Origin
from vitfold.model.schedule import flow_sampler, own_sampler
from vitfold.ops.run import Run

STEPS = 50
_CHECKED_STEPS = 4
_TOLERANCE = 1e-3
"""Of latents behind a few steps: each adds the rounding of its transformer."""


def export_steps(
    pipe: Any,
    plan: StepPlan | str,
    prompts: Sequence[Any],
    path: str | Path,
    *,
    steps: int = STEPS,
    source: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
    **call: Any,
) -> Bundle:
    """Write the steps of a pipeline as a bundle of ONNX graphs, which take embeddings of prompts.

    `plan` is what `plan_steps` returned, or a method by name such as "fitted:14", whose steps and weights are then
    fitted on these prompts. `call` are the pipeline's arguments (height=..., guidance_scale=...); sizes, and the length
    of a text, belong to the bundle. Before anything is written, a few steps of the pipeline itself have to give the
    same latents as the program.

    Raises:
        ArgumentError: if there are no prompts.
        RecipeError: if the plan is of another model or has no form in a bundle.
        UnsupportedError: if the pipeline draws in a way that is not followed.
        SourceError: if the transformer cannot be exported, or the scheduler is not followed.
        BundleError: if the destination cannot be written, or exists and may not be replaced.
        EngineError: if the graphs draw something else than the program.
    """
    if isinstance(prompts, str) or not prompts:
        raise ArgumentError(f'prompts must be a list of at least one prompt, such as ["a red fox"], found {prompts!r}')
    folder = Path(str(getattr(getattr(pipe, "config", {}), "_name_or_path", "") or ""))
    name = source or (f"hf:{folder}" if folder.is_dir() and folder.name else type(pipe).__name__)
    decoder = str(folder / "vae") if folder.name and (folder / "vae").is_dir() else None
    guidance = _guidance(pipe, plan, call)
    if isinstance(plan, StepPlan):
        _check_plan(pipe, plan)
        steps, method = plan.steps, method_of_plan(pipe, plan)
        call = {**call, "guidance_scale": guidance}
    else:
        method = find_method(plan)
        check_budget(method, steps)
    for transformer in denoisers(pipe).values():
        check_cut(type(transformer).__name__, method)
    say(f"embedding {len(prompts)} prompts")
    bank = embed_prompts(pipe, prompts, **call)
    say("reading the transformer as a program")
    origin = Origin(source=name, loader="diffusers", arguments={})
    model = lift_pipeline(pipe, prompts[0], origin=origin, decoder=decoder, **call)
    sampler = sampler_of(model)
    applied = guidance if bank.negative else 1.0
    bank.check(model.spec, applied)
    say("comparing with the pipeline")
    check_pipeline(pipe, prompts[0], model, bank, sampler=sampler, guidance=applied, call=call)
    settings = SamplingPlan(
        reuse=method.text, steps=steps, sampler=sampler, guidance=applied, **Compression().to_dict()
    )
    return save_steps(model, settings, method, Compression(), Path(path), conditions=bank, overwrite=overwrite, say=say)


def sampler_of(model: DenoiserModel) -> str:
    """Return the sampler that a pipeline's scheduler is.

    Raises:
        SourceError: if it is of another kind.
        RecipeError: if a bundle would draw by another one.
    """
    flow = flow_sampler(model.schedule)
    if flow is not None:
        return flow
    own = own_sampler(model.schedule)
    if own.replaced is not None:
        raise RecipeError(
            f"bundles do not draw by {own.replaced}; give the pipeline a DPMSolverMultistepScheduler or DDIMScheduler, "
            "made of its scheduler's config"
        )
    return own.name


def check_pipeline(
    pipe: Any,
    prompt: Any,
    model: DenoiserModel,
    prompts: Prompts,
    *,
    sampler: str,
    guidance: float,
    call: Mapping[str, Any],
    steps: int = _CHECKED_STEPS,
) -> float:
    """Return max|a - b| / max|a| of the latents a of a few steps of the pipeline and b of the program by our sampler.

    Raises:
        UnsupportedError: if they differ, so that the pipeline does something that is not followed.
    """
    method = find_method("none")
    executor = eager(denoiser_parts(model, method), Run(model.params))
    asked = SamplingConfig(
        labels=(0,), seed=0, steps=steps, sampler=sampler, guidance=guidance, batch=1, conditions=prompts
    )
    found = draw(model, executor, method, asked).samples
    made = pipe(**{**call_arguments(pipe, prompt, call, steps=steps), "output_type": "latent"})
    expected = next(iter(made.values()) if hasattr(made, "values") else iter(made)).float().cpu().numpy()
    if expected.shape != found.shape or not np.isfinite(expected).all():
        raise UnsupportedError(f"{type(pipe).__name__} returns {expected.shape}, the program {found.shape}")
    error = float(np.abs(expected - found).max()) / (float(np.abs(expected).max()) or 1.0)
    if not error <= _TOLERANCE:
        raise UnsupportedError(
            f"{type(pipe).__name__} draws other latents than its transformer by {sampler} (by {error:.2g}, relative): "
            "it does something between the steps that bundles do not; draw in its own process by vitfold.accelerate"
        )
    return error


def _guidance(pipe: Any, plan: StepPlan | str, call: Mapping[str, Any]) -> float:
    """The scale of classifier-free guidance, by the plan, the call, or the pipeline's own default."""
    if isinstance(plan, StepPlan):
        planned = plan.guidance.get("guidance_scale", 1.0)
        asked = guidance_of(call).get("guidance_scale", planned)
        if asked != planned:
            raise RecipeError(f"guidance_scale = {asked} (plan: {planned}); leave it out, or make a plan for it")
        return planned
    default = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    return float(call.get("guidance_scale", 1.0 if default is None else default.default))


def _check_plan(pipe: Any, plan: StepPlan) -> None:
    if weights_digest(denoisers(pipe)) != plan.weights or scheduler_facts(pipe.scheduler) != plan.scheduler:
        raise RecipeError("the plan is of other weights or another scheduler; make one of this pipeline")
