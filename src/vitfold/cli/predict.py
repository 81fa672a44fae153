"""`vitfold predict`: what a model says of images, printed or written as it is found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vitfold.artifacts.bundle import open_bundle
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.making import turned
from vitfold.cli.terminal import counting, note, out, print_json, skipped
from vitfold.errors import ImageError
from vitfold.images import given_paths
from vitfold.serve.predictor import Prediction, Predictor
from vitfold.serve.rows import Row, answer, columns_of, open_rows
from vitfold.visible import visible


@command(
    shown="output top skip_bad batch threads json",
    brief={"output": "Write rows as they are done: FILE.jsonl, FILE.csv, or FILE.npy."},
    examples=(
        "vitfold predict vit.fold photo.jpg",
        "vitfold predict vit.fold PHOTOS --skip-bad -o labels.csv",
        "vitfold predict encoder.fold 'PHOTOS/**/*.jpg' -o embeddings.npy",
    ),
)
def predict(
    bundle: options.BundlePath,
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...", help="Image files, folders of them, folders of class folders, quoted patterns."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write a row per image as they are done: FILE.jsonl, FILE.csv, or FILE.npy for the outputs alone.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Labels per image.")] = 5,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Where several labels may be right: those at least so probable.")
    ] = 0.5,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Go on behind images that cannot be read: their rows say why.")
    ] = False,
    batch: options.Batch = 8,
    exif: options.Exif = None,
    engine: options.Engine = None,
    threads: options.Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --output.")] = False,
    json: options.Json = False,
) -> None:
    """Print or write the most probable labels of images, the numbers of a regression, or embeddings (--json, -o)."""
    opened = turned(open_bundle(bundle), exif)
    paths = given_paths(images)
    results: list[Mapping[str, Any]] = []
    unread = 0
    with (
        Predictor(opened, engine=engine, threads=threads) as predictor,
        counting("predict", len(paths), unit="images") as advance,
    ):
        head = predictor.head
        columns = columns_of(head, top, opened.manifest.spec.output_width)
        writing = nullcontext() if output is None else open_rows(output, columns, len(paths), overwrite=overwrite)
        with writing as write:
            for path, found in zip(paths, _stream(predictor, paths, batch, skip_bad=skip_bad), strict=True):
                row = _row(path, found, top, threshold)
                unread += row[1] is None
                if write is None:
                    results.append(row[0])
                else:
                    write([row])
                advance(1)
    summary = {"output": str(output), "images": len(paths), "unread": unread}
    if json:
        print_json(results if output is None else summary)
    elif output is None:
        _print(results, _COLUMNS[head])
    else:
        note(f"{output}: {len(paths)} images, of which {unread} cannot be read")
    if paths and unread == len(paths):
        raise ImageError(f"none of the {unread} images can be read; give others")


def _row(path: Path, found: Prediction | ImageError, top: int, threshold: float) -> Row:
    """What is said of one image, and what the model gave for it; of an image that cannot be read why, and None."""
    if isinstance(found, ImageError):
        skipped(str(found))
        return {"image": str(path), "error": str(found)}, None
    return {"image": str(path), **answer(found, top, threshold)}, found


def _stream(
    predictor: Predictor, paths: Iterable[Path], batch: int, *, skip_bad: bool
) -> Iterator[Prediction | ImageError]:
    try:
        yield from predictor.stream(paths, batch=batch, skip_bad=skip_bad)
    except ImageError as error:
        raise ImageError(f"{error} (or pass --skip-bad to go on behind such images)") from None


def _print(results: Iterable[Mapping[str, Any]], column: str) -> None:
    table = Table(pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column(column)
    for result in results:
        table.add_row(result["image"], _cell(result))
    out.print(table)


_COLUMNS = {
    "single_label": "prediction",
    "multi_label": "labels, each by itself",
    "regression": "values",
    "map": "map",
    "segmentation": "classes by their share of pixels",
    "features": "embedding",
}


def _lines(lines: Iterable[str]) -> Text:
    """A cell of several lines; what a label holds breaks none of them."""
    return Text("\n".join(map(visible, lines)))


def _cell(result: Mapping[str, Any]) -> str | Text:
    if "error" in result:
        return _lines([f"error: {result['error']}"])
    if "values" in result:
        return _lines(f"{entry['value']:+.4g}  {entry['label']}" for entry in result["values"])
    if "map" in result:
        found = result["map"]
        return f"{' x '.join(map(str, found['shape']))} from {found['least']:+.4g} to {found['most']:+.4g}"
    if "classes" in result:
        return _lines(f"{entry['share']:7.2%}  {entry['label']}" for entry in result["classes"])
    if "embedding" in result:
        head = " ".join(f"{x:+.3f}" for x in result["embedding"][:6])
        return f"{head} ... ({len(result['embedding'])} values; --json prints all)"
    chosen = [entry for entry in result["top"] if entry.get("chosen", True)]
    if not chosen:
        best = result["top"][0]
        return f"none; {best['probability']:.2%}  {best['label']} is the most probable"
    return _lines(f"{entry['probability']:7.2%}  {entry['label']}" for entry in chosen)
