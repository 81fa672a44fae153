"""A bundle and what serves it as the context of a container image, which installs wheels only."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
from pathlib import Path

from vitfold.artifacts.bundle import Bundle
from vitfold.cores import check_threads
from vitfold.engines import ENGINES
from vitfold.errors import BundleError, TargetError, missing_extra
from vitfold.storage.ordinary import read_text
from vitfold.storage.placing import reserve

DOCKERFILE, REQUIREMENTS = "Dockerfile", "requirements.txt"
WRITTEN = "# A server of one model, written by `vitfold export`."
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
    "starlette",
    "uvicorn",
    "python-multipart",
    "prometheus-client",
)
_ENGINES = {"onnxruntime": "onnxruntime", "openvino": "openvino"}


def export_docker(bundle: Bundle, folder: str | Path, *, threads: int | None = None, overwrite: bool = False) -> Path:
    """Write a folder from which `docker build` makes a server of a bundle; return it.

    It holds the bundle, this package, and the versions of the packages that are installed here.

    Raises:
        TargetError: for a bundle whose engine is none of CPUs.
        BundleError: if the folder cannot be written, may not be replaced, or a package of the server is not installed.
    """
    engine = str(bundle.manifest.target["engine"])
    if engine not in _ENGINES:
        instead = "--format triton" if ENGINES[engine].gpu else f"a bundle for {' or '.join(_ENGINES)}"
        raise TargetError(f"{bundle.path} runs on {engine}, and the image has CPUs only; take {instead}")
    if threads is not None:
        check_threads(threads)
    requirements = "".join(f"{name}=={_installed(name)}\n" for name in (*_NEEDED, _ENGINES[engine]))
    with reserve(folder, overwrite=overwrite, standing=_standing) as place:
        draft = place.draft()
        name = re.sub(r"[^A-Za-z0-9._-]+", "_", bundle.path.name)
        try:
            draft.mkdir(parents=True)
            shutil.copytree(bundle.path, draft / name)
            shutil.copytree(Path(__file__).parents[1], draft / _PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
            (draft / REQUIREMENTS).write_text(requirements, encoding="utf-8")
            (draft / DOCKERFILE).write_text(_dockerfile(name, threads), encoding="utf-8")
        except OSError as error:
            raise BundleError(f"cannot write {folder}: {error}; free some space or choose another folder") from None
        return place.publish(draft)


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise BundleError(missing_extra(name, "serve", "--format docker")) from None


def _standing(folder: Path) -> set[str]:
    try:
        ours = read_text(folder / DOCKERFILE).startswith(WRITTEN)
    except (OSError, UnicodeDecodeError):
        ours = False
    if not ours:
        raise BundleError(f"{folder} exists and was not written by `vitfold export --format docker`; choose another")
    bundles = {path.name for path in folder.iterdir() if (path / "manifest.json").is_file()}
    return {DOCKERFILE, REQUIREMENTS, _PACKAGE, *bundles}


def _dockerfile(name: str, threads: int | None) -> str:
    command = ["python", "-m", "vitfold", "serve", name, "--host", "0.0.0.0", "--port", "8000"]
    command += [] if threads is None else ["--threads", str(threads)]
    probe = "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=5)"
    return f"""\
{WRITTEN}
#   docker build -t {name.removesuffix(".fold").lower() or "model"} .
#   docker run --rm -p 8000:8000 {name.removesuffix(".fold").lower() or "model"}
FROM python:{sys.version_info.major}.{sys.version_info.minor}-slim
COPY {REQUIREMENTS} /tmp/
RUN pip install --no-cache-dir --only-binary :all: -r /tmp/{REQUIREMENTS} && useradd --create-home server
USER server
WORKDIR /home/server
COPY {_PACKAGE} {_PACKAGE}
COPY {name} {name}
EXPOSE 8000
HEALTHCHECK CMD {json.dumps(["python", "-c", probe])}
CMD {json.dumps(command)}
"""
