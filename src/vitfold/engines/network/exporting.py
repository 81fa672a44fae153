"""Bundles as files for PyTorch: a program of torch.export, or a package that AOTInductor compiled from it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from vitfold.artifacts.bundle import Bundle
from vitfold.engines.network.session import NetworkSession, usual_device
from vitfold.engines.network.translation import torch_module
from vitfold.errors import BundleError, EngineError

Kind = Literal["pt2", "aoti"]


def export_network(
    bundle: Bundle,
    folder: Path,
    name: str,
    *,
    kind: Kind = "pt2",
    batch: int = 1,
    device: torch.device | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a bundle of one part as NAME.pt2 for batches of this size; return where it lies.

    "pt2" is a program, `torch.export.load(path).module()`; "aoti" is compiled for this device and processor,
    `torch._inductor.aoti_load_package(path)`, and C++ loads it, too.

    Raises:
        BundleError: if the file exists and may not be replaced, or cannot be written.
        EngineError: if the bundle has several parts, or no compiler is found.
    """
    if len(bundle.graphs) != 1:
        raise EngineError(
            f"{bundle.path} holds {len(bundle.graphs)} graphs, and a .pt2 file holds one; export a bundle of "
            "images that is not simulated"
        )
    if kind == "aoti":
        NetworkSession.check_starts(compiled=True)
    path = folder / f"{name}.pt2"
    if path.exists() and not overwrite:
        raise BundleError(f"{path} exists; give another name, or --overwrite")
    device = device or usual_device()
    network = torch_module(bundle).to(device).eval()
    (port,) = network.ends.inputs
    dtype = network.dtype if port.dtype.startswith("float") else getattr(torch, port.dtype)
    example = torch.zeros((batch, *port.shape), dtype=dtype, device=device)
    try:
        with torch.no_grad():
            program = torch.export.export(network, (example,))
            folder.mkdir(parents=True, exist_ok=True)
            draft = folder / f".{name}.new.pt2"
            if kind == "aoti":
                from torch._inductor import aoti_compile_and_package

                aoti_compile_and_package(program, package_path=str(draft))
            else:
                torch.export.save(program, draft)
            draft.replace(path)
    except OSError as error:
        raise BundleError(f"cannot write {path}: {error}; free some space or choose another folder") from None
    return path
