"""`vitfold lengths`: a table, a sentence, a file; what cannot be is said with the cure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from invoking import error, run, saved_vit


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A model of 17 tokens in a file."""
    return saved_vit(tmp_path_factory.mktemp("larger") / "larger.safetensors", image_size=64)


def test_lengths_are_timed_and_said(larger: tuple[str, ...], few: Path, tmp_path: Path) -> None:
    path = tmp_path / "lengths.json"
    options = ("--lengths", "12:15", "--quant", "none", "--rounds", 2)
    printed = run("lengths", *larger, *options, "--images", few, "-o", path).stdout
    found = json.loads(path.read_text())
    assert [row["tokens"] for row in found["lengths"]] == [15, 14, 13, 12]
    assert (found["quant"], found["batch"], found["rounds"]) == ("none", 1, 2)
    assert "line" in printed
    assert "15 tokens" in " ".join(printed.split())


@pytest.mark.parametrize(
    ("lengths", "told"), [("a:b", "takes A:B, as 176:196"), ("15,14", "at least three numbers"), ("14:200", "found 18")]
)
def test_what_is_no_length_is_refused(larger: tuple[str, ...], few: Path, lengths: str, told: str) -> None:
    assert told in error("lengths", *larger, "--lengths", lengths, "--quant", "none", "--images", few)
