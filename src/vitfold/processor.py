"""What the processor of this machine is called and can do."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import PurePath
from typing import Any

import cpuinfo

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


SETTINGS = (
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "ATEN_CPU_CAPABILITY",
    "OMP_NUM_THREADS",
    "LD_PRELOAD",
)
"""Environment variables by which kernels are chosen: one processor then behaves like another."""


def processor() -> dict[str, Any]:
    """Return the processor's name, those of its instruction sets that matter here, and what is set beside them.

    `settings` holds the environment variables of `SETTINGS` that are set, of preloaded libraries the names alone; it is
    absent where none is.
    """
    settings = {name: _shown(name, os.environ[name]) for name in SETTINGS if os.environ.get(name)}
    return {**_hardware(), **({"settings": settings} if settings else {})}


def _shown(name: str, value: str) -> str:
    if name != "LD_PRELOAD":
        return value
    return " ".join(PurePath(part).name for part in value.replace(":", " ").split())


@functools.lru_cache(maxsize=1)
def _hardware() -> dict[str, Any]:
    info = cpuinfo.get_cpu_info()
    flags = set(info.get("flags", ()))
    return {
        "name": info.get("brand_raw") or platform.processor() or "unknown",
        "architecture": platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
    }
