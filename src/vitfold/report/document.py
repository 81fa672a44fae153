"""Tables inside Markdown documents, generated from the JSON files in results/.

The markers, each ended by its closing twin: `<!-- table: FILE.json SCOPE -->`, `<!-- accuracy: PATTERN -->`, `<!--
ladder: FILE.json -->`, `<!-- models: FILE.json -->`, `<!-- timm: FILE.json -->`, `<!-- audit: FILE.json -->`, `<!--
forecast: FILE.json -->`, `<!-- outliers: FILE.json -->`, `<!-- sweep: FILE.json -->` and `<!-- diffusion: FILE.json
[likeness] -->` (likeness: without distances, which need more images), `<!-- lengths: FILE.json FILE.json -->`,
`<!-- modelled-lengths: FILE.json GPU -->` and `<!-- measured-lengths: FILE.json -->` (of a GPU; the file may not exist
yet).
`python -m vitfold.report.document README.md` fills them in; a test compares.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from vitfold.audit.measured import compare_measured
from vitfold.errors import VitfoldError
from vitfold.report.audits import GPUS, forecast_cells, forecast_columns, overview_cells, overview_columns
from vitfold.report.gpu_lengths import (
    MEASURED_COLUMNS,
    batches_of,
    lengths_cells,
    lengths_columns,
    measured_cells,
    measured_sentence,
)
from vitfold.report.lengths import length_cell
from vitfold.report.sinks import remedy_cells, remedy_columns
from vitfold.report.tables import (
    DISTANCES,
    SWEEP_COLUMNS,
    accuracy_rows,
    diffusion_rows,
    markdown,
    number,
    percent,
    sweep_cells,
)

_BLOCK = re.compile(r"(<!-- ([a-z-]+): ([^>]+?) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def fill(text: str, root: Path) -> str:
    """Return the document with every marked table generated from the files below `root`."""

    def render(match: re.Match[str]) -> str:
        opening, kind, argument, closing = match.groups()
        table = _MAKERS[kind](root, argument)
        return f"{opening}\n{table}\n\n{closing}"

    return _BLOCK.sub(render, text)


def _speed(root: Path, argument: str) -> str:
    name, scope = argument.split()
    rows = json.loads((root / name).read_text(encoding="utf-8"))["rows"]
    return markdown([row for row in rows if row["scope"] == scope])


def _accuracy(root: Path, pattern: str) -> str:
    header = "| variant | images | top-1 % | agree % | cosine |\n|---|---:|---:|---:|---:|"
    lines = [header]
    for path in sorted(root.glob(pattern)):
        values = json.loads(path.read_text(encoding="utf-8"))
        shown = (
            percent(values["top1"], unit=""),
            percent(values["agreement"], unit=""),
            number(values["cosine"], ".4f"),
        )
        lines.append(f"| {path.stem.partition('-')[2]} | {values['images']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _ladder(root: Path, name: str) -> str:
    header, body = accuracy_rows(json.loads((root / name).read_text(encoding="utf-8")))
    return _lines(header, body, left=2)


def _lengths(root: Path, names: str) -> str:
    """Files side by side: the time of each length, and by how many per cent it lies beside its line."""
    files = [json.loads((root / name).read_text(encoding="utf-8")) for name in names.split()]
    rows = [{row["tokens"]: row for row in file["lengths"]} for file in files]
    tokens = sorted(set[int]().union(*rows), reverse=True)
    body = [[str(at), *(length_cell(of[at]) if at in of else "-" for of in rows)] for at in tokens]
    return _lines(["tokens", *(file["target"] for file in files)], body, left=0)


def _models(root: Path, name: str) -> str:
    header = ["checkpoint", "class", "read", "merges", "INT8", "as they were", "why not"]
    body = []
    for row in json.loads((root / name).read_text(encoding="utf-8"))["models"]:
        foreign = ", ".join(f"{count} {kind}" for kind, count in (row.get("foreign") or {}).items())
        read = {"reader": "by class", "graph": "as a graph", None: "no"}[row["read"]]
        why = row["error"] or row.get("why") or ""
        shown = ["yes" if row[key] is not None else "no" for key in ("merges", "int8")]
        body.append([row["checkpoint"], row.get("class") or "", read, *shown, foreign, _first(why)])
    return _lines(header, body, left=len(header))


def _timm(root: Path, name: str) -> str:
    """A line per class: how many of its architectures were tried and are read, what merges, and why some are not."""
    classes: dict[str, list[dict[str, Any]]] = {}
    for row in json.loads((root / name).read_text(encoding="utf-8"))["models"]:
        classes.setdefault(str(row.get("class") or row["name"]), []).append(row)
    body = []
    for kind, rows in sorted(classes.items()):
        read = [row for row in rows if row["error"] is None]
        merging = sum(row.get("why") is None for row in read)
        reasons = {_first(row["error"] or row.get("why") or "") for row in rows} - {""}
        example = min(row["name"] for row in rows)
        body.append([kind, example, f"{len(read)} of {len(rows)}", str(merging), "; ".join(sorted(reasons))[:160]])
    return _lines(["class", "such as", "read", "merge", "why not"], body, left=5)


def _first(text: str) -> str:
    """What a reason says before it goes into details."""
    reason = text.rpartition(" as a graph: ")[2]
    return reason.partition(";")[0].replace("|", "/")[:140]


def _audit(root: Path, name: str) -> str:
    audits = json.loads((root / name).read_text(encoding="utf-8"))["audits"]
    table = _lines(overview_columns(GPUS), overview_cells(audits, GPUS), left=5)
    return f"{table}\n\nTimes: {audits[0]['prediction']}."


def _forecast(root: Path, name: str) -> str:
    document = json.loads((root / name).read_text(encoding="utf-8"))
    table = _lines(forecast_columns(document), forecast_cells(document), left=1)
    return f"{table}\n\nTimes: {document['prediction']}."


def _modelled_lengths(root: Path, argument: str) -> str:
    """The lengths of a forecast on one GPU."""
    name, gpu = argument.split()
    document = json.loads((root / name).read_text(encoding="utf-8"))
    rows = [row for row in document["lengths"] if row["gpu"] == gpu]
    table = _lines(lengths_columns(batches_of(rows)), lengths_cells(rows), left=0)
    return f"{table}\n\n{document['source']}, {document['target']} on {gpu}; {document['prediction']}."


def _measured_lengths(root: Path, name: str) -> str:
    """What was measured on a GPU beside the model, as soon as there is a file of it."""
    if not (root / name).is_file():
        return f"Not measured yet: `make gpu` on a GPU of the table writes {name}, `make readme` the comparison here."
    try:
        document = compare_measured(json.loads((root / name).read_text(encoding="utf-8")))
    except VitfoldError as error:
        return f"Nothing to compare: {error}."
    table = _lines(list(MEASURED_COLUMNS), measured_cells(document), left=1)
    return f"{table}\n\n{measured_sentence(document)}; modelled: {document['prediction']}."


def _outliers(root: Path, name: str) -> str:
    document = json.loads((root / name).read_text(encoding="utf-8"))
    header, body = remedy_columns(), remedy_cells(document)
    shown = [column for column in range(len(header)) if any(line[column] != "-" for line in body)]
    lines = [[line[column] for column in shown] for line in body]
    return _lines([header[column] for column in shown], lines, left=1)


def _sweep(root: Path, name: str) -> str:
    rows = json.loads((root / name).read_text(encoding="utf-8"))["rows"]
    return _lines(SWEEP_COLUMNS, sweep_cells(rows), left=1)


def _diffusion(root: Path, name: str) -> str:
    name, _, only = name.partition(" ")
    header, body = diffusion_rows(json.loads((root / name).read_text(encoding="utf-8")))
    shown = [place for place, column in enumerate(header) if not only or column not in DISTANCES]
    return _lines([header[place] for place in shown], [[line[place] for place in shown] for line in body], left=1)


_MAKERS = {
    "table": _speed,
    "accuracy": _accuracy,
    "ladder": _ladder,
    "models": _models,
    "timm": _timm,
    "audit": _audit,
    "forecast": _forecast,
    "outliers": _outliers,
    "sweep": _sweep,
    "diffusion": _diffusion,
    "lengths": _lengths,
    "modelled-lengths": _modelled_lengths,
    "measured-lengths": _measured_lengths,
}


def _lines(header: list[str], body: list[list[str]], *, left: int) -> str:
    rule = "|" + "---|" * left + "---:|" * (len(header) - left)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(row) + " |" for row in body)])


def main() -> None:
    """Fill the tables of the documents named on the command line, in place."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(fill(path.read_text(encoding="utf-8"), _root(path)), encoding="utf-8")


def _root(path: Path) -> Path:
    """The nearest folder above a document that holds results/."""
    parents = path.absolute().parents
    return next((folder for folder in parents if (folder / "results").is_dir()), parents[0])


if __name__ == "__main__":
    main()
