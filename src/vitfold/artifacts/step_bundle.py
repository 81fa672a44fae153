"""The bundle of a Diffusion Transformer's steps: one graph per part, their weights stored once.

Owns what stands in its manifest. How the folder is written and checked is `sealed`'s business; which part runs at
which step follows from the plan and is `reuse`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from vitfold.artifacts.digested import MANIFEST, check_files, read_header, reserve_bundle, seal
from vitfold.artifacts.manifest import checked_origin, checked_target, checked_verified, sha256_entry
from vitfold.errors import BundleError, VitfoldError
from vitfold.model import DiTSpec, Origin
from vitfold.model.dit import dit_spec_from_dict, dit_spec_to_dict
from vitfold.model.spec import with_names_of_today
from vitfold.storage.checked import ImplausibleError, Range, check_fields, entry
from vitfold.storage.placing import Place

KIND = "diffusion"
PARTS = ("condition", "step", "full", "front", "rest", "resume", "refresh")
"""Every graph that a method may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """How images are drawn: the method of reuse with its numbers, and what each step computes less by itself."""

    reuse: str
    steps: int
    sampler: str
    guidance: float
    merge: int = 0
    quant: str = "none"

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepManifest:
    """Everything about such a bundle but its weights.

    `parts` are the graphs' names; `counts` the tokens that a step renews per block and `mask` the steps computed in
    full, where a method leaves them to the model.
    `verified` says how far the engine's images are from the reference interpreter's, `search` what else was tried.
    """

    vitfold: str
    spec: DiTSpec
    schedule: Mapping[str, Any]
    labels: tuple[str, ...] | None
    origin: Origin
    latent: bool
    decoder: str | None
    model_digest: str
    plan: StepPlan
    parts: tuple[str, ...]
    counts: tuple[int, ...]
    mask: tuple[int, ...]
    target: Mapping[str, Any]
    verified: Mapping[str, Any]
    search: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without the format header and the file list."""
        return {
            "kind": KIND,
            "vitfold": self.vitfold,
            "spec": dit_spec_to_dict(self.spec),
            "schedule": dict(self.schedule),
            "labels": None if self.labels is None else list(self.labels),
            "origin": self.origin.to_dict(),
            "latent": self.latent,
            "decoder": self.decoder,
            "model_digest": self.model_digest,
            "plan": self.plan.to_dict(),
            "parts": list(self.parts),
            "counts": list(self.counts),
            "mask": list(self.mask),
            "target": dict(self.target),
            "verified": dict(self.verified),
            "search": None if self.search is None else dict(self.search),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBundle:
    """An opened bundle whose files had the digests that its manifest states."""

    path: Path
    manifest: StepManifest
    size_bytes: int
    digest: str

    @property
    def name(self) -> str:
        """The directory's name without its suffix."""
        return self.path.name.removesuffix(".fold")


def holds_steps(path: Path) -> bool:
    """Return whether a folder is such a bundle.

    Raises:
        BundleError: if it is no bundle at all.
    """
    return read_header(path).values.get("kind") == KIND


def write_step_bundle(
    path: str | Path, write: Callable[[Path], StepManifest], *, overwrite: bool = False
) -> StepBundle:
    """Write a bundle as a whole or not at all; `write` is handed its folder and returns the manifest.

    Raises:
        BundleError: if the destination cannot be written, or exists and may not be replaced.
    """
    with reserve_bundle(path, overwrite=overwrite) as place:
        draft = seal(place.draft(), lambda folder: write(folder).to_dict())
        return publish_steps(place, open_step_bundle(draft))


def publish_steps(place: Place, draft: StepBundle) -> StepBundle:
    """Put a bundle that was made in a workshop at its destination; return it there.

    Raises:
        BundleError: if it cannot be written.
    """
    return replace(draft, path=place.publish(draft.path))


