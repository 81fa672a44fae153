"""The cache: bounded, least recently used first, and never in the way of a result."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vitfold.artifacts.cache import (
    cache_entries,
    cache_folder,
    cache_limit,
    clear_cache,
    entry_folder,
    find_file,
    keep_bytes,
    read_bytes,
)
from vitfold.errors import CacheError

pytestmark = pytest.mark.usefixtures("own_cache")


A, B, C, D = (letter * 64 for letter in "abcd")
"""Keys, as `key_of` gives them."""


def age(path: Path, hours: float) -> None:
    then = time.time() - 3600 * hours
    for one in (path, *path.rglob("*")) if path.is_dir() else (path,):
        os.utime(one, (then, then))


def names() -> list[str]:
    """The entries, each by the first letter of its key and its suffix."""
    return [entry.path.name[0] + entry.path.name[64:] for entry in cache_entries()]


def test_what_was_used_longest_ago_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITFOLD_CACHE_GB", "3e-6")
    for hours, key in enumerate((A, B, C)):
        keep_bytes("kind", key, ".bin", b"x" * 1000)
        age(cache_folder() / "kind" / f"{key}.bin", 10 - hours)
    assert names() == ["a.bin", "b.bin", "c.bin"]
    assert read_bytes("kind", A, ".bin") == b"x" * 1000
    assert names() == ["b.bin", "c.bin", "a.bin"]
    keep_bytes("another", D, ".bin", b"x" * 1500)
    assert names() == ["a.bin", "d.bin"]
    assert find_file("kind", B, ".bin") is None


def test_a_folder_is_one_entry_as_old_as_its_newest_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITFOLD_CACHE_GB", "3e-6")
    used, idle = entry_folder("searches", A), entry_folder("searches", B)
    for folder in (used, idle):
        (folder / "inner").mkdir()
        (folder / "inner" / "rows").write_bytes(b"x" * 10)
        (folder / "big").write_bytes(b"x" * 1200)
        age(folder, 5)
    assert entry_folder("searches", A) == used
    age(used / "inner", 9)
    keep_bytes("kind", A, ".bin", b"x" * 1400)
    assert not idle.exists()
    assert (used / "inner" / "rows").read_bytes() == b"x" * 10


def test_what_is_larger_than_the_whole_cache_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITFOLD_CACHE_GB", "1e-6")
    keep_bytes("kind", A, ".bin", b"x" * 900)
    keep_bytes("kind", B, ".bin", b"x" * 1100)
    assert names() == ["a.bin"]
    monkeypatch.setenv("VITFOLD_CACHE_GB", "0")
    keep_bytes("kind", C, ".bin", b"x")
    assert names() == ["a.bin"]


def test_files_that_are_being_written_stay_and_abandoned_ones_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITFOLD_CACHE_GB", "1e-6")
    keep_bytes("kind", A, ".bin", b"x")
    written, abandoned = (cache_folder() / "kind" / f"{key}.bin.00000000.partial" for key in (B, C))
    for path, hours in ((written, 1), (abandoned, 30)):
        path.write_bytes(b"x" * 800)
        age(path, hours)
    keep_bytes("kind", D, ".bin", b"x" * 500)
    assert written.exists()
    assert not abandoned.exists()
    assert read_bytes("kind", D, ".bin") == b"x" * 500


def test_a_folder_that_cannot_be_made_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("VITFOLD_CACHE", str(tmp_path / "file"))
    with pytest.raises(CacheError, match="set VITFOLD_CACHE to a folder that can be written"):
        entry_folder("searches", A)
    assert cache_entries() == []


def test_strange_files_beside_the_kinds_are_no_entries() -> None:
    keep_bytes("kind", A, ".bin", b"x")
    (cache_folder() / "stray.txt").write_bytes(b"x")
    assert names() == ["a.bin"]


def test_clearing_empties_the_folder_and_says_how_much() -> None:
    assert clear_cache() == 0
    keep_bytes("kind", A, ".bin", b"x" * 100)
    (entry_folder("searches", B) / "rows").write_bytes(b"x" * 50)
    assert clear_cache() >= 150
    assert cache_entries() == []


@pytest.mark.parametrize("text", ["eight", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITFOLD_CACHE_GB", text)
    with pytest.raises(CacheError, match="VITFOLD_CACHE_GB='.*' is no number of gigabytes; give one such as 8"):
        cache_limit()


def test_the_limit_is_eight_gigabytes_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITFOLD_CACHE_GB", raising=False)
    assert cache_limit() == 8_000_000_000
