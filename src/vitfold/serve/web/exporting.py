"""A bundle as a folder of a web page that runs it in the browser.

Source: ONNX Runtime Web, https://onnxruntime.ai/docs/tutorials/web/.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

from vitfold.artifacts.bundle import MODEL, Bundle
from vitfold.engines import DEFAULT, MAIN, open_graph
from vitfold.errors import BundleError, TargetError
from vitfold.serve.folders import write_folder
from vitfold.storage.ordinary import read_text

PACKAGE = "onnxruntime-web"
ABOUT, RUNTIME = "bundle.json", "ort"
SCRIPTS = ("index.html", "page.js", "preprocess.js", "predict.mjs")
_MARK = 'content="vitfold export --format web"'
_RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_LICENSES = ("LICENSE", "ThirdPartyNotices.txt")


def export_web(
    bundle: Bundle, folder: str | Path, *, runtime: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Write a page that runs a bundle in the browser, and all that it loads; return the folder.

    `runtime` is the folder of the npm package onnxruntime-web: by default that in `node_modules` of the working folder
    or of one above it.

    Raises:
        TargetError: if the bundle is for an engine other than ONNX Runtime on CPUs, or takes no pictures.
        BundleError: if there is no such package, or the folder cannot be written or may not be replaced.
    """
    manifest = bundle.manifest
    engine = str(manifest.target["engine"])
    if engine != DEFAULT or manifest.simulated:
        kind = "is simulated" if manifest.simulated else f"is for {engine}"
        raise TargetError(f"{bundle.path} {kind}, and browsers run ONNX Runtime; make it with --target cpu")
    if manifest.preprocess.arrays:
        raise TargetError(f"{bundle.path} takes arrays, and the page takes pictures; run the graph by your own script")
    package = find_package() if runtime is None else Path(runtime)
    _check_package(package)

    def fill(draft: Path) -> None:
        for name in SCRIPTS:
            shutil.copyfile(Path(__file__).with_name(name), draft / name)
        for path in sorted(bundle.path.glob(f"{MODEL}*")):
            shutil.copyfile(path, draft / path.name)
        (draft / ABOUT).write_text(json.dumps(_about(bundle), ensure_ascii=False, indent=1), encoding="utf-8")
        (draft / RUNTIME).mkdir()
        for name in _RUNTIME_FILES:
            shutil.copyfile(package / "dist" / name, draft / RUNTIME / name)
        shutil.copyfile(package / "package.json", draft / RUNTIME / "package.json")
        for path in _licenses(package):
            shutil.copyfile(path, draft / RUNTIME / path.name)

    own = {*SCRIPTS, ABOUT, RUNTIME, MODEL, f"{MODEL}.data"}
    return write_folder(folder, fill, format="web", mark=("index.html", _MARK), own=lambda _: own, overwrite=overwrite)


def find_package(start: Path | None = None) -> Path:
    """Return the package in `node_modules` of a folder or of one above it, as Node looks for it.

    Raises:
        BundleError: if there is none.
    """
    here = (start or Path.cwd()).absolute()
    for above in (here, *here.parents):
        found = above / "node_modules" / PACKAGE
        if found.is_dir():
            return found
    raise BundleError(
        f"no npm package {PACKAGE} here; `npm install --ignore-scripts {PACKAGE}`, or name its folder by --runtime"
    )


def _check_package(package: Path) -> None:
    try:
        named = json.loads(read_text(package / "package.json"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    if named != PACKAGE:
        raise BundleError(f"{package} is not the folder of the npm package {PACKAGE}; name that one by --runtime")
    missing = [name for name in _RUNTIME_FILES if not (package / "dist" / name).is_file()]
    if missing:
        raise BundleError(f"{package} has no dist/{missing[0]}; install {PACKAGE} 1.20 or later")


def _licenses(package: Path) -> list[Path]:
    """Return the licence and the notices: the package's own, or those of ONNX Runtime for Python, the same project."""
    spec = find_spec("onnxruntime")
    places = [package, *map(Path, (spec.submodule_search_locations or []) if spec else [])]
    found = [next((at / name for at in places if (at / name).is_file()), None) for name in _LICENSES]
    return [path for path in found if path is not None]


def _about(bundle: Bundle) -> dict[str, object]:
    """Return what the page has to know: names of tensors, preprocessing, labels."""
    with open_graph(bundle.onnx_path, DEFAULT, threads=1, literal=True) as session:
        part = session.parts[MAIN]
        given, returned = part.inputs[0].name, part.outputs[0].name
    return {
        "name": bundle.name,
        "model": MODEL,
        "data": [path.name for path in sorted(bundle.path.glob(f"{MODEL}.*"))],
        "input": given,
        "output": returned,
        "head": bundle.manifest.spec.head,
        "preprocess": {"exif": "ignore", **bundle.manifest.preprocess.to_dict()},
        "labels": bundle.manifest.labels,
    }
