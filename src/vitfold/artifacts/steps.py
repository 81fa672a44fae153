"""What a manifest says of a diffusion model's steps, checked as it is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from vitfold.model import DenoiserModel, DenoiserSpec, DiTModel, DiTSpec, Origin
from vitfold.model.denoiser import KIND, denoiser_spec_from_dict
from vitfold.model.dit import dit_spec_from_dict
from vitfold.model.schedule import SHIFT, SIGMAS
from vitfold.model.spec import with_names_of_today
from vitfold.storage.checked import ImplausibleError, Range, check_fields, entry

PARTS = ("condition", "step", "full", "front", "rest", "resume", "refresh", "whole.N", "renew.N")
"""Every graph that a method may have; N is the number of a block."""
DECODE = "decode"
"""The graph that makes images of latents; no step runs it."""
_PART = re.compile("|".join(re.escape(part).replace("N", "(0|[1-9][0-9]{0,4})") for part in PARTS))


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """How images are drawn: the method of reuse with its numbers, and what each step computes less by itself.

    `method` is how the linear layers were quantized; None where none were, or where an older manifest doesn't say.
    """

    reuse: str
    steps: int
    sampler: str
    guidance: float
    merge: int = 0
    quant: str = "none"
    method: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGraph:
    """The graph `DECODE` of a bundle: the shape of the images that it makes of latents, and its error to the VAE."""

    image_shape: tuple[int, int, int]
    relative_error: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFidelity:
    """How near quantized steps draw to the same steps in float, at seeds that calibration has not seen.

    `of` says what was compared. `psnr_db` is over all of them; None where they are equal.
    """

    of: Literal["images", "latents"]
    images: int
    seed: int
    psnr_db: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The model that the graphs of a bundle draw by, without its weights, and how they draw.

    `parts` are the graphs' names; `counts` the tokens that a step renews per block, `mask` the steps computed in full,
    `weights` those of what the newest full steps kept, by step, and `rescale` the polynomial that judges a change,
    where a method leaves them to the model. `search` says what else was tried. `decode` is the graph that makes images
    of latents, where there is one; `decoder` the folder of the VAE where the bundle was made. `fidelity` is what
    quantization costs, where that was measured.
    """

    spec: DiTSpec | DenoiserSpec
    schedule: Mapping[str, Any]
    labels: tuple[str, ...] | None
    origin: Origin
    latent: bool
    decoder: str | None
    plan: SamplingPlan
    parts: tuple[str, ...]
    counts: tuple[int, ...]
    mask: tuple[int, ...]
    search: Mapping[str, Any] | None = None
    weights: tuple[tuple[float, ...], ...] | None = None
    rescale: tuple[float, ...] | None = None
    decode: DecodeGraph | None = None
    fidelity: StepFidelity | None = None


DiffusionModelInfo = DiTModel | DenoiserModel | Steps
"""What drawing asks besides what runs the graphs: spec, schedule, labels, origin, and how latents become images."""


_PLAN: dict[str, Range] = {"steps": (1, 10_000), "guidance": (-1e4, 1e4), "merge": (0, 2**20)}
_SPEC: dict[str, Range] = {
    **dict.fromkeys(("image_size", "patch_size", "channels", "outputs", "num_layers", "num_heads"), (1, 2**16)),
    **dict.fromkeys(("embed_dim", "mlp_dim", "classes"), (1, 2**20)),
    "freq_dim": (2, 2**16),
    "freq_shift": (0, 2**16),
    **dict.fromkeys(("norm_eps", "mlp_norm_eps"), (0.0, 1.0)),
}


_DENOISER: dict[str, Range] = {
    **dict.fromkeys(("image_shape", "outputs", "num_layers"), (1, 2**16)),
    **dict.fromkeys(("tokens", "embed_dim"), (1, 2**20)),
    "time_scale": (0.0, 1e6),
    "packing": (1, 2**40),
}


