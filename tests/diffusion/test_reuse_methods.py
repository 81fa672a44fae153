"""Methods by name: which steps they compute, and what is refused."""

from __future__ import annotations

import pytest

from vitfold.diffusion import METHODS, find_method, full_steps
from vitfold.errors import RecipeError


def test_steps_that_are_computed() -> None:
    shown = "".join("F" if full else "." for full in full_steps(find_method("taylor:3:1"), 12))
    assert shown == "FF..F..F..FF"
    shown = "".join("F" if full else "." for full in full_steps(find_method("tokencache:0.5:2:4"), 16))
    assert shown == "FF.F.F.F...F...F"
    assert full_steps(find_method("none"), 5) == (True,) * 5
    assert full_steps(find_method("first-block"), 6) == (True, True, False, False, False, True)
    assert full_steps(find_method("stack:1000"), 1) == (True,)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_its_numbers_so_that_it_is_found_again(name: str) -> None:
    method = find_method(name)
    assert find_method(method.text).text == method.text
    assert method.reuses == (name != "none")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tailor", "did you mean taylor"),
        ("taylor:1", "in reuse method 'taylor:1', 1 is out of range; from 2 to 1000"),
        ("taylor:3:9", "out of range; from 1 to 4"),
        ("taylor:3:1:4", "takes 2 numbers, found 3"),
        ("stack:2.5", "'2.5' is no whole number, such as 2"),
        ("stack:two", "'two' is no whole number"),
        ("first-block:-1", "out of range"),
        ("first-block:nan", "out of range"),
        ("none:3", "takes 0 numbers"),
    ],
)
def test_what_no_method_is(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        find_method(text)
