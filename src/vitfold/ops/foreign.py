"""Running pieces of somebody's ONNX graph that programs carry as they are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitfold.model import Array

_KEPT = 4096


def run_foreign(graph: Array, parts: Sequence[Array], weights: Sequence[Any]) -> list[Array]:
    """Run a piece in ONNX Runtime, on the CPU; `weights` are arrays or tensors of torch."""
    session, names = _session(graph.tobytes())
    given = [np.ascontiguousarray(part) for part in (*parts, *(np.asarray(weight) for weight in weights))]
    found: list[Array] = session.run(None, dict(zip(names, given, strict=True)))
    return found


@functools.lru_cache(maxsize=_KEPT)
def _session(data: bytes) -> tuple[Any, tuple[str, ...]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session, tuple(one.name for one in session.get_inputs())
