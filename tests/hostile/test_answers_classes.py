"""Class folders that fit no class, or several: each is refused with the words of its cure."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vitfold.bench.classes import map_classes
from vitfold.errors import ImageError

PETS = ("cat", "dog", "ant")
NUMBERS = tuple(str(n) for n in range(1, 11))


@dataclass(frozen=True)
class Case:
    id: str
    folders: tuple[str, ...]
    labels: tuple[str, ...] | None
    outputs: int
    said: tuple[str, ...]


CASES = (
    Case("no such class", ("dog", "unicorn"), PETS, 3, ("'unicorn' is no class", "ant, cat, dog")),
    Case("a slip", ("cat", "dog", "aant"), PETS, 3, ("'aant' is no class", "did you mean ant")),
    Case("one of many misspelt", ("cat", "dgo", "ant"), PETS, 3, ("'dgo' is no class", "dog")),
    Case("names without labels", ("dog", "cat"), None, 3, ("no names for its classes", "indices", "from 0 on")),
    Case("too many folders", ("a", "b", "c", "d"), None, 3, ("4 folders, 3 outputs",)),
    Case("an index beyond the last", ("0", "3"), None, 3, ("'3'", "0 to 2", "number the folders from 0 on")),
    Case("numbered from one", ("1", "2", "3"), PETS, 3, ("'3'", "0 to 2")),
    Case("two equal labels", ("crane",), ("crane", "crane"), 2, ("0 ('crane') and 1 ('crane')", "index")),
    Case("a synonym of two", ("hound",), ("dog, hound", "basset, hound"), 2, ("0 ('dog, hound') and 1", "index")),
    Case("case tells nothing", ("DOG",), ("dog", "Dog"), 2, ("0 ('dog') and 1 ('Dog')", "index of its class")),
    Case("two spellings of one", ("Dog", "dog"), PETS, 3, ("'Dog' and 'dog' are both class 1 ('dog')", "one folder")),
    Case("a name and its index", ("1", "dog"), PETS, 3, ("'1' and 'dog' are both class 1", "one folder")),
    Case("two writings of an index", ("1", "01"), None, 3, ("'1' and '01' are both class 1", "one folder")),
    Case("an index among numbered labels", ("0", "5"), NUMBERS, 10, ("'0' is no label", "after the labels")),
    Case("a negative index", ("-1", "0"), None, 3, ("'-1' is no class",)),
    Case("a fraction", ("0.5", "0"), None, 3, ("'0.5' is no class",)),
    Case("other digits", ("٣", "0"), None, 9, ("'٣' is no class",)),
    Case("a very long number", ("9" * 400, "0"), None, 9, ("is no class",)),
    Case("a blank name", (" ", "dog"), PETS, 3, ("' ' is no class",)),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_folders_that_do_not_fit_are_refused_by_name(case):
    with pytest.raises(ImageError) as caught:
        map_classes(case.folders, case.labels, case.outputs)
    for words in case.said:
        assert words in str(caught.value)
