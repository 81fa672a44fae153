"""The folder on disk that optimizing makes and serving opens: graphs for one target, and how they were made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitfold.artifacts.digested import MANIFEST, check_files, read_header, reserve_bundle, seal
from vitfold.artifacts.manifest import checked_origin, checked_target, checked_verified, plain_fields, sha256_entry
from vitfold.artifacts.steps import DECODE, Steps, read_steps
from vitfold.artifacts.vision import Vision, read_vision
from vitfold.errors import BundleError, VitfoldError
from vitfold.model import Architecture, GraphSpec, Preprocess
from vitfold.products import Product, products_of, products_of_recipe
from vitfold.recipe import Recipe
from vitfold.storage.checked import ImplausibleError, entry
from vitfold.storage.ordinary import check_ordinary
from vitfold.storage.placing import Place
from vitfold.target import ENGINES, find_target

MAIN = "main"
"""The part of a bundle that has one."""
MODEL = "model.onnx"
WEIGHTS = "weights.safetensors"
QUANTIZERS = "quantizers.safetensors"
PROGRAM = "program.json"
_PROGRAM_BYTES = 256 * 1024 * 1024
RECIPE = "recipe.toml"
STEPS = "diffusion"
"""The kind that a manifest states if the bundle holds steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a bundle but its weights.

    `verified` says how far the engine's output is from the reference interpreter's. `held` is one Vision Transformer,
    whose values are at hand here, too, or the steps of a diffusion model.
    """

    vitfold: str
    labels: tuple[str, ...] | None
    target: Mapping[str, Any]
    origin: Mapping[str, Any]
    model_digest: str
    verified: Mapping[str, Any]
    held: Vision | Steps

    @property
    def steps(self) -> Steps:
        """The steps of a diffusion model, which `open_bundle(steps=True)` makes sure of."""
        assert isinstance(self.held, Steps)
        return self.held

    @property
    def _vision(self) -> Vision:
        assert isinstance(self.held, Vision)
        return self.held

    @property
    def spec(self) -> Architecture:
        """The Vision Transformer's architecture."""
        return self._vision.spec

    @property
    def preprocess(self) -> Preprocess:
        """How images are prepared."""
        return self._vision.preprocess

    @property
    def recipe(self) -> Recipe:
        """What was done to the Vision Transformer."""
        return self._vision.recipe

    @property
    def tokens(self) -> tuple[int, ...]:
        """Tokens that enter each block, and those that leave the last."""
        return self._vision.tokens

    @property
    def macs(self) -> int:
        """Multiply-accumulates per image."""
        return self._vision.macs

    @property
    def fidelity(self) -> Mapping[str, Any] | None:
        """How far the bundle is from the unfolded model, where that was measured."""
        return self._vision.fidelity

    @property
    def calibration(self) -> Mapping[str, Any] | None:
        """How a quantized bundle was calibrated."""
        return self._vision.calibration

    @property
    def compensation(self) -> Mapping[str, Any] | None:
        """What refitting layers to the merging changed, None where none was refitted."""
        return self._vision.compensation

    def changed(self, **values: Any) -> Manifest:
        """Return the manifest with other values of the Vision Transformer."""
        return replace(self, held=replace(self._vision, **values))

    @property
    def simulated(self) -> bool:
        """True if no engine executes it: the bundle holds weights and quantizers instead of a graph."""
        return not ENGINES[self.target["engine"]].executes

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the graphs; none of a simulated bundle."""
        if isinstance(self.held, Steps):
            return self.held.parts
        return () if self.simulated else (MAIN,)

    @property
    def products(self) -> tuple[Product, ...]:
        """The integer products that the graphs ask of their runtime, which not every processor computes exactly.

        Raises:
            TargetError: if this vitfold does not know the target of quantized steps.
        """
        if isinstance(self.held, Vision):
            return products_of_recipe(self.target, self.recipe.quant)
        if self.steps.plan.quant == "none":
            return ()
        return products_of(find_target(str(self.target["name"])).to_dict(), weight_bits=8, attention=False)

    @property
    def has_trained_weights(self) -> bool:
        """False for seeded random weights, whose outputs hardly depend on the image: no fidelity is meant by them."""
        return has_trained_weights(self.origin)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values without format header and file list; `compensation` only where there is one."""
        kind = {"kind": STEPS} if isinstance(self.held, Steps) else {}
        left: tuple[str, ...]
        if isinstance(self.held, Vision):
            left = ("compensation",) if self.held.compensation is None else ()
        else:
            left = tuple(name for name in (DECODE, "fidelity") if getattr(self.held, name) is None)
        return {**kind, **plain_fields(self.held, but=left), **plain_fields(self, but=("held",))}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """An opened bundle whose files had the digests that its manifest states."""

    path: Path
    manifest: Manifest
    size_bytes: int
    digest: str

    @property
    def name(self) -> str:
        """The directory's name without its suffix."""
        return self.path.name.removesuffix(".fold")

    @property
    def graphs(self) -> dict[str, Path]:
        """The ONNX graph of every part."""
        return {part: self.path / graph_name(part) for part in self.manifest.parts}

    @property
    def decode_path(self) -> Path:
        """The graph that makes images of the latents of steps, where the manifest states one."""
        return self.path / graph_name(DECODE)

    @property
    def decode_bytes(self) -> int:
        """Bytes of that graph with its weights; 0 where there is none."""
        graph = self.decode_path
        return sum(one.stat().st_size for one in (graph, graph.with_name(f"{graph.name}.data")) if one.is_file())

    @property
    def onnx_path(self) -> Path:
        """The ONNX graph of a Vision Transformer."""
        return self.path / MODEL


