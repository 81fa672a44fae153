"""The machine and the versions that a measurement was taken with.

Owns what a reader needs to judge a number; takes no measurement.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from typing import Any

import cpuinfo

from vitfold.engines.session import usable_cores

INSTRUCTION_SETS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
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


@functools.lru_cache(maxsize=1)
def processor() -> dict[str, Any]:
    """Return the processor's name and those of its instruction sets that matter here."""
    info = cpuinfo.get_cpu_info()
    flags = set(info.get("flags", ()))
    return {
        "name": info.get("brand_raw") or platform.processor() or "unknown",
        "architecture": platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
    }


def environment(*, threads: int | None = None) -> dict[str, Any]:
    """Return the environment as plain JSON values; `load_average` is the machine's before measuring."""
    versions = {name: installed_version(name) for name in PACKAGES}
    return {
        "processor": processor(),
        "cores": usable_cores(),
        "threads": threads or usable_cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": {name: version for name, version in versions.items() if version is not None},
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }
