"""`vitfold serve`: bundles behind HTTP."""

from __future__ import annotations

import os
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitfold.artifacts.bundle import open_bundle
from vitfold.cli import options
from vitfold.cli.declaring import command
from vitfold.cli.terminal import note
from vitfold.cores import check_threads, usable_cores
from vitfold.errors import VitfoldError, missing_extra
from vitfold.serve.predictor import Predictor

if TYPE_CHECKING:
    from vitfold.serve.server.app import Beside

_ENDING_S = 30


@command(shown="port grpc_port host threads batch queue timeout", examples=("vitfold serve vit.fold --port 8000",))
def serve(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundles; each is a model of its name.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of HTTP.")] = 8000,
    grpc_port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of gRPC, beside that of HTTP; default: none.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    batch: Annotated[int, typer.Option("--batch", min=1, help="Largest batch, and images of a request.")] = 8,
    engine: options.Engine = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of each model's engine; default: its share of the usable cores.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Images that may wait; further ones are answered by 503.")] = 64,
    max_body: Annotated[float, typer.Option(min=0.001, metavar="MIB", help="Largest body of a request.")] = 16.0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Most pixels of an image, as its file says.")] = 50_000_000,
    timeout: Annotated[float, typer.Option(min=0.01, metavar="S", help="Seconds from request to answer.")] = 10.0,
) -> None:
    """Answer requests over HTTP: files of images, and tensors by the Open Inference Protocol."""
    _check_installed(grpc_port)
    import uvicorn

    from vitfold.serve.server.app import Limits, Server

    each = check_threads(threads) if threads else max(1, usable_cores() // len(bundles))
    predictors: dict[str, Predictor] = {}
    for path in bundles:
        opened = open_bundle(path)
        if opened.name in predictors:
            raise VitfoldError(f"two bundles are called {opened.name}; rename one, its name is that of the model")
        predictors[opened.name] = Predictor(opened, engine=engine, threads=each)
    limits = Limits(body_bytes=int(max_body * 2**20), pixels=max_pixels, seconds=timeout, queue=queue, batch=batch)
    server = Server(predictors, limits, None if grpc_port is None else _beside(host, grpc_port))
    settings = uvicorn.Config(server.app, log_level="warning", access_log=False, timeout_graceful_shutdown=_ENDING_S)
    try:
        with _listener(host, port) as listener:
            note(f"http://{host}:{port}: {', '.join(predictors)}")
            if grpc_port is not None:
                note(f"gRPC: {_address(host, grpc_port)}")
            uvicorn.Server(settings).run(sockets=[listener])
    finally:
        server.close()
        for one in predictors.values():
            one.close()


def _check_installed(grpc_port: int | None) -> None:
    needed = {"starlette": "starlette", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}
    more = {} if grpc_port is None else {"grpc": "grpcio", "google.protobuf": "protobuf"}
    for extra, packages in (("serve", needed), ("grpc", more)):
        for module, package in packages.items():
            try:
                found = find_spec(module)
            except ModuleNotFoundError:
                found = None
            if found is None:
                raise VitfoldError(missing_extra(package, extra, "vitfold serve"))


def _beside(host: str, port: int) -> Beside:
    from vitfold.serve.server.rpc import answering

    with _listener(host, port, "--grpc-port"):
        pass  # the port is free: what fails later has no words for it
    return lambda server: answering(server, _address(host, port))


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listener(host: str, port: int, option: str = "--port") -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise VitfoldError(
            f"cannot listen at {host}, port {port}: {os.strerror(error.errno or 0)}; choose another {option}"
        ) from None
