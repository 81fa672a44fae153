"""NVIDIA's compiler, run ahead of time without a GPU, in a process of its own.

Source: TensorRT for RTX, ahead-of-time compilation on machines without a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitfold.errors import EngineError, TargetError, missing_extra, nearest

GPUS = ("sm75", "sm80", "sm86", "sm89", "sm120")
FLOAT8_GPUS = ("sm89", "sm120")
TIMEOUT_SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What the compiler answered: the text that lists its kernels, and the size of the engine."""

    version: str
    layers: str
    engine_bytes: int
    seconds: float
    peak_bytes: int


def check_gpu(gpu: str) -> None:
    """Check the name of a compute capability.

    Raises:
        TargetError: naming those that the compiler knows.
    """
    if gpu not in GPUS:
        raise TargetError(
            f"unknown GPU {gpu!r}; {nearest(gpu, GPUS)} (A100: sm80, A10 and RTX 30: sm86, L4, L40S and RTX 40: sm89, "
            "RTX 50: sm120, T4: sm75; H100 is not compiled ahead of time, sm89 comes nearest)"
        )


def compile_graph(graph: Path, *, gpu: str, batch: int) -> Compiled:
    """Compile an ONNX file for a GPU that need not be here; every dynamic first axis gets `batch`.

    Raises:
        TargetError: if the GPU is unknown.
        EngineError: if the compiler is missing, rejects the graph (naming the node), or crashes.
    """
    check_gpu(gpu)
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise EngineError(missing_extra("tensorrt-rtx-cu13", "audit", "the audit"))
    with tempfile.TemporaryDirectory(prefix="vitfold-audit-") as folder:
        result = Path(folder) / "result.json"
        order = {"graph": str(graph.absolute()), "gpu": gpu, "batch": batch, "result": str(result)}
        command = [sys.executable, "-m", "vitfold.audit.worker", json.dumps(order)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise EngineError(f"NVIDIA's compiler did not end within {TIMEOUT_SECONDS} s on {graph}") from None
        if not result.exists():
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise EngineError(
                f"NVIDIA's compiler crashed on {graph}: {last}; known causes are a Mul between Softmax and its "
                "QuantizeLinear, and too little memory"
            )
        return _read(graph, json.loads(result.read_text(encoding="utf-8")))


def _read(graph: Path, answer: dict[str, Any]) -> Compiled:
    version = answer["version"]
    if "dynamic" in answer:
        raise EngineError(
            f"{graph} has an input of dynamic size beyond its batch: {answer['dynamic']}; export it for one image size"
        )
    if "parser" in answer:
        first = (answer["parser"] or [{"node": "?", "operator": "?", "text": "no reason given"}])[0]
        raise EngineError(
            f"TensorRT {version} does not read {graph}: node {first['node'] or '?'} ({first['operator'] or '?'}): "
            f"{first['text']}; {_cure(first['text'], first['operator'])}"
        )
    if answer["engine_bytes"] is None:
        reason = (answer["errors"] or ["no reason given"])[-1].strip()
        raise EngineError(f"TensorRT {version} cannot build {graph}: {reason}; {_cure(reason, '')}")
    return Compiled(
        version=version,
        layers=answer["layers"],
        engine_bytes=answer["engine_bytes"],
        seconds=answer["seconds"],
        peak_bytes=answer["peak_bytes"],
    )


def _cure(reason: str, operator: str) -> str:
    """Say what to do about a failure, as far as its text tells."""
    if "fp8" in reason.lower() or "HW-specific" in reason:
        return f"8-bit floats need {' or '.join(FLOAT8_GPUS)}: choose such a GPU, or --target tensorrt-int8"
    if "zero" in reason.lower() and "point" in reason.lower():
        return "TensorRT takes symmetric int8 only: quantize with --target tensorrt-int8"
    if operator in ("MatMulInteger", "QLinearMatMul", "DynamicQuantizeLinear", "MatMulIntegerToFloat", "QLinearConv"):
        return "write Q/DQ pairs instead of integer operators: --target tensorrt-int8"
    if operator in ("FusedMatMul", "QuickGelu", "SkipLayerNormalization"):
        return "operators of ONNX Runtime are unknown to TensorRT: --target tensorrt-fp16 or portable"
    return "export with one of the targets tensorrt-fp16, tensorrt-int8, tensorrt-fp8"
