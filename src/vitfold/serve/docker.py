"""A bundle and what serves it as a folder for Docker, KServe, BentoML or Ray Serve, which install wheels only."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
from pathlib import Path
from typing import Literal, get_args

from vitfold.artifacts.bundle import Bundle
from vitfold.cores import check_threads, usable_cores
from vitfold.engines import ENGINES
from vitfold.errors import BundleError, EngineError, TargetError, missing_extra
from vitfold.serve import deployments
from vitfold.serve.deployments import REQUIREMENTS, WRITTEN, Deployment
from vitfold.serve.folders import write_folder

Context = Literal["docker", "kserve", "bento", "ray-serve"]
CONTEXTS = get_args(Context)

_PACKAGE = "vitfold"
_NEEDED = (
    "numpy",
    "pillow",
    "typer",
    "rich",
    "safetensors",
    "jaxtyping",
    "platformdirs",
    "py-cpuinfo",
    "tomli-w",
)
_SERVER = ("starlette", "uvicorn", "python-multipart", "prometheus-client")
_ENGINES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "openvino-bf16": "openvino"}
"""The package that an engine comes in."""
_TEXTS = {
    "docker": deployments.docker,
    "kserve": deployments.kserve,
    "bento": deployments.bento,
    "ray-serve": deployments.ray_serve,
}
_OTHERS = {"bento": "bentoml>=1.4\n", "ray-serve": "ray[serve]>=2.40\n"}


def export_context(
    bundle: Bundle,
    folder: str | Path,
    format: Context = "docker",
    *,
    name: str | None = None,
    threads: int | None = None,
    instances: int = 1,
    overwrite: bool = False,
) -> Path:
    """Write a folder of which a server is made: the bundle, this package, versions, and the files of `format`.

    The versions are those of the packages that are installed here. `instances` divide `threads`: by default, where
    there are several, this machine's usable cores.

    Raises:
        TargetError: for a bundle whose engine is none of CPUs.
        EngineError: if threads or instances are no number for a machine, or a container should run several instances.
        BundleError: if the folder cannot be written, may not be replaced, or a package of the server is not installed.
    """
    engine = str(bundle.manifest.target["engine"])
    if engine not in _ENGINES:
        instead = "--format triton" if ENGINES[engine].gpu else f"a bundle for {' or '.join(_ENGINES)}"
        raise TargetError(f"{bundle.path} runs on {engine}, and the server has CPUs only; take {instead}")
    if format == "docker" and instances != 1:
        raise EngineError("a container runs one instance; start several of them, or take --format kserve")
    check_threads(threads)
    ours = _SERVER if format in ("docker", "kserve") else ()
    requirements = "".join(f"{name}=={_installed(name)}\n" for name in (*_NEEDED, *ours, _ENGINES[engine]))
    deployment = Deployment(
        name=re.sub(r"[^a-z0-9-]+", "-", (name or bundle.name).lower()).strip("-")[:50] or "model",
        bundle=re.sub(r"[^A-Za-z0-9._-]+", "_", bundle.path.name),
        size_bytes=sum(path.stat().st_size for path in bundle.path.rglob("*") if path.is_file()),
        threads=threads if instances == 1 else max(1, (threads or usable_cores()) // instances),
        instances=instances,
    )
    texts = {REQUIREMENTS: requirements + _OTHERS.get(format, ""), **_TEXTS[format](deployment)}

    def fill(draft: Path) -> None:
        shutil.copytree(bundle.path, draft / deployment.bundle)
        shutil.copytree(Path(__file__).parents[1], draft / _PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
        for file, text in texts.items():
            (draft / file).write_text(text, encoding="utf-8")

    def own(former: Path) -> set[str]:
        bundles = {path.name for path in former.iterdir() if (path / "manifest.json").is_file()}
        return {_PACKAGE, *texts, *bundles}

    mark = next(file for file, text in texts.items() if WRITTEN in text)
    return write_folder(folder, fill, format=format, mark=(mark, WRITTEN), own=own, overwrite=overwrite)


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise BundleError(missing_extra(name, "serve", "a folder for servers")) from None
