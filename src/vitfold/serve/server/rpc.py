"""The Open Inference Protocol by gRPC: the same models, queue and bounds as over HTTP.

Calls are read as streams of one message, which is what they are on the wire: so the time that a slow sender takes is
bounded, too. Source: Open Inference Protocol, specification/protocol/inference_grpc.md.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

from vitfold.serve.server.app import Server
from vitfold.serve.server.protocol import check_shape, checked_outputs, numbers, plain_numbers, strings
from vitfold.serve.server.refusing import RefusedError
from vitfold.version import __version__

_SERVICE = "inference.GRPCInferenceService"
_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_FIELDS = {"FP32": "fp32_contents", "INT64": "int64_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents"}
_ENDING_S = 30
Work = Callable[[Any], Awaitable[Any]]


@functools.cache
def messages() -> dict[str, Any]:
    """Return the classes of the protocol's messages by name, in a pool of their own.

    The pool that all packages share may hold messages of the same names, of Triton's client or of KServe.
    """
    described = FileDescriptorSet.FromString(Path(__file__).with_name("open_inference.binpb").read_bytes())
    pool = DescriptorPool()
    pool.Add(described.file[0])
    file = pool.FindFileByName(described.file[0].name)
    return {name: GetMessageClass(found) for name, found in file.message_types_by_name.items()}


@asynccontextmanager
async def answering(server: Server, address: str) -> AsyncIterator[int]:
    """Answer calls at an address, HOST:PORT, within the block; hand out the port.

    At the end no new calls are taken, and those that have begun are answered, for 30 s at the most.
    """
    options = (
        ("grpc.max_receive_message_length", server.limits.body_bytes),
        ("grpc.so_reuseport", 0),  # else a second server would share the port, unnoticed
    )
    running = grpc.aio.server(options=options)
    running.add_generic_rpc_handlers((_Calls(server).handler(),))
    port = running.add_insecure_port(address)
    await running.start()
    try:
        yield port
    finally:
        await running.stop(_ENDING_S)


class _Calls:
    """The calls of the protocol, answered by a server."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def handler(self) -> Any:
        calls: Mapping[str, Work] = {
            "ServerLive": self._live,
            "ServerReady": self._ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._about,
            "ModelMetadata": self._model,
            "ModelInfer": self._infer,
        }
        return grpc.method_handlers_generic_handler(_SERVICE, {name: self._call(name, calls[name]) for name in calls})

    def _call(self, name: str, work: Work) -> Any:
        kind = messages()[f"{name}Request"]
        bounded = self._server.bounded if name == "ModelInfer" else self._server.within_time

        async def run(parts: Any, context: Any) -> Any:
            async def answered() -> Any:
                return await work(_message(kind, [part async for part in parts]))

            try:
                return await bounded("grpc", answered)
            except RefusedError as error:
                return await context.abort(_CODES.get(error.status, grpc.StatusCode.INTERNAL), error.message)

        return grpc.stream_unary_rpc_method_handler(run, None, lambda said: said.SerializeToString())

    async def _live(self, _: Any) -> Any:
        return messages()["ServerLiveResponse"](live=True)

    async def _ready(self, _: Any) -> Any:
        return messages()["ServerReadyResponse"](ready=True)

    async def _model_ready(self, asked: Any) -> Any:
        self._server.named(asked.name, asked.version)
        return messages()["ModelReadyResponse"](ready=True)

    async def _about(self, _: Any) -> Any:
        return messages()["ServerMetadataResponse"](name="vitfold", version=__version__)

    async def _model(self, asked: Any) -> Any:
        return messages()["ModelMetadataResponse"](
            **self._server.described(*self._server.named(asked.name, asked.version))
        )

    async def _infer(self, asked: Any) -> Any:
        name, batcher = self._server.named(asked.model_name, asked.model_version)
        tensors = await self._server.aside(_tensors, asked)
        outputs = checked_outputs(await self._server.infer(batcher, tensors), [one.name for one in asked.outputs])
        described = [{"name": key, "datatype": "FP32", "shape": list(values.shape)} for key, values in outputs.items()]
        raw = [values.tobytes() for values in outputs.values()]
        made = {"model_name": name, "model_version": "1", "id": asked.id}
        return messages()["ModelInferResponse"](**made, outputs=described, raw_output_contents=raw)


def _message(kind: Any, parts: list[bytes]) -> Any:
    if len(parts) != 1:
        raise RefusedError(400, f"a call has one message, found {len(parts)}")
    try:
        return kind.FromString(parts[0])
    except DecodeError:
        raise RefusedError(400, f"the message is no {kind.DESCRIPTOR.name}") from None


def _tensors(asked: Any) -> dict[str, Any]:
    """Return the tensors of a request by name: an array, or for BYTES a list of bytes."""
    raw = list(asked.raw_input_contents)
    if raw and len(raw) != len(asked.inputs):
        raise RefusedError(400, f"{len(asked.inputs)} inputs have {len(raw)} raw contents; give one for each, or none")
    return {one.name: _tensor(one, raw[i] if raw else None) for i, one in enumerate(asked.inputs)}


def _tensor(one: Any, raw: bytes | None) -> np.ndarray | list[bytes]:
    name, kind = one.name, one.datatype
    shape, count = check_shape(name, list(one.shape))
    if raw is not None:
        return strings(name, raw, count) if kind == "BYTES" else numbers(name, kind, raw, shape)
    if kind not in _FIELDS:
        raise RefusedError(400, f"{name} has the datatype {kind}; in contents: {', '.join(_FIELDS)}")
    data = list(getattr(one.contents, _FIELDS[kind]))
    if kind != "BYTES":
        return plain_numbers(name, kind, data, shape)
    if len(data) != count:
        raise RefusedError(400, f"{name} has {len(data)} elements, and its shape says {count}")
    return data
