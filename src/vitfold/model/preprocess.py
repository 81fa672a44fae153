"""Preprocessing as data, and its execution with Pillow and NumPy.

Reading files is `images`' job.
"""

from __future__ import annotations

import warnings
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float
from PIL import Image

from vitfold.errors import ImageError, ImageWarning, SourceError, nearest

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
ResizeMode = Literal["shortest", "cover", "exact", "none"]
CropOffset = Literal["round", "floor"]
Exif = Literal["ignore", "apply"]

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """Resize, center crop, scale to [0, 1], normalize; sizes are (height, width) in pixels.

    `resize` is "shortest" (the short side becomes `resize_size[0]`, the long side is truncated, as
    torchvision does), "cover" (the smallest size with this aspect that covers `resize_size`, rounded,
    as timm does for oblong inputs), "exact" (aspect ignored) or "none". An odd surplus is cropped at the
    rounded half (torchvision) or at its floor (transformers), as `crop_offset` says. `exif` says whether whoever
    decodes an image turns it first as its EXIF orientation says. `arrays` is the shape of what a model takes that is
    fed by arrays, not by pictures: they enter as they are.
    """

    resize: ResizeMode
    resize_size: tuple[int, int]
    crop_size: tuple[int, int]
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_offset: CropOffset = "round"
    exif: Exif = "ignore"
    arrays: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.resize not in get_args(ResizeMode):
            raise SourceError(f"unsupported resize mode {self.resize!r}; supported: {get_args(ResizeMode)}")
        if self.crop_offset not in get_args(CropOffset):
            raise SourceError(f"unsupported crop offset {self.crop_offset!r}; supported: {get_args(CropOffset)}")
        if self.exif not in get_args(Exif):
            raise SourceError(f"unsupported exif {self.exif!r}; supported: {get_args(Exif)}")
        if self.interpolation not in _RESAMPLING:
            raise SourceError(f"unsupported interpolation {self.interpolation!r}; supported: {sorted(_RESAMPLING)}")
        if min(*self.resize_size, *self.crop_size) <= 0:
            raise SourceError(f"sizes must be positive, found resize {self.resize_size}, crop {self.crop_size}")
        if min(self.std) <= 0:
            raise SourceError(f"std must be positive, found {self.std}")

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `exif` and `arrays` only where they say something."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        if self.exif == "ignore":
            del values["exif"]
        if not self.arrays:
            del values["arrays"]
        return values

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what enters the model, for one example."""
        return self.arrays or (3, *self.crop_size)

    def resized_shape(self, height: int, width: int) -> tuple[int, int]:
        """Return the (height, width) to which an image of this size is resized."""
        if self.resize == "none":
            return height, width
        if self.resize == "exact":
            return self.resize_size
        if self.resize == "shortest":
            short, long = min(height, width), max(height, width)
            other = int(self.resize_size[0] * long / short)
            return (self.resize_size[0], other) if height <= width else (other, self.resize_size[0])
        ratio = min(height / self.resize_size[0], width / self.resize_size[1])
        return round(height / ratio), round(width / ratio)

    def __call__(self, image: Image.Image) -> Float[np.ndarray, "3 H W"]:
        """Return the model input (3, H, W), float32, of one decoded image."""
        if self.arrays:
            raise ImageError(f"this model takes no pictures but arrays of shape {self.arrays}; give .npy files")
        image = rgb_from_image(image)
        shape = self.resized_shape(image.height, image.width)
        if shape != (image.height, image.width):
            image = image.resize((shape[1], shape[0]), _RESAMPLING[self.interpolation])
        image = _center_crop(image, self.crop_size, self.crop_offset)
        pixels = np.asarray(image, dtype=np.float32)
        pixels = pixels / np.float32(255.0)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def rgb_from_image(image: Image.Image) -> Image.Image:
    """Return the image as RGB with 8 bits; transparency is dropped, as the source libraries do.

    Differs from Pillow's own conversion for 16-bit grey images, which it saturates to white: here they
    are scaled. One whose values need fewer bits is all but black then, and an `ImageWarning` says so.

    Raises:
        ImageError: for pixels whose white is not defined (32-bit integers and floats).
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        deep = np.asarray(image)
        _warn_of_unused_bits(int(deep.max(initial=0)))
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"pixels of mode {image.mode} have no defined white; convert the image to 8 or 16 bits first")
    return image.convert("RGB")


def _warn_of_unused_bits(brightest: int) -> None:
    """Cameras and scanners write 10, 12 or 14 bits into 16; taken as 16 bits such a picture is all but black."""
    bits = next((bits for bits in (8, 10, 12, 14) if 0 < brightest < 2**bits), None)
    if bits is not None:
        warnings.warn(
            f"a 16-bit picture has no value above {2**bits - 1}, as if it held {bits} bits; read as 16 bits it is "
            f"{'all but black' if bits < 14 else 'dark'}: multiply its values by {2 ** (16 - bits)} first",
            ImageWarning,
            stacklevel=4,
        )


def _center_crop(image: Image.Image, size: tuple[int, int], offset: CropOffset) -> Image.Image:
    """Crop the center; an image smaller than the crop is padded with black, as torchvision does."""
    height, width = size
    if (image.height, image.width) == size:
        return image
    if image.height < height or image.width < width:
        canvas = Image.new("RGB", (max(width, image.width), max(height, image.height)))
        canvas.paste(image, (max(0, (width - image.width) // 2), max(0, (height - image.height) // 2)))
        image = canvas
    down, across = image.height - height, image.width - width
    top, left = (down // 2, across // 2) if offset == "floor" else (round(down / 2), round(across / 2))
    return image.crop((left, top, left + width, top + height))


def preprocess_of_arrays(shape: tuple[int, ...]) -> Preprocess:
    """Return the preprocessing of a model that takes arrays as they are."""
    return Preprocess(
        resize="none",
        resize_size=(1, 1),
        crop_size=(1, 1),
        interpolation="bilinear",
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        arrays=shape,
    )


def preprocess_from_dict(values: dict[str, Any]) -> Preprocess:
    """Rebuild from `Preprocess.to_dict`.

    Raises:
        SourceError: if a key is unknown or missing.
    """
    known = {f.name for f in fields(Preprocess)}
    needed = {f.name for f in fields(Preprocess) if f.default is MISSING}
    unknown, missing = sorted(set(values) - known), sorted(needed - set(values))
    if unknown:
        raise SourceError(
            f"unknown preprocessing key {unknown[0]!r} ({nearest(unknown[0], known)}); "
            "upgrade vitfold to read this file"
        )
    if missing:
        raise SourceError(f"preprocessing key {missing[0]!r} is missing; the file is damaged, write it again")
    plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Preprocess(**plain)
