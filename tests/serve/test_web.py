"""A bundle in a browser and in Node: the same pixels and the same answers as here, and no request to anywhere else."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitfold import pipeline
from vitfold.artifacts.bundle import open_bundle
from vitfold.errors import BundleError, TargetError
from vitfold.images import find_images
from vitfold.model import Model, Preprocess
from vitfold.serve.predictor import open_predictor
from vitfold.serve.web import exporting
from vitfold.serve.web.exporting import export_web, find_package

LABELS = tuple("abcdefghij")


def modules() -> Path | None:
    """The folder `node_modules` of the repository or of NODE_PATH."""
    places = [Path(__file__).parents[2] / "node_modules", *map(Path, os.environ.get("NODE_PATH", "").split(os.pathsep))]
    return next((one for one in places if (one / "onnxruntime-web").is_dir()), None)


@pytest.fixture(scope="module")
def runtime() -> Path:
    found = modules()
    if found is None:
        pytest.skip("no npm package onnxruntime-web in node_modules or NODE_PATH; make node")
    return found / "onnxruntime-web"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth pictures of several formats and sizes: one of a camera held upright, one smaller than the crop."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (53, 41)), ("b.jpg", (90, 128)), ("c.jpg", (37, 200)), ("d.webp", (20, 24))):
        small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        exif = Image.Exif()
        if name == "b.jpg":
            exif[0x0112] = 6
        small.resize(size, Image.Resampling.BICUBIC).save(folder / name, exif=exif, quality=95)
    return folder


@pytest.fixture(scope="module")
def bundles(
    tiny_model: Callable[..., Model], pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("web")
    model = replace(tiny_model(), labels=LABELS, preprocess=replace(tiny_model().preprocess, exif="apply"))
    images = find_images(pictures)
    whole = pipeline.calibrate_plan(pipeline.optimize(model, quant="w8a8"), images)
    recipes = {"plain": pipeline.optimize(model), "whole": whole}
    return {name: pipeline.save(made, folder / f"{name}.fold").path for name, made in recipes.items()}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


PREDICT = """async name => {
  const {predict, ready} = await import('./page.js');
  const made = await predict(await ready, await (await fetch(name)).blob());
  return [Array.from(made.pixels), Array.from(made.output)];
}"""


@pytest.mark.parametrize("kind", ["plain", "whole"])
def test_the_page_says_what_is_said_here(
    bundles: dict[str, Path], kind: str, runtime: Path, pictures: Path, browser: Any, tmp_path: Path
) -> None:
    folder = export_web(open_bundle(bundles[kind]), tmp_path / "web", runtime=runtime)
    assert "Microsoft" in (folder / "ort" / "LICENSE").read_text()
    for path in pictures.iterdir():
        shutil.copy(path, folder)
    said: list[str] = []
    asked: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    with served(folder) as url, open_predictor(bundles[kind], threads=1) as vit:
        page.goto(url)
        page.locator("#state").get_by_text("ready").wait_for()
        for path in sorted(pictures.iterdir()):
            expected = vit.bundle.manifest.preprocess(pipeline_image(path))
            pixels, output = page.evaluate(PREDICT, path.name)
            # One grey level is 1 / 127.5: decoders of JPEG differ by a few in chroma, those of PNG not at all.
            level = np.abs(np.reshape(pixels, expected.shape) - expected) * 127.5
            assert level.max() < (0.01 if path.suffix == ".png" else 12), path.name
            assert level.mean() < 1, path.name
            here = vit.session(np.reshape(pixels, (1, *expected.shape)).astype(np.float32))[0]
            np.testing.assert_allclose(output, here, atol=1e-3 * np.abs(here).max(), err_msg=path.name)
        page.set_input_files("#file", pictures / "a.png")
        page.locator("#timing").get_by_text("ms on 1 thread").wait_for()
        rows = page.eval_on_selector_all("#rows tr", "rows => rows.map(row => row.cells[0].textContent)")
        assert rows == [label for label, _ in vit(pictures / "a.png")[0].top(5)]
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"broken"})
        page.locator("#error").get_by_text("cannot read the file as a picture").wait_for()
    assert said == []
    assert all(one.startswith((url, "blob:", "data:")) for one in asked)
    page.close()


def pipeline_image(path: Path) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(Image.open(path)).convert("RGB")


def node(folder: Path, script: str, *words: str, path: Path | None = None) -> list[Any]:
    """Run a module of a folder in Node; return what it prints, one JSON a line."""
    command = shutil.which("node")
    if command is None:
        pytest.skip("Node is not installed")
    if path is not None:
        (folder / "node_modules").symlink_to(path)
    done = subprocess.run([command, script, *words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


PREPARE = """
import {readFileSync} from "node:fs";
import {prepare} from "./preprocess.js";
for (const {height, width, how} of JSON.parse(readFileSync("cases.json", "utf8"))) {
  const rgb = Uint8Array.from(readFileSync(`${height}x${width}.rgb`));
  console.log(JSON.stringify(Array.from(prepare(rgb, height, width, how))));
}
"""


def test_pixels_in_node_are_those_of_pillow(tmp_path: Path) -> None:
    """Bit by bit, whatever the filter, the way of resizing and the crop: noise, which no other filter keeps."""
    shutil.copy(Path(exporting.__file__).with_name("preprocess.js"), tmp_path)
    (tmp_path / "prepare.mjs").write_text(PREPARE)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    sizes = [(40, 50), (97, 61), (16, 90), (224, 224)]
    images = {}
    for height, width in sizes:
        pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        images[height, width] = Image.fromarray(pixels)
        (tmp_path / f"{height}x{width}.rgb").write_bytes(pixels.tobytes())
    means = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    ways: list[dict[str, Any]] = [
        {"resize": "shortest", "resize_size": (37, 37), "crop_size": (32, 32)},
        {"resize": "cover", "resize_size": (33, 48), "crop_size": (31, 48), "crop_offset": "floor"},
        {"resize": "exact", "resize_size": (61, 30), "crop_size": (64, 32)},
        {"resize": "none", "resize_size": (1, 1), "crop_size": (45, 61)},
    ]
    filters = ("nearest", "bilinear", "bicubic", "lanczos")
    hows = [Preprocess(**way, **means, interpolation=name) for way in ways for name in filters]
    cases = [(size, how) for size in sizes for how in hows]
    text = [{"height": size[0], "width": size[1], "how": how.to_dict()} for size, how in cases]
    (tmp_path / "cases.json").write_text(json.dumps(text))
    for (size, how), found in zip(cases, node(tmp_path, "prepare.mjs"), strict=True):
        expected = how(images[size])
        difference = np.abs(np.reshape(found, expected.shape) - expected).max()
        assert difference < 1e-6, (size, how, difference)


@pytest.mark.parametrize("kind", ["plain", "whole"])
def test_the_example_in_node(
    bundles: dict[str, Path], kind: str, runtime: Path, pictures: Path, tmp_path: Path
) -> None:
    packages = runtime.parent
    for name in ("onnxruntime-node", "sharp"):
        if not (packages / name).is_dir():
            pytest.skip(f"no npm package {name} in {packages}")
    folder = export_web(open_bundle(bundles[kind]), tmp_path / "web", runtime=runtime)
    paths = sorted(pictures.iterdir())
    found = node(folder, "predict.mjs", "--threads", "1", "--logits", *map(str, paths), path=packages)
    with open_predictor(bundles[kind], threads=1) as vit:
        expected = vit.logits(paths)
        np.testing.assert_allclose([one["output"] for one in found], expected, atol=0.02 * np.abs(expected).max())
        (said,) = node(folder, "predict.mjs", str(paths[0]))
        best = vit(paths[0])[0].top(5)
    assert [one["label"] for one in said["top"]] == [label for label, _ in best]
    np.testing.assert_allclose([one["probability"] for one in said["top"]], [p for _, p in best], rtol=0.05)


def test_what_cannot_be_written_is_said(
    bundles: dict[str, Path], tiny_model: Callable[..., Model], tmp_path: Path
) -> None:
    opened = open_bundle(bundles["plain"])
    with pytest.raises(BundleError, match=r"`npm install --ignore-scripts onnxruntime-web`, or name its"):
        find_package(tmp_path)
    (tmp_path / "sub" / "node_modules" / "onnxruntime-web").mkdir(parents=True)
    package = find_package(tmp_path / "sub")
    with pytest.raises(BundleError, match="is not the folder of the npm package onnxruntime-web"):
        export_web(opened, tmp_path / "web", runtime=package)
    (package / "package.json").write_text('{"name": "onnxruntime-web"}')
    with pytest.raises(BundleError, match=r"has no dist/ort.wasm.min.mjs; install onnxruntime-web 1.20 or later"):
        export_web(opened, tmp_path / "web", runtime=package)
    other = pipeline.save(pipeline.optimize(tiny_model(), target="openvino"), tmp_path / "other.fold")
    with pytest.raises(TargetError, match="is for openvino, and browsers run ONNX Runtime; make it with --target cpu"):
        export_web(other, tmp_path / "web", runtime=package)
    assert not (tmp_path / "web").exists()


def test_only_a_page_is_replaced(bundles: dict[str, Path], runtime: Path, tmp_path: Path) -> None:
    opened = open_bundle(bundles["plain"])
    folder = export_web(opened, tmp_path / "web", runtime=runtime)
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(BundleError, match="--overwrite"):
        export_web(opened, folder, runtime=runtime)
    export_web(opened, folder, runtime=runtime, overwrite=True)
    assert (folder / "mine.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.html").write_text("<p>mine")
    with pytest.raises(BundleError, match="was not written by `vitfold export --format web`"):
        export_web(opened, tmp_path / "other", runtime=runtime, overwrite=True)
