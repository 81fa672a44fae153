"""How near the page of `vitfold export --format web` comes to the bundle here, in Chromium, and how fast it is.

python examples/check_web.py BUNDLE --runtime node_modules/onnxruntime-web --images PHOTOS -o results/web-demo.json
"""

from __future__ import annotations

import argparse
import http.server
import json
import shutil
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import sync_playwright

from vitfold.artifacts.bundle import open_bundle
from vitfold.bench.environment import environment
from vitfold.decoding import prepared
from vitfold.images import find_images
from vitfold.serve.predictor import Predictor, open_predictor
from vitfold.serve.web.exporting import export_web

ASK = """async url => {
  const {predict, ready} = await import('./page.js');
  const made = await predict(await ready, await (await fetch(url)).blob());
  return {...made, pixels: Array.from(made.pixels), output: Array.from(made.output)};
}"""


TIMES = ("model_ms", "prepare_ms", "here_ms")


def main() -> None:
    """Compare images one by one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--runtime", type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--output", "-o", type=Path)
    given = parser.parse_args()
    bundle = open_bundle(given.bundle)
    paths = list(find_images(given.images).paths)[: given.limit]
    with tempfile.TemporaryDirectory() as scratch, open_predictor(given.bundle, threads=1) as vit:
        folder = export_web(bundle, Path(scratch) / "web", runtime=given.runtime)
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
        handler.func.log_message = lambda *_: None
        for i, path in enumerate(paths):
            shutil.copyfile(path, folder / f"{i}{path.suffix}")
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            found = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/")
            rows = [compared(vit, path, page.evaluate(ASK, f"{i}{path.suffix}")) for i, path in enumerate(paths)]
            version = browser.version
            browser.close()
            server.shutdown()
    summary = {
        "bundle": bundle.name,
        "images": len(rows),
        "chromium": version,
        "same_label_ratio": float(np.mean([row["same"] for row in rows])),
        "grey_levels": {name: float(np.max([row[name] for row in rows])) for name in ("mean", "most")},
        "output_relative": {
            "median": float(np.median([row["relative"] for row in rows])),
            "most": float(np.max([row["relative"] for row in rows])),
        },
        "median_ms": {
            name: float(np.median([row[name] for row in rows])) for name in ("model_ms", "prepare_ms", "here_ms")
        },
        "environment": environment(),
    }
    text = json.dumps(summary, indent=1)
    print(text)
    if given.output:
        given.output.write_text(text + "\n", encoding="utf-8")


def compared(vit: Predictor, path: Path, made: dict[str, Any]) -> dict[str, Any]:
    """Compare one image: pixels in grey levels of 8 bits, outputs relative to the largest."""
    how = vit.bundle.manifest.preprocess
    pixels = prepared(path, how)
    std = np.asarray(how.std)[:, None, None] * 255
    levels = np.abs(np.reshape(made["pixels"], pixels.shape) - pixels) * std
    began = time.perf_counter()
    output = vit.session(pixels[None])[0]
    here = time.perf_counter() - began
    there = np.asarray(made["output"])
    return {
        "same": int(there.argmax()) == int(output.argmax()),
        "mean": float(levels.mean()),
        "most": float(levels.max()),
        "relative": float(np.abs(there - output).max() / np.abs(output).max()),
        "model_ms": made["model_ms"],
        "prepare_ms": made["prepare_ms"],
        "here_ms": 1000 * here,
    }


if __name__ == "__main__":
    main()
