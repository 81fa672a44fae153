"""Class folders: names, synonyms, indices, and position where nothing else fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitfold.bench.classes import class_targets, fitting_classes, map_classes
from vitfold.errors import ImageError
from vitfold.images import ImageSet

PETS = ("cat", "dog", "ant")


def images_of(*classes: str, index: tuple[int, ...] | None = None) -> ImageSet:
    places = tuple(range(len(classes))) if index is None else index
    paths = tuple(Path(f"/photos/{classes[i]}/{n}.png") for n, i in enumerate(places))
    return ImageSet(root="/photos", paths=paths, classes=classes, class_index=places)


@pytest.mark.parametrize(
    ("folders", "labels", "expected"),
    [
        (("dog", "ant"), PETS, (1, 2)),
        (("Dog", "ANT"), PETS, (1, 2)),
        (("great_white_shark",), ("tench", "Great white shark, man-eater"), (1,)),
        (("tench", "goldfish"), ("tench, Tinca tinca", "goldfish, Carassius auratus", "shark"), (0, 1)),
        (("Tinca tinca",), ("tench, Tinca tinca", "goldfish"), (0,)),
        (("tench, Tinca tinca",), ("tench, Tinca tinca", "goldfish"), (0,)),
        # A whole label before a synonym, whatever their order.
        (("dog",), ("hound, dog", "dog"), (1,)),
        (("dog",), ("hound, dog", "Dog"), (1,)),
        # The first synonym before the others: timm's ImageNet has both crayfish.
        (("crayfish",), ("spiny lobster, crawfish, crayfish", "crayfish, crawdad"), (1,)),
        # Case tells two classes apart where it does.
        (("cardigan", "Cardigan"), ("cardigan", "Cardigan, Welsh corgi"), (0, 1)),
        # Labels that are numbers are names.
        (("7", "10"), tuple(str(n) for n in range(1, 11)), (6, 9)),
    ],
)
def test_folders_are_classes_by_name(folders, labels, expected):
    found = map_classes(folders, labels, len(labels))
    assert found.outputs == expected
    assert found.matched_by == "names"
    assert found.warning is None


@pytest.mark.parametrize("labels", [None, tuple(f"class {i}" for i in range(12))])
def test_numbers_are_indices_and_not_their_sorted_position(labels):
    folders = tuple(sorted(str(i) for i in range(12)))
    assert folders[2] == "10", "sorted as text"
    found = map_classes(folders, labels, 12)
    assert found.outputs == tuple(int(name) for name in folders)
    assert (found.matched_by, found.warning) == ("indices", None)


@pytest.mark.parametrize(
    ("folders", "outputs", "expected"),
    [(("3", "997"), 1000, (3, 997)), (("007", "010"), 12, (7, 10)), (("0", "dog"), 3, (0, 1))],
)
def test_a_subset_of_indices_is_enough_also_beside_names(folders, outputs, expected):
    labels = PETS if outputs == 3 else None
    assert map_classes(folders, labels, outputs).outputs == expected


@pytest.mark.parametrize("labels", [None, PETS])
def test_position_is_the_last_resort_and_warns_with_the_pairs(labels):
    found = map_classes(("n01", "n02", "n03"), labels, 3)
    assert (found.matched_by, found.outputs) == ("position", (0, 1, 2))
    assert found.warning is not None
    assert ("n01 = cat, n02 = dog, n03 = ant" if labels else "n01 = output 0, n02 = output 1") in found.warning


def test_many_pairs_are_cut_short():
    warning = map_classes([f"n{i:03}" for i in range(100)], None, 100).warning
    assert warning is not None
    assert "n009 = output 9, and 90 more" in warning


def test_targets_follow_the_folders_of_the_images():
    assert class_targets(images_of("dog", "ant", index=(0, 0, 1)), PETS, 3) == [1, 1, 2]


def test_images_without_classes_have_no_targets():
    loose = ImageSet(root="/photos", paths=(Path("/photos/1.png"),), classes=None, class_index=None)
    with pytest.raises(ImageError, match="has no class folders"):
        class_targets(loose, PETS, 3)


def test_folders_that_do_not_fit_are_dropped_with_the_reason():
    said: list[str] = []
    found = fitting_classes(images_of("dog", "unicorn"), PETS, 3, said.append)
    assert (found.classes, found.class_index) == (None, None)
    assert len(said) == 1
    assert said[0].startswith(
        "no top-1, because the class folders of /photos do not fit the model: the folder 'unicorn'"
    )


def test_fitting_folders_are_kept_and_a_position_is_said():
    said: list[str] = []
    assert fitting_classes(images_of("dog", "ant"), PETS, 3, said.append).classes == ("dog", "ant")
    assert said == []
    assert fitting_classes(images_of("a", "b", "c"), PETS, 3, said.append).classes == ("a", "b", "c")
    assert len(said) == 1
    assert said[0].startswith("warning: no class folder has the name or the index of a class")
