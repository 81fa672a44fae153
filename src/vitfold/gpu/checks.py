"""The contract of the engine, and the accuracy of the demo, on the device."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitfold.bench.classes import class_targets
from vitfold.engines.network import Network, read_network
from vitfold.gpu.report import Report
from vitfold.gpu.study import has_float8, plan_of
from vitfold.images import batches, find_images
from vitfold.pipeline.writing import write_graph
from vitfold.sources import demo_folder, load_source

ROOT = Path(__file__).parents[3]
CONTRACT = (
    "extreme_codes or kernel or long_products or fit_half or onnx_runtime and not openvino or "
    "test_engines and torch and not compile or reference and torch and compile and 5"
)
"""The tests of the contract that say something about a GPU, as pytest's -k takes them."""


def contract(report: Report) -> None:
    """Run the engine's contract on the device, where its kernels are exact, and once what torch compiles.

    Its tests are in a checkout; an installed package has none, and the file says so.
    """
    if not (ROOT / "tests" / "contracts").is_dir():
        report.write("contract", [{"passed": None, "said": f"{ROOT} has no tests: run it from a checkout"}])
        report.say("contract: no tests here, they are in a checkout")
        return
    tests = ["tests/contracts/test_engines.py", "tests/engines/test_network.py", "-k", CONTRACT]
    if report.small:
        tests = ["tests/engines/test_network.py", "-k", "extreme_codes and qdq or kernel"]
    # Warnings of a torch, a driver or a compiler that was never seen before are no failures.
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(30.0, min(90.0, 0.3 * report.left())),
        )
        passed, said = done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    except subprocess.TimeoutExpired as error:
        passed, said = False, f"not finished within {error.timeout:.0f} s"
    row = {"command": command[1:], "passed": passed, "seconds": time.monotonic() - began, "said": said}
    report.write("contract", [row])
    report.say(f"contract: {'passed' if passed else 'FAILED, see gpu-contract.json'}")


def accuracy(report: Report) -> None:
    """Demo weights on CIFAR-10 test images: top-1, agreement with FP32, and how far the GPU is from the CPU."""
    model, images = load_source("demo").model, find_images(demo_folder() / "images")
    few = images.sample(8, seed=0)
    images = images.first(8) if report.small else images.without(few) or images
    pixels = np.concatenate([one.pixel_values for one in batches(images, model.preprocess, batch=64)])
    until = report.until(0.2)
    truth = class_targets(images, model.labels, model.spec.output_width)
    ways: list[tuple[str, str, Any, str | None]] = [
        ("fp32", "torch", None, None),
        ("fp16", "torch-fp16", None, None),
        ("fp16-r4", "torch-fp16", 4, None),
        ("int8", "torch-fp16", None, "w8a8"),
        ("int8-r4", "torch-fp16", 4, "w8a8"),
    ]
    if has_float8(report.device):
        ways += [("fp8", "torch-fp8", None, None), ("fp8-r4", "torch-fp8", 4, None)]
    rows: list[dict[str, Any]] = []
    reference: np.ndarray | None = None
    for name, target, merge, quant in ways:
        if rows and report.over(until):
            return
        path = report.work / f"demo-{name}.onnx"
        write_graph(plan_of(model, target, few, merge, quant=quant), path)
        network = read_network(path).eval()
        outputs = _outputs(network.to(report.device), pixels)
        reference = outputs if reference is None else reference
        host = _outputs(network.to("cpu"), pixels[:4])
        row = {
            "name": name,
            "images": len(pixels),
            "top1": None if truth is None else float((outputs.argmax(1) == np.asarray(truth)).mean()),
            "agreement": float((outputs.argmax(1) == reference.argmax(1)).mean()),
            "finite": bool(np.isfinite(outputs).all()),
            "from_cpu": float(np.median(np.linalg.norm(outputs[:4] - host, axis=1) / np.linalg.norm(host, axis=1))),
        }
        rows.append(row)
        report.write("accuracy", rows, model="demo", source="CIFAR-10 test images of assets/demo")
        report.say(
            "accuracy: " + ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        )


def _outputs(network: Network, pixels: np.ndarray) -> np.ndarray:
    device = network.body.get_buffer("real").device
    made = []
    with torch.no_grad():
        for start in range(0, len(pixels), 64):
            y: Any = network(torch.from_numpy(pixels[start : start + 64]).to(device))
            made.append(y.float().cpu().numpy())
    return np.concatenate(made)
