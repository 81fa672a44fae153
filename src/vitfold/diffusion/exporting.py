"""A pipeline of diffusers with a plan of its steps, written as a bundle that draws the same latents."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitfold.artifacts.bundle import Bundle
from vitfold.artifacts.steps import SamplingPlan
from vitfold.diffusion.compare import SamplingConfig, draw
from vitfold.diffusion.compression import check_scheme, compress
from vitfold.diffusion.conditions import Prompts
from vitfold.diffusion.decoding import difference, in_unit_range, lift_decoder
from vitfold.diffusion.denoiser_parts import check_cut, denoiser_parts
from vitfold.diffusion.eager import eager
from vitfold.diffusion.lifting import call_arguments, embed_prompts, lift_pipeline, method_of_plan
from vitfold.diffusion.methods import ReuseMethod, find_method
from vitfold.diffusion.opening import find_step_target
from vitfold.diffusion.pipelines.step_plan import StepPlan, guidance_of, scheduler_facts, weights_digest
from vitfold.diffusion.pipelines.stepping import Steps, denoisers
from vitfold.diffusion.schedulers import build_scheduler
from vitfold.diffusion.solving import check_budget
from vitfold.diffusion.writing import save_steps
from vitfold.errors import ArgumentError, RecipeError, UnsupportedError
from vitfold.model import Array, DenoiserModel, Origin
from vitfold.model.schedule import flow_sampler, own_sampler
from vitfold.ops.run import Run
from vitfold.quant import Progress
from vitfold.sources.diffusers import LatentDecoder

STEPS = 50
_CHECKED_STEPS = 4
_TOLERANCE = 1e-3
"""Of latents behind a few steps: each adds the rounding of its transformer. Of images in [0, 1]."""
_ENTERING = 1e-5
"""Of what a VAE is handed: shares and sums of latents."""


def export_steps(
    pipe: Any,
    plan: StepPlan | str,
    prompts: Sequence[Any],
    path: str | Path,
    *,
    steps: int = STEPS,
    quant: str | None = None,
    quant_method: str | None = None,
    vae: bool = True,
    target: str | None = None,
    source: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
    **call: Any,
) -> Bundle:
    """Write the steps of a pipeline as a bundle of ONNX graphs, which take embeddings of prompts.

    `plan` is what `plan_steps` returned, or a method by name such as "fitted:14", whose steps and weights are then
    fitted on these prompts. `call` are the pipeline's arguments (height=..., guidance_scale=...); sizes, and the length
    of a text, belong to the bundle. `quant`, such as "w8a8", rounds the linear layers of the blocks by a method of
    `vitfold.quant`, calibrated on trajectories of these prompts. With `vae` the bundle also makes images of latents, by
    a graph of the pipeline's decoder. `target` is what graphs are written for, by default this processor. Before
    anything is written, a few steps of the pipeline itself have to give the same latents as the program, and its
    decoder the same image of them.

    Raises:
        ArgumentError: if there are no prompts.
        RecipeError: if the plan is of another model or has no form in a bundle, or bits or method are unknown.
        UnsupportedError: if the pipeline draws in a way that is not followed.
        SourceError: if transformer or decoder cannot be exported, or the scheduler is not followed.
        ParityError: if the program of one computes something else.
        CalibrationError: if an activation is constant, NaN or infinite.
        BundleError: if the destination cannot be written, or exists and may not be replaced.
        EngineError: if the graphs draw something else than the program.
        TargetError: if there is no such target, or it cannot execute what the graphs hold.
    """
    lowering = None if target is None else find_step_target(target)
    quant = quant or ("none" if lowering is None else lowering.implied_quant)
    _check(prompts, quant, quant_method)
    guidance = _guidance(pipe, plan, call)
    method, steps = _method(pipe, plan, steps)
    call = {**call, "guidance_scale": guidance} if isinstance(plan, StepPlan) else call
    say(f"embedding {len(prompts)} prompts")
    bank = embed_prompts(pipe, prompts, **call)
    say("reading the transformer as a program")
    model = _lifted(pipe, prompts[0], source, call)
    sampler, applied = sampler_of(model), guidance if bank.negative else 1.0
    if isinstance(plan, StepPlan):
        method = method_of_plan(plan, build_scheduler(sampler, model.schedule, steps))
    bank.check(model.spec, applied)
    say("comparing with the pipeline")
    decodes = vae and getattr(pipe, "vae", None) is not None
    checked: dict[str, Any] = {"sampler": sampler, "guidance": applied, "call": call, "vae": decodes}
    decoding = check_pipeline(pipe, prompts[0], model, bank, **checked)
    decoder = None
    if decoding is not None:
        say("reading the VAE's decoder as a program")
        decoder = lift_decoder(decoding, model.spec.image_shape)
    along: dict[str, Any] = {"steps": steps, "guidance": applied, "sampler": sampler, "conditions": bank}
    compression = compress(
        model, quant=quant, method=quant_method, target=lowering, progress=Progress(step=say), **along
    )
    settings = SamplingPlan(reuse=method.text, steps=steps, sampler=sampler, guidance=applied, **compression.to_dict())
    how: dict[str, Any] = {"conditions": bank, "decoder": decoder, "overwrite": overwrite, "say": say}
    how["target"] = lowering
    return save_steps(model, settings, method, compression, Path(path), **how)


def _check(prompts: Sequence[Any], quant: str, quant_method: str | None) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ArgumentError(f'prompts must be a list of at least one prompt, such as ["a red fox"], found {prompts!r}')
    if quant_method is not None and quant == "none":
        raise RecipeError(f'quant_method="{quant_method}" says how quant rounds; give quant="w8a8"')
    check_scheme(quant, quant_method)


def _method(pipe: Any, plan: StepPlan | str, steps: int) -> tuple[ReuseMethod, int]:
    """The method that a plan is of or names, and its steps."""
    if isinstance(plan, StepPlan):
        _check_plan(pipe, plan)
        return find_method("none"), plan.steps
    method = find_method(plan)
    check_budget(method, steps)
    for transformer in denoisers(pipe).values():
        check_cut(type(transformer).__name__, method)
    return method, steps


def _lifted(pipe: Any, prompt: Any, source: str | None, call: Mapping[str, Any]) -> DenoiserModel:
    """The transformer as a program, with the folder that the pipeline was loaded from."""
    folder = Path(str(getattr(getattr(pipe, "config", {}), "_name_or_path", "") or ""))
    name = source or (f"hf:{folder}" if folder.is_dir() and folder.name else type(pipe).__name__)
    decoder = str(folder / "vae") if folder.name and (folder / "vae").is_dir() else None
    origin = Origin(source=name, loader="diffusers", arguments={})
    return lift_pipeline(pipe, prompt, origin=origin, decoder=decoder, **call)


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
    vae: bool = False,
    steps: int = _CHECKED_STEPS,
) -> LatentDecoder | None:
    """Check that a few steps of a pipeline give the latents of its program by our sampler.

    With `vae` return what decodes them as the pipeline does.

    Raises:
        UnsupportedError: if not, so that the pipeline does something that is not followed.
    """
    method, kind = find_method("none"), type(pipe).__name__
    executor = eager(denoiser_parts(model, method), Run(model.params))
    asked = SamplingConfig(
        labels=(0,), seed=0, steps=steps, sampler=sampler, guidance=guidance, batch=1, conditions=prompts
    )
    found = draw(model, executor, method, asked).samples
    given, decoding = call_arguments(pipe, prompt, call, steps=steps), None
    if vae:
        latents, decoding = decoded_latents(pipe, given, model.spec.packing)
    else:
        latents = _first(pipe(**{**given, "output_type": "latent"}))
    expected = _array(latents)
    if expected.shape != found.shape or not np.isfinite(expected).all():
        raise UnsupportedError(f"{kind} returns {expected.shape}, the program {found.shape}")
    error = difference(expected, found)
    if not error <= _TOLERANCE:
        raise UnsupportedError(
            f"{kind} draws other latents than its transformer by {sampler} (by {error:.2g}, relative): "
            "it does something between the steps that bundles do not; draw in its own process by vitfold.accelerate"
        )
    return decoding


def _first(made: Any) -> Any:
    """The images of what a pipeline returned."""
    return next(iter(made.values()) if hasattr(made, "values") else iter(made))


def decoded_latents(
    pipe: Any, given: Mapping[str, Any], packing: Sequence[tuple[int, int]] = ()
) -> tuple[Tensor, LatentDecoder]:
    """Return the last latents of a pipeline's scheduler, and what decodes them just as the pipeline does.

    Raises:
        UnsupportedError: if it makes images in another way than by its VAE.
    """
    samples: list[Tensor] = []
    decoded: list[Tensor] = []
    inner = type(pipe.vae).decode

    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        decoded.append(latents)
        return inner(pipe.vae, latents, *args, **kwargs)

    hooks = Steps(scheduler=pipe.scheduler, end=samples.append)
    hooks.install()
    pipe.vae.decode = decode
    try:
        images = np.asarray(_first(pipe(**{**given, "output_type": "np"})))
    finally:
        del pipe.vae.decode
        hooks.remove()
    if len(decoded) == 1:
        decoding = LatentDecoder(pipe.vae, packing=packing, entered=decoded[0].shape[1:] if packing else ())
        with torch.inference_mode():
            entered = _array(decoding.entering(samples[-1]))
            found = np.moveaxis(in_unit_range(_array(decoding(samples[-1]))), 1, -1)
        near = found.shape == images.shape and np.abs(images - found).max() <= _TOLERANCE
        if near and difference(_array(decoded[0]), entered) <= _ENTERING:
            return samples[-1], decoding
    raise UnsupportedError(
        f"{type(pipe).__name__} makes an image of its latents in another way than by its VAE alone; leave the "
        "decoder out: --no-vae (vae=False)"
    )


def _array(tensor: Tensor) -> Array:
    found: Array = tensor.float().cpu().numpy()
    return found


def _guidance(pipe: Any, plan: StepPlan | str, call: Mapping[str, Any]) -> float:
    """The scale of classifier-free guidance, by the plan, the call, or the pipeline's own default."""
    if isinstance(plan, StepPlan):
        planned = plan.guidance.get("guidance_scale", 1.0)
        asked = guidance_of(call).get("guidance_scale", planned)
        if asked != planned:
            raise RecipeError(f"guidance_scale = {asked} (plan: {planned}); leave it out, or make a plan for it")
        return planned
    default = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    return float(call.get("guidance_scale", None if default is None else default.default) or 1.0)


def _check_plan(pipe: Any, plan: StepPlan) -> None:
    if weights_digest(denoisers(pipe)) != plan.weights or scheduler_facts(pipe.scheduler) != plan.scheduler:
        raise RecipeError("the plan is of other weights or another scheduler; make one of this pipeline")
