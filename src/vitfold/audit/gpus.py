"""The table of GPUs and of the model's constants, with the source of each."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from vitfold.audit.kernels import Kernel
from vitfold.errors import TargetError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODEL = "roofline with assumed tiles and waves"
_RATES = ("fp32", "fp16", "int8", "fp8")
_INSTRUCTION_ROWS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Shares of the peaks that kernels reach, and the microseconds that each costs; where these figures come from."""

    compute: float
    memory: float
    launch_us: float
    source: str = "given"


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRules:
    """Which tiles (rows, columns) kernels have, and what a tile's shape does to its rate."""

    shapes: tuple[tuple[int, int], ...]
    attention: tuple[tuple[int, int], ...]
    step_bytes: int
    edge: float
    splits: tuple[int, ...]
    source: str

    def rate(self, rows: int, columns: int) -> float:
        """Return the rate of a tile as a share of the largest one's: small tiles load more per operation."""
        return self._alone(rows, columns) / max(self._alone(*shape) for shape in self.shapes)

    def _alone(self, rows: int, columns: int) -> float:
        return 1 / (1 + self.edge * (1 / rows + 1 / columns))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Gpu:
    """A GPU: operations per second by type, bytes per second, multiprocessors.

    `plan` is the capability compiled for it, `devices` are its names in CUDA. One instruction of its tensor cores
    multiplies at least `instruction_rows` rows.
    """

    key: str
    name: str
    plan: str
    multiprocessors: int
    devices: tuple[str, ...]
    peak: Mapping[str, float]
    bandwidth: float
    source: str
    instruction_rows: int = _INSTRUCTION_ROWS

    def runs(self, kernels: Sequence[Kernel]) -> bool:
        """True if it multiplies every type in the plan."""
        return all(kernel.precision is None or kernel.precision in self.peak for kernel in kernels)


@cache
def _table() -> Mapping[str, Any]:
    text = resources.files("vitfold.audit").joinpath("gpus.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def ceilings() -> Ceilings:
    """Return the realistic ceilings of the table."""
    return Ceilings(**_table()["ceilings"])


@cache
def tile_rules() -> TileRules:
    """Return the table's rules of tiles."""
    found = _table()["tiles"]
    shapes = {name: tuple((rows, columns) for rows, columns in found[name]) for name in ("shapes", "attention")}
    return TileRules(**{**found, **shapes, "splits": tuple(found["splits"])})


@cache
def gpus() -> tuple[Gpu, ...]:
    """Return every GPU of the table."""
    return tuple(
        Gpu(
            key=key,
            name=entry["name"],
            plan=entry["plan"],
            multiprocessors=entry["multiprocessors"],
            devices=tuple(entry["devices"]),
            peak={rate: entry[rate] * 1e12 for rate in _RATES if rate in entry},
            bandwidth=entry["memory"] * 1e9,
            source=entry["source"],
            instruction_rows=entry.get("instruction_rows", _INSTRUCTION_ROWS),
        )
        for key, entry in _table()["gpu"].items()
    )


def find_gpu(key: str) -> Gpu:
    """Return the GPU of this name.

    Raises:
        TargetError: offering the nearest names.
    """
    known = {gpu.key.lower(): gpu for gpu in gpus()}
    if key.lower() not in known:
        raise TargetError(f"no peaks are known of the GPU {key!r}; {nearest(key, [gpu.key for gpu in gpus()])}")
    return known[key.lower()]


def constants(names: Sequence[str]) -> dict[str, Any]:
    """Return what the model of time takes for granted of some GPUs, with sources, as plain JSON values."""
    limits, rules = ceilings(), tile_rules()
    return {
        "name": MODEL,
        "measured_on": None,
        "ceilings": {
            "compute": limits.compute,
            "memory": limits.memory,
            "launch_us": limits.launch_us,
            "source": limits.source,
        },
        "tiles": {"edge": rules.edge, "step_bytes": rules.step_bytes, "source": rules.source},
        "gpus": {
            gpu.key: {"multiprocessors": gpu.multiprocessors, "source": gpu.source} for gpu in map(find_gpu, names)
        },
    }
