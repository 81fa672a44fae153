"""Which noise schedules are followed: what a folder's scheduler says, and the sampler that it stands for.

Builds no scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vitfold.errors import SourceError

USUAL = "ddim"
OWN = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++",
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
}
"""Classes that a sampler here is the same as."""
REPLACED = frozenset({
    "DEISMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
    "SASolverScheduler", "UniPCMultistepScheduler",
})  # fmt: skip
"""Classes that solve the same diffusion with another method: one of the samplers here draws by the same model."""
FLOW = {"FlowMatchEulerDiscreteScheduler": "flow-euler"}
"""Classes of flow matching, for models that are trained for it."""
_FLOW_OPTIONS = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "stochastic_sampling",
)
SHIFT, SIGMAS, EVEN = "_mu", "_sigmas", "even"
"""What a pipeline hands its scheduler besides a number of steps, kept beside the words of diffusers: by how much times
are shifted for one size of images, and which sigmas it starts from: evenly from 1 down to 1 / steps."""
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnSampler:
    """The sampler that a model's schedule asks for; `replaced` is the class that it stands in for, if it does."""

    name: str
    replaced: str | None = None


def own_sampler(schedule: Mapping[str, Any]) -> OwnSampler:
    """Return the sampler of a schedule in the words of diffusers; the usual one where it names no class.

    Raises:
        SourceError: if it is of another kind, such as flow matching, by which these samplers would draw nothing.
    """
    kind = str(schedule.get("_class_name") or "")
    flow = schedule.get("use_flow_sigmas") or str(schedule.get("prediction_type", "")).startswith("flow")
    if flow or (kind and kind not in OWN and kind not in REPLACED):
        what = f"flow matching ({kind})" if flow or "Flow" in kind else kind
        raise SourceError(
            f"the model's scheduler is {what}, and vitfold draws by noise schedules of diffusion alone: "
            f"{', '.join(sorted({*OWN, *REPLACED}))}; use a model that was trained for one of them"
        )
    prediction = schedule.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise SourceError(
            f"the model's scheduler has prediction_type {prediction!r}; vitfold knows {', '.join(PREDICTIONS)}"
        )
    if kind in OWN or not kind:
        return OwnSampler(name=OWN.get(kind, USUAL))
    return OwnSampler(name=USUAL, replaced=kind)


def flow_sampler(schedule: Mapping[str, Any]) -> str | None:
    """Return the sampler of a schedule of flow matching; None where it is none.

    Raises:
        SourceError: if its times depend on more than their number, and on a shift that is not known.
    """
    sampler = FLOW.get(str(schedule.get("_class_name") or ""))
    known = ("use_dynamic_shifting",) if isinstance(schedule.get(SHIFT), float | int) else ()
    more = next((name for name in _FLOW_OPTIONS if schedule.get(name) and name not in known), None)
    if sampler is not None and more is not None:
        raise SourceError(
            f"the model's scheduler has {more}, and vitfold knows times of flow matching that depend on their number "
            "alone; draw by vitfold.accelerate in the pipeline's own process"
        )
    return sampler
