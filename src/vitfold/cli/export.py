"""`vitfold export`: a bundle for a server or a runtime of other people."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vitfold.artifacts.bundle import open_bundle
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.making import require_optimize
from vitfold.cli.terminal import heading, out, print_json, steps


@command()
def export(
    bundle: options.BundlePath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The model repository or folder.")],
    format: Annotated[
        Literal["triton", "docker", "pt2", "aoti"],
        typer.Option(
            "--format",
            help="triton; docker: a folder for docker build, with `vitfold serve`; pt2: a program of "
            "torch.export; aoti: that compiled for this machine.",
        ),
    ] = "triton",
    batch: Annotated[int, typer.Option(min=1, help="Images per call of a pt2 or aoti file.")] = 1,
    name: Annotated[str | None, typer.Option(help="Default: the bundle's.")] = None,
    instances: Annotated[int, typer.Option(min=1, help="Instances that the server runs side by side.")] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Cores that instances divide; default: those usable here."),
    ] = None,
    max_batch: Annotated[int | None, typer.Option(min=1, help="Largest batch; default: the bundle's, or 64.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model of that name.")] = False,
    json: options.Json = False,
) -> None:
    """Write a bundle for Triton Inference Server, for a container of its own, or as a file that PyTorch loads."""
    if format == "docker":
        from vitfold.serve.docker import export_docker

        with steps("export") as say:
            say("writing a docker context")
            written = export_docker(open_bundle(bundle), output, threads=threads, overwrite=overwrite)
        if json:
            print_json({"path": str(written), "format": format})
            return
        heading(str(written), " for docker build")
        out.print(f"  docker build -t model {written} && docker run --rm -p 8000:8000 model", soft_wrap=True)
        return
    if format != "triton":
        require_optimize()
        from vitfold.engines.network.exporting import export_network

        with steps("export") as say:
            say(f"writing a .pt2 file ({format})")
            opened = open_bundle(bundle)
            written = export_network(opened, output, name or opened.name, kind=format, batch=batch, overwrite=overwrite)
        if json:
            print_json({"path": str(written), "format": format, "batch": batch})
            return
        heading(str(written), f" for batches of {batch}")
        load = "torch.export.load(FILE).module()" if format == "pt2" else "torch._inductor.aoti_load_package(FILE)"
        out.print(f"  load it: {load}", soft_wrap=True)
        return
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
