"""Images on disk: folders, and batches that are prepared while the model runs."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Num

from vitfold.decoding import ARRAYS, HEIF, check_readable, prepared, suffixes
from vitfold.decoding import read_image as read_image  # noqa: PLC0414 (exported clients look here)
from vitfold.errors import ArgumentError, ImageError, nearest
from vitfold.model import Preprocess

A = TypeVar("A")
B = TypeVar("B")

_COMMON = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".bmp", ".gif")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSet:
    """Files of images, or of arrays where there are no images, sorted.

    `classes[class_index[i]]` is the class folder of `paths[i]`, if there are any.

    `left_out` are the other files and folders that stand where images are looked for, relative to the root.
    """

    root: str
    paths: tuple[Path, ...]
    classes: tuple[str, ...] | None
    class_index: tuple[int, ...] | None
    left_out: tuple[str, ...] = ()

    @property
    def remark(self) -> str | None:
        """Say how many files were left out, which, and what would make images of them; None if none was."""
        if not self.left_out:
            return None
        names = ", ".join(self.left_out[:3]) + (", ..." if len(self.left_out) > 3 else "")
        heic = any(Path(name).suffix.lower() in HEIF for name in self.left_out)
        cure = "; for HEIC run: pip install 'vitfold[heif]'" if heic else ""
        return f"left out of {self.root}, as no image files: {len(self.left_out)} ({names}){cure}"

    def digest(self) -> str:
        """Return the sha256 over the names, class folders and contents of all files."""
        total = hashlib.sha256()
        for path in self.paths:
            total.update(os.fsencode(path.relative_to(self.root).as_posix()))
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
                check_readable(path)
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
            left_out=self.left_out,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Preprocessed images (B, 3, H, W), or what else a model takes; `index` are their positions in the set."""

    pixel_values: Num[np.ndarray, "B ..."]
    index: tuple[int, ...]


def find_images(root: str | Path) -> ImageSet:
    """List the images of a folder: class folders if it has any with images, else the files in it.

    Raises:
        ImageError: if the folder is missing, not a folder, may not be read, or holds no image.
    """
    if not isinstance(root, str | os.PathLike):
        raise ArgumentError(f"find_images takes the path of a folder, found {type(root).__name__}")
    folder = Path(root)
    try:
        folder.lstat()  # says what is wrong with a path that cannot be one
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise ImageError(f"{str(root)!r} cannot be read as a folder ({error}); check the path") from None
    try:
        return _found(folder)
    except PermissionError as error:
        raise ImageError(f"{error.filename} may not be read by this user; change its permissions") from None
    except (OSError, ValueError) as error:
        raise ImageError(f"{str(root)!r} cannot be read as a folder ({error}); check the path") from None


def given_paths(given: Iterable[str | Path]) -> list[Path]:
    """Return the files that paths stand for: files as they are, the images of folders, what a pattern (*, ?, **) finds.

    A file that is missing is returned, too: whoever reads it says so.

    Raises:
        ImageError: if a folder holds no image or cannot be read, or a pattern finds nothing.
    """
    found: list[Path] = []
    for path in map(Path, given):
        pattern = glob.has_magic(str(path)) and not os.path.lexists(path)
        matches = [path]
        if pattern:
            matches = [Path(one) for one in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
        if not matches:
            raise ImageError(f"nothing matches {path}; check the pattern, or give a folder")
        if pattern and "**" in path.parts:  # every level is a match of its own
            matches = [one for one in matches if not one.is_dir()]
        for one in matches:
            found += find_images(one).paths if one.is_dir() else [one]
    return found


def _found(folder: Path) -> ImageSet:
    if not folder.exists():
        parent = folder.parent
        beside = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        hint = nearest(folder.name, beside) if beside else "check the path"
        raise ImageError(f"no such folder: {folder} ({hint})")
    if not folder.is_dir():
        raise ImageError(f"{folder} is a file; give a folder of images or of class folders")
    files, others, children = _listed(folder)
    inside = {child.name: _listed(child) for child in children}
    by_class = {name: images for name, (images, _, _) in inside.items() if images}
    if by_class and files:
        raise ImageError(
            f"{folder} holds both images ({files[0].name}, {len(files)} in all) and folders of images "
            f"({next(iter(by_class))}, ...); move the loose images into class folders or elsewhere"
        )
    for name, (_, rest, deeper) in inside.items():
        others += [*rest, *deeper] if name in by_class else [folder / name]
    left_out = tuple(path.relative_to(folder).as_posix() for path in others)
    if by_class:
        return ImageSet(
            root=str(folder),
            paths=tuple(p for group in by_class.values() for p in group),
            classes=tuple(by_class),
            class_index=tuple(i for i, group in enumerate(by_class.values()) for _ in group),
            left_out=left_out,
        )
    found = ImageSet(root=str(folder), paths=tuple(files), classes=None, class_index=None, left_out=left_out)
    if not files:
        more = f"; {found.remark}" if left_out else ""
        raise ImageError(
            f"no images in {folder}; expected files that Pillow reads ({', '.join(sorted(_COMMON))}, ...), "
            f"of NumPy (.npy), or one sub-folder of images per class{more}"
        )
    return found


def _listed(folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """Return images, other files and folders in a folder, sorted; hidden ones are none of these."""
    images: list[Path] = []
    others: list[Path] = []
    folders: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            folders.append(path)
        else:
            (images if path.suffix.lower() in suffixes() and path.is_file() else others).append(path)
    if not images:  # arrays are what lies beside pictures, unless there is nothing else
        images = [path for path in others if path.suffix.lower() in ARRAYS and path.is_file()]
        others = [path for path in others if path not in set(images)]
    return images, others, folders


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
                pixels.append(prepared(images.paths[i], preprocess))
                kept.append(i)
            except ImageError as error:
                if not skip_bad:
                    raise ImageError(f"{error} (or pass --skip-bad to leave such images out)") from None
                bad.append(str(error))
        return Batch(pixel_values=np.stack(pixels), index=tuple(kept)) if kept else None, bad

    for ready, bad in prepared_ahead(groups, prepare, workers=workers):
        for message in bad:
            if on_skip is not None:
                on_skip(message)
        if ready is not None:
            yield ready


def prepared_ahead(items: Iterable[A], prepare: Callable[[A], B], *, workers: int = 2) -> Generator[B, None, None]:
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
