"""Images on disk: folders, decoding, batches that are prepared while the model runs.

Owns what can be wrong with image files. What happens to the pixels is `model.preprocess`; what the
model says about them is `bench`.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError

from vitfold.errors import ImageError, nearest
from vitfold.model import Preprocess
from vitfold.model.preprocess import rgb_from_image

A = TypeVar("A")
B = TypeVar("B")

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff", ".gif"})
# Filters of warnings belong to the process, so only one thread at a time may change them.
_OPENING = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """Image files, sorted; `classes[classes_index[i]]` is the class folder of `paths[i]`, if there are any."""

    root: str
    paths: tuple[Path, ...]
    classes: tuple[str, ...] | None
    class_index: tuple[int, ...] | None

    def digest(self) -> str:
        """Return the sha256 over the names, class folders and contents of all files."""
        total = hashlib.sha256()
        for path in self.paths:
            total.update(path.relative_to(self.root).as_posix().encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
        return total.hexdigest()

    def first(self, count: int) -> ImageSet:
        """Return a subset of at most `count` images, spread evenly over the set."""
        if count >= len(self.paths):
            return self
        return self._only([int(i) for i in np.linspace(0, len(self.paths) - 1, count)])

    def sample(self, count: int, *, seed: int) -> ImageSet:
        """Return a seeded random subset of at most `count` images, in the order of the set."""
        if count >= len(self.paths):
            return self
        return self._only(sorted(np.random.default_rng(seed).choice(len(self.paths), count, replace=False).tolist()))

    def without(self, others: ImageSet) -> ImageSet | None:
        """Return the images that are not among the others, None if there are none."""
        taken = set(others.paths)
        keep = [i for i, path in enumerate(self.paths) if path not in taken]
        return self._only(keep) if keep else None

    def readable(self, on_skip: Callable[[str], None]) -> ImageSet:
        """Return the images that decode; `on_skip` is told of each other one.

        Raises:
            ImageError: if none does.
        """
        keep = []
        for i, path in enumerate(self.paths):
            try:
                read_image(path)
                keep.append(i)
            except ImageError as error:
                on_skip(str(error))
        if not keep:
            raise ImageError(f"none of the {len(self.paths)} images in {self.root} can be read; give another folder")
        return self._only(keep)

    def _only(self, keep: Sequence[int]) -> ImageSet:
        return ImageSet(
            root=self.root,
            paths=tuple(self.paths[i] for i in keep),
            classes=self.classes,
            class_index=None if self.class_index is None else tuple(self.class_index[i] for i in keep),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Decoded and preprocessed images; `index` are their positions in the set."""

    pixel_values: Float[np.ndarray, "B 3 H W"]
    index: tuple[int, ...]


def find_images(root: str | Path) -> ImageSet:
    """List the images of a folder: class folders if it has any with images, else the files in it.

    Raises:
        ImageError: if the folder is missing, not a folder, or holds no image.
    """
    folder = Path(root)
    if not folder.exists():
        parent = folder.parent
        beside = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        hint = nearest(folder.name, beside) if beside else "check the path"
        raise ImageError(f"no such folder: {folder} ({hint})")
    if not folder.is_dir():
        raise ImageError(f"{folder} is a file; give a folder of images or of class folders")
    children = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    by_class = {p.name: _image_files(p) for p in children}
    by_class = {name: files for name, files in by_class.items() if files}
    files = _image_files(folder)
    if by_class and files:
        raise ImageError(
            f"{folder} holds both images ({files[0].name}, {len(files)} in all) and folders of images "
            f"({next(iter(by_class))}, ...); move the loose images into class folders or elsewhere"
        )
    if by_class:
        classes = tuple(by_class)
        paths = tuple(p for group in by_class.values() for p in group)
        index = tuple(i for i, group in enumerate(by_class.values()) for _ in group)
        return ImageSet(root=str(folder), paths=paths, classes=classes, class_index=index)
    if not files:
        raise ImageError(
            f"no images in {folder}; expected files ending in {', '.join(sorted(SUFFIXES))}, "
            "or one sub-folder of images per class"
        )
    return ImageSet(root=str(folder), paths=tuple(files), classes=None, class_index=None)


def _image_files(folder: Path) -> list[Path]:
    files = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return sorted(p for p in files if p.is_file())


def read_image(path: str | Path) -> Image.Image:
    """Decode one file completely, as RGB.

    Raises:
        ImageError: if it is missing, not an image, cut short, or too large to be one.
    """
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(path)
        with opened as image:
            image.load()
            return rgb_from_image(image)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from None
    except FileNotFoundError:
        raise ImageError(f"no such image: {path}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(
            f"{path} would decode to more than {Image.MAX_IMAGE_PIXELS} pixels and looks like a decompression bomb; "
            "remove it, or scale it down first"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not an image that Pillow can read; remove it or convert it") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"{path} is damaged or cut short ({error}); fetch it again or remove it") from None


def batches(
    images: ImageSet,
    preprocess: Preprocess,
    *,
    batch: int,
    skip_bad: bool = False,
    on_skip: Callable[[str], None] | None = None,
    workers: int = 2,
) -> Iterator[Batch]:
    """Yield batches in order; the next ones are decoded by threads while the caller works.

    At most `workers + 2` decoded batches exist at any time, whatever the size of the set.

    Raises:
        ImageError: at the first bad image, naming it, unless `skip_bad`.
    """
    groups = (range(start, min(start + batch, len(images.paths))) for start in range(0, len(images.paths), batch))

    def prepare(group: range) -> tuple[Batch | None, list[str]]:
        kept, pixels, bad = [], [], []
        for i in group:
            try:
                pixels.append(preprocess(read_image(images.paths[i])))
                kept.append(i)
            except ImageError as error:
                if not skip_bad:
                    raise ImageError(f"{error} (or pass --skip-bad to leave such images out)") from None
                bad.append(str(error))
        return Batch(pixel_values=np.stack(pixels), index=tuple(kept)) if kept else None, bad

    for prepared, bad in prepared_ahead(groups, prepare, workers=workers):
        for message in bad:
            if on_skip is not None:
                on_skip(message)
        if prepared is not None:
            yield prepared


def prepared_ahead(items: Iterable[A], prepare: Callable[[A], B], *, workers: int = 2) -> Iterator[B]:
    """Yield prepare(item) in order; threads prepare the next ones while the caller works on this one.

    At most `workers + 2` results exist at any time.
    """
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="decode")
    waiting: deque[Future[B]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(prepare, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def class_targets(images: ImageSet, labels: Sequence[str] | None, outputs: int) -> list[int]:
    """Return the model's output index of every image's class folder.

    Folders are matched by name where the model has labels (also by the first of several synonyms),
    else by sorted position where there are as many folders as outputs.

    Raises:
        ImageError: if neither fits.
    """
    if images.classes is None or images.class_index is None:
        raise ImageError(f"{images.root} has no class folders; accuracy needs one sub-folder per class")
    if labels is not None:
        position = {name: i for i, name in enumerate(labels)}
        position |= {name.split(",")[0].strip(): i for i, name in enumerate(labels)}
        if set(images.classes) <= set(position):
            return [position[images.classes[i]] for i in images.class_index]
    if len(images.classes) == outputs:
        return list(images.class_index)
    unknown = [c for c in images.classes if labels is None or c not in labels]
    raise ImageError(
        f"the {len(images.classes)} class folders of {images.root} do not fit the model's {outputs} outputs "
        f"(first folder without a class: {unknown[0]!r}); name the folders after the model's labels, "
        "or give one folder per output in label order"
    )
