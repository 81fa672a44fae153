"""Which output of a model every class folder stands for.

The rules by which folder names are read: names, synonyms, indices, and position where nothing else fits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from vitfold.errors import ImageError, nearest
from vitfold.images import ImageSet
from vitfold.progress import Say

MatchedBy = Literal["names", "indices", "position"]
_SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassMap:
    """The output of every class folder, in the folders' order, and what it was found by.

    `pairs` are (folder, label or index of its output).
    """

    outputs: tuple[int, ...]
    matched_by: MatchedBy
    pairs: tuple[tuple[str, str], ...]

    @property
    def warning(self) -> str | None:
        """What to tell the user of a mapping that no name confirms; None where names or indices did."""
        if self.matched_by != "position":
            return None
        shown = ", ".join(f"{folder} = {label}" for folder, label in self.pairs[:_SHOWN])
        rest = len(self.pairs) - _SHOWN
        return (
            f"warning: no class folder has the name or the index of a class, so they are taken in sorted order: {shown}"
            f"{f', and {rest} more' if rest > 0 else ''}; if that is wrong, so is top-1: name the folders after the "
            "classes or their indices"
        )


def map_classes(folders: Sequence[str], labels: Sequence[str] | None, outputs: int) -> ClassMap:
    """Find the output of every class folder; a subset of the classes is enough.

    A folder is a class by its label, by the first of a label's comma-separated synonyms, by any of them, or by the
    index of its output. Case, and blanks written as underscores, do not matter unless they tell two classes apart.
    Only where no folder is any of these, and there are as many as outputs, folders are taken in sorted order.

    Raises:
        ImageError: if a folder fits no class or several, or two folders fit one class.
    """
    names = [str(label) for label in labels or ()]
    lookups = _lookups(names)
    numbered = any(_index(name) is not None for name in names)
    found: dict[str, int] = {}
    by_index = False
    unknown: list[str] = []
    for folder in folders:
        by_name = _by_name(folder, lookups, names)
        index = _index(folder)
        if by_name is not None:
            found[folder] = by_name
        elif index is None:
            unknown.append(folder)
        else:
            found[folder] = _checked(folder, index, outputs, numbered=numbered)
            by_index = True
    if not found and len(folders) == outputs:
        shown = names or [f"output {i}" for i in range(outputs)]
        pairs = tuple(zip(folders, shown, strict=True))
        return ClassMap(outputs=tuple(range(outputs)), matched_by="position", pairs=pairs)
    if unknown:
        raise _misfit(folders, unknown[0], names, outputs)
    _check_distinct(found, names)
    return ClassMap(
        outputs=tuple(found[folder] for folder in folders),
        matched_by="indices" if by_index else "names",
        pairs=tuple((folder, names[found[folder]] if names else str(found[folder])) for folder in folders),
    )


def class_targets(images: ImageSet, labels: Sequence[str] | None, outputs: int) -> list[int]:
    """Return the model's output index of every image's class folder, as `map_classes` finds it.

    Raises:
        ImageError: if there are no class folders, or they do not fit the classes.
    """
    if images.classes is None or images.class_index is None:
        raise ImageError(f"{images.root} has no class folders; accuracy needs one sub-folder per class")
    found = _mapped(images, labels, outputs)
    return [found.outputs[i] for i in images.class_index]


def fitting_classes(images: ImageSet, labels: Sequence[str] | None, outputs: int, say: Say) -> ImageSet:
    """Return the images; without their class folders where these do not fit, after `say` was told why.

    `say` is also told of a mapping that no name confirms.
    """
    if images.classes is None:
        return images
    try:
        warning = _mapped(images, labels, outputs).warning
    except ImageError as error:
        say(f"no top-1, because {error}")
        return without_classes(images)
    if warning is not None:
        say(warning)
    return images


def without_classes(images: ImageSet) -> ImageSet:
    """Return the same images as if they were not in class folders."""
    return replace(images, classes=None, class_index=None)


def _mapped(images: ImageSet, labels: Sequence[str] | None, outputs: int) -> ClassMap:
    assert images.classes is not None
    try:
        return map_classes(images.classes, labels, outputs)
    except ImageError as error:
        raise ImageError(f"the class folders of {images.root} do not fit the model: {error}") from None


def _lookups(names: Sequence[str]) -> list[tuple[Callable[[str], str], Mapping[str, set[int]]]]:
    """Ways to read a name, the most literal first, each with the outputs that it gives."""

    def whole(name: str) -> list[str]:
        return [name]

    def first(name: str) -> list[str]:
        return [name.split(",", maxsplit=1)[0].strip()]

    def any_of(name: str) -> list[str]:
        return [part.strip() for part in name.split(",")]

    order = ((whole, str), (first, str), (whole, _plain), (first, _plain), (any_of, str), (any_of, _plain))
    ways: list[tuple[Callable[[str], str], Mapping[str, set[int]]]] = []
    for parts, form in order:
        table: dict[str, set[int]] = defaultdict(set)
        for i, name in enumerate(names):
            for word in parts(name):
                table[form(word)].add(i)
        ways.append((form, table))
    return ways


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _by_name(
    folder: str, lookups: Sequence[tuple[Callable[[str], str], Mapping[str, set[int]]]], names: Sequence[str]
) -> int | None:
    for form, table in lookups:
        places = sorted(table.get(form(folder), ()))
        if len(places) > 1:
            shown = " and ".join(f"{place} ({names[place]!r})" for place in places[:3])
            raise ImageError(
                f"the folder {folder!r} could be class {shown}; name it after the index of its class, such as "
                f"{places[0]}"
            )
        if places:
            return places[0]
    return None


def _index(name: str) -> int | None:
    """The number that a name is, None where it is none."""
    return int(name) if name.isascii() and name.isdecimal() and len(name) < 10 else None


def _checked(folder: str, index: int, outputs: int, *, numbered: bool) -> int:
    if numbered:
        raise ImageError(
            f"the folder {folder!r} is no label of the model, whose labels are numbers themselves, so it could also be "
            "an index; name the folders after the labels"
        )
    if index >= outputs:
        raise ImageError(
            f"the folder {folder!r} is taken for the index of an output, and the model has {outputs}: 0 to "
            f"{outputs - 1}; number the folders from 0 on"
        )
    return index


def _check_distinct(found: Mapping[str, int], names: Sequence[str]) -> None:
    taken: dict[int, str] = {}
    for folder, output in found.items():
        if output in taken:
            label = f" ({names[output]!r})" if names else ""
            raise ImageError(
                f"the folders {taken[output]!r} and {folder!r} are both class {output}{label}; put their images into "
                "one folder"
            )
        taken[output] = folder


def _misfit(folders: Sequence[str], unknown: str, names: Sequence[str], outputs: int) -> ImageError:
    cure = "the model has no names for its classes: name the folders after the indices of its outputs, from 0 on"
    if names:
        near = nearest(unknown, [name.split(",")[0].strip() for name in names])
        cure = f"{near.removesuffix('?')}; name folders after the labels of classes or their indices"
    return ImageError(
        f"the folder {unknown!r} is no class of the model ({len(folders)} folders, {outputs} outputs); {cure}"
    )
