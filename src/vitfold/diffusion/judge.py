"""What a vision transformer of the user's choice says about generated images: features and classes.

What a distance of features is worth depends on that model: none of these is an Inception FID.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vitfold.architectures.programs import UNMERGED, forward
from vitfold.architectures.vit import head
from vitfold.bench.pictures import FRECHET_IMAGES, Moments, frechet_distance, moments, resampled_distances
from vitfold.bench.statistics import Rise, paired_rise, resampled_places, share_interval
from vitfold.errors import ImageError
from vitfold.images import find_images, read_image
from vitfold.model import Array, Model
from vitfold.model.spec import as_vit
from vitfold.ops.run import Run
from vitfold.storage.ordinary import check_ordinary

_BATCH = 32
_HEAD = "real"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Verdict:
    """Distance to the real images, and which images the model gives the class asked for, or None.

    Of too few images there is no distance: `frechet` and `resampled` are None. `resampled` are distances of
    resamples, which take the same places in all sets of images of the same labels.
    """

    frechet: float | None
    resampled: Float[np.ndarray, " R"] | None
    right: Bool[np.ndarray, " B"] | None

    @property
    def frechet_noise(self) -> float | None:
        """By how much the distance would differ with other seeds: its standard deviation over resamples."""
        return None if self.resampled is None else float(np.std(self.resampled, ddof=1))

    @property
    def class_accuracy(self) -> float | None:
        """The share of images that have the class asked for, by this model."""
        return None if self.right is None else float(np.mean(self.right))

    def rise_from(self, baseline: Verdict) -> Rise | None:
        """Return by how much the distance is larger than that of other images of the same labels; None without one."""
        if self.frechet is None or self.resampled is None or baseline.frechet is None or baseline.resampled is None:
            return None
        return paired_rise(baseline.frechet, self.frechet, baseline.resampled, self.resampled)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "frechet": self.frechet,
            "frechet_noise": self.frechet_noise,
            "class_accuracy": self.class_accuracy,
            "class_accuracy_interval": None if self.right is None else share_interval(self.right),
        }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judge:
    """A model, and what a distance needs of its features of real images."""

    model: Model
    real: Moments

    def __call__(self, images: Float[np.ndarray, "B C Y X"], labels: tuple[int, ...], classes: int) -> Verdict:
        """Judge generated images; classes are compared where the model has as many as the generator.

        Of fewer than thirty images there is no distance.
        """
        enough = min(len(images), self.real.count) >= FRECHET_IMAGES
        pixels = [Image.fromarray(_bytes(image)) for image in images]
        found = features(self.model, pixels)
        spec, right = as_vit(self.model.spec, "judging images needs"), None
        if spec.outputs == classes and spec.output == "logits":
            with torch.inference_mode():
                logits = head(Run(self.model.params), spec, torch.from_numpy(found)).numpy()
            right = logits.argmax(1) == np.array(labels)
        return Verdict(
            frechet=frechet_distance(self.real, moments(found)) if enough else None,
            resampled=resampled_distances(self.real, found, resampled_places(labels)) if enough else None,
            right=right,
        )

    def save(self, path: Path) -> None:
        """Write what `open_judge` reads instead of the real images; it goes with this model alone.

        Raises:
            ImageError: if the file cannot be written.
        """
        head = {"count": self.real.count, "model": self.model.digest()}
        try:
            save_file(
                {"mean": self.real.mean, "covariance": self.real.covariance}, path, metadata={_HEAD: json.dumps(head)}
            )
        except (OSError, SafetensorError) as error:
            raise ImageError(f"cannot write {path}: {error}; choose another folder") from None


def open_judge(model: Model, real: Path) -> Judge:
    """Take the features of a folder of real images, or what `Judge.save` kept of them.

    Raises:
        ImageError: if images are too few or one cannot be read, or the file is something else or of another model.
    """
    if real.is_file():
        return Judge(model=model, real=_read_moments(real, model))
    found = find_images(real)
    if len(found.paths) < FRECHET_IMAGES:
        raise ImageError(
            f"{real} holds {len(found.paths)} images; a Frechet distance needs at least {FRECHET_IMAGES}; give more"
        )
    return Judge(model=model, real=moments(features(model, [read_image(path) for path in found.paths])))


def _read_moments(path: Path, model: Model) -> Moments:
    try:
        check_ordinary(path)
        with safe_open(path, framework="numpy") as file:
            head = json.loads((file.metadata() or {})[_HEAD])
            found = Moments(count=head["count"], mean=file.get_tensor("mean"), covariance=file.get_tensor("covariance"))
            digest = str(head["model"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ImageError(f"{path} holds no features of real images ({error}); give the folder of images") from None
    if digest != model.digest():
        raise ImageError(
            f"{path} holds features by another model than {model.origin.source}; give the folder of images, or name "
            "the model that made it"
        )
    return found


def features(model: Model, images: list[Image.Image]) -> Float[np.ndarray, "B F"]:
    """Return what the model pools, before its head."""
    spec = replace(as_vit(model.spec, "judging images needs"), outputs=0, output="image_embeds", head_activation="none")
    run, found = Run(model.params), []
    with torch.inference_mode():
        for start in range(0, len(images), _BATCH):
            batch = np.stack([model.preprocess(image) for image in images[start : start + _BATCH]])
            pooled = forward(run, spec, UNMERGED, torch.from_numpy(batch))
            found.append(pooled.flatten(1).numpy())
    return np.concatenate(found)


def _bytes(image: Float[np.ndarray, "C Y X"]) -> Array:
    """8-bit RGB; grey is repeated."""
    pixels: Array = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
