"""Products as tiles and waves: what a tile pads, and which multiprocessors wait while the last wave runs.

A kernel computes its output tile by tile, each on one multiprocessor at a time. Rows, columns and depth that fill no
tile are padded; tiles that fill no wave leave multiprocessors idle. Plans name no tiles: the best candidate is taken.

Equation: t = ceil(tiles / SMs) 2 R C ceil(depth / step) step / (rate peak / SMs), tiles = matrices ceil(rows / R)
ceil(columns / C).

Source: NVIDIA, Matrix Multiplication Background User's Guide, 2.3 and 3; split depths: CUTLASS, "Efficient GEMM in
CUDA".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from vitfold.audit.gpus import Ceilings, Gpu, TileRules
from vitfold.audit.kernels import Precision, Product

_BYTES = {"fp32": 4, "fp16": 2, "int8": 1, "fp8": 1}
_PARTIAL = 4
"""Bytes of a partial sum, FP32 or INT32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """A product in tiles of `rows` x `columns`, the depth of each shared among `splits`.

    `tiles` run on `multiprocessors`, each of `tile_macs` with its padding; `macs` is the product's own work. Seconds
    are those of arithmetic and of traffic by themselves; traffic holds what splits write and read again.
    """

    rows: int
    columns: int
    splits: int
    tiles: int
    tile_macs: int
    macs: int
    multiprocessors: int
    arithmetic: float
    traffic: float

    @property
    def waves(self) -> int:
        """How often the multiprocessors take a tile each."""
        return math.ceil(self.tiles / self.multiprocessors)

    @property
    def last_wave(self) -> float:
        """Share of the multiprocessors that are busy in the last wave."""
        return (self.tiles - (self.waves - 1) * self.multiprocessors) / self.multiprocessors

    @property
    def padded_ratio(self) -> float:
        """Work with its padding, over the work."""
        return self.tiles * self.tile_macs / self.macs

    @property
    def padding(self) -> float:
        """Share of the tensor cores' time that goes to padding."""
        return (self.tiles - self.macs / self.tile_macs) / (self.waves * self.multiprocessors)

    @property
    def idle(self) -> float:
        """Share of the tensor cores' time in which multiprocessors have no tile."""
        return 1 - self.tiles / (self.waves * self.multiprocessors)

    @property
    def seconds(self) -> float:
        """The longer of arithmetic and traffic."""
        return max(self.arithmetic, self.traffic)


@lru_cache(maxsize=1 << 16)
def tile(product: Product, precision: Precision, gpu: Gpu, moved: int, limits: Ceilings, rules: TileRules) -> Tiling:
    """Return the tiling that takes a product the shortest time on a GPU; of equal ones that with least arithmetic.

    Args:
        moved: bytes that the kernel reads and writes, weights included.
    """
    return min(_tilings(product, precision, gpu, moved, limits, rules), key=lambda one: (one.seconds, one.arithmetic))


@lru_cache
def _candidates(rules: TileRules, least: int, *, attends: bool) -> tuple[tuple[int, int, float], ...]:
    """Rows, columns and rate of the tiles of which one side has as many rows as an instruction."""
    shapes = rules.attention if attends else rules.shapes
    return tuple((*shape, rules.rate(*shape)) for shape in shapes if max(shape) >= least)


def _tilings(
    product: Product, precision: Precision, gpu: Gpu, moved: int, limits: Ceilings, rules: TileRules
) -> Iterator[Tiling]:
    step = rules.step_bytes // _BYTES[precision]
    peak, bandwidth = gpu.peak[precision] * limits.compute, gpu.bandwidth * limits.memory
    steps, result = math.ceil(product.depth / step), product.matrices * product.rows * product.columns
    for rows, columns, rate in _candidates(rules, gpu.instruction_rows, attends=product.attends):
        down, across = math.ceil(product.rows / rows), math.ceil(product.columns / columns)
        for splits in (1,) if product.attends else rules.splits:
            if splits > steps:
                break
            if product.attends:  # both products, over all keys
                tiles, tile_macs = product.matrices * down, 2 * rows * columns * across * steps * step
            else:
                tiles = product.matrices * down * across * splits
                tile_macs = rows * columns * math.ceil(steps / splits) * step
            partial = 2 * _PARTIAL * splits * result if splits > 1 else 0
            waves = math.ceil(tiles / gpu.multiprocessors)
            yield Tiling(
                rows=rows,
                columns=columns,
                splits=splits,
                tiles=tiles,
                tile_macs=tile_macs,
                macs=product.macs,
                multiprocessors=gpu.multiprocessors,
                arithmetic=waves * 2 * tile_macs * gpu.multiprocessors / (peak * rate),
                traffic=(moved + partial) / bandwidth,
            )
