"""A folder of documents: each recognized by what it holds, and every folder that cannot be shown says why."""

from __future__ import annotations

import json
from pathlib import Path

import documents
import pytest

from vitfold.errors import JournalError, ReportError
from vitfold.report.loading import SHOWN, load_folder
from vitfold.report.sweeps import read_sweep_rows

ROOT = Path(__file__).resolve().parents[2]


def test_every_kind_is_recognized_in_its_order(tmp_path: Path) -> None:
    found = load_folder(documents.fill(tmp_path))
    assert [document.kind for document in found.documents] == list(SHOWN)
    assert found.left_out == ()
    assert found.of("sweep")[0].content["rows"] == documents.sweep()
    assert found.of("sweep")[0].content["environment"] == documents.ENVIRONMENT, "of sweep.json"
    assert found.of("bench")[0].name == "demo"


def test_folders_of_sweeps_are_read_and_bundles_are_not(tmp_path: Path) -> None:
    documents.fill(tmp_path / "wide")
    (tmp_path / "r4.fold").mkdir()
    (tmp_path / "r4.fold" / "manifest.json").write_text("{}")
    names = {document.name for document in load_folder(tmp_path).documents}
    assert {"wide", "wide/demo"} <= names


def test_a_contact_sheet_belongs_to_what_drew_it(tmp_path: Path) -> None:
    def sheets() -> dict[str, Path | None]:
        return {document.name: document.sheet for document in load_folder(tmp_path).of("diffusion")}

    (tmp_path / "found.json").write_text(json.dumps(documents.diffusion(chosen="stack:2")))
    assert sheets() == {"found": None}
    sheet = documents.write_sheet(tmp_path)
    assert sheets() == {"found": sheet}
    (tmp_path / "diffuse.json").write_text(json.dumps(documents.diffusion()))
    assert sheets() == {"diffuse": sheet, "found": None}


def test_a_search_of_steps_is_shown_and_a_bundle_alone_is_not(tmp_path: Path) -> None:
    bundle = {"bundle": "x.fold", "plan": {}, "parts": [], "size_bytes": 1, "digest": "0", "verified": {}}
    searched = {**documents.diffusion(), **documents.held_out(), **bundle}
    for name, content in (("searched", searched), ("named", bundle)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = load_folder(tmp_path)
    assert [(document.name, document.kind) for document in found.documents] == [("searched", "diffusion")]
    assert found.left_out == ("named (a bundle of steps)",)


def test_the_results_of_this_project_can_be_shown() -> None:
    found = load_folder(ROOT / "results")
    assert {"bench", "evaluate", "ladder"} <= {document.kind for document in found.documents}
    assert any("audit" in name for name in found.left_out)
    assert {"search-cifar10", "rules-cifar10"} <= {document.name for document in found.of("sweep")}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "list, not a document"),
        ('{"what": 1, "else": 2}', r"none of the documents that a report shows \(sweep, .*holds what, else; move it"),
        ("{}", "it holds nothing"),
    ],
)
def test_files_that_are_no_documents_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "odd.json").write_text(content)
    with pytest.raises(ReportError, match=message) as caught:
        load_folder(tmp_path)
    assert "odd.json" in str(caught.value)


def test_missing_and_empty_folders(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="holds nothing to report; fill it with: vitfold bench"):
        load_folder(tmp_path)
    with pytest.raises(ReportError, match="does not exist"):
        load_folder(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="is a file"):
        load_folder(tmp_path / "file")


GOOD = json.dumps(documents.sweep_row(0, "none", 16.0, 0.89))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"recipe": "r0", "mer', "line 2 is not JSON"),
        ('"r0"', "line 2 is no row but str"),
        ('{"recipe": "r0", "merge": [0]}', "row 2 lacks quant"),
        (
            json.dumps(documents.sweep_row(0, "none", 1.0, None, latency_ns=5)),
            "row 2 has latency_ns 5, which must be null",
        ),
        (json.dumps(documents.sweep_row(0, "none", 1.0, None, merge="8")), "row 2 has merge '8', which must be a list"),
    ],
)
def test_an_unreadable_row_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises((JournalError, ReportError), match=message) as caught:
        load_folder(tmp_path)
    assert "rows.jsonl" in str(caught.value)
    assert "remove" in str(caught.value)


def test_the_last_row_of_a_recipe_counts_and_one_cut_short_does_not(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    again = documents.sweep_row(0, "none", 12.0, 0.89)
    path.write_text(f'{GOOD}\n\n{json.dumps(again)}\n{{"recipe": "r1"')
    assert read_sweep_rows(path) == [again]
    path.write_text("\n")
    with pytest.raises(ReportError, match="has no row yet"):
        read_sweep_rows(path)
