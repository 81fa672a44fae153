"""A model of a plan's time: what its kernels would take on a GPU. A model, not a measurement.

Equation: t = sum over kernels of max(arithmetic, bytes / (eff_m bandwidth)) + launch. The roofline alone has 2 MACs /
(eff_c peak) for arithmetic; here products take their tiles and waves, which is never less.

Source: Williams et al., Roofline (CACM 2009), with a cost per launch; `tiles` for tiles and waves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from vitfold.audit.gpus import Ceilings, Gpu, ceilings, tile_rules
from vitfold.audit.kernels import Kernel
from vitfold.audit.tiles import Tiling, tile

Bound = Literal["compute", "memory", "launch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Milliseconds per batch, and how much of them each bound accounts for; `roofline_ms` knows no tiles.

    `padding` and `idle` are shares of the tensor cores' time: what goes to padding, and what multiprocessors wait
    while others finish a wave.
    """

    gpu: str
    ms: float
    roofline_ms: float
    share: Mapping[Bound, float]
    padding: float
    idle: float

    @property
    def bound(self) -> Bound:
        """What most of the time goes to."""
        return max(self.share, key=lambda name: self.share[name])


def kernel_tiling(kernel: Kernel, gpu: Gpu, limits: Ceilings) -> Tiling | None:
    """Return the tiles of a kernel's product, None where it computes none."""
    if kernel.product is None or kernel.precision is None:
        return None
    moved = kernel.bytes_moved + kernel.weight_bytes
    return tile(kernel.product, kernel.precision, gpu, moved, limits, tile_rules())


def roofline_seconds(kernel: Kernel, gpu: Gpu, limits: Ceilings) -> float:
    """Return the seconds of a kernel without tiles: the longer of arithmetic and traffic."""
    traffic = (kernel.bytes_moved + kernel.weight_bytes) / (gpu.bandwidth * limits.memory)
    if kernel.precision is None:
        return traffic
    return max(2 * kernel.macs / (gpu.peak[kernel.precision] * limits.compute), traffic)


def predict(kernels: Sequence[Kernel], gpu: Gpu, limits: Ceilings | None = None) -> Prediction:
    """Sum the model over a plan that `gpu.runs`."""
    limits = limits or ceilings()
    tilings = [kernel_tiling(kernel, gpu, limits) for kernel in kernels]
    alone = [roofline_seconds(kernel, gpu, limits) for kernel in kernels]
    spent: dict[Bound, list[float]] = {"compute": [], "memory": [], "launch": [len(kernels) * limits.launch_us * 1e-6]}
    for tiling, seconds in zip(tilings, alone, strict=True):
        bound: Bound = "compute" if tiling is not None and tiling.arithmetic > tiling.traffic else "memory"
        spent[bound].append(seconds if tiling is None else tiling.seconds)
    sums = {bound: math.fsum(seconds) for bound, seconds in spent.items()}
    total, found = math.fsum(sums.values()), [tiling for tiling in tilings if tiling is not None]
    cores = math.fsum(tiling.arithmetic for tiling in found) or 1.0
    return Prediction(
        gpu=gpu.key,
        ms=1e3 * total,
        roofline_ms=1e3 * math.fsum([*alone, *spent["launch"]]),
        share={bound: seconds / total for bound, seconds in sums.items()},
        padding=math.fsum(tiling.arithmetic * tiling.padding for tiling in found) / cores,
        idle=math.fsum(tiling.arithmetic * tiling.idle for tiling in found) / cores,
    )
