"""Rows appended to a file: whole ones are read back, a cut one counts as not written."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitfold.artifacts.journal import append_row, read_rows
from vitfold.errors import JournalError

ROWS = [{"recipe": "a", "top1": 0.5}, {"recipe": "b", "top1": None}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "rows.jsonl"


def test_rows_come_back_in_order(path: Path) -> None:
    assert read_rows(path) == []
    for row in ROWS:
        append_row(path, row)
    assert read_rows(path) == ROWS


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_row_that_was_cut_short_is_not_there_and_does_not_spoil_the_next(path: Path, cut: int) -> None:
    append_row(path, ROWS[0])
    whole = path.read_bytes()
    path.write_bytes(whole + whole[:-cut])
    assert read_rows(path) == ROWS[:1]
    append_row(path, ROWS[1])
    assert read_rows(path) == ROWS


@pytest.mark.parametrize(
    ("line", "message"), [("{nonsense", "line 2 is not JSON"), ("[1]", "line 2 is no row but list")]
)
def test_a_damaged_line_is_named(path: Path, line: str, message: str) -> None:
    append_row(path, ROWS[0])
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(JournalError, match=message):
        read_rows(path)


def test_what_json_cannot_say_is_a_bug(path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_row(path, {"top1": float("nan")})
