"""A cache in a folder that holds somebody's own things: they are neither counted nor removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitfold.artifacts.cache import (
    MARK,
    cache_entries,
    cache_folder,
    clear_cache,
    entry_folder,
    find_file,
    keep_bytes,
)
from vitfold.artifacts.journal import ROWS, alone
from vitfold.cli.app import app

KEY, OTHER = "ab" * 32, "cd" * 32

MINE = (
    ("a photo beside the kinds", "holiday.jpg"),
    ("a photo in a folder", "photos/1.jpg"),
    ("a document in a folder of a kind's name", "reference/thesis.pdf"),
    ("a name that is nearly a key", f"reference/{KEY[:-1]}.safetensors"),
    ("a key in capitals", f"reference/{KEY.upper()}.safetensors"),
    ("a key with more behind it", f"reference/{KEY}-copy.safetensors"),
    ("a blob of another program", f"blobs/{KEY}"),
    ("a blob of another program with a suffix", f"sha256/{KEY}.bin"),
    ("a partial file of another program", "downloads/film.partial"),
    ("a partial file in a folder of a kind's name", "reference/film.partial"),
    ("a hidden file", ".bashrc"),
    ("a file below a folder that is no entry", "reference/notes/a.txt"),
    ("an entry's name in a deeper folder", f"reference/deep/{KEY}.safetensors"),
    ("a repository", ".git/config"),
    ("another program's cache", "huggingface/version.txt"),
    ("another program's tag", "CACHEDIR.TAG"),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITFOLD_CACHE", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.parametrize("name", [case[1] for case in MINE], ids=[case[0] for case in MINE])
def test_what_vitfold_did_not_make_stays(home: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = home / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_bytes(b"years of work" * 1000)
    os.utime(mine, (0, 0))
    keep_bytes("reference", KEY, ".json", b"x" * 700)
    assert [entry.path.name for entry in cache_entries()] == [f"{KEY}.json"]
    monkeypatch.setenv("VITFOLD_CACHE_GB", "1e-6")
    keep_bytes("reference", OTHER, ".json", b"x" * 700)
    assert find_file("reference", KEY, ".json") is None, "the oldest entry made room"
    assert clear_cache() == 700
    assert mine.read_bytes() == b"years of work" * 1000
    assert cache_entries() == []


def test_a_folder_with_things_in_it_gets_no_mark(home: Path) -> None:
    (home / "holiday.jpg").write_bytes(b"x")
    keep_bytes("reference", KEY, ".json", b"x")
    assert not (home / MARK).exists(), "backups would leave the photos out"


def test_a_new_cache_has_the_mark_that_backups_know(own_cache: Path) -> None:
    keep_bytes("anything", KEY, ".json", b"x" * 10)
    assert (own_cache / MARK).read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    assert [entry.kind for entry in cache_entries()] == ["anything"]
    assert clear_cache() == 10


def test_a_link_is_no_entry(home: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/a").write_text("mine")
    (home / "searches").mkdir()
    (home / "searches" / KEY).symlink_to(tmp_path / "outside")
    (home / "searches" / f"{OTHER}.json").symlink_to(tmp_path / "outside/a")
    assert cache_entries() == []
    assert clear_cache() == 0
    assert (tmp_path / "outside/a").read_text() == "mine"


def test_entries_from_before_there_was_a_mark_are_known_by_their_names(home: Path) -> None:
    for name in (f"reference/{KEY}.safetensors", f"tensorrt/{KEY}.plan", "search/tmpabcd_123.partial"):
        (home / name).parent.mkdir(exist_ok=True)
        (home / name).write_bytes(b"x" * 10)
    (home / "searches" / KEY).mkdir(parents=True)
    (home / "searches" / KEY / ROWS).write_bytes(b"x" * 10)
    (home / "notes.txt").write_text("mine")
    assert len(cache_entries()) == 4
    assert clear_cache() == 40
    assert sorted(path.name for path in home.rglob("*") if path.is_file()) == ["notes.txt"]


def test_a_folder_that_a_command_works_in_stays(own_cache: Path) -> None:
    folder = entry_folder("searches", KEY)
    (folder / "float.fold").write_bytes(b"x" * 100)
    with alone(folder / ROWS):
        assert clear_cache() == 0
        assert (folder / "float.fold").exists()
    assert clear_cache() == 100
    assert not folder.exists()


def test_a_killed_writer_leaves_what_is_removed_later(own_cache: Path) -> None:
    script = (
        "import os, signal\n"
        "from vitfold.artifacts.cache import keep_file\n"
        f"keep_file('reference', {KEY!r}, lambda p: (p.write_bytes(b'half'), os.kill(os.getpid(), signal.SIGKILL)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "VITFOLD_CACHE": str(own_cache)}, check=False
    )
    assert done.returncode == -9
    assert find_file("reference", KEY) is None
    (entry,) = cache_entries()
    assert entry.path.name.endswith(".partial")
    assert clear_cache() == 4


@pytest.mark.parametrize("key", ["", "a", "../" + "a" * 61, "A" * 64, "a" * 63, "a" * 65])
def test_a_key_that_is_none_is_a_bug(own_cache: Path, key: str) -> None:
    with pytest.raises(ValueError, match="a key of the cache is a sha256"):
        keep_bytes("reference", key, ".json", b"x")
    assert not own_cache.exists()


def test_the_command_leaves_photos_alone(home: Path) -> None:
    from typer.testing import CliRunner

    (home / "photos").mkdir()
    (home / "photos/1.jpg").write_bytes(b"x" * 100)
    keep_bytes("reference", KEY, ".json", b"x" * 10)
    result = CliRunner().invoke(app, ["cache", "--clear", "--json"])
    assert '"freed_bytes": 10' in result.stdout
    assert (home / "photos/1.jpg").read_bytes() == b"x" * 100
    assert str(cache_folder()) == str(home)
