"""What a block takes at numbers of tokens on GPUs that are not here, in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vitfold.audit.canonical import block_kernels
from vitfold.audit.gpus import find_gpu
from vitfold.audit.pricing import tiled
from vitfold.audit.roofline import predict
from vitfold.errors import RecipeError
from vitfold.model import Architecture
from vitfold.pipeline.solving import block_of
from vitfold.target import find_target


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthForecast:
    """A block that `tokens` pass, on a GPU at a batch: modelled milliseconds, and ratios to the longest length.

    `roofline_ratio` is that of the model without tiles and waves; `padding` and `idle` are shares of the tensor cores'
    time. `products` are rows of `audit.pricing.tiled`.
    """

    gpu: str
    batch: int
    tokens: int
    ms: float
    ratio: float
    roofline_ratio: float
    work_ratio: float
    padding: float
    idle: float
    products: Sequence[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def forecast_lengths(
    spec: Architecture, lengths: Sequence[int], *, target: str, gpu: str, batch: int
) -> tuple[LengthForecast, ...]:
    """Model an unmerged block at lengths, the longest first.

    Raises:
        RecipeError: if a length is none that the model has.
        TargetError: if the target is not one of TensorRT's, or the GPU is unknown or does not run its types.
    """
    wrong = [length for length in lengths if not 1 <= length <= spec.tokens]
    if wrong or not lengths:
        raise RecipeError(
            f"--lengths takes numbers of tokens from 1 to {spec.tokens}, which this model has; found "
            f"{', '.join(map(str, wrong[:3])) or 'none'}"
        )
    device = find_gpu(gpu)
    shape, precision = block_of(spec, find_target(target), device)
    rows: list[LengthForecast] = []
    longest = None
    for tokens in sorted(set(lengths), reverse=True):
        block = block_kernels(shape, precision, batch=batch, tokens=tokens, merged=0, sizes=False)
        found, work = predict(block, device), sum(kernel.macs for kernel in block)
        longest = longest or (found, work)
        rows.append(
            LengthForecast(
                gpu=device.key,
                batch=batch,
                tokens=tokens,
                ms=found.ms,
                ratio=found.ms / longest[0].ms,
                roofline_ratio=found.roofline_ms / longest[0].roofline_ms,
                work_ratio=work / longest[1],
                padding=found.padding,
                idle=found.idle,
                products=tiled(block, device),
            )
        )
    return tuple(rows)
