"""How `vitfold serve` stands a load, beside a server written by hand with FastAPI and ONNX Runtime.

    pip install fastapi python-multipart
    python examples/serve_load.py BUNDLE FOLDER OUT.json [--seconds 120] [--clients 8] [--threads 1]

BUNDLE has no labels (`--num-classes 10` without class folders): the server by hand answers with numbers.

Clients on loopback post files of images one after the other, each waiting for its answer; one request in ten is
malformed. Both servers run at the same time on ports of their own, and take turns of ten seconds under the load, so
that slow spells of the machine fall on both. A good request that gets no answer of 200 is an error; its label is
compared with the one that the bundle gives in this process. Memory is that of the server's process. Threads of the
server by hand run the engine side by side: `taskset -c 0` gives both one core.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from vitfold.bench.environment import environment
from vitfold.serve.predictor import open_predictor

TURN_S = 10.0
BY_HAND = '''
"""A classifier behind HTTP, as tutorials have it."""
import io, json, sys
import numpy as np, onnxruntime, uvicorn
from fastapi import FastAPI, File, HTTPException, UploadFile
from PIL import Image, UnidentifiedImageError
from vitfold.model import preprocess_from_dict

graph, settings, port, threads = sys.argv[1:]
preprocess = preprocess_from_dict(json.loads(settings))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(threads)
session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
app = FastAPI()

@app.get("/v2/health/ready")
def ready(): return {}

@app.post("/predict")
def predict(image: UploadFile = File(...)):
    try:
        picture = Image.open(io.BytesIO(image.file.read())).convert("RGB")
    except (UnidentifiedImageError, OSError):
        raise HTTPException(400, "no image")
    logits = session.run(None, {session.get_inputs()[0].name: preprocess(picture)[None]})[0][0]
    shares = np.exp(logits - logits.max()); shares /= shares.sum()
    best = np.argsort(-shares)[:5]
    return {"top": [{"label": str(i), "probability": float(shares[i])} for i in best]}

uvicorn.run(app, port=int(port), log_level="error")
'''


@dataclass(slots=True)
class Seen:
    """What clients saw of a server."""

    took_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    busy_s: float = 0.0
    cpu_s: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def form(content: bytes) -> tuple[bytes, dict[str, str]]:
    """Return a file as a browser sends it."""
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    return head + content + b"\r\n--x--\r\n", {"content-type": "multipart/form-data; boundary=x"}


def malformed(draw: random.Random, content: bytes) -> tuple[bytes, dict[str, str]]:
    """Return a request that should not be answered."""
    kinds: list[Callable[[], tuple[bytes, dict[str, str]]]] = [
        lambda: form(b"no image"),
        lambda: form(content[: len(content) // 3]),
        lambda: (b"--x\r\nbroken", {"content-type": "multipart/form-data; boundary=x"}),
        lambda: (b"", {"content-type": "multipart/form-data; boundary=x"}),
        lambda: form(bytes(draw.randrange(256) for _ in range(1000))),
    ]
    return draw.choice(kinds)()


def client(port: int, images: Sequence[bytes], best: Sequence[str], seen: Seen, until: float, seed: int) -> None:
    """Ask until the time is over."""
    draw = random.Random(seed)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    while time.perf_counter() < until:
        number, bad = draw.randrange(len(images)), draw.random() < 0.1
        body, headers = malformed(draw, images[number]) if bad else form(images[number])
        began = time.perf_counter()
        try:
            connection.request("POST", "/predict", body, headers)
            response = connection.getresponse()
            status, content = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            status, content = 0, repr(error).encode()
            connection.close()
        took = time.perf_counter() - began
        with seen.lock:
            if bad:
                seen.refused[str(status)] = seen.refused.get(str(status), 0) + 1
            elif status != 200 or json.loads(content)["top"][0]["label"] != best[number]:
                seen.wrong.append(f"{status}: {content[:200]!r}")
            else:
                seen.took_s.append(took)
    connection.close()


def started(words: Sequence[str], port: int) -> psutil.Popen:
    """Start a server and wait until it is ready."""
    process = psutil.Popen(list(words))
    ends = time.monotonic() + 120
    while time.monotonic() < ends and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status == 200:
                return process
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{words} did not start")


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def row(name: str, seen: Seen) -> dict[str, Any]:
    """Return what is said of a server."""
    p50, p90, p99 = (float(one) for one in np.percentile(seen.took_s, [50, 90, 99]))
    return {
        "subject": name,
        "answered": len(seen.took_s),
        "errors_on_good": len(seen.wrong),
        "first_errors": seen.wrong[:3],
        "malformed_by_status": seen.refused,
        "images_per_s": len(seen.took_s) / seen.busy_s,
        "cpu_ms_per_answer": seen.cpu_s / len(seen.took_s) * 1e3,
        "p50_ms": p50 * 1e3,
        "p90_ms": p90 * 1e3,
        "p99_ms": p99 * 1e3,
        "memory_mib": seen.curve,
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0, help="under load, each server")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--note", default="")
    options = parser.parse_args()
    paths = sorted(options.folder.rglob("*.jpg"))[:200]
    images = [path.read_bytes() for path in paths]
    with open_predictor(options.bundle, threads=options.threads) as vit:
        best = [one.top(1)[0][0] for one in vit(paths)]
        graph, settings = vit.bundle.onnx_path, json.dumps(vit.bundle.manifest.preprocess.to_dict())
    ports = {"vitfold serve": free_port()}
    words = [sys.executable, "-m", "vitfold", "serve", str(options.bundle), "--threads", str(options.threads)]
    processes = {"vitfold serve": started([*words, "--port", str(ports["vitfold serve"])], ports["vitfold serve"])}
    with tempfile.TemporaryDirectory() as text:
        script = Path(text) / "by_hand.py"
        script.write_text(BY_HAND)
        port = ports["FastAPI and ONNX Runtime"] = free_port()
        line = [sys.executable, str(script), str(graph), settings, str(port), str(options.threads)]
        processes["FastAPI and ONNX Runtime"] = started(line, port)
        found = {name: Seen() for name in ports}
        began = time.perf_counter()
        for turn in range(round(options.seconds / TURN_S)):
            for name in sorted(ports, reverse=bool(turn % 2)):
                until = time.perf_counter() + TURN_S
                threads = [
                    threading.Thread(
                        target=client, args=(ports[name], images, best, found[name], until, 1000 * turn + i)
                    )
                    for i in range(options.clients)
                ]
                at, used_s = time.perf_counter(), sum(processes[name].cpu_times()[:2])
                for one in threads:
                    one.start()
                for one in threads:
                    one.join()
                found[name].busy_s += time.perf_counter() - at
                found[name].cpu_s += sum(processes[name].cpu_times()[:2]) - used_s
                used = processes[name].memory_info().rss / 2**20
                found[name].curve.append([round(time.perf_counter() - began), round(used, 1)])
                print(turn, name, len(found[name].took_s), "answers", len(found[name].wrong), "errors", flush=True)
        for one in processes.values():
            one.terminate()
            one.wait(60)
    made = {"environment": environment(), "note": options.note, "threads": options.threads, "clients": options.clients}
    made |= {"seconds": options.seconds, "rows": [row(name, seen) for name, seen in found.items()]}
    options.output.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