def read_steps(values: Mapping[str, Any], *, labels: tuple[str, ...] | None, origin: Mapping[str, Any]) -> Steps:
    """Return what a manifest says of the steps.

    Raises:
        ImplausibleError: naming the first value that is wrong.
        SourceError: if the spec is of no architecture.
    """
    spec = _spec(values.get("spec"))
    plan = check_fields(SamplingPlan, values.get("plan"), "plan", _PLAN)
    unknown = sorted(set(plan) - {field.name for field in fields(SamplingPlan)})
    if unknown:
        raise ImplausibleError(
            f"unknown key plan.{unknown[0][:60]}; this vitfold is older than the file, upgrade vitfold"
        )
    classes = spec.classes if isinstance(spec, DiTSpec) else 0
    if labels is not None and len(labels) != classes:
        raise ImplausibleError(f"there are {len(labels)} labels for {classes} classes")
    steps = int(plan["steps"])
    parts: tuple[str, ...] = entry(values, "parts", tuple[str, ...])
    if not parts or len(set(parts)) != len(parts) or not all(map(_PART.fullmatch, parts)):
        raise ImplausibleError(f"parts are some of {', '.join(PARTS)}, each once")
    mask: tuple[int, ...] = entry(values, "mask", tuple[int, ...], within=(0, steps - 1))
    weights = entry(values, "weights", tuple[tuple[float, ...], ...] | None)
    if weights is not None and (
        len(weights) != steps or any(bool(row) == (i in mask) for i, row in enumerate(weights))
    ):
        raise ImplausibleError("weights are one row for every step that is not computed in full")
    return Steps(
        spec=spec,
        schedule=_schedule(entry(values, "schedule", Mapping[str, Any])),
        labels=labels,
        origin=Origin(source=origin["source"], loader=origin["loader"], arguments=origin["arguments"]),
        latent=entry(values, "latent", bool),
        decoder=entry(values, "decoder", str | None),
        plan=SamplingPlan(**{**plan, "guidance": float(plan["guidance"])}),
        parts=parts,
        counts=entry(values, "counts", tuple[int, ...], within=(0, spec.tokens)),
        mask=mask,
        weights=weights,
        rescale=entry(values, "rescale", tuple[float, ...] | None),
        search=entry(values, "search", Mapping[str, Any] | None),
        decode=_decode(entry(values, DECODE, Mapping[str, Any] | None)),
        fidelity=_fidelity(entry(values, "fidelity", Mapping[str, Any] | None)),
    )


def _fidelity(values: Mapping[str, Any] | None) -> StepFidelity | None:
    if values is None:
        return None
    within: dict[str, Range] = {"images": (1, 2**31), "seed": (0, 2**53), "psnr_db": (-1e4, 1e4)}
    found = check_fields(StepFidelity, values, "fidelity", within)
    return StepFidelity(**{field.name: found[field.name] for field in fields(StepFidelity)})


def _decode(values: Mapping[str, Any] | None) -> DecodeGraph | None:
    if values is None:
        return None
    shape = entry(values, "image_shape", tuple[int, int, int], DECODE, (1, 2**16))
    return DecodeGraph(image_shape=shape, relative_error=entry(values, "relative_error", float, DECODE, (0.0, 1.0)))


def _spec(values: Any) -> DiTSpec | DenoiserSpec:
    if isinstance(values, Mapping) and values.get("kind") == KIND:
        checked = check_fields(DenoiserSpec, {**values}, "spec", _DENOISER)
        return denoiser_spec_from_dict(checked)
    return dit_spec_from_dict(check_fields(DiTSpec, with_names_of_today(values), "spec", _SPEC))


_STEPS: Range = (1, 1_000_000)
_SCHEDULE: dict[str, tuple[Any, Range | None]] = {
    "num_train_timesteps": (int, _STEPS),
    "beta_start": (float, (0.0, 1.0)),
    "beta_end": (float, (0.0, 1.0)),
    "steps_offset": (int, (0, 1_000_000)),
    "clip_sample_range": (float, (0.0, 1e6)),
    "sample_max_value": (float, (0.0, 1e6)),
    "dynamic_thresholding_ratio": (float, (0.0, 1.0)),
    SHIFT: (float, (-1e3, 1e3)),
    SIGMAS: (Literal["even"], None),
    "beta_schedule": (Literal["linear", "scaled_linear", "squaredcos_cap_v2"], None),
    "prediction_type": (Literal["epsilon", "sample", "v_prediction", "flow_prediction"], None),
    "timestep_spacing": (Literal["linspace", "leading", "trailing"], None),
    **dict.fromkeys(("clip_sample", "set_alpha_to_one", "thresholding", "rescale_betas_zero_snr"), (bool, None)),
}


def _schedule(values: dict[str, Any]) -> dict[str, Any]:
    """Check what is known of diffusers' words; what else stands there is theirs, and plain."""
    for key, value in values.items():
        if key in _SCHEDULE:
            kind, within = _SCHEDULE[key]
            entry(values, key, kind, "schedule", within)
        elif isinstance(value, dict):
            raise ImplausibleError(f"schedule.{key[:60]} has to be a plain value")
    return values
