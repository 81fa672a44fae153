"""A roofline model of a plan: what its kernels would take on a GPU. A model, not a measurement.

Equation: t = sum over kernels of max(2 MACs / (eff_c peak), bytes / (eff_m bandwidth)) + launch.

Source: Williams et al., Roofline (CACM 2009), with a cost per launch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from vitfold.audit.kernels import Kernel
from vitfold.errors import TargetError, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Bound = Literal["compute", "memory", "launch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Shares of the peaks that kernels reach, and the microseconds that each costs."""

    compute: float
    memory: float
    launch_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Peaks of a GPU: operations per second by type, bytes per second. `plan` is the capability compiled for it."""

    key: str
    name: str
    plan: str
    peak: Mapping[str, float]
    bandwidth: float
    source: str

    def runs(self, kernels: Sequence[Kernel]) -> bool:
        """True if it multiplies every type in the plan."""
        return all(kernel.precision is None or kernel.precision in self.peak for kernel in kernels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Milliseconds per batch, and how much of them each bound accounts for."""

    gpu: str
    ms: float
    share: Mapping[Bound, float]

    @property
    def bound(self) -> Bound:
        """What most of the time goes to."""
        return max(self.share, key=lambda name: self.share[name])


@cache
def _table() -> Mapping[str, Any]:
    text = resources.files("vitfold.audit").joinpath("gpus.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def ceilings() -> Ceilings:
    """Return the realistic ceilings of the table."""
    return Ceilings(**_table()["ceilings"])


def gpus() -> tuple[Gpu, ...]:
    """Return every GPU of the table."""
    rates = ("fp32", "fp16", "int8", "fp8")
    return tuple(
        Gpu(
            key=key,
            name=entry["name"],
            plan=entry["plan"],
            peak={rate: entry[rate] * 1e12 for rate in rates if rate in entry},
            bandwidth=entry["memory"] * 1e9,
            source=entry["source"],
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


def kernel_seconds(kernel: Kernel, gpu: Gpu, limits: Ceilings) -> tuple[float, float]:
    """Return the seconds that its arithmetic and its traffic would take by themselves."""
    arithmetic = 0.0
    if kernel.precision is not None:
        arithmetic = 2 * kernel.macs / (gpu.peak[kernel.precision] * limits.compute)
    return arithmetic, (kernel.bytes_moved + kernel.weight_bytes) / (gpu.bandwidth * limits.memory)


def predict(kernels: Sequence[Kernel], gpu: Gpu, limits: Ceilings | None = None) -> Prediction:
    """Sum the model over a plan that `gpu.runs`."""
    limits = limits or ceilings()
    spent: dict[Bound, float] = {"compute": 0.0, "memory": 0.0, "launch": len(kernels) * limits.launch_us * 1e-6}
    for kernel in kernels:
        arithmetic, traffic = kernel_seconds(kernel, gpu, limits)
        spent["compute" if arithmetic > traffic else "memory"] += max(arithmetic, traffic)
    total = sum(spent.values())
    return Prediction(gpu=gpu.key, ms=1e3 * total, share={name: seconds / total for name, seconds in spent.items()})
