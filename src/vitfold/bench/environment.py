"""The machine and the versions that a measurement was taken with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

from vitfold.cores import usable_cores
from vitfold.processor import processor

PACKAGES = (
    "vitfold",
    "numpy",
    "pillow",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "nncf",
    "onnx-ir",
    "torch",
    "timm",
    "transformers",
    "torchvision",
    "open_clip_torch",
)


def installed_version(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment(*, threads: int | None = None) -> dict[str, Any]:
    """Return the environment as plain JSON values; `load_average` is the machine's before measuring."""
    versions = {name: installed_version(name) for name in PACKAGES}
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "machine_cores": os.cpu_count() or usable_cores(),
        "threads": threads or usable_cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name, version in versions.items() if version is not None},
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def busy_remark(environment: Mapping[str, Any]) -> str | None:
    """Say that others kept the machine busy before a measurement, None if there was room.

    The load is the whole machine's, and so is compared with all of its cores: a container may have fewer.
    """
    load, cores = environment.get("load_average"), environment.get("machine_cores") or environment["cores"]
    if load is None or load <= cores:
        return None
    return (
        f"the machine was busy (load {load:.1f} on {cores} cores): times are too long and speed-ups may be far off; "
        "measure again when it is idle"
    )
