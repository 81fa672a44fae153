"""The server on loopback: what it answers, what it refuses, and that a bad request harms no good one."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")
from vitfold.serve.server.app import Limits, Server  # noqa: E402

LABELS = tuple("abcdefghij")
LIMITS = Limits(body_bytes=200_000, pixels=40_000, seconds=10.0, queue=16, batch=4)


@pytest.fixture(scope="module")
def bundle(tiny_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return pipeline.save(pipeline.optimize(replace(tiny_model(), labels=LABELS)), folder / "a.fold").path


@pytest.fixture(scope="module")
def encoder(tiny_model: Callable[..., Model], tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model(outputs=0, output="image_embeds")
    return pipeline.save(pipeline.optimize(model), tmp_path_factory.mktemp("served") / "encoder.fold").path


@contextmanager
def running(limits: Limits, *bundles: Path, kind: type[Predictor] = Predictor) -> Iterator[int]:
    """Serve bundles; hand out the port."""
    predictors = {path.stem: kind(open_bundle(path), threads=1) for path in bundles}
    server = Server(predictors, limits)
    listener = socket.create_server(("127.0.0.1", 0))
    http_server = uvicorn.Server(uvicorn.Config(server.app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=http_server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        http_server.should_exit = True
        thread.join()
        server.close()
        listener.close()
        for one in predictors.values():
            one.close()
        Image.MAX_IMAGE_PIXELS = 1024 * 1024 * 1024 // 4 // 3


@pytest.fixture(scope="module")
def port(bundle: Path, encoder: Path) -> Iterator[int]:
    with running(LIMITS, bundle, encoder) as found:
        yield found


def ask(
    port: int, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
        response = connection.getresponse()
        content, found = response.read(), {name.lower(): value for name, value in response.getheaders()}
    finally:
        connection.close()
    is_json = found.get("content-type") == "application/json"
    return response.status, json.loads(content) if is_json else content, found


def photo(seed: int, size: tuple[int, int] = (50, 40), kind: str = "PNG") -> bytes:
    held = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(held, kind)
    return held.getvalue()


def form(content: bytes, *, field: str = "image", name: str = "a.png") -> tuple[bytes, dict[str, str]]:
    head = f'--x\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--x--\r\n", {"content-type": "multipart/form-data; boundary=x"}


def inputs(name: str, kind: str, shape: list[int], data: Any, **more: Any) -> dict[str, Any]:
    return {"inputs": [{"name": name, "datatype": kind, "shape": shape, "data": data}], **more}


def test_a_file_gets_labels(port: int, bundle: Path) -> None:
    with open_predictor(bundle, threads=1) as vit:
        best = vit(photo(0))[0].top(3)
    for body, headers in (form(photo(0)), (photo(0), {})):
        status, said, _ = ask(port, "/predict?top=3", body, headers)
        assert (status, said["model"]) == (200, "a")
        assert [one["label"] for one in said["top"]] == [label for label, _ in best]
        np.testing.assert_allclose([one["probability"] for one in said["top"]], [p for _, p in best], rtol=1e-5)
    status, said, _ = ask(port, "/predict?model=encoder", photo(0))
    assert (status, len(said["embedding"])) == (200, 32)


def test_the_protocol_says_what_there_is(port: int) -> None:
    assert ask(port, "/v2/health/live")[:2] == ask(port, "/v2/health/ready")[:2] == (200, {"live": True, "ready": True})
    status, said, _ = ask(port, "/v2")
    assert (status, said["name"], said["models"]) == (200, "vitfold", ["a", "encoder"])
    assert ask(port, "/v2/models/a/ready")[:2] == (200, {"name": "a", "ready": True})
    status, said, _ = ask(port, "/v2/models/a/versions/1")
    assert said["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 10]}]
    assert [one["shape"] for one in said["inputs"]] == [[-1, 3, 32, 32], [-1]]
    assert ask(port, "/v2/models/absent")[0] == ask(port, "/v2/models/a/versions/2/ready")[0] == 404


def test_tensors_and_files_by_the_protocol(port: int, bundle: Path) -> None:
    images = [photo(seed) for seed in range(3)]
    with open_predictor(bundle, threads=1) as vit:
        expected = vit.logits(images)
        preprocess = vit.bundle.manifest.preprocess
    files = inputs("images", "BYTES", [3], [base64.b64encode(one).decode() for one in images], id="7")
    status, said, _ = ask(port, "/v2/models/a/infer", files)
    assert (status, said["id"], said["model_name"]) == (200, "7", "a")
    (output,) = said["outputs"]
    assert (output["name"], output["shape"]) == ("logits", [3, 10])
    np.testing.assert_allclose(np.reshape(output["data"], (3, 10)), expected, rtol=1e-4, atol=1e-5)
    name = ask(port, "/v2/models/a")[1]["inputs"][0]["name"]
    pixels = np.stack([preprocess(Image.open(io.BytesIO(one)).convert("RGB")) for one in images]).astype("<f4")
    plain = inputs(name, "FP32", list(pixels.shape), pixels.reshape(-1).tolist())
    nested = inputs(name, "FP32", list(pixels.shape), pixels.tolist())
    for request in (plain, nested):
        status, said, _ = ask(port, "/v2/models/a/infer", request)
        np.testing.assert_allclose(np.reshape(said["outputs"][0]["data"], (3, 10)), expected, rtol=1e-4, atol=1e-5)
    head = {"inputs": [{"name": name, "datatype": "FP32", "shape": list(pixels.shape)}]}
    head["inputs"][0]["parameters"] = {"binary_data_size": pixels.nbytes}
    head["outputs"] = [{"name": "logits", "parameters": {"binary_data": True}}]
    text = json.dumps(head).encode()
    length = {"Inference-Header-Content-Length": str(len(text))}
    status, content, headers = ask(port, "/v2/models/a/infer", text + pixels.tobytes(), length)
    cut = int(headers["inference-header-content-length"])
    assert json.loads(content[:cut])["outputs"][0]["parameters"] == {"binary_data_size": 120}
    np.testing.assert_allclose(np.frombuffer(content[cut:], "<f4").reshape(3, 10), expected, rtol=1e-4, atol=1e-5)
    raw = b"".join(struct.pack("<I", len(one)) + one for one in images[:1])
    head = {"inputs": [{"name": "images", "datatype": "BYTES", "shape": [1]}]}
    head["inputs"][0]["parameters"] = {"binary_data_size": len(raw)}
    text = json.dumps(head).encode()
    length = {"Inference-Header-Content-Length": str(len(text))}
    status, said, _ = ask(port, "/v2/models/a/infer", text + raw, length)
    np.testing.assert_allclose(said["outputs"][0]["data"], expected[0], rtol=1e-4, atol=1e-5)


def malformed(tmp_path: Path) -> list[tuple[str, Any, dict[str, str], int]]:
    """Requests that no client should send: path, body, headers, status."""
    infer = "/v2/models/a/infer"
    secret = tmp_path / "secret.png"
    secret.write_bytes(photo(9))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    header = {"Inference-Header-Content-Length": "999999"}
    found: list[tuple[str, Any, dict[str, str], int]] = [
        ("/predict", b"no image", {}, 400),
        ("/predict", b"", {}, 400),
        ("/predict", photo(0)[:300], {}, 400),
        ("/predict", eps, {}, 400),
        ("/predict", str(secret).encode(), {}, 400),
        ("/predict", b"\x80\x04\x95cos\nsystem\n.", {}, 400),
        ("/predict?model=absent", photo(0), {}, 404),
        ("/predict?model=../../etc/passwd", photo(0), {}, 404),
        ("/predict?top=0", photo(0), {}, 400),
        ("/predict", photo(0, (210, 200)), {}, 400),
        ("/predict", bytes(300_000), {}, 413),
        ("/predict", b"--x\r\nbroken", {"content-type": "multipart/form-data; boundary=x"}, 400),
        ("/predict", b"x", {"content-type": "multipart/form-data"}, 400),
        (infer, b"[" * 100_000, {}, 400),
        (infer, b"\xff\xfe", {}, 400),
        (infer, b"{}", {}, 400),
        (infer, b"{}", header, 400),
        (infer, inputs("images", "BYTES", [1], [str(secret)]), {}, 400),
        (infer, inputs("images", "BYTES", [2], [base64.b64encode(photo(0)).decode()]), {}, 400),
        (infer, inputs("images", "BYTES", [5], [base64.b64encode(photo(0)).decode()] * 5), {}, 400),
        (infer, inputs("images", "FP32", [1], [1.0]), {}, 400),
        (infer, inputs("absent", "FP32", [1], [1.0]), {}, 400),
        (infer, inputs("pixel_values", "FP32", [1, 3, 31, 32], [0.0] * 2976), {}, 400),
        (infer, inputs("pixel_values", "FP32", [-1, 3], [0.0]), {}, 400),
        (infer, inputs("pixel_values", "FP32", [2**62, 2**62], [0.0]), {}, 400),
        (infer, inputs("pixel_values", "OBJECT", [1], [0.0]), {}, 400),
        (infer, inputs("pixel_values", "FP32", [1], [{"a": 1}]), {}, 400),
        (infer, json.dumps(inputs("pixel_values", "FP32", [1, 3, 32, 32], [float("nan")] * 3072)).encode(), {}, 400),
        ("/v2/repository/models/a/unload", b"{}", {}, 404),
        ("/../../etc/passwd", None, {}, 404),
    ]
    return found


def test_what_is_malformed_is_refused_with_a_reason(port: int, tmp_path: Path) -> None:
    name = ask(port, "/v2/models/a")[1]["inputs"][0]["name"]
    assert name == "pixel_values"
    for path, body, headers, status in malformed(tmp_path):
        found, said, _ = ask(port, path, body, headers)
        assert found == status, (path, body if body is None else str(body)[:80], said)
        if path.startswith(("/predict", "/v2/models/a/infer")):
            assert len(said["error"]) > 5


def test_a_bad_request_harms_no_good_one(port: int, bundle: Path, tmp_path: Path) -> None:
    bad = [one for one in malformed(tmp_path) if one[1] is not None]
    with open_predictor(bundle, threads=1) as vit:
        best = [vit(photo(seed))[0].top(1)[0][0] for seed in range(8)]

    def good(i: int) -> None:
        while True:
            status, said, _ = ask(port, "/predict?top=1", photo(i % 8))
            if status != 503:  # the queue of the test is short
                break
        assert (status, said["top"][0]["label"]) == (200, best[i % 8])

    def send(i: int) -> None:
        good(i) if i % 2 else ask(port, *bad[i // 2 % len(bad)][:3])

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(send, range(300)))
    metrics = ask(port, "/metrics")[1].decode()
    assert 'vitfold_requests_total{route="predict",status="200"}' in metrics
    assert 'vitfold_requests_total{route="infer",status="500"}' not in metrics
    assert 'vitfold_requests_total{route="predict",status="500"}' not in metrics


class Slow(Predictor):
    """A bundle whose engine takes its time."""

    def run(self, pixels: Any) -> Any:
        time.sleep(0.5)
        return super().run(pixels)


def test_too_many_requests_are_refused_and_slow_ones_end(bundle: Path) -> None:
    pixels = {"inputs": [{"name": "pixel_values", "datatype": "FP32", "shape": [1, 3, 32, 32], "data": [0.0] * 3072}]}
    with running(replace(LIMITS, queue=2, batch=1), bundle, kind=Slow) as port, ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: ask(port, "/v2/models/a/infer", pixels), range(12)))
        statuses = [status for status, _, _ in found]
        assert 1 <= statuses.count(200) <= 4
        assert statuses.count(200) + statuses.count(503) == 12
        assert all(headers["retry-after"] == "1" for status, _, headers in found if status == 503)
        assert ask(port, "/v2/models/a/infer", pixels)[0] == 200
    with running(replace(LIMITS, seconds=0.2), bundle, kind=Slow) as port:
        status, said, _ = ask(port, "/v2/models/a/infer", pixels)
        assert (status, said["error"]) == (503, "no answer within 0.2 s; ask again later")
        with socket.create_connection(("127.0.0.1", port)) as sender:  # a body that never comes
            sender.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nab")
            assert b" 503 " in sender.recv(100)


def started(bundle: Path) -> tuple[subprocess.Popen[str], int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["vitfold", "serve", str(bundle), "--port", str(port), "--threads", "1"]
    script = f"import sys; from vitfold.cli import main; sys.argv = {words!r}; main()"
    process = subprocess.Popen([sys.executable, "-c", script], text=True, stderr=subprocess.PIPE, env=os.environ)
    ends = time.monotonic() + 60
    while time.monotonic() < ends and process.poll() is None:
        try:
            ask(port, "/v2/health/ready")
            return process, port
        except OSError:
            time.sleep(0.05)
    raise AssertionError(process.communicate()[1])


@pytest.mark.slow
def test_a_server_that_is_ended_answers_what_it_has_begun(bundle: Path) -> None:
    process, port = started(bundle)
    answered, lost = [0], [0]
    ended = threading.Event()

    def load() -> None:
        while not ended.is_set():
            try:
                answered[0] += ask(port, "/predict", photo(0, (100, 100)))[0] == 200
            except ConnectionRefusedError:
                return
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                lost[0] += 1  # a connection that the server had not taken yet
                return

    threads = [threading.Thread(target=load) for _ in range(4)]
    for one in threads:
        one.start()
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=40)[1]
    ended.set()
    for one in threads:
        one.join()
    assert process.returncode in (0, 143), said
    assert "Traceback" not in said
    assert answered[0] > 10
    assert lost[0] <= 4


def test_the_page_in_a_browser(port: int, browser: Any, bundle: Path) -> None:
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"http://127.0.0.1:{port}/")
    page.wait_for_selector("#model option", state="attached")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": photo(0)})
    page.wait_for_selector("#rows tr")
    rows = page.eval_on_selector_all("#rows tr", "rows => rows.map(row => row.cells[0].textContent)")
    with open_predictor(bundle, threads=1) as vit:
        assert rows == [label for label, _ in vit(photo(0))[0].top(5)]
    assert said == []
    encoded = base64.b64encode(photo(1)).decode()
    page.evaluate(
        """encoded => {
          const bytes = Uint8Array.from(atob(encoded), c => c.charCodeAt(0));
          const data = new DataTransfer();
          data.items.add(new File([bytes], "b.png", {type: "image/png"}));
          document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
        }""",
        encoded,
    )
    with open_predictor(bundle, threads=1) as vit:
        best = vit(photo(1))[0].top(1)[0]
    page.locator("#rows tr").first.get_by_text(f"{100 * best[1]:.1f} %").wait_for()
    page.select_option("#model", "encoder")
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": photo(2)})
    page.locator("#rows").get_by_text("32 numbers").wait_for()
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"broken"})
    page.locator("#error").get_by_text("not an image").wait_for()


def test_what_cannot_be_served_is_said(bundle: Path, tmp_path: Path) -> None:
    def said(*words: object) -> str:
        script = (
            f"import sys; from vitfold.cli import main; sys.argv = {['vitfold', 'serve', *map(str, words)]!r}; main()"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1, done.stderr
        return " ".join(done.stderr.split())

    shutil.copytree(bundle, tmp_path / "a.fold")
    assert "two bundles are called a; rename one" in said(bundle, tmp_path / "a.fold")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use; choose another --port" in said(bundle, "--port", taken.getsockname()[1])
