"""`vitfold predict`: labels of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from vitfold.cli import options
from vitfold.cli.terminal import command, out, print_json, steps


@command
def predict(
    bundle: options.BundlePath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    top: Annotated[int, typer.Option(min=1, help="Labels per image.")] = 5,
    engine: options.Engine = None,
    threads: options.Threads = None,
    json: options.Json = False,
) -> None:
    """Print the most probable labels of images, or their embeddings with --json."""
    from vitfold.predictor import open_predictor

    with steps("predict") as say, open_predictor(bundle, engine=engine, threads=threads) as predictor:
        say(f"{len(images)} images")
        predictions = predictor(images)
        classifies = predictor.classifies
    results: list[dict[str, Any]] = []
    for path, prediction in zip(images, predictions, strict=True):
        if classifies:
            ranked = [{"label": label, "probability": p} for label, p in prediction.top(top)]
            results.append({"image": str(path), "top": ranked})
        else:
            results.append({"image": str(path), "embedding": [float(x) for x in prediction.output.reshape(-1)]})
    if json:
        print_json(results)
        return
    table = Table(pad_edge=False)
    table.add_column("image", overflow="fold")
    table.add_column("prediction" if classifies else "embedding")
    for result in results:
        if classifies:
            shown = "\n".join(f"{entry['probability']:7.2%}  {entry['label']}" for entry in result["top"])
        else:
            head = " ".join(f"{x:+.3f}" for x in result["embedding"][:6])
            shown = f"{head} ... ({len(result['embedding'])} values; --json prints all)"
        table.add_row(result["image"], shown)
    out.print(table)
