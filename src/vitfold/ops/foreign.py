"""Running pieces of somebody's ONNX graph that programs carry as they are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from vitfold.model import Array

_KEPT = 4096
_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64"}
"""Types that ONNX calls otherwise than NumPy."""


def run_foreign(graph: Array, parts: Sequence[Array], weights: Sequence[Any]) -> list[Array]:
    """Run a piece in ONNX Runtime, on the CPU; `weights` are arrays or tensors of torch."""
    session, ends = _session(graph.tobytes())
    given = {
        name: _of_type(np.asarray(part), dtype) for (name, dtype), part in zip(ends, (*parts, *weights), strict=True)
    }
    found: list[Array] = session.run(None, given)
    return found


def _of_type(array: Array, dtype: str) -> Array:
    """An array of a type; reals that stand for whole numbers, as prepared pixels do, are rounded."""
    whole = dtype.startswith(("int", "uint")) and array.dtype.kind == "f"
    return np.ascontiguousarray(np.rint(array) if whole else array, dtype)


@functools.lru_cache(maxsize=_KEPT)
def _session(data: bytes) -> tuple[Any, tuple[tuple[str, str], ...]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session, tuple((one.name, _TYPES.get(one.type, one.type[7:-1])) for one in session.get_inputs())
