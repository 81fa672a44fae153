"""Names and messages that a terminal, a page or an encoding would read as something else."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from rich.table import Table
from typer.testing import CliRunner

from vitfold.cli.app import app
from vitfold.cli.terminal import PlainConsole
from vitfold.images import find_images
from vitfold.visible import visible


@dataclass(frozen=True)
class Name:
    id: str
    raw: str
    shown: str


NAMES = (
    Name("colour", "[red]x.jpg", "[red]x.jpg"),
    Name("end of markup", "[/]x.jpg", "[/]x.jpg"),
    Name("a link of markup", "[link=x]y[/link].jpg", "[link=x]y[/link].jpg"),
    Name("an escaped bracket", "\\[bold]x.jpg", "\\[bold]x.jpg"),
    Name("a picture", ":smile:.jpg", ":smile:.jpg"),
    Name("braces", "{task.id}%s{0}.jpg", "{task.id}%s{0}.jpg"),
    Name("two lines", "a\nb.jpg", "a\\nb.jpg"),
    Name("back to the beginning", "good\rbad.jpg", "good\\rbad.jpg"),
    Name("a tab", "a\tb.jpg", "a\\tb.jpg"),
    Name("a colour of the terminal", "\x1b[31mx.jpg", "\\x1b[31mx.jpg"),
    Name("the terminal's title", "\x1b]0;mine\x07.jpg", "\\x1b]0;mine\\x07.jpg"),
    Name("eight-bit control", "\x9b31mx.jpg", "\\x9b31mx.jpg"),
    Name("delete", "x\x7f.jpg", "x\\x7f.jpg"),
    Name("backspace", "x\x08\x08y.jpg", "x\\x08\\x08y.jpg"),
    Name("bytes that are no UTF-8", os.fsdecode(b"n\xff\xfe.jpg"), "n\\xff\\xfe.jpg"),
    Name("turned writing", "x\u202egpj.exe", "x\\u202egpj.exe"),
    Name("a line of Unicode", "a\u2028b.jpg", "a\\u2028b.jpg"),
    Name("letters as they are", "ünï 写真.jpg", "ünï 写真.jpg"),
)


@pytest.mark.parametrize("case", NAMES, ids=lambda case: case.id)
def test_a_name_is_shown_as_it_is_on_one_line(case):
    assert visible(case.raw) == case.shown
    console = PlainConsole()
    console.file, console.width = io.StringIO(), 200
    table = Table(title=case.raw)
    table.add_column(case.raw)
    table.add_row(case.raw)
    console.print(case.raw)
    console.print(table)
    written = console.file.getvalue()
    assert written.count(case.shown) == 4
    assert case.raw == case.shown or case.raw not in written
    assert "\x1b" not in written


@pytest.mark.parametrize("case", NAMES, ids=lambda case: case.id)
def test_a_folder_of_such_a_name_has_a_digest_and_an_error_of_one_line(case, tmp_path):
    picture = tmp_path / "in" / case.raw
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(picture, format="png")
    kept = picture.rename(picture.with_suffix(".png"))
    assert len(find_images(kept.parent).digest()) == 64
    done = CliRunner().invoke(app, ["predict", str(tmp_path / case.raw), str(kept)])
    assert done.exit_code == 1
    assert done.stderr.count("\n") == 1
    assert f"error: no such bundle: {tmp_path}/{case.shown} " in done.stderr
    assert done.stdout == ""


def _vitfold(*arguments: object, stdout: object = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vitfold", *map(os.fspath, map(_path, arguments))]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, env={**os.environ, **environment}, check=False, timeout=120
    )


def _path(argument: object) -> str | Path:
    return argument if isinstance(argument, str | Path) else str(argument)


@dataclass(frozen=True)
class Stream:
    id: str
    arguments: tuple[str, ...]
    environment: dict[str, str]


ASCII = {"PYTHONIOENCODING": "ascii"}
STREAMS = (
    Stream("help", ("--help",), ASCII),
    Stream("a command's help", ("optimize", "--help"), ASCII),
    Stream("tables", ("doctor",), ASCII),
    Stream("strict on top", ("cache",), {"PYTHONIOENCODING": "ascii:strict"}),
    Stream("another encoding", ("cache",), {"PYTHONIOENCODING": "latin-1"}),
    Stream("a language without letters", ("cache",), {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    Stream("an error with letters", ("predict", "ünï写.fold", "x.jpg"), ASCII),
)


@pytest.mark.parametrize("case", STREAMS, ids=lambda case: case.id)
def test_no_encoding_of_the_output_stops_a_command(case):
    done = _vitfold(*case.arguments, **case.environment)
    said = done.stdout + done.stderr
    assert b"Traceback" not in said
    assert b"Error" not in said
    assert done.returncode == (1 if "predict" in case.arguments else 0)
    assert "predict" not in case.arguments or b"\\xfcn\\xef\\u5199.fold" in said


FULL = (("--help",), ("--version",), ("cache",), ("cache", "--json"), ("doctor",))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("arguments", FULL, ids=" ".join)
def test_a_full_disk_is_one_line_and_not_success(arguments):
    with Path("/dev/full").open("wb") as full:
        done = _vitfold(*arguments, stdout=full)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if not line.startswith(b"doctor:")]
    assert said == [b"error: cannot write: No space left on device; free space, or send the output elsewhere"]


@pytest.mark.parametrize("arguments", FULL, ids=" ".join)
def test_a_reader_that_left_is_no_reason_for_words(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = _vitfold(*arguments, stdout=writing)
    finally:
        os.close(writing)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if not line.startswith(b"doctor:")] == []


def test_json_of_any_name_is_one_document(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff[red]\n")
    done = _vitfold("cache", "--json", VITFOLD_CACHE=str(folder))
    assert json.loads(done.stdout)["folder"] == str(folder)


NAMES_ON_A_PAGE = ("</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<!--<script>", "a\udcffb")


@pytest.mark.parametrize("name", NAMES_ON_A_PAGE, ids=ascii)
def test_a_page_shows_names_and_runs_none(name, tmp_path):
    pytest.importorskip("plotly")
    pytest.importorskip("jinja2")
    from vitfold.report.loading import load_folder
    from vitfold.report.page import render_page

    row = {
        "recipe": name, "merge": [2] * 12, "quant": name, "method": "vitfold", "bundle": None, "top1": 0.8,
        "top1_agreement": 0.99, "cosine": 0.99, "latency_ns": {"median": 1e6, "trials": [9e5, 1e6]},
        "speedup": {"median": 2.0, "low": 1.9, "high": 2.1}, "throughput_ips": 100.0, "size_bytes": 5, "images": 9,
        "error": None, "commands": [name], "target": "cpu", "drop": {"drop": 0.1, "low": 0.0, "high": 0.2},
    }  # fmt: skip
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    page = render_page(load_folder(tmp_path), title=name, command=f"vitfold report {name}")
    assert page.encode("utf-8")
    assert name not in page
    assert page.count("<script") == page.count("</script>") == 3, "those of the page itself"
    assert "<img src=x" not in page
