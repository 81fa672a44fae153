"""One image in, RGB pixels out: whatever a caller has an image as."""

from __future__ import annotations

import functools
import io
import os
import stat
import threading
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vitfold.errors import ImageError, missing_extra
from vitfold.model import Preprocess
from vitfold.model.preprocess import Exif, rgb_from_image

ACCEPTED = (
    "a path, a Pillow image, the bytes of a file, an open binary file, a NumPy array (H, W), (H, W, 1), (H, W, 3) or "
    "(H, W, 4) of uint8, or a torch tensor (1, H, W), (3, H, W) or (4, H, W) of uint8"
)
ARRAYS = frozenset({".npy", ".npz"})
HEIF = frozenset({".heic", ".heif", ".hif"})
# Formats that Pillow knows by name and decodes only with a handler or another program, or that hold no pictures.
_NO_PICTURES = frozenset({"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "IPTC", "FITS"})
# Filters of warnings belong to the process, so only one thread at a time may change them.
_OPENING = threading.Lock()


@functools.lru_cache(maxsize=1)
def suffixes() -> frozenset[str]:
    """Return the suffixes of files that the installed Pillow decodes, with those of pillow-heif where that is there."""
    Image.init()
    _add_heif()
    found = Image.registered_extensions().items()
    return frozenset(suffix for suffix, kind in found if kind in Image.OPEN and kind not in _NO_PICTURES)


@functools.lru_cache(maxsize=1)
def _add_heif() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return
    register_heif_opener()


def read_image(path: str | Path, *, exif: Exif = "ignore") -> Image.Image:
    """Decode one file completely, as RGB; with `exif` "apply" turned as its EXIF orientation says.

    Raises:
        ImageError: if it is missing, no regular file, not an image, cut short, or too large to be one.
    """
    try:
        _check_regular(path)
        return _decoded(path, str(path), exif)
    except FileNotFoundError:
        raise ImageError(f"no such image: {path}") from None
    except PermissionError:
        raise ImageError(f"{path} may not be read by this user; change its permissions") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{str(path)!r} cannot be opened ({error}); check the path") from None


def as_image(item: Any, *, exif: Exif = "ignore", formats: Sequence[str] | None = None) -> Image.Image:
    """Return an image of whatever holds one, as RGB.

    Arrays and tensors hold 8 bits a channel, 0 to 255; a fourth channel is opacity and is dropped. A Pillow image is
    turned by its EXIF orientation like a file. `formats` are those that bytes may have, all by default.

    Raises:
        ImageError: if it holds none; the message says what was expected.
    """
    if isinstance(item, (str, Path)):
        return read_image(item, exif=exif)
    if isinstance(item, Image.Image):
        return _loaded(item, "the Pillow image", exif)
    if isinstance(item, (bytes, bytearray, memoryview)):
        return _decoded(io.BytesIO(item), f"an image of {len(item)} bytes", exif, formats)
    if isinstance(item, np.ndarray):
        return _from_array(item)
    if _is_tensor(item):
        return _from_tensor(item)
    if hasattr(item, "read"):
        return _decoded(item, f"the open file {getattr(item, 'name', '')}".rstrip(), exif)
    if hasattr(item, "__fspath__"):
        return read_image(os.fsdecode(item), exif=exif)
    raise ImageError(f"cannot read an image from {type(item).__name__}; give {ACCEPTED}")


def listed(images: Any, dimensions: int = 3) -> Sequence[Any]:
    """Return the images of one image or of many: an array or tensor of a dimension more than one example is a batch.

    Raises:
        ImageError: if it is neither an image nor something to go through.
    """
    single = (str, Path, Image.Image, bytes, bytearray, memoryview)
    if isinstance(images, single) or hasattr(images, "read") or hasattr(images, "__fspath__"):
        return [images]
    if isinstance(images, np.ndarray) or _is_tensor(images):
        return list(images) if images.ndim > dimensions else [images]
    if isinstance(images, dict) or not hasattr(images, "__iter__"):
        raise ImageError(f"expected an image or several, found {type(images).__name__}; give {ACCEPTED}")
    return list(images)


def prepared(item: Any, preprocess: Preprocess, formats: Sequence[str] | None = None) -> Any:
    """Return the model input, (3, H, W) in float32, of a file or of whatever holds an image.

    Of a file of NumPy, and of anything for a model that takes arrays, it is the array itself.

    Raises:
        ImageError: if it holds none, or an array of another shape.
    """
    if preprocess.arrays or is_array_file(item):
        return as_array(item, preprocess.shape)
    return preprocess(as_image(item, exif=preprocess.exif, formats=formats))


def is_array_file(item: Any) -> bool:
    """Say whether something is the path of a file of NumPy."""
    return isinstance(item, str | os.PathLike) and Path(os.fsdecode(item)).suffix.lower() in ARRAYS


def as_array(item: Any, shape: tuple[int, ...] | None = None) -> Any:
    """Return an array of a file of NumPy, of an array or of a tensor: real numbers in float32, whole ones in int64.

    Raises:
        ImageError: if it is none, holds several, has another shape than this one, or numbers that are not finite.
    """
    if is_array_file(item):
        array, name = _loaded_array(Path(os.fsdecode(item))), str(item)
    elif isinstance(item, np.ndarray) or _is_tensor(item):
        array, name = np.asarray(item.detach().cpu() if _is_tensor(item) else item), "the array"
    else:
        found = item if isinstance(item, str | Path) else type(item).__name__
        raise ImageError(
            f"this model takes arrays of shape {shape}, as .npy files, NumPy arrays or tensors; found {found}"
        )
    if array.dtype.kind not in "iufb":
        raise ImageError(f"{name} holds {array.dtype}, no numbers; save it as float32")
    if shape is not None and array.shape != shape:
        several = array.shape[1:] == shape
        cure = "it holds several examples: save each in a file of its own" if several else "save it in that shape"
        raise ImageError(f"{name} has the shape {array.shape}, and the model takes {shape}; {cure}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ImageError(f"{name} holds NaN or infinite numbers; remove it")
    return np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else np.int64)


def check_readable(path: Path) -> None:
    """Check that a file is an image that decodes, or an array.

    Raises:
        ImageError: if it is neither.
    """
    if is_array_file(path):
        as_array(path)
    else:
        read_image(path)


def _loaded_array(path: Path) -> Any:
    try:
        _check_regular(path)
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                return found
            if len(found.files) != 1:
                raise ImageError(f"{path} holds {len(found.files)} arrays; save one in each file")
            return found[found.files[0]]
    except FileNotFoundError:
        raise ImageError(f"no such file: {path}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ImageError(f"{path} is no array of NumPy that can be read ({error}); write it with numpy.save") from None


def _check_regular(path: str | Path) -> None:
    """Check that a path names a regular file: opening a pipe or a device would wait for ever.

    Raises:
        ImageError: naming what it is instead.
    """
    mode = os.stat(path).st_mode  # noqa: PTH116 (follows links and takes any path)
    if stat.S_ISDIR(mode):
        raise ImageError(f"{path} is a folder, not an image; give the files in it, for instance {path}/*.jpg")
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for test, name in kinds if test(mode)), "a device")
        raise ImageError(f"{path} is {kind}, not an image file; save the image to a file and give that")


def _decoded(source: Any, name: str, exif: Exif, formats: Sequence[str] | None = None) -> Image.Image:
    _add_heif()
    if formats is not None:
        Image.init()
        formats = [one for one in formats if one in Image.OPEN]
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(source, formats=formats)
        with opened as image:
            return _loaded(image, name, exif)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(
            f"{name} would decode to more than {Image.MAX_IMAGE_PIXELS} pixels and looks like a decompression bomb; "
            "remove it, or scale it down first"
        ) from None
    except UnidentifiedImageError:
        heif = Path(name).suffix.lower() in HEIF and Path(name).suffix.lower() not in suffixes()
        cure = missing_extra("pillow-heif", "heif", "reading HEIC") if heif else "remove it or convert it"
        raise ImageError(f"{name} is not an image that Pillow can read; {cure}") from None
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, SyntaxError, ValueError, EOFError, TypeError) as error:
        raise ImageError(f"{name} is damaged or cut short ({error}); fetch it again or remove it") from None


