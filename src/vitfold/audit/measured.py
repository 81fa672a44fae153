"""What was measured on a GPU beside what the model says of the same products, or of the blocks of a merged model.

The files are those of `vitfold.gpu`: `gpu-lengths.json`, linear layers and attention of a block at several
lengths, and `gpu-vit-b16.json`, whole models, of which the blocks are modelled as TensorRT would compile them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vitfold.audit.canonical import BlockShape, schedule_kernels
from vitfold.audit.gpus import Gpu, ceilings, constants, gpus
from vitfold.audit.kernels import Kernel, Precision, Product
from vitfold.audit.pricing import PREDICTION
from vitfold.audit.roofline import predict
from vitfold.errors import EngineError
from vitfold.storage.checked import ImplausibleError, entry, section

_LINEAR = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}
"""Inputs and outputs of the layers, in widths of the model."""
_PRECISIONS: Mapping[str, tuple[Precision, int, int]] = {
    "fp16": ("fp16", 2, 2),
    "int8": ("int8", 1, 4),
    "fp8": ("fp8", 1, 2),
}
"""The type multiplied in, bytes of an operand's number and of an output's: PyTorch's INT8 products end in INT32."""
_BLOCK = ("tokens", "width", "heads", "head_width", "hidden")
_SIZE, _MS = (1, 2**20), (1e-9, 1e9)
_KEPT = ("gpu", "capability", "multiprocessors", "torch", "cuda", "nvidia_smi")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A product at a length: milliseconds measured and modelled; ratios are to the longest length of the same product.

    Of a merged model `tokens` are those that its last block leaves, and ratios are to the model without merging.
    `roofline_ratio` is that of the model without tiles and waves.
    """

    product: str
    tokens: int
    batch: int
    measured_ms: float
    modelled_ms: float
    measured_ratio: float
    modelled_ratio: float
    roofline_ratio: float
    padding: float
    idle: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def compare_measured(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return measured and modelled times side by side, as plain JSON values.

    Raises:
        EngineError: if the file holds neither, or was not measured on a GPU of the table.
    """
    try:
        environment = section(document.get("environment"), "environment")
        gpu = _device(environment)
        rows = _models(document, gpu) if "blocks" in document else _products(document, gpu)
    except ImplausibleError as error:
        raise EngineError(
            f"nothing in this file to compare with: {error}; give gpu-lengths.json or gpu-vit-b16.json of `make gpu`"
        ) from None
    return {
        "gpu": gpu.key,
        "measured_on": {key: environment[key] for key in _KEPT if key in environment},
        "prediction": PREDICTION,
        "model": constants([gpu.key]),
        "measured": [row.to_dict() for row in rows],
        "median_error": _median_error(rows),
    }


def _device(environment: Mapping[str, Any]) -> Gpu:
    """Return the GPU that the file says it was measured on.

    Raises:
        EngineError: if it was a processor, or a GPU whose figures are not in the table.
    """
    name = environment.get("gpu")
    known = ", ".join(device for gpu in gpus() for device in gpu.devices)
    if name is None:
        raise EngineError(
            f"measured on {environment.get('device', 'no GPU')}: the model's constants are of GPUs and say nothing "
            f"about it; run `make gpu` on one of {known}"
        )
    for gpu in gpus():
        if name not in gpu.devices:
            continue
        if environment.get("multiprocessors", gpu.multiprocessors) != gpu.multiprocessors:
            raise EngineError(
                f"measured on {environment['multiprocessors']} multiprocessors, {gpu.name} has {gpu.multiprocessors}: "
                "a part of a GPU (MIG) or another model; measure a whole one"
            )
        return gpu
    raise EngineError(
        f"measured on {name!r}, whose peaks are not in audit/gpus.toml; add it there, or measure one of {known}"
    )


Line = tuple[int, int, float, Sequence[Kernel]]
"""Tokens, batch, measured milliseconds, and the kernels that the model takes for it."""


