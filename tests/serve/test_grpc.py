"""The Open Inference Protocol by gRPC, asked by Triton's client: the answers and the bounds of HTTP."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitfold import pipeline
from vitfold.artifacts.bundle import open_bundle
from vitfold.model import Model
from vitfold.serve.predictor import Predictor, open_predictor

grpc = pytest.importorskip("grpc")
uvicorn = pytest.importorskip("uvicorn")
client_of = pytest.importorskip("tritonclient.grpc")
from vitfold.serve.server.app import Limits, Server  # noqa: E402
from vitfold.serve.server.rpc import answering, messages  # noqa: E402

LIMITS = Limits(body_bytes=200_000, pixels=40_000, seconds=2.0, queue=16, batch=4)


@pytest.fixture(scope="module")
def bundle(tiny_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = replace(tiny_model(), labels=tuple("abcdefghij"))
    return pipeline.save(pipeline.optimize(model), tmp_path_factory.mktemp("grpc") / "a.fold").path


@pytest.fixture(scope="module")
def port(bundle: Path) -> Iterator[int]:
    found: list[int] = []
    predictor = Predictor(open_bundle(bundle), threads=1)

    @asynccontextmanager
    async def beside(server: Server) -> Any:
        async with answering(server, "127.0.0.1:0") as port:
            found.append(port)
            yield

    server = Server({"a": predictor}, LIMITS, beside)
    http = uvicorn.Server(uvicorn.Config(server.app, log_level="error", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]})
        thread.start()
        while not found and thread.is_alive():
            time.sleep(0.01)
        yield found[0]
        http.should_exit = True
        thread.join()
    server.close()
    predictor.close()
    Image.MAX_IMAGE_PIXELS = 1024 * 1024 * 1024 // 4 // 3


@pytest.fixture
def client(port: int) -> Iterator[Any]:
    with client_of.InferenceServerClient(f"127.0.0.1:{port}") as opened:
        yield opened


@pytest.fixture
def raw(port: int) -> Iterator[Callable[..., bytes]]:
    """Send any bytes as any call."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield lambda call, body: channel.unary_unary(f"/inference.GRPCInferenceService/{call}")(body, timeout=20)


def photo(seed: int, size: tuple[int, int] = (50, 40)) -> bytes:
    held = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(held, "PNG")
    return held.getvalue()


def given(name: str, values: np.ndarray, kind: str) -> Any:
    tensor = client_of.InferInput(name, list(values.shape), kind)
    tensor.set_data_from_numpy(values)
    return tensor


def test_the_messages_are_those_of_triton() -> None:
    """Names, numbers and types of all fields that we know; the client has some more."""
    from tritonclient.grpc import service_pb2

    for name, ours in messages().items():
        theirs = service_pb2.DESCRIPTOR.message_types_by_name[name]
        compared = [(ours.DESCRIPTOR, theirs)]
        while compared:
            one, other = compared.pop()
            assert {field.name for field in one.fields} <= {field.name for field in other.fields}
            for field in one.fields:
                twin = other.fields_by_name[field.name]
                assert (field.number, field.type, field.is_repeated) == (twin.number, twin.type, twin.is_repeated)
            compared += [(inner, other.nested_types_by_name[inner.name]) for inner in one.nested_types]


