"""The routes of the server, and the bounds on what a request may cost."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from vitfold.decoding import prepared
from vitfold.engines import MAIN
from vitfold.errors import ImageError
from vitfold.serve.predictor import Prediction, Predictor
from vitfold.serve.rows import answer
from vitfold.serve.server.batching import Batcher, Outputs
from vitfold.serve.server.protocol import HEADER_LENGTH, IMAGES, answer_of, request_of
from vitfold.serve.server.refusing import RefusedError
from vitfold.version import __version__

T = TypeVar("T")
Beside = Callable[["Server"], AbstractAsyncContextManager[Any]]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
"""What is decoded: no format for which Pillow starts another program."""
_PAGE = Path(__file__).with_name("page.html")
_TIMES_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)
_PARTS = 4
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src blob:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may cost: bytes of its body, pixels of an image, seconds, and images that wait with it."""

    body_bytes: int = 16 * 2**20
    pixels: int = 50_000_000
    seconds: float = 10.0
    queue: int = 64
    batch: int = 8


class _InMemory(MultiPartParser):
    """Reads forms without files on a disk: a body has a bounded size."""

    spool_max_size = 2**40


class Server:
    """Bundles by name, behind the routes of one application; `beside` is what runs as long as it does."""

    def __init__(self, predictors: Mapping[str, Predictor], limits: Limits, beside: Beside | None = None) -> None:
        self.limits = limits
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="prepare")
        self._active = 0
        Image.MAX_IMAGE_PIXELS = limits.pixels
        registry = self._registry = CollectorRegistry()
        sizes = Histogram("vitfold_batch_images", "Images in a call of the engine", buckets=_SIZES, registry=registry)
        self._answered = Counter(
            "vitfold_requests", "Requests by route and status", ("route", "status"), registry=registry
        )
        self._took = Histogram(
            "vitfold_request_seconds", "Time of requests", ("route",), buckets=_TIMES_S, registry=registry
        )
        waiting = Gauge("vitfold_waiting_images", "Images that wait for the engine", registry=registry)
        self._batchers = {
            name: Batcher(one, largest=limits.batch, queue=limits.queue, told=sizes.observe)
            for name, one in predictors.items()
        }
        waiting.set_function(lambda: sum(one.waiting for one in self._batchers.values()))
        model = "/v2/models/{model}"
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/metrics", self._metrics),
                Route("/predict", self._bounded("predict", self._predict), methods=["POST"]),
                Route("/v2", self._server),
                Route("/v2/health/live", self._well),
                Route("/v2/health/ready", self._well),
                *(
                    route
                    for prefix in (model, f"{model}/versions/{{version}}")
                    for route in (
                        Route(prefix, self._model),
                        Route(f"{prefix}/ready", self._ready),
                        Route(f"{prefix}/infer", self._bounded("infer", self._infer), methods=["POST"]),
                    )
                ),
            ],
            exception_handlers={RefusedError: _refusal},  # type: ignore[dict-item]
            lifespan=None if beside is None else self._lasting(beside),
        )

    def close(self) -> None:
        """End when what waits is done."""
        for one in self._batchers.values():
            one.close()
        self._decoders.shutdown(wait=True, cancel_futures=True)

    def _lasting(self, beside: Beside) -> Any:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            async with beside(self):
                yield

        return lifespan

    async def bounded(self, route: str, work: Callable[[], Awaitable[T]]) -> T:
        """Answer a request in time, if not too many are at work; it is counted.

        Raises:
            RefusedError: otherwise.
        """
        began, status = time.perf_counter(), 500
        self._active += 1
        try:
            if self._active > self.limits.queue + self.limits.batch:
                raise RefusedError(503, f"{self._active} requests are at work; ask again later")
            made = await self.within_time(route, work)
            status = 200
            return made
        except RefusedError as error:
            status = error.status
            raise
        finally:
            self._active -= 1
            self._answered.labels(route, str(status)).inc()
            self._took.labels(route).observe(time.perf_counter() - began)

    async def within_time(self, _: str, work: Callable[[], Awaitable[T]]) -> T:
        """Answer a request in time.

        Raises:
            RefusedError: if it takes longer, or whoever asks is gone.
        """
        try:
            return await asyncio.wait_for(work(), self.limits.seconds)
        except asyncio.TimeoutError:
            raise RefusedError(503, f"no answer within {self.limits.seconds:g} s; ask again later") from None
        except ClientDisconnect:
            raise RefusedError(400, "the request was cut short") from None

    def _bounded(self, route: str, work: Callable[[Request], Awaitable[Response]]) -> Any:
        async def run(request: Request) -> Response:
            return await self.bounded(route, functools.partial(work, request))

        return run

    async def _page(self, _: Request) -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": _POLICY})

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _well(self, _: Request) -> Response:
        return JSONResponse({"live": True, "ready": True})

    async def _server(self, _: Request) -> Response:
        named = {"name": "vitfold", "version": __version__, "extensions": ["binary_tensor_data"]}
        return JSONResponse({**named, "models": list(self._batchers)})

    async def _ready(self, request: Request) -> Response:
        return JSONResponse({"name": self._named(request)[0], "ready": True})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(self.described(*self._named(request)))

    def described(self, name: str, batcher: Batcher) -> dict[str, Any]:
        """Return the protocol's metadata of a model."""
        part = batcher.predictor.session.parts[MAIN]
        given = [{"name": one.name, "datatype": "FP32", "shape": [-1, *one.shape]} for one in part.inputs]
        if not batcher.predictor.bundle.manifest.preprocess.arrays:
            given.append({"name": IMAGES, "datatype": "BYTES", "shape": [-1]})
        made = [{"name": one.name, "datatype": "FP32", "shape": [-1, *one.shape]} for one in part.outputs]
        platform = batcher.predictor.session.engine
        return {"name": name, "versions": ["1"], "platform": platform, "inputs": given, "outputs": made}

    async def _infer(self, request: Request) -> Response:
        name, batcher = self._named(request)
        body = await self._body(request)
        asked, tensors = await self.aside(request_of, body, request.headers.get(HEADER_LENGTH))
        body, length = answer_of(asked, name, await self.infer(batcher, tensors))
        if length is None:
            return Response(body, media_type="application/json")
        return Response(body, headers={HEADER_LENGTH: str(length)}, media_type="application/octet-stream")

    async def infer(self, batcher: Batcher, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return a model's outputs (B, ...) by name, of the tensors of a request.

        Raises:
            RefusedError: if they are not what the model takes.
        """
        port = batcher.predictor.session.parts[MAIN].inputs[0]
        if set(tensors) not in ({port.name}, {IMAGES}):
            raise RefusedError(400, f"give one input, {port.name} or {IMAGES}; found {', '.join(tensors) or 'none'}")
        given = next(iter(tensors.values()))
        if not 1 <= len(given) <= self.limits.batch:
            raise RefusedError(400, f"a request has 1 to {self.limits.batch} images, found {len(given)}")
        if IMAGES in tensors:
            if not isinstance(given, list):
                raise RefusedError(400, f"{IMAGES} has the datatype BYTES")
            pixels = [await self.aside(_prepared, one, batcher.predictor) for one in given]
        else:
            pixels = _rows(port.name, given, port.shape)
        made = await batcher.run(pixels)
        return {key: np.stack([row[key] for row in made]) for key in made[0]}

    async def _predict(self, request: Request) -> Response:
        name, batcher = self._named(request, request.query_params.get("model"))
        top = request.query_params.get("top", "5")
        if not top.isdecimal() or not 1 <= int(top) <= 10_000:
            raise RefusedError(400, f"top has to be a whole number from 1 to 10000, found {top!r}")
        pixels = await self.aside(_prepared, await self._file(request), batcher.predictor)
        (row,) = await batcher.run([pixels])
        return JSONResponse({"model": name, **await self.aside(_said, batcher.predictor, row, int(top))})

    def _named(self, request: Request, name: str | None = None) -> tuple[str, Batcher]:
        found = request.path_params
        return self.named(found.get("model") or name or next(iter(self._batchers)), found.get("version", ""))

    def named(self, name: str, version: str = "") -> tuple[str, Batcher]:
        """Return a model's name and what runs it.

        Raises:
            RefusedError: if there is none.
        """
        batcher = self._batchers.get(name)
        if batcher is None or version not in ("", "1"):
            raise RefusedError(404, f"no such model; there are {', '.join(self._batchers)}, each in version 1")
        return name, batcher

    async def _body(self, request: Request) -> bytes:
        return b"".join([part async for part in self._stream(request)])

    async def _stream(self, request: Request) -> Any:
        """Yield a body as it comes, within its bound."""
        most, found = self.limits.body_bytes, 0
        told = request.headers.get("content-length", "0")
        async for part in request.stream():
            found += len(part)
            if found > most or (told.isdecimal() and int(told) > most):
                raise RefusedError(413, f"the body has more than {most} bytes")
            yield part

    async def _file(self, request: Request) -> bytes:
        """Return the file of a form, or the body itself."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            return await self._body(request)
        parser = _InMemory(request.headers, self._stream(request), max_files=1, max_fields=_PARTS)
        try:
            form = await parser.parse()
            try:
                files = [one for one in form.values() if not isinstance(one, str)]
                if len(files) != 1:
                    raise RefusedError(400, "the form has no file")
                return await files[0].read()
            finally:
                await form.close()
        except (MultiPartException, KeyError, ValueError) as error:
            raise RefusedError(400, f"the form cannot be read: {error}") from None

    async def aside(self, work: Callable[..., T], *given: Any) -> T:
        """Call a function in a thread, so that other requests go on."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work, *given)


def _prepared(content: bytes, predictor: Predictor) -> np.ndarray:
    try:
        found: np.ndarray = prepared(content, predictor.bundle.manifest.preprocess, FORMATS)
    except ImageError as error:
        raise RefusedError(400, str(error)) from None
    return found


def _said(predictor: Predictor, row: Outputs, top: int) -> dict[str, Any]:
    labels, head = predictor.bundle.manifest.labels, predictor.head
    first = next(iter(row.values()))
    return answer(Prediction(output=first, labels=labels, head=head, outputs=dict(row)), top, 0.5)


def _rows(name: str, given: Any, shape: Sequence[int]) -> list[np.ndarray]:
    """Return the images of a tensor, checked: what is wrong with one may reach no other request."""
    wrong = not isinstance(given, np.ndarray) or given.ndim != len(shape) + 1
    if wrong or any(want not in (-1, found) for want, found in zip(shape, given.shape[1:], strict=True)):
        found = list(given.shape) if isinstance(given, np.ndarray) else "BYTES"
        raise RefusedError(400, f"{name} has the shape {[-1, *shape]}, found {found}")
    if not np.isfinite(given).all():
        raise RefusedError(400, f"{name} holds NaN or infinite numbers")
    kind = np.int64 if given.dtype.kind == "i" else np.float32
    return list(np.ascontiguousarray(given, kind))


async def _refusal(_: Request, error: RefusedError) -> Response:
    headers = {"retry-after": "1"} if error.status in (429, 503) else None
    return JSONResponse({"error": error.message}, status_code=error.status, headers=headers)
