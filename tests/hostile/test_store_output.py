"""Where bundles are written: what stands there, who else writes there, and a kill at every moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vitfold.artifacts.digested import MANIFEST, check_files, read_header, reserve_bundle, seal
from vitfold.artifacts.journal import append_row, read_rows
from vitfold.cli.app import app
from vitfold.errors import BundleError, JournalError
from vitfold.storage.locks import sign, try_lock
from vitfold.storage.ordinary import write_whole
from vitfold.storage.placing import check_space, two_renames
from vitfold.storage.workshop import WRITER, leftovers, workshop_of


def fill(content: bytes = b"weights") -> Callable[[Path], dict[str, Any]]:
    def write(folder: Path) -> dict[str, Any]:
        (folder / "model.onnx").write_bytes(content)
        return {"made": content.decode()}

    return write


def make(path: Path, content: bytes = b"weights", **options: Any) -> Path:
    with reserve_bundle(path, **options) as place:
        return place.publish(seal(place.draft(), fill(content)))


def content_of(path: Path) -> str:
    """The content of a bundle that opens."""
    header = read_header(path)
    check_files(path, header, ["model.onnx"])
    return str(header.values["made"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def folder_with(**files: str) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        path.mkdir()
        for name, text in files.items():
            (path / name.replace("_", ".")).write_text(text)

    return build


def pipe(path: Path) -> None:
    os.mkfifo(path)


def with_pipe(path: Path) -> None:
    make(path)
    os.mkfifo(path / "pipe")


def with_manifest_pipe(path: Path) -> None:
    path.mkdir()
    os.mkfifo(path / MANIFEST)


STANDING = (
    ("a file", lambda path: path.write_text("mine"), "exists and is a file; choose another output"),
    ("a pipe", pipe, "exists and is a file"),
    ("photos", folder_with(a_jpg="mine"), "is not a bundle; choose another output, it is left untouched"),
    ("a web app", folder_with(manifest_json='{"name": "app", "icons": []}', index_html="x"), "is another program's"),
    ("an extension", folder_with(manifest_json='{"manifest_version": 3}'), "is another program's"),
    ("another format", folder_with(manifest_json='{"format": "zip", "files": {}}'), "is another program's"),
    ("a list", folder_with(manifest_json="[]"), "is another program's"),
    ("half a manifest", folder_with(manifest_json='{"format": "vitfold.bun'), "cannot be read, so it is not known"),
    ("no text", folder_with(manifest_json="\udcff".encode(errors="replace").decode() + "\0"), "cannot be read"),
    (
        "no list of files",
        folder_with(manifest_json='{"format": "vitfold.bundle"}'),
        "does not say which files are",
    ),
    ("a manifest that is a pipe", with_manifest_pipe, "cannot be read, so it is not known to be a bundle"),
    ("a bundle with a pipe in it", with_pipe, "is neither a file nor a folder; move it elsewhere"),
)


@pytest.mark.parametrize(("build", "words"), [case[1:] for case in STANDING], ids=[case[0] for case in STANDING])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, build: Callable[[Path], None], words: str) -> None:
    path = tmp_path / "out.fold"
    build(path)
    before = names(path) if path.is_dir() else path.stat().st_ino
    with pytest.raises(BundleError, match=words):
        make(path, overwrite=True)
    assert (names(path) if path.is_dir() else path.stat().st_ino) == before
    assert names(tmp_path) == ["out.fold"]


PLACES = (
    ("below a file", "file/out.fold", "cannot write"),
    ("a name that is too long", "n" * 250 + ".fold", "cannot write"),
    ("where a workshop's name is taken", "taken", "is in the way and is not vitfold's; move it"),
    ("a link that leads nowhere and to itself", "loop", "is a symbolic link that leads nowhere"),
)


@pytest.mark.parametrize(("name", "words"), [case[1:] for case in PLACES], ids=[case[0] for case in PLACES])
def test_places_where_nothing_can_be_written(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / ".taken.partial").mkdir()
    (tmp_path / ".taken.partial/mine.txt").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = names(tmp_path)
    with pytest.raises(BundleError, match=words):
        make(tmp_path / name)
    assert names(tmp_path) == before
    assert (tmp_path / ".taken.partial/mine.txt").read_text() == "mine"


def test_a_disk_without_room_is_noticed_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"takes about 1000000000000 MB while it is made, and \d+ MB are free there"):
        check_space(tmp_path / "deep" / "out.fold", 10**18)
    check_space(tmp_path / "deep" / "out.fold", 1000)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out.fold"
    link.symlink_to(tmp_path / "disk" / "real.fold")
    assert make(link, b"first") == tmp_path / "disk" / "real.fold"
    make(link, b"second", overwrite=True)
    assert link.is_symlink()
    assert content_of(link) == content_of(tmp_path / "disk/real.fold") == "second"
    assert names(tmp_path / "disk") == ["real.fold"]


@pytest.mark.parametrize("swap", [None, two_renames])
def test_the_users_files_stay_in_a_bundle_that_is_replaced(tmp_path: Path, swap: Any) -> None:
    path = make(tmp_path / "a.fold", b"first")
    (path / "notes.txt").write_text("mine")
    (path / "pictures").mkdir()
    (path / "pictures/1.png").write_text("mine too")
    (path / "link").symlink_to("notes.txt")
    options = {} if swap is None else {"swap": swap}
    with reserve_bundle(path, overwrite=True, **options) as place:
        place.publish(seal(place.draft(), fill(b"second")))
        assert place.kept == ["link", "notes.txt", "pictures"]
    assert content_of(path) == "second"
    assert (path / "link").read_text() == "mine"
    assert (path / "pictures/1.png").read_text() == "mine too"
    assert names(tmp_path) == ["a.fold"]


def test_a_users_file_of_the_name_of_a_new_one_is_not_lost(tmp_path: Path) -> None:
    path = make(tmp_path / "a.fold", b"first")
    (path / "quantizers.safetensors").write_text("mine")

    def write(folder: Path) -> dict[str, Any]:
        (folder / "quantizers.safetensors").write_text("new")
        return fill(b"second")(folder)

    with (
        pytest.raises(BundleError, match="quantizers.safetensors is not vitfold's, and the new bundle has a file"),
        reserve_bundle(path, overwrite=True) as place,
    ):
        place.publish(seal(place.draft(), write))
    assert (path / "quantizers.safetensors").read_text() == "mine"
    assert content_of(path) == "first"


def test_folders_that_led_to_nothing_are_removed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), reserve_bundle(tmp_path / "a" / "b" / "out.fold"):
        raise RuntimeError
    assert names(tmp_path) == []
    make(tmp_path / "a" / "b" / "out.fold")
    assert names(tmp_path / "a" / "b") == ["out.fold"]


def test_what_is_not_published_leaves_the_former_bundle(tmp_path: Path) -> None:
    path = make(tmp_path / "a.fold", b"first")
    with reserve_bundle(path, overwrite=True) as place:
        seal(place.draft(), fill(b"second"))
        assert content_of(path) == "first"
    assert content_of(path) == "first"
    assert names(tmp_path) == ["a.fold"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with reserve_bundle(tmp_path / "a") as place:
        draft = seal(place.draft(), fill())
        seal(tmp_path / "a", fill(b"copied there"))
        with pytest.raises(BundleError, match="exists already; pass --overwrite"):
            place.publish(draft)
    assert content_of(tmp_path / "a") == "copied there"


WRITER_SCRIPT = """
    import os, signal, sys, time
    from pathlib import Path
    from vitfold.storage.placing import two_renames
    from vitfold.artifacts.digested import reserve_bundle, seal
    import vitfold.storage.placing as placing

    def write(folder):
        (folder / "model.onnx").write_bytes(b"second")
        return {"made": "second"}

    def stop(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    moment, path = sys.argv[1], Path(sys.argv[2])
    def swap(draft, destination):
        if moment == "between":
            destination.rename(draft.parent / "old")
            stop()
        return two_renames(draft, destination)
    with reserve_bundle(path, overwrite=True, swap=swap) as place:
        if moment == "wait":
            print("held", flush=True)
            time.sleep(60)
        if moment == "reserved":
            stop()
        draft = seal(place.draft(), write)
        if moment == "sealed":
            stop()
        place.publish(draft)
        if moment == "published":
            stop()
"""


def killed_writer(moment: str, path: Path) -> None:
    script = textwrap.dedent(WRITER_SCRIPT)
    assert subprocess.run([sys.executable, "-c", script, moment, path], check=False).returncode == -signal.SIGKILL


@pytest.mark.parametrize("moment", ["reserved", "sealed", "between", "published"])
@pytest.mark.parametrize("comes", ["opening", "writing"])
def test_a_kill_at_any_moment_leaves_one_whole_bundle(tmp_path: Path, moment: str, comes: str) -> None:
    path = make(tmp_path / "a.fold", b"first")
    killed_writer(moment, path)
    (left,) = leftovers(tmp_path)
    assert (left.destination, left.lives) == (path, False)
    if moment == "between":
        assert not path.exists()
    if comes == "opening":
        assert content_of(path) == ("second" if moment == "published" else "first")
    make(path, b"third", overwrite=True)
    assert content_of(path) == "third"
    assert names(tmp_path) == ["a.fold"]


def test_a_bundle_moved_aside_by_a_killed_writer_still_needs_permission(tmp_path: Path) -> None:
    path = make(tmp_path / "a.fold", b"first")
    killed_writer("between", path)
    with pytest.raises(BundleError, match="--overwrite"):
        make(path, b"third")
    assert content_of(path) == "first"


def test_a_second_command_on_the_same_output_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(WRITER_SCRIPT), "wait", tmp_path / "a.fold"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(BundleError, match=rf"being written by another command \(process {first.pid} on .*wait for"):
            make(tmp_path / "a.fold", overwrite=True)
        (left,) = leftovers(tmp_path)
        assert left.lives
        make(tmp_path / "b.fold")
        first.kill()
    make(tmp_path / "a.fold", b"mine")
    assert content_of(tmp_path / "a.fold") == "mine"


def test_two_threads_are_two_writers(tmp_path: Path) -> None:
    with reserve_bundle(tmp_path / "a.fold"), pytest.raises(BundleError, match=f"process {os.getpid()}"):
        make(tmp_path / "a.fold")


def test_what_vitfold_left_before_there_were_locks_is_taken_care_of(tmp_path: Path) -> None:
    path = tmp_path / "a.fold"
    seal(tmp_path / ".a.fold.0123abcd.old", fill(b"first"))
    partial = tmp_path / ".a.fold.0123abcd.partial"
    partial.mkdir()
    (partial / "model.onnx").write_bytes(b"half")
    assert content_of(path) == "first", "moved aside by a killed command and never replaced"
    make(path, b"second", overwrite=True)
    assert partial.exists(), "its writer may still run"
    hours_ago = time.time() - 2 * 3600
    for one in (partial, *partial.iterdir()):
        os.utime(one, (hours_ago, hours_ago))
    assert [left.lives for left in leftovers(tmp_path)] == [False]
    make(path, b"third", overwrite=True)
    assert names(tmp_path) == ["a.fold"]


def test_doctor_shows_what_interrupted_commands_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken_packages: Path
) -> None:
    killed_writer("sealed", tmp_path / "a.fold")
    monkeypatch.setenv("PYTHONPATH", str(broken_packages))  # importing them all takes seconds, and tells nothing here
    monkeypatch.chdir(tmp_path)
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["leftovers"]
    assert [(Path(one["path"]).name, one["of"], one["running"]) for one in found] == [
        (".a.fold.partial", "a.fold", False)
    ]
    assert found[0]["bytes"] > 0
    said = " ".join(CliRunner().invoke(app, ["doctor"]).output.split())
    assert ".a.fold.partial" in said
    assert "the next command that writes a.fold removes it" in said


def test_a_lock_is_released_with_its_process_and_names_it(tmp_path: Path) -> None:
    workshop = workshop_of(tmp_path / "a.fold")
    workshop.mkdir()
    descriptor = try_lock(workshop / WRITER, create=True)
    assert descriptor is not None
    sign(descriptor)
    assert try_lock(workshop / WRITER) is None
    os.close(descriptor)
    again = try_lock(workshop / WRITER)
    assert again is not None
    os.close(again)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    write_whole(path, b"first")
    path.chmod(0o640)
    script = (
        "import os, pathlib, signal\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "from vitfold.storage.ordinary import write_whole\n"
        f"write_whole(pathlib.Path({str(path)!r}), b'second')\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert path.read_bytes() == b"first"
    write_whole(path, b"third")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"third", 0o640)
    (tmp_path / "link.json").symlink_to(path)
    write_whole(tmp_path / "link.json", b"fourth")
    assert (tmp_path / "link.json").is_symlink()
    assert path.read_bytes() == b"fourth"
    assert names(tmp_path) == ["bench.json", "link.json"]
    write_whole(Path("/dev/null"), b"nowhere")


JOURNALS = (
    ("a pipe", os.mkfifo, "is no ordinary file but a pipe"),
    ("a folder", Path.mkdir, "is a folder"),
    ("no JSON", lambda path: path.write_text("row\n"), "line 1 is not JSON"),
    ("a number", lambda path: path.write_text('{"a": 1}\n7\n'), "line 2 is no row but int"),
    ("no text", lambda path: path.write_bytes(b"\xff\xfe\n"), "give another folder"),
    ("depth", lambda path: path.write_text("[" * 100_000 + "\n"), "line 1 is not JSON"),
    ("a number of a million digits", lambda path: path.write_text("1" * 1_000_000 + "\n"), "line 1 is no"),
)


@pytest.mark.parametrize(("build", "words"), [case[1:] for case in JOURNALS], ids=[case[0] for case in JOURNALS])
def test_journals_that_are_none(tmp_path: Path, build: Callable[[Path], Any], words: str) -> None:
    build(tmp_path / "rows.jsonl")
    with pytest.raises(JournalError, match=words):
        read_rows(tmp_path / "rows.jsonl")


def test_a_row_that_was_cut_within_a_character_counts_as_not_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_row(path, {"recipe": "a"})
    with path.open("ab") as file:
        file.write('{"recipe": "é'.encode()[:-1])
    assert read_rows(path) == [{"recipe": "a"}]
    append_row(path, {"recipe": "b"})
    assert read_rows(path) == [{"recipe": "a"}, {"recipe": "b"}]


def test_rows_are_not_appended_to_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(JournalError, match="pipe"):
        append_row(tmp_path / "rows.jsonl", {})