def graph_name(part: str) -> str:
    """Return the file that holds the graph of a part."""
    return MODEL if part == MAIN else f"{part}.onnx"


def has_trained_weights(origin: Mapping[str, Any]) -> bool:
    """Return whether an origin names trained weights, so that a fidelity says something."""
    return bool(origin["arguments"].get("weights") != "random")


def write_bundle(path: str | Path, write: Callable[[Path], Manifest], *, overwrite: bool = False) -> Bundle:
    """Write a bundle as a whole or not at all; `write` is handed its folder, fills it and returns the manifest.

    Raises:
        BundleError: if the destination cannot be written, or exists and may not be replaced.
    """

    def fill(folder: Path) -> Mapping[str, Any]:
        manifest = write(folder)
        if isinstance(manifest.held, Vision):
            (folder / RECIPE).write_text(manifest.recipe.to_toml(), encoding="utf-8")
        values = manifest.to_dict()
        if isinstance(manifest.held, Vision) and isinstance(manifest.held.spec, GraphSpec):
            (folder / PROGRAM).write_text(manifest.held.spec.program, encoding="utf-8")
            values = {**values, "spec": {**values["spec"], "program": PROGRAM}}
        return values

    with reserve_bundle(path, overwrite=overwrite) as place:
        return publish_bundle(place, open_bundle(seal(place.draft(), fill), steps=None))


def publish_bundle(place: Place, draft: Bundle) -> Bundle:
    """Put a bundle that was made in a workshop at its destination; return it there.

    Raises:
        BundleError: if it cannot be written.
    """
    return replace(draft, path=place.publish(draft.path))


def copy_bundle(
    bundle: Bundle, path: str | Path, *, fidelity: Mapping[str, Any] | None, overwrite: bool = False
) -> Bundle:
    """Write a bundle anew elsewhere, with another fidelity in its manifest.

    Raises:
        BundleError: if the destination cannot be written.
    """

    def write(folder: Path) -> Manifest:
        for name in read_header(bundle.path).values["files"]:
            shutil.copyfile(bundle.path / name, folder / name)
        return bundle.manifest.changed(fidelity=fidelity)

    return write_bundle(path, write, overwrite=overwrite)


def holds_steps(path: Path) -> bool:
    """Return whether a folder is a bundle of a diffusion model's steps.

    Raises:
        BundleError: if it is no bundle at all.
    """
    return read_header(path).values.get("kind") == STEPS


def open_bundle(path: str | Path, *, steps: bool | None = False) -> Bundle:
    """Open a bundle and check every file against its digest.

    `steps` says whether it has to hold the steps of a diffusion model; None takes either.

    Raises:
        BundleError: if it is missing, of another kind, newer than this vitfold, or damaged.
    """
    folder = Path(path)
    header = read_header(folder)
    kind = header.values.get("kind")
    if "kind" in header.values and (kind != STEPS or steps is False):
        raise BundleError(
            f"{folder} holds the steps of a diffusion model, which only these take: vitfold diffusion sample, "
            "vitfold diffusion bench and vitfold inspect"
        )
    if kind is None and steps:
        raise BundleError(
            f"{folder} is not a bundle of a diffusion model's steps; make one with: vitfold diffusion optimize "
            "demo-dit -o OUT.fold"
        )
    spec = header.values.get("spec")
    graph = isinstance(spec, dict) and spec.get("program") == PROGRAM
    values = header.values
    try:
        if isinstance(spec, dict) and graph:
            values = {**values, "spec": {**spec, "program": _program(folder / PROGRAM)}}
        manifest = _manifest(values, name=f"{folder}/{MANIFEST}")
    except (ImplausibleError, VitfoldError) as error:
        raise BundleError(f"{folder / MANIFEST} is damaged: {error}; make the bundle again") from None
    needed = [graph_name(part) for part in manifest.parts]
    needed += [WEIGHTS, QUANTIZERS] if manifest.simulated else []
    needed += [RECIPE] if isinstance(manifest.held, Vision) else []
    needed += [PROGRAM] if graph else []
    needed += [graph_name(DECODE)] if isinstance(manifest.held, Steps) and manifest.held.decode is not None else []
    size = check_files(folder, header, needed)
    return Bundle(path=folder, manifest=manifest, size_bytes=size, digest=header.digest)


def _program(path: Path) -> str:
    """Read the program of a graph.

    Raises:
        ImplausibleError: if the file is missing, no text, or longer than any program.
    """
    try:
        check_ordinary(path)
        if path.stat().st_size > _PROGRAM_BYTES:
            raise ImplausibleError(f"{PROGRAM} is too long")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ImplausibleError(f"{PROGRAM} cannot be read ({error})") from None


def _manifest(values: Mapping[str, Any], *, name: str) -> Manifest:
    """Check every value and build the manifest.

    Raises:
        ImplausibleError: naming the first that is wrong.
    """
    labels = entry(values, "labels", tuple[str, ...] | None)
    origin, target = checked_origin(values.get("origin")), checked_target(values.get("target"))
    steps = "kind" in values
    if steps and not (ENGINES[target["engine"]].several_parts or ENGINES[target["engine"]].gpu):
        raise ImplausibleError(f"target.engine is {target['engine']}, which does not run steps")
    held = (
        read_steps(values, labels=labels, origin=origin)
        if steps
        else read_vision(values, labels=labels, target=target, name=name)
    )
    return Manifest(
        vitfold=entry(values, "vitfold", str),
        labels=labels,
        target=target,
        origin=origin,
        model_digest=sha256_entry(values, "model_digest"),
        verified=checked_verified(values.get("verified")),
        held=held,
    )
