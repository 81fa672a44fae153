"""`vitfold predict`: labels of images."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vitfold.artifacts.bundle import open_bundle
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.making import turned
from vitfold.cli.terminal import out, print_json, steps
from vitfold.serve.predictor import Predictor
from vitfold.visible import visible

if TYPE_CHECKING:
    from vitfold.serve.predictor import Prediction


@command()
def predict(
    bundle: options.BundlePath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="Labels per image.")] = 5,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Where several labels may be right: those at least so probable.")
    ] = 0.5,
    exif: options.Exif = None,
    engine: options.Engine = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Print the most probable labels of images, the numbers of a regression, or embeddings with --json."""
    opened = turned(open_bundle(bundle), exif)
    with steps("predict") as say, Predictor(opened, engine=engine, threads=threads) as predictor:
        say(f"{len(images)} images")
        predictions = predictor(images)
        head = predictor.head
    results = [
        {"image": str(path), **_result(prediction, top, threshold)}
        for path, prediction in zip(images, predictions, strict=True)
    ]
    if json:
        print_json(results)
        return
    table = Table(pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column(_COLUMNS[head])
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


def _result(prediction: Prediction, top: int, threshold: float) -> dict[str, Any]:
    """What the JSON says of one image."""
    if prediction.head == "single_label":
        return {"top": [{"label": label, "probability": p} for label, p in prediction.top(top)]}
    if prediction.head == "multi_label":
        ranked = prediction.top(top)
        return {"top": [{"label": label, "probability": p, "chosen": p >= threshold} for label, p in ranked]}
    if prediction.head == "regression":
        return {"values": [{"label": label, "value": value} for label, value in prediction.values()]}
    if prediction.head == "map":
        values = prediction.output
        return {"map": {"shape": list(values.shape), "least": float(values.min()), "most": float(values.max())}}
    if prediction.head == "segmentation":
        return {"classes": [{"label": label, "share": share} for label, share in prediction.shares()[:top]]}
    return {"embedding": [float(x) for x in prediction.output.reshape(-1)]}


def _lines(lines: Iterable[str]) -> Text:
    """A cell of several lines; what a label holds breaks none of them."""
    return Text("\n".join(map(visible, lines)))


def _cell(result: dict[str, Any]) -> str | Text:
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
