"""`vitfold export`: a bundle for a server that other people run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vitfold.artifacts.bundle import open_bundle
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.terminal import heading, out, print_json, steps


@command()
def export(
    bundle: options.BundlePath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The model repository to write into.")],
    format: Annotated[
        Literal["triton"], typer.Option("--format", help="triton: a model of Triton Inference Server.")
    ] = "triton",
    name: Annotated[str | None, typer.Option(help="Name of the model; default: that of the bundle.")] = None,
    instances: Annotated[int, typer.Option(min=1, help="Instances that the server runs side by side.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Cores of the machine that serves, which instances divide; default: those usable here."
        ),
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, help="Largest batch; default: the bundle's largest, else 64.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model of that name.")] = False,
    json: options.Json = False,
) -> None:
    """Write a bundle as a model of Triton Inference Server: configuration, graph, README, client."""
    from vitfold.serve.triton import export_triton

    with steps("export") as say:
        say(f"writing a {format} model")
        model = export_triton(
            open_bundle(bundle),
            output,
            name=name,
            instances=instances,
            threads=threads,
            max_batch=max_batch,
            overwrite=overwrite,
        )
    if json:
        files = sorted(str(path.relative_to(model.path)) for path in model.path.rglob("*") if path.is_file())
        facts = {"name": model.name, "backend": model.backend, "trtexec": model.trtexec, "files": files}
        print_json({"path": str(model.path), **facts})
        return
    heading(str(model.path), f" for the backend {model.backend}")
    if model.trtexec is not None:
        out.print(f"  build the engine on the GPU that serves: {model.trtexec}", soft_wrap=True)
    out.print(f"  how to start and ask it: {model.path / 'README.md'}", soft_wrap=True)