def _loaded(image: Image.Image, name: str, exif: Exif) -> Image.Image:
    """Decode what Pillow has only opened."""
    try:
        image.load()
        if 0 in image.size:
            raise ImageError(f"its size is {image.width} x {image.height}; give an image with pixels")
        if exif == "apply":
            image = ImageOps.exif_transpose(image)
        return rgb_from_image(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, AttributeError, TypeError) as error:
        # A closed image raises what Python raises; a broken one what its decoder does.
        raise ImageError(f"{name} is damaged or cut short ({error}); fetch it again or remove it") from None


def _from_array(array: np.ndarray) -> Image.Image:
    shape, kind = array.shape, array.dtype
    channels = shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in shape:
        cure = f"give {ACCEPTED}"
        if array.ndim == 3 and shape[0] in (1, 3, 4):
            cure = "its channels stand first; give (H, W, C): array.transpose(1, 2, 0)"
        raise ImageError(f"an array of shape {shape} is no image; {cure}")
    if kind == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    elif kind == np.uint16 and channels == 1:
        return rgb_from_image(Image.fromarray(np.ascontiguousarray(array.reshape(shape[:2]))))
    elif kind != np.uint8:
        raise ImageError(
            f"an array of {kind} has no defined white; give uint8 from 0 to 255: values in [0, 1] by "
            "(array * 255).round().astype(numpy.uint8)"
        )
    array = np.ascontiguousarray(array if channels > 1 else array.reshape(shape[:2]))
    return rgb_from_image(Image.fromarray(array))


def _is_tensor(item: Any) -> bool:
    return type(item).__module__.partition(".")[0] == "torch" and hasattr(item, "detach")


def _from_tensor(tensor: Any) -> Image.Image:
    """A tensor has its channels first, as torchvision reads files."""
    shape = tuple(int(n) for n in tensor.shape)
    if str(tensor.dtype) not in ("torch.uint8", "torch.bool"):
        raise ImageError(
            f"a tensor of {tensor.dtype} has no defined white; give uint8 from 0 to 255: values in [0, 1] by "
            "(tensor * 255).round().to(torch.uint8)"
        )
    if len(shape) == 3 and shape[0] not in (1, 3, 4):
        raise ImageError(f"a tensor of shape {shape} is no image; give (C, H, W): tensor.permute(2, 0, 1)")
    array = tensor.detach().cpu().numpy()
    return _from_array(array.transpose(1, 2, 0) if array.ndim == 3 else array)
