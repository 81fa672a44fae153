"""What a user would run instead: the original in torch, compiled torch, and its plain ONNX export.

Owns how each peer is set up at its best settings. Timing them is `bench`'s business.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitfold.bench.environment import installed_version
from vitfold.engines import Session
from vitfold.errors import EngineError, missing_extra, nearest

PEERS: Mapping[str, str] = {
    "torch": "the original module in eager PyTorch",
    "torch-compile": "the original module through torch.compile",
    "onnxruntime": "the original module through torch.onnx.export on ONNX Runtime",
}


def check_peers(names: list[str]) -> None:
    """Check names before anything slow starts.

    Raises:
        EngineError: for a name that is not a peer, or one whose package is missing.
    """
    for name in names:
        if name not in PEERS:
            raise EngineError(f"unknown peer {name!r}; {nearest(name, PEERS)}")
        if installed_version("torch") is None:
            raise EngineError(missing_extra("torch", "optimize", f"the peer {name}"))
        if name == "onnxruntime" and installed_version("onnxscript") is None:
            raise EngineError(missing_extra("onnxscript", "peers", f"the peer {name}"))


def load_original(origin: Mapping[str, Any]) -> Any:
    """Load the torch module that a bundle was made from.

    Raises:
        SourceError: if that cannot be loaded again.
    """
    from vitfold.sources.origin import load_origin

    return load_origin(origin).original


def open_peer(
    name: str, module: Any, shape: tuple[int, int, int], folder: Path, *, threads: int | None = None
) -> Session:
    """Set up a peer for images of this shape (3, H, W); `folder` keeps its files meanwhile."""
    from vitfold.engines.torch import TorchSession

    if name == "torch":
        return TorchSession(module, threads=threads)
    if name == "torch-compile":
        return TorchSession(module, compiled=True, threads=threads)
    if name == "onnxruntime":
        from vitfold.engines.onnxruntime import OnnxRuntimeSession

        path = folder / "plain.onnx"
        _export(module, shape, path)
        return OnnxRuntimeSession(path, threads=threads)
    raise EngineError(f"unknown peer {name!r}; {nearest(name, PEERS)}")


def _export(module: Any, shape: tuple[int, int, int], path: Path) -> None:
    import torch

    quiet = io.StringIO()
    example = torch.zeros((2, *shape))
    batch = torch.export.Dim("batch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (example,), str(path), dynamo=True, dynamic_shapes=({0: batch},), opset_version=20)
