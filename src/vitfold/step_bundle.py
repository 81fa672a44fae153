"""The bundle of a Diffusion Transformer's steps: one graph per part, their weights stored once.

Owns what stands in its manifest. How the folder is written and checked is `sealed`'s business; which part runs at
which step follows from the plan and is `reuse`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitfold.errors import BundleError, SourceError
from vitfold.model import DiTSpec, Origin
from vitfold.model.dit import dit_spec_from_dict, dit_spec_to_dict
from vitfold.sealed import MANIFEST, check_files, read_header, write_sealed

KIND = "diffusion"


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
    return open_step_bundle(write_sealed(path, lambda folder: write(folder).to_dict(), overwrite=overwrite))


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


def _read_manifest(folder: Path, values: Mapping[str, Any]) -> StepManifest:
    try:
        return StepManifest(
            vitfold=values["vitfold"],
            spec=dit_spec_from_dict(values["spec"]),
            schedule=values["schedule"],
            labels=None if values["labels"] is None else tuple(values["labels"]),
            origin=Origin(**values["origin"]),
            latent=values["latent"],
            decoder=values["decoder"],
            model_digest=values["model_digest"],
            plan=StepPlan(**values["plan"]),
            parts=tuple(values["parts"]),
            counts=tuple(values["counts"]),
            mask=tuple(values["mask"]),
            target=values["target"],
            verified=values["verified"],
            search=values["search"],
        )
    except (KeyError, TypeError, AttributeError, SourceError) as error:
        raise BundleError(f"{folder / MANIFEST} is damaged: {error!r}; make the bundle again") from None