def _products(document: Mapping[str, Any], gpu: Gpu) -> list[Compared]:
    width, heads = (int(entry(document, key, int, within=_SIZE)) for key in ("width", "heads"))
    lines: dict[str, list[Line]] = {}
    for place, row in enumerate(entry(document, "rows", list)):
        values = section(row, where := f"rows[{place}]")
        tokens, batch = (int(entry(values, key, int, where, _SIZE)) for key in ("tokens", "batch"))
        times = section(values.get("ms"), f"{where}.ms")
        for name in times:
            kernel = _kernel(name, width=width, heads=heads, tokens=tokens, batch=batch)
            if kernel is not None and kernel.precision in gpu.peak:
                ms = float(entry(times, name, float, f"{where}.ms", _MS))
                lines.setdefault(name, []).append((tokens, batch, ms, [kernel]))
    if not lines:
        raise ImplausibleError("rows hold no products")
    return [row for name, of in lines.items() for row in _beside([name] * len(of), of, gpu)]


def _models(document: Mapping[str, Any], gpu: Gpu) -> list[Compared]:
    """Merged models beside those without merging, in the same type and at the same batch."""
    blocks = section(document["blocks"], "blocks")
    sizes = {name: int(entry(blocks, name, int, "blocks", _SIZE)) for name in _BLOCK}
    tokens, shape = sizes.pop("tokens"), BlockShape(**sizes, inner=sizes["hidden"])
    schedules = section(blocks.get("schedules"), "blocks.schedules")
    lines: dict[tuple[str, int], dict[str, Line]] = {}
    for place, row in enumerate(entry(document, "rows", list)):
        values = section(row, where := f"rows[{place}]")
        precision, _, merging = entry(values, "name", str, where).partition("-")
        if merging not in schedules or precision not in ("fp16", "int8", "fp8") or precision not in gpu.peak:
            continue
        if "error" in values:
            continue
        batch, ms = int(entry(values, "batch", int, where, _SIZE)), float(entry(values, "median_ms", float, where, _MS))
        r = entry(schedules, merging, tuple[int, ...], "blocks.schedules", (0, tokens))
        kernels = schedule_kernels(shape, precision, batch=batch, tokens=tokens, r=r)
        lines.setdefault((precision, batch), {})[f"{precision}-{merging}"] = (tokens - sum(r), batch, ms, kernels)
    if not lines:
        raise ImplausibleError("rows hold no models of blocks.schedules")
    return [row for of in lines.values() for row in _beside(list(of), list(of.values()), gpu)]


def _beside(names: Sequence[str], of: Sequence[Line], gpu: Gpu) -> list[Compared]:
    """The same at several lengths, the longest first."""
    places = sorted(range(len(of)), key=lambda place: -of[place][0])
    found = [predict(of[place][3], gpu, ceilings()) for place in places]
    longest = of[places[0]][2]
    return [
        Compared(
            product=names[place],
            tokens=of[place][0],
            batch=of[place][1],
            measured_ms=of[place][2],
            modelled_ms=here.ms,
            measured_ratio=of[place][2] / longest,
            modelled_ratio=here.ms / found[0].ms,
            roofline_ratio=here.roofline_ms / found[0].roofline_ms,
            padding=here.padding,
            idle=here.idle,
        )
        for place, here in zip(places, found, strict=True)
    ]


def _kernel(name: str, *, width: int, heads: int, tokens: int, batch: int) -> Kernel | None:
    """The kernel of one of the file's products, None for a name that is none."""
    layer, _, kind = name.partition("-")
    if kind not in _PRECISIONS or layer not in (*_LINEAR, "attention"):
        return None
    precision, operand, result = _PRECISIONS[kind]
    rows = batch * tokens
    if layer == "attention":
        product = Product(matrices=batch * heads, rows=tokens, columns=tokens, depth=width // heads, attends=True)
        moved, weights = 4 * operand * rows * width, 0
    else:
        inputs, outputs = (factor * width for factor in _LINEAR[layer])
        product = Product(matrices=1, rows=rows, columns=outputs, depth=inputs)
        moved, weights = rows * (operand * inputs + result * outputs), operand * inputs * outputs
    return Kernel(
        name=name,
        kind="attention" if layer == "attention" else "gemm",
        precision=precision,
        product=product,
        bytes_moved=moved,
        weight_bytes=weights,
        nodes=(),
        sites=(name,),
        block=None,
        shapes=(),
    )


def _median_error(rows: list[Compared]) -> dict[str, float | None]:
    """How far ratios to the longest length are off, in the median of all others: with tiles, and without."""
    others = [row for row in rows if row.measured_ratio != 1.0]

    def median(key: str) -> float | None:
        errors = [abs(getattr(row, key) / row.measured_ratio - 1) for row in others]
        return statistics.median(errors) if errors else None

    return {"tiles": median("modelled_ratio"), "roofline": median("roofline_ratio")}
