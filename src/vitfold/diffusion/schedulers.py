"""Diffusers' schedulers: how a prediction takes a sample from one noise level to the next."""

# mypy: disable-error-code="no-untyped-call,attr-defined"
# (diffusers is typed in part)

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from vitfold.errors import RecipeError, SourceError, missing_extra, nearest
from vitfold.model.schedule import EVEN, FLOW, SHIFT, SIGMAS, flow_sampler

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "ddpm": "DDPMScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}


def build_scheduler(sampler: str, schedule: Mapping[str, Any], steps: int, *, learned_sigma: bool = False) -> Any:
    """Return a scheduler of diffusers with its timesteps set; DDPM uses a learned variance where the model has one.

    Raises:
        RecipeError: if the sampler is unknown, of another kind than the schedule, or takes no such number of steps.
        SourceError: if diffusers is not installed or does not understand the model's schedule.
    """
    if sampler not in SAMPLERS:
        raise RecipeError(f"unknown sampler {sampler!r}; {nearest(sampler, SAMPLERS)}")
    flow = flow_sampler(schedule)
    if flow != (sampler if sampler in FLOW.values() else None):
        kind = "a diffusion, not of flow matching" if flow is None else f"flow matching, which {flow} draws by"
        raise RecipeError(f"the sampler {sampler} does not go with this model's schedule, which is of {kind}")
    try:
        import diffusers
    except ModuleNotFoundError:
        raise SourceError(missing_extra("diffusers", "diffusion", "sampling")) from None
    most = int(schedule.get("num_train_timesteps", 1000))
    if not 1 <= steps <= most:
        raise RecipeError(f"--steps {steps} is out of range; this model was trained with {most} steps: 1 to {most}")
    own = {key: value for key, value in schedule.items() if not key.startswith("_")}
    if sampler == "ddpm":
        own["variance_type"] = "learned_range" if learned_sigma else "fixed_small"
    else:
        own.pop("variance_type", None)
    try:
        scheduler = getattr(diffusers, SAMPLERS[sampler]).from_config(own)
        scheduler.set_timesteps(**_times(schedule, steps))
    except (NotImplementedError, ValueError, TypeError, KeyError) as error:
        raise SourceError(
            f"diffusers' {SAMPLERS[sampler]} does not take this model's schedule ({error}); choose another --sampler"
        ) from None
    return scheduler


def even_sigmas(steps: int) -> Float[np.ndarray, " T"]:
    """Return the sigmas that pipelines of packed latents start from, before they are shifted."""
    return np.linspace(1.0, 1 / steps, steps)


def _times(schedule: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """What a scheduler is told: as many steps, or sigmas, and their shift."""
    shift = {"mu": float(schedule[SHIFT])} if SHIFT in schedule else {}
    if schedule.get(SIGMAS) == EVEN:
        return {"sigmas": even_sigmas(steps).tolist(), **shift}
    return {"num_inference_steps": steps, **shift}