def test_the_protocol_says_what_there_is(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("a")
    assert client.is_model_ready("a", "1")
    assert client.get_server_metadata().name == "vitfold"
    said = client.get_model_metadata("a")
    assert [(one.name, list(one.shape)) for one in said.outputs] == [("logits", [-1, 10])]
    assert [list(one.shape) for one in said.inputs] == [[-1, 3, 32, 32], [-1]]
    for name, version in (("absent", ""), ("a", "2")):
        with pytest.raises(client_of.InferenceServerException, match="NOT_FOUND.*no such model; there are a"):
            client.get_model_metadata(name, version)


def test_tensors_and_files(client: Any, bundle: Path) -> None:
    images = [photo(seed) for seed in range(3)]
    with open_predictor(bundle, threads=1) as vit:
        expected = vit.logits(images)
        how, name = vit.bundle.manifest.preprocess, vit.session.parts["main"].inputs[0].name
    files = given("images", np.array(images, dtype=object), "BYTES")
    found = client.infer("a", [files], request_id="7")
    assert found.get_response().id == "7"
    np.testing.assert_allclose(found.as_numpy("logits"), expected, rtol=1e-4, atol=1e-5)
    pixels = np.stack([how(Image.open(io.BytesIO(one))) for one in images])
    wanted = [client_of.InferRequestedOutput("logits")]
    for kind in (np.float32, np.float64):
        tensor = given(name, pixels.astype(kind), {np.float32: "FP32", np.float64: "FP64"}[kind])
        found = client.infer("a", [tensor], outputs=wanted).as_numpy("logits")
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_contents_that_are_not_raw(raw: Callable[..., bytes], bundle: Path) -> None:
    with open_predictor(bundle, threads=1) as vit:
        expected = vit.logits([photo(4)])
    asked = messages()["ModelInferRequest"](model_name="a")
    asked.inputs.add(name="images", datatype="BYTES", shape=[1]).contents.bytes_contents.append(photo(4))
    said = messages()["ModelInferResponse"].FromString(raw("ModelInfer", asked.SerializeToString()))
    found = np.frombuffer(said.raw_output_contents[0], "<f4").reshape(said.outputs[0].shape)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_wrong_is_said_and_harms_no_other(client: Any, raw: Callable[..., bytes], bundle: Path) -> None:
    def refused(*tensors: Any, match: str, **more: Any) -> None:
        with pytest.raises(client_of.InferenceServerException, match=match):
            client.infer("a", list(tensors), **more)

    refused(given("images", np.array([b"broken"], object), "BYTES"), match="INVALID_ARGUMENT.*not an image")
    refused(given("images", np.array([photo(0, (300, 300))], object), "BYTES"), match="RESOURCE_EXHAUSTED|pixels")
    refused(given("images", np.array([photo(0)] * 5, object), "BYTES"), match="1 to 4 images, found 5")
    refused(given("other", np.zeros((1, 3, 32, 32), np.float32), "FP32"), match="give one input")
    with open_predictor(bundle, threads=1) as vit:
        name = vit.session.parts["main"].inputs[0].name
    refused(given(name, np.zeros((1, 3, 32, 31), np.float32), "FP32"), match="has the shape")
    refused(given(name, np.full((1, 3, 32, 32), np.nan, np.float32), "FP32"), match="NaN")
    good = given("images", np.array([photo(0)], object), "BYTES")
    refused(good, match="no output 'none'", outputs=[client_of.InferRequestedOutput("none")])
    with pytest.raises(grpc.RpcError) as caught:
        raw("ModelInfer", b"\xff\xff\xff")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.RpcError) as caught:
        raw("ModelInfer", bytes(300_000))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as caught:
        raw("RepositoryModelUnload", b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert client.infer("a", [good]).as_numpy("logits").shape == (1, 10)


def test_a_sender_that_never_sends_is_let_go(port: int) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        never = threading.Event()

        def silence() -> Iterator[bytes]:
            never.wait(30)
            yield b""

        with pytest.raises(grpc.RpcError) as caught:
            call(silence(), timeout=20)
        never.set()
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert "no answer within 2 s" in caught.value.details()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def test_the_command_serves_both_and_ends_when_told(bundle: Path) -> None:
    ports = [free_port(), free_port()]
    words = ["serve", str(bundle), "--port", str(ports[0]), "--grpc-port", str(ports[1]), "--threads", "1"]
    with subprocess.Popen([sys.executable, "-m", "vitfold", *words], stderr=subprocess.PIPE, text=True) as running:
        try:
            with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
                grpc.channel_ready_future(channel).result(timeout=60)
            with client_of.InferenceServerClient(f"127.0.0.1:{ports[1]}") as client:
                good = given("images", np.array([photo(0)], object), "BYTES")
                assert client.infer("a", [good]).as_numpy("logits").shape == (1, 10)
                second = [*words[:3], str(free_port()), *words[4:]]
                done = subprocess.run(
                    [sys.executable, "-m", "vitfold", *second], capture_output=True, text=True, check=False, timeout=60
                )
                assert done.returncode == 1
                assert "choose another --grpc-port" in " ".join(done.stderr.split())
        finally:
            os.kill(running.pid, signal.SIGTERM)
        said = running.communicate(timeout=60)[1]
    assert f"gRPC: 127.0.0.1:{ports[1]}" in said
    assert "Traceback" not in said
