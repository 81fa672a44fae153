"""`vitfold export`: a bundle for a server or a runtime of other people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vitfold.artifacts.bundle import open_bundle
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.making import require_optimize
from vitfold.cli.terminal import heading, out, print_json, steps
from vitfold.serve.docker import CONTEXTS, Context

Format = Literal["triton", "docker", "kserve", "bento", "ray-serve", "web", "pt2", "aoti"]
_START = {
    "docker": "docker build -t model {0} && docker run --rm -p 8000:8000 model",
    "kserve": "build and push the image, then: kubectl apply -f {0}/inferenceservice.yaml",
    "bento": "cd {0} && bentoml serve service:Model",
    "ray-serve": "cd {0} && serve run serve.yaml",
    "web": "python -m http.server --bind 127.0.0.1 -d {0}   # then http://127.0.0.1:8000",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Where an export stands, what --json says of it beside that, and the lines that are shown."""

    path: Path
    facts: Mapping[str, Any]
    title: str = ""
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be written."""

    format: Format
    output: Path
    name: str | None
    batch: int
    instances: int
    threads: int | None
    max_batch: int | None
    runtime: Path | None
    overwrite: bool


@command(
    shown="output format name instances threads overwrite json",
    examples=("vitfold export vit.fold --format docker -o image", "vitfold export vit.fold --format web -o page"),
)
def export(
    bundle: options.BundlePath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The model repository or folder.")],
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="triton; docker: a folder for docker build, with `vitfold serve`; kserve, bento, ray-serve: that for "
            "these servers; web: a page that runs it in the browser; pt2: a program of torch.export; aoti: that "
            "compiled for this machine.",
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
    runtime: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Of web: the npm package onnxruntime-web; default: that in node_modules."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model of that name.")] = False,
    json: options.Json = False,
) -> None:
    """Write a bundle for other servers, for a container of its own, for browsers, or as a file that PyTorch loads."""
    wanted = Wanted(
        format=format,
        output=output,
        name=name,
        batch=batch,
        instances=instances,
        threads=threads,
        max_batch=max_batch,
        runtime=runtime,
        overwrite=overwrite,
    )
    with steps("export") as say:
        say(f"writing for {format}")
        written = _WRITERS[format](bundle, wanted)
    if json:
        print_json({"path": str(written.path), **written.facts})
        return
    heading(str(written.path), written.title)
    for line in written.lines:
        out.print(f"  {line}", soft_wrap=True)


def _context(bundle: Path, wanted: Wanted) -> Written:
    from vitfold.serve.docker import export_context

    kind: Context = wanted.format  # type: ignore[assignment]
    path = export_context(
        open_bundle(bundle),
        wanted.output,
        kind,
        name=wanted.name,
        threads=wanted.threads,
        instances=wanted.instances,
        overwrite=wanted.overwrite,
    )
    return _folder(path, wanted)


def _web(bundle: Path, wanted: Wanted) -> Written:
    from vitfold.serve.web.exporting import export_web

    opened = open_bundle(bundle)
    return _folder(export_web(opened, wanted.output, runtime=wanted.runtime, overwrite=wanted.overwrite), wanted)


def _folder(path: Path, wanted: Wanted) -> Written:
    start = _START[wanted.format].format(path)
    return Written(path=path, facts={"format": wanted.format}, title=f" for {wanted.format}", lines=(start,))


def _network(bundle: Path, wanted: Wanted) -> Written:
    require_optimize()
    from vitfold.engines.network.exporting import export_network

    opened = open_bundle(bundle)
    kind: Any = wanted.format
    named = wanted.name or opened.name
    path = export_network(opened, wanted.output, named, kind=kind, batch=wanted.batch, overwrite=wanted.overwrite)
    load = "torch.export.load(FILE).module()" if kind == "pt2" else "torch._inductor.aoti_load_package(FILE)"
    facts = {"format": kind, "batch": wanted.batch}
    return Written(path=path, facts=facts, title=f" for batches of {wanted.batch}", lines=(f"load it: {load}",))


def _triton(bundle: Path, wanted: Wanted) -> Written:
    from vitfold.serve.triton import export_triton

    model = export_triton(
        open_bundle(bundle),
        wanted.output,
        name=wanted.name,
        instances=wanted.instances,
        threads=wanted.threads,
        max_batch=wanted.max_batch,
        overwrite=wanted.overwrite,
    )
    files = sorted(str(path.relative_to(model.path)) for path in model.path.rglob("*") if path.is_file())
    facts = {"name": model.name, "backend": model.backend, "trtexec": model.trtexec, "files": files}
    build = () if model.trtexec is None else (f"build the engine on the GPU that serves: {model.trtexec}",)
    lines = (*build, f"how to start and ask it: {model.path / 'README.md'}")
    return Written(path=model.path, facts=facts, title=f" for the backend {model.backend}", lines=lines)


_WRITERS = {"triton": _triton, "web": _web, "pt2": _network, "aoti": _network} | dict.fromkeys(CONTEXTS, _context)