def open_step_bundle(path: str | Path) -> StepBundle:
    """Open a bundle and check every file against its digest.

    Raises:
        BundleError: if it is missing, holds no steps of a diffusion model, is newer than this vitfold, or damaged.
    """
    folder = Path(path)
    header = read_header(folder)
    if header.values.get("kind") != KIND:
        raise BundleError(
            f"{folder} is not a bundle of a diffusion model's steps; make one with: vitfold optimize demo-dit "
            "--reuse auto -o OUT.fold"
        )
    manifest = _read_manifest(folder, header.values)
    size = check_files(folder, header, [f"{part}.onnx" for part in manifest.parts])
    return StepBundle(path=folder, manifest=manifest, size_bytes=size, digest=header.digest)


_PLAN: dict[str, Range] = {"steps": (1, 10_000), "guidance": (-1e4, 1e4), "merge": (0, 2**20)}
_SPEC: dict[str, Range] = {
    **dict.fromkeys(("image_size", "patch_size", "channels", "outputs", "num_layers", "num_heads"), (1, 2**16)),
    **dict.fromkeys(("embed_dim", "mlp_dim", "classes"), (1, 2**20)),
    "freq_dim": (2, 2**16),
    "wave_shift": (0, 2**16),
    **dict.fromkeys(("norm_eps", "mlp_norm_eps"), (0.0, 1.0)),
}


def _read_manifest(folder: Path, values: Mapping[str, Any]) -> StepManifest:
    """Check every value and build the manifest.

    Raises:
        BundleError: naming the first that is wrong.
    """
    try:
        return _manifest(values)
    except (ImplausibleError, VitfoldError) as error:
        raise BundleError(f"{folder / MANIFEST} is damaged: {error}; make the bundle again") from None


def _manifest(values: Mapping[str, Any]) -> StepManifest:
    spec = dit_spec_from_dict(check_fields(DiTSpec, with_names_of_today(values.get("spec")), "spec", _SPEC))
    plan = check_fields(StepPlan, values.get("plan"), "plan", _PLAN)
    unknown = sorted(set(plan) - {field.name for field in fields(StepPlan)})
    if unknown:
        raise ImplausibleError(
            f"unknown key plan.{unknown[0][:60]}; this vitfold is older than the file, upgrade vitfold"
        )
    labels = entry(values, "labels", tuple[str, ...] | None)
    if labels is not None and len(labels) != spec.classes:
        raise ImplausibleError(f"there are {len(labels)} labels for {spec.classes} classes")
    steps = int(plan["steps"])
    parts: tuple[str, ...] = entry(values, "parts", tuple[str, ...])
    if not parts or len(set(parts)) != len(parts) or not set(parts) <= set(PARTS):
        raise ImplausibleError(f"parts are some of {', '.join(PARTS)}, each once")
    origin = checked_origin(values.get("origin"))
    return StepManifest(
        vitfold=entry(values, "vitfold", str),
        spec=spec,
        schedule=_schedule(entry(values, "schedule", Mapping[str, Any])),
        labels=labels,
        origin=Origin(source=origin["source"], loader=origin["loader"], arguments=origin["arguments"]),
        latent=entry(values, "latent", bool),
        decoder=entry(values, "decoder", str | None),
        model_digest=sha256_entry(values, "model_digest"),
        plan=StepPlan(**{**plan, "guidance": float(plan["guidance"])}),
        parts=parts,
        counts=entry(values, "counts", tuple[int, ...], within=(0, spec.tokens)),
        mask=entry(values, "mask", tuple[int, ...], within=(0, steps - 1)),
        target=checked_target(values.get("target")),
        verified=checked_verified(values.get("verified")),
        search=entry(values, "search", Mapping[str, Any] | None),
    )


_STEPS: Range = (1, 1_000_000)
_SCHEDULE: dict[str, tuple[Any, Range | None]] = {
    "num_train_timesteps": (int, _STEPS),
    "beta_start": (float, (0.0, 1.0)),
    "beta_end": (float, (0.0, 1.0)),
    "steps_offset": (int, (0, 1_000_000)),
    "clip_sample_range": (float, (0.0, 1e6)),
    "sample_max_value": (float, (0.0, 1e6)),
    "dynamic_thresholding_ratio": (float, (0.0, 1.0)),
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
