"""`vitfold map`: what a model says of any number of images, as a folder of Parquet files."""

from __future__ import annotations

from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from vitfold.artifacts.bundle import open_bundle
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.terminal import counting, heading, note, print_json
from vitfold.cores import check_threads, usable_cores
from vitfold.errors import VitfoldError, missing_extra

_CORES_PER_WORKER = 4


@command(
    shown="output column columns top workers fail_fast json",
    examples=(
        "vitfold map vit.fold PHOTOS -o labels",
        "vitfold map encoder.fold items.csv --column url --columns embedding -o embeddings",
        "vitfold map encoder.fold 'shards/*.tar' -o embeddings --workers 4",
    ),
)
def map_images(
    bundle: options.BundlePath,
    images: Annotated[
        str,
        typer.Argument(
            metavar="IN",
            help="A folder of images, a quoted pattern, CSV or Parquet with a column of paths, URLs or bytes, "
            "tar files (webdataset), or a data set of Hugging Face that was saved.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", help="Folder of Parquet files, new or begun."),
    ],
    column: Annotated[str | None, typer.Option(help="The column of images in a table.")] = None,
    ids: Annotated[
        str | None, typer.Option("--id", metavar="COLUMN", help="The column of ids; default: path, URL, or row number.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="Of label, score, labels, scores, embedding; default: all there are."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Length of labels and scores.")] = 5,
    dtype: Annotated[Literal["float32", "float16"], typer.Option(help="Type of embeddings.")] = "float32",
    part: Annotated[int, typer.Option(min=1, help="Images of a file, which is what is done or not.")] = 1024,
    batch: options.Batch = 8,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes, each with a session; default: one per 4 cores.")
    ] = None,
    engine: options.Engine = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each worker; default: its share of the usable cores.")
    ] = None,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="End at an image that cannot be read; else its row says why.")
    ] = False,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Run the workers on this cluster of Ray.")] = None,
    json: options.Json = False,
) -> None:
    """Write labels or embeddings of many images; after Ctrl-C or a kill the same command goes on."""
    _require("pyarrow", "daft", *(("ray",) if ray else ()))
    from vitfold.serve.mapping.job import open_job
    from vitfold.serve.mapping.running import Work, check_columns, computed
    from vitfold.serve.mapping.sources import find_source
    from vitfold.serve.tables import BatchPredictor

    opened = open_bundle(bundle)
    workers = workers or max(1, usable_cores() // _CORES_PER_WORKER)
    threads = check_threads(threads) if threads else max(1, usable_cores() // workers)
    source = find_source(images, column=column, ids=ids)
    wanted = None if columns is None else [name.strip() for name in columns.split(",") if name.strip()]
    trial = BatchPredictor(bundle, engine=engine, threads=threads, top=top)
    chosen = check_columns(trial, wanted)
    trial.close()
    predict = BatchPredictor(bundle, engine=engine, threads=threads, batch=batch, top=top, columns=chosen)
    facts = {
        "bundle": opened.digest,
        "engine": engine or opened.manifest.target["engine"],
        "columns": chosen,
        "dtype": dtype,
    }
    facts["top"] = top if {"labels", "scores"} & set(chosen) else None
    with open_job(output, source, facts, part, arrays=bool(opened.manifest.preprocess.arrays)) as job:
        done = job.done()
        left = [one for one in range(job.parts) if one not in done]
        before = job.total - sum(job.rows_of(one) for one in left)
        if done:
            note(f"{before} of {job.total} images were done before")
        unread = job.unread(done)
        work = Work(job=job, predict=predict, dtype=dtype, fail_fast=fail_fast)
        with (
            counting("map", job.total - before, unit="images") as advance,
            closing(computed(work, left, workers=workers, ray=ray, stop=job.stop)) as finished,
        ):
            for one in finished:
                advance(one.images)
                unread += one.unread
    if json:
        print_json({"output": str(output), "images": job.total, "before": before, "unread": unread, "files": job.parts})
    else:
        heading(str(output), f": {job.total} images in {job.parts} files, of which {unread} cannot be read")
    if unread == job.total:
        raise VitfoldError(f"none of the {unread} images can be read; the column error of {output} says why")


def _require(*packages: str) -> None:
    for name in packages:
        if find_spec(name) is None:
            if name == "ray":
                raise VitfoldError("--ray needs the package ray, which is not installed; run: pip install ray")
            raise VitfoldError(missing_extra(name, "map", "vitfold map"))
