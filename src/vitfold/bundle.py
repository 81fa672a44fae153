"""The directory on disk that optimizing makes and serving opens.

Owns its layout, its digests, and that a reader never sees half of one. What the files mean to a
runtime is `engines`' business. docs/bundle.md is the specification.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vitfold.digest import file_sha256
from vitfold.errors import BundleError, VitfoldError, nearest
from vitfold.model import Preprocess, ViTSpec, preprocess_from_dict, spec_to_dict, vit_spec_from_dict
from vitfold.recipe import Recipe, recipe_from_dict

FORMAT = "vitfold.bundle"
VERSION = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
WEIGHTS = "weights.safetensors"
QUANTIZERS = "quantizers.safetensors"
RECIPE = "recipe.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything about a bundle but its weights.

    `tokens` are those that enter each block and those that leave the last; `macs` are per image.
    `verified` says how far the engine's output is from the reference interpreter's, `fidelity` how
    far this bundle is from the unfolded model on real images, if any were given. `calibration` says how a
    quantized bundle was calibrated: method, seed, images with their digests, environment.
    """

    vitfold: str
    spec: ViTSpec
    preprocess: Preprocess
    labels: tuple[str, ...] | None
    recipe: Recipe
    target: Mapping[str, Any]
    tokens: tuple[int, ...]
    macs: int
    origin: Mapping[str, Any]
    model_digest: str
    verified: Mapping[str, Any]
    fidelity: Mapping[str, Any] | None
    calibration: Mapping[str, Any] | None = None

    @property
    def simulated(self) -> bool:
        """True if no engine executes it: the bundle holds weights and quantizers instead of a graph."""
        return self.target.get("engine") == "simulation"

    @property
    def has_trained_weights(self) -> bool:
        """False for seeded random weights, whose outputs hardly depend on the image: no fidelity is meant by them."""
        return has_trained_weights(self.origin)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, without the format header and the file list."""
        return {
            "vitfold": self.vitfold,
            "spec": spec_to_dict(self.spec),
            "preprocess": self.preprocess.to_dict(),
            "labels": None if self.labels is None else list(self.labels),
            "recipe": self.recipe.to_dict(),
            "target": dict(self.target),
            "tokens": list(self.tokens),
            "macs": self.macs,
            "origin": dict(self.origin),
            "model_digest": self.model_digest,
            "verified": dict(self.verified),
            "fidelity": None if self.fidelity is None else dict(self.fidelity),
            "calibration": None if self.calibration is None else dict(self.calibration),
        }


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
    def onnx_path(self) -> Path:
        """The ONNX graph."""
        return self.path / MODEL


def has_trained_weights(origin: Mapping[str, Any]) -> bool:
    """Return whether an origin names trained weights, so that a fidelity says something."""
    return bool(origin["arguments"].get("weights") != "random")


def write_bundle(path: str | Path, write: Callable[[Path], Manifest], *, overwrite: bool = False) -> Bundle:
    """Write a bundle beside its destination, then rename it into place.

    `write` is handed the path of model.onnx, writes it and returns the manifest. Nothing is left behind
    if it raises or the user interrupts; an existing bundle is replaced only by a complete one.

    Raises:
        BundleError: if the destination cannot be written, or exists and may not be replaced.
    """
    destination = Path(path).absolute()
    check_destination(destination, overwrite=overwrite)
    work = destination.parent / f".{destination.name}.{secrets.token_hex(4)}.partial"
    try:
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir(mode=0o700)
        except OSError as error:
            raise BundleError(f"cannot write {destination}: {error}; choose a folder that you may write to") from None
        manifest = write(work / MODEL)
        (work / RECIPE).write_text(manifest.recipe.to_toml(), encoding="utf-8")
        header = {"format": FORMAT, "version": VERSION, **manifest.to_dict(), "files": _file_table(work)}
        (work / MANIFEST).write_text(json.dumps(header, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        _put_in_place(work, destination)
    except OSError as error:
        raise BundleError(f"cannot write {destination}: {error}; free some space or choose another folder") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return open_bundle(destination)


def check_destination(destination: Path, *, overwrite: bool) -> None:
    """Check that a bundle may be written there, before anything slow starts.

    Raises:
        BundleError: if something else stands there, or a bundle that may not be replaced.
    """
    if not destination.exists():
        return
    if not destination.is_dir():
        raise BundleError(f"{destination} exists and is a file; choose another output")
    if any(destination.iterdir()) and not (destination / MANIFEST).exists():
        raise BundleError(f"{destination} exists and is not a bundle; choose another output, it is left untouched")
    if any(destination.iterdir()) and not overwrite:
        raise BundleError(f"{destination} exists already; pass --overwrite to replace it, or choose another output")


def copy_bundle(
    bundle: Bundle, path: str | Path, *, fidelity: Mapping[str, Any] | None, overwrite: bool = False
) -> Bundle:
    """Write a bundle anew elsewhere, with another fidelity in its manifest.

    Raises:
        BundleError: if the destination cannot be written.
    """

    def write(onnx_path: Path) -> Manifest:
        for file in bundle.path.iterdir():
            if file.name != MANIFEST:
                shutil.copyfile(file, onnx_path.with_name(file.name))
        return replace(bundle.manifest, fidelity=fidelity)

    return write_bundle(path, write, overwrite=overwrite)


def _put_in_place(work: Path, destination: Path) -> None:
    work.chmod(0o755)
    if not destination.exists():
        work.rename(destination)
        return
    old = work.with_suffix(".old")
    destination.rename(old)
    try:
        work.rename(destination)
    except OSError:
        old.rename(destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _file_table(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }


def open_bundle(path: str | Path) -> Bundle:
    """Open a bundle and check every file against its digest.

    Raises:
        BundleError: if it is missing, not a bundle, newer than this vitfold, or damaged.
    """
    folder = Path(path)
    if not folder.exists():
        around = [p.name for p in folder.parent.iterdir() if p.suffix == ".fold"] if folder.parent.is_dir() else []
        hint = nearest(folder.name, around) if around else "make one with: vitfold optimize SOURCE -o OUT.fold"
        raise BundleError(f"no such bundle: {folder} ({hint})")
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{folder} is not a bundle: it has no {MANIFEST}; make one with: vitfold optimize SOURCE -o OUT.fold"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"cannot read {folder / MANIFEST}: {error}; make the bundle again") from None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise BundleError(f"{folder / MANIFEST} is damaged ({error}); make the bundle again") from None
    manifest, files = _read_manifest(folder, values)
    size = 0
    for name, entry in files.items():
        size += _check_file(folder, name, entry)
    return Bundle(
        path=folder, manifest=manifest, size_bytes=size, digest=hashlib.sha256(text.encode("utf-8")).hexdigest()
    )


def _read_manifest(folder: Path, values: Any) -> tuple[Manifest, Mapping[str, Any]]:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError(f"{folder} is not a bundle: its {MANIFEST} lacks the format {FORMAT!r}")
    version = values.get("version")
    if not isinstance(version, int) or version < 1:
        raise BundleError(f"{folder} states the format version {version!r}, which is not one; make the bundle again")
    if version > VERSION:
        raise BundleError(
            f"{folder} has format version {version}, this vitfold reads up to {VERSION}; "
            "upgrade with: pip install -U vitfold"
        )
    try:
        files = values["files"]
        manifest = Manifest(
            vitfold=values["vitfold"],
            spec=vit_spec_from_dict(values["spec"]),
            preprocess=preprocess_from_dict(values["preprocess"]),
            labels=None if values["labels"] is None else tuple(values["labels"]),
            recipe=recipe_from_dict(values["recipe"], name=f"{folder}/{MANIFEST}"),
            target=values["target"],
            tokens=tuple(values["tokens"]),
            macs=values["macs"],
            origin=values["origin"],
            model_digest=values["model_digest"],
            verified=values["verified"],
            fidelity=values["fidelity"],
            calibration=values.get("calibration"),
        )
    except (KeyError, TypeError, AttributeError, VitfoldError) as error:
        raise BundleError(f"{folder / MANIFEST} is damaged: {error!r}; make the bundle again") from None
    needed = (WEIGHTS, QUANTIZERS) if manifest.simulated else (MODEL,)
    for name in needed:
        if not isinstance(files, dict) or name not in files:
            raise BundleError(f"{folder / MANIFEST} is damaged: it does not list {name}; make the bundle again")
    return manifest, files


def _check_file(folder: Path, name: str, entry: Any) -> int:
    if not isinstance(entry, dict) or Path(name).name != name or name in (".", ".."):
        raise BundleError(f"{folder / MANIFEST} lists the file {name!r}, which a bundle cannot hold")
    path = folder / name
    if not path.is_file() or path.is_symlink():
        raise BundleError(f"{folder} lacks the file {name}; copy the whole folder again or make the bundle again")
    size = path.stat().st_size
    if size != entry.get("size_bytes") or file_sha256(path) != entry.get("sha256"):
        raise BundleError(
            f"{path} is damaged: its sha256 is not the one in {MANIFEST}; copy it again or make the bundle again"
        )
    return size
