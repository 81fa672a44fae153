"""The modelled time of kernels on every GPU of the table, as plain JSON values; and kernels read back from them.

What was compiled is compiled once: a document keeps what its kernels cost, so that a better model prices it anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from vitfold.audit.compiler import check_gpu
from vitfold.audit.gpus import Gpu, ceilings, constants, find_gpu, gpus
from vitfold.audit.kernels import Kernel, Kind, Precision, Product
from vitfold.audit.roofline import kernel_tiling, predict
from vitfold.audit.tiles import Tiling
from vitfold.errors import EngineError, TargetError
from vitfold.storage.checked import ImplausibleError, check_fields, entry, section

PREDICTION = "roofline model with assumed tiles and waves, not a measurement"
OF_BLOCKS = "roofline model of the transformer blocks with assumed tiles and waves, not a measurement"
_MOST = 10_000
"""Kernels that are alike in one plan."""
_LARGEST = 2**53
_BLOCK = re.compile(r"^(?:\w+\.)*?(?:blocks|layers?|resblocks|h)\.\d+\.")


def priced(kernels: Sequence[Kernel], tiles_on: str | None = None) -> dict[str, Any]:
    """Return the times of a plan on every GPU that runs its types, and the tiles of its products on one, if named.

    Raises:
        TargetError: if `tiles_on` is unknown, or does not multiply a type of the plan.
    """
    shown, able = None if tiles_on is None else find_gpu(tiles_on), [gpu for gpu in gpus() if gpu.runs(kernels)]
    if shown is not None and shown not in able:
        names = ", ".join(gpu.key for gpu in able)
        raise TargetError(f"{shown.name} does not multiply a type of this plan; its tiles are known on {names}")
    found = [predict(kernels, gpu) for gpu in able]
    return {
        "predicted_ms": {one.gpu: one.ms for one in found},
        "predicted_roofline_ms": {one.gpu: one.roofline_ms for one in found},
        "predicted_bound": {one.gpu: dict(one.share) for one in found},
        "tensor_cores": {one.gpu: {"padding": one.padding, "idle": one.idle} for one in found},
        **({} if shown is None else {"tiles": {"gpu": shown.key, "products": tiled(kernels, shown)}}),
        "prediction": PREDICTION,
        "model": constants([one.gpu for one in found]),
    }


def tiled(kernels: Sequence[Kernel], gpu: Gpu) -> list[dict[str, Any]]:
    """Return how a GPU computes the products of a plan; those that are alike are one row."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for kernel in kernels:
        tiling = kernel_tiling(kernel, gpu, ceilings())
        if tiling is None or kernel.product is None:
            continue
        key = _alike(kernel)
        if key not in rows:
            shown = {"name": key[0], "count": 0, "precision": kernel.precision, "product": asdict(kernel.product)}
            rows[key] = shown | _to_dict(tiling)
        rows[key]["count"] += 1
    return list(rows.values())


def _to_dict(tiling: Tiling) -> dict[str, Any]:
    return {
        "tile": [tiling.rows, tiling.columns],
        "splits": tiling.splits,
        "tiles": tiling.tiles,
        "waves": tiling.waves,
        "last_wave": tiling.last_wave,
        "padded_ratio": tiling.padded_ratio,
        "padding": tiling.padding,
        "idle": tiling.idle,
        "ms": 1e3 * tiling.seconds,
        "bound": "compute" if tiling.arithmetic > tiling.traffic else "memory",
    }


def costs(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """Return what decides the time of kernels, alike ones counted, as `read_costs` takes it."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for kernel in kernels:
        key = _alike(kernel)
        if key not in rows:
            rows[key] = {
                "count": 0,
                "kind": kernel.kind,
                "precision": kernel.precision,
                "product": None if kernel.product is None else asdict(kernel.product),
                "bytes_moved": kernel.bytes_moved,
                "weight_bytes": kernel.weight_bytes,
                "site": kernel.sites[0] if kernel.sites else kernel.name,
            }
        rows[key]["count"] += 1
    return list(rows.values())


def _alike(kernel: Kernel) -> tuple[Any, ...]:
    """What kernels of all blocks share that do the same at the same cost, its name first."""
    name = _BLOCK.sub("", kernel.sites[0] if kernel.sites else kernel.name)
    return name, kernel.kind, kernel.precision, kernel.product, kernel.bytes_moved, kernel.weight_bytes


def read_costs(rows: Sequence[Any]) -> tuple[Kernel, ...]:
    """Return kernels that cost what `costs` wrote.

    Raises:
        ImplausibleError: naming the first value that no plan has.
    """
    found: list[Kernel] = []
    for place, row in enumerate(rows):
        values = section(row, where := f"costs[{place}]")
        found += [_read(values, where)] * int(entry(values, "count", int, where, (1, _MOST)))
    return tuple(found)


def _read(row: Mapping[str, Any], where: str) -> Kernel:
    product = row.get("product")
    if product is not None:
        sizes = dict.fromkeys(("matrices", "rows", "columns", "depth"), (1, _LARGEST))
        values = check_fields(Product, product, f"{where}.product", sizes)
        product = Product(**{one.name: values[one.name] for one in fields(Product) if one.name in values})
    site = entry(row, "site", str, where)
    return Kernel(
        name=site,
        kind=entry(row, "kind", Kind, where),
        precision=entry(row, "precision", Precision | None, where),
        product=product,
        bytes_moved=entry(row, "bytes_moved", int, where, (0, _LARGEST)),
        weight_bytes=entry(row, "weight_bytes", int, where, (0, _LARGEST)),
        nodes=(),
        sites=(site,),
        block=None,
        shapes=(),
    )


def reprice(document: Mapping[str, Any], tiles_on: str | None = None) -> dict[str, Any]:
    """Return the document of an audit with its times by the model as it is now, and tiles where a GPU is named.

    Raises:
        EngineError: if it is none, was written before kernels were kept, or holds values that no plan has.
        TargetError: if `tiles_on` is unknown.
    """
    if "kernels_per_block" not in document:
        raise EngineError("this file is no audit; give what `vitfold audit --output` wrote, a bundle or an ONNX file")
    if "costs" not in document:
        raise EngineError(
            "this audit was written by an earlier vitfold and holds no kernels to price again; audit its bundle anew"
        )
    try:
        kernels = read_costs(entry(document, "costs", list))
    except ImplausibleError as error:
        raise EngineError(f"this audit cannot be priced again: {error}; audit its bundle anew") from None
    return {**{key: value for key, value in document.items() if key != "tiles"}, **priced(kernels, tiles_on)}


def usual_gpu(plan: str) -> str:
    """Return the first GPU of the table that a plan for this compute capability stands for.

    Raises:
        TargetError: if there is none.
    """
    check_gpu(plan)
    return next(gpu.key for gpu in gpus() if gpu.plan == plan)
