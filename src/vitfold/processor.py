"""What the processor of this machine is called and can do."""

from __future__ import annotations

import functools
import platform
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
