"""The JSON documents of a folder, each recognized by what it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitfold.artifacts.journal import HEAD, MOST_BYTES, ROWS
from vitfold.errors import ReportError
from vitfold.report.sheet import SHEET
from vitfold.report.sweeps import check_sweep_rows, read_sweep_rows
from vitfold.storage.ordinary import read_text

SHOWN = ("sweep", "bench", "diffusion", "evaluate", "ladder", "sensitivity", "profile")
_SIGNS: dict[str, frozenset[str]] = {
    "sweep": frozenset({"rows"}),  # also a search: its rows are a sweep's
    "profile": frozenset({"kinds", "blocks", "advice"}),
    "sensitivity": frozenset({"source", "sites"}),
    "ladder": frozenset({"rows", "model_digest", "calibration_size"}),
    "bench": frozenset({"rows", "environment"}),
    "diffusion": frozenset({"rows", "source", "classes", "steps", "sampler", "guidance", "engine", "features"}),
    "evaluate": frozenset({"images", "agreement", "cosine"}),
}
# Written by the tool, but nothing that this page shows.
_OTHERS: dict[str, frozenset[str]] = {
    "audit": frozenset({"audits"}),
    "audit of one graph": frozenset({"kernels", "findings"}),
    "accumulators": frozenset({"layers_beyond", "rows"}),
    "forecast": frozenset({"prediction", "rows"}),
    "lengths": frozenset({"lengths", "rounds"}),
    "forecast of lengths": frozenset({"lengths", "prediction"}),
    "a forecast beside measured times": frozenset({"measured", "prediction"}),
    "many images": frozenset({"files", "bytes", "rows"}),
    "plans of steps": frozenset({"how", "rows"}),
    "a server under load": frozenset({"clients", "seconds", "rows"}),
    "resizing": frozenset({"answers", "rows"}),
    "a page in a browser": frozenset({"chromium", "grey_levels"}),
    "adaptive merging": frozenset({"model", "rows"}),
    "outliers": frozenset({"remedies", "sink_site"}),
    "a bundle of steps": frozenset({"plan", "parts", "verified"}),
    "a sweep without rows": frozenset({"images_digest", "protocol", "calibration_seed"}),
    "inspect": frozenset({"recipe", "digest", "preprocess"}),
    "optimize": frozenset({"recipe", "schedule", "weight_bytes"}),
}
_ROW_SIGNS: dict[str, frozenset[str]] = {
    "sweep": frozenset({"recipe", "merge", "quant", "drop"}),
    "bench": frozenset({"bundle", "scope"}),
    "diffusion": frozenset({"reuse", "seconds_per_image", "psnr_db"}),
    "plans of steps": frozenset({"full", "psnr_db", "speedup_quartiles"}),
    "adaptive merging": frozenset({"mean_macs", "std_macs"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One file that the page shows: its name without the suffix, its kind, its content, the contact sheet beside it."""

    name: str
    kind: str
    content: Mapping[str, Any]
    sheet: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """What was found: documents in the order of `SHOWN`, and files that are the tool's but are not shown."""

    documents: tuple[Document, ...]
    left_out: tuple[str, ...]

    def of(self, kind: str) -> list[Document]:
        """The documents of one kind."""
        return [document for document in self.documents if document.kind == kind]


def load_folder(path: Path) -> Folder:
    """Read every JSON file of a folder, and the rows of a sweep in it.

    Raises:
        ReportError: if the folder is missing or empty, or a file is unreadable or of no known kind.
        JournalError: if a line of a sweep's rows is no row.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise ReportError(
            f"{path} {what}; give the folder that holds the JSON files of bench, sweep, profile and others"
        )
    documents: list[Document] = []
    left_out: list[str] = []
    for file in sorted([*path.glob("*.json"), *path.glob("*/*.json")]):
        if file.parent.name.endswith(".fold") or (file.name == HEAD and file.with_name(ROWS).exists()):
            continue
        name = file.relative_to(path).with_suffix("").as_posix()
        content = _read(file)
        kind = _kind(content)
        if kind == "sweep":
            content = {**content, "rows": check_sweep_rows(file, content["rows"])}
        if kind in _SIGNS:
            sheet = _sheet(file) if kind == "diffusion" else None
            documents.append(Document(name=name, kind=kind, content=content, sheet=sheet))
        elif kind is None:
            raise ReportError(
                f"{file} is none of the documents that a report shows ({', '.join(SHOWN)}): it holds "
                f"{_keys(content)}; move it to another folder"
            )
        else:
            left_out.append(f"{name} ({kind})")
    for file in sorted([*path.glob(ROWS), *path.glob(f"*/{ROWS}")]):
        name = "sweep" if file.parent == path else file.parent.name
        head = file.with_name(HEAD)
        content = {**(_read(head) if head.exists() else {}), "rows": read_sweep_rows(file)}
        documents.append(Document(name=name, kind="sweep", content=content))
    if not documents:
        raise ReportError(
            f"{path} holds nothing to report; fill it with: vitfold bench BUNDLE... -o {path}/bench.json, or "
            f"vitfold profile BUNDLE -o {path}/profile.json"
        )
    documents.sort(key=lambda document: (SHOWN.index(document.kind), document.name))
    return Folder(documents=tuple(documents), left_out=tuple(left_out))


def _sheet(file: Path) -> Path | None:
    """The contact sheet beside a document; where several lie there, that of `vitfold diffusion sample`."""
    owner, sheet = file.with_name("diffuse.json"), file.with_name(SHEET)
    return sheet if sheet.is_file() and (file == owner or not owner.exists()) else None


def _read(file: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(read_text(file, MOST_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{file} cannot be read ({error}); write it again, or move it to another folder") from None
    if not isinstance(content, dict):
        raise ReportError(
            f"{file} holds {type(content).__name__}, not a document of vitfold; move it to another folder"
        )
    return content


def _kind(content: Mapping[str, Any]) -> str | None:
    for table in (_OTHERS, _SIGNS):
        for kind, signs in table.items():
            if signs <= set(content) and _fits(kind, content):
                return kind
    return None


def _fits(kind: str, content: Mapping[str, Any]) -> bool:
    """Tell rows from rows."""
    rows, signs = content.get("rows"), _ROW_SIGNS.get(kind)
    if kind in ("a bundle of steps", "a sweep without rows"):
        return rows is None
    return signs is None or (isinstance(rows, list) and bool(rows) and all(signs <= set(row) for row in rows))


def _keys(content: Mapping[str, Any]) -> str:
    names = list(content)
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"
