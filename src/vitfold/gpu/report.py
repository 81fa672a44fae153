"""What a report on a GPU is made of: where it goes, when it ends, what is timed."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitfold.bench.environment import environment
from vitfold.engines.network import read_network
from vitfold.gpu.children import Children
from vitfold.sources import load_source

TUNED = "max-autotune"
"""The mode in which torch.compile tries kernels of its own for products, with what follows them in one."""


@dataclass
class Report:
    """The folder that is filled, the device, and when to stop."""

    folder: Path
    device: torch.device
    ends: float
    work: Path
    small: bool
    environment: Mapping[str, Any]
    compiles: bool = True
    study: Study | None = None

    def left(self) -> float:
        """Seconds until the end."""
        return self.ends - time.monotonic()

    def until(self, share: float) -> float:
        """The moment at which a share of what is left is over, on the monotonic clock."""
        return time.monotonic() + share * max(0.0, self.left())

    def over(self, moment: float | None = None) -> bool:
        """Say whether a moment is over, or the time; small models are always measured to the end."""
        return not self.small and time.monotonic() > (self.ends if moment is None else moment)

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """Stop what compiles in the background while something is timed."""
        return contextlib.nullcontext() if self.study is None else self.study.children.paused()

    def write(self, name: str, rows: Sequence[Mapping[str, Any]], **facts: Any) -> None:
        """Write a file as it stands now, whole or not at all."""
        path = self.folder / f"gpu-{name}.json"
        document = {"environment": self.environment, **facts, "rows": list(rows)}
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)

    def say(self, line: str) -> None:
        """Print a line with the time that is left."""
        print(f"[{self.left():6.1f} s left] {line}", flush=True)


@dataclass(frozen=True)
class Subject:
    """What is timed: a graph of ours, or the original module; `how` is eager, or a way to compile."""

    name: str
    graph: Path | None
    dtype: str
    how: str = "compile"
    tf32: bool = False

    def module(self, device: torch.device, source: str) -> torch.nn.Module:
        """Return the module on the device."""
        if self.graph is not None:
            return read_network(self.graph).eval().to(device)
        original: torch.nn.Module = copy.deepcopy(loaded(source).original)
        if self.how == "torchao":
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

            original = original.eval().to(device, getattr(torch, self.dtype))
            quantize_(original, Int8DynamicActivationInt8WeightConfig())
        return original.eval().to(device, getattr(torch, self.dtype))


@functools.lru_cache(maxsize=1)
def loaded(source: str) -> Any:
    """Return a source with random weights: `model`, and the `original` module in float32 on the CPU."""
    return load_source(source, weights="random")


@dataclass(frozen=True)
class Ready:
    """A subject that runs at a batch: its module as it is called, and a call on random images that waits."""

    subject: Subject
    module: Callable[..., Any]
    call: Callable[[], None]
    how: str


@dataclass
class Study:
    """The models that are timed: the `first` subjects at the largest batch before all others, `core` at all batches."""

    source: str
    batch: int
    batches: tuple[int, ...]
    subjects: list[Subject]
    first: int
    core: list[Subject]
    blocks: dict[str, Any]
    children: Children
    ready: dict[str, Ready] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def essential(self, subject: Subject, batch: int) -> bool:
        """Say whether a subject is compiled here even if no child has done so in time."""
        return batch == self.batch and subject in self.subjects[: self.first]

    def warm(self, report: Report, subjects: Sequence[Subject], batch: int) -> None:
        """Have subjects compiled by children."""
        for one in subjects:
            if one.how != "eager":
                graph = None if one.graph is None else str(one.graph)
                task = ["subject", str(report.device), self.source, graph, one.dtype, one.how, batch]
                self.children.start(f"{one.name}@{batch}", task, threads=4 if one.how == TUNED else 2)


def gpu_environment(device: torch.device) -> dict[str, Any]:
    """Return the environment with the GPU's name, capability, memory and driver."""
    facts: dict[str, Any] = {"device": str(device), "torch": torch.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": found.name,
            "capability": [found.major, found.minor],
            "multiprocessors": found.multi_processor_count,
            "memory_bytes": found.total_memory,
        }
        asked = "driver_version,clocks.max.sm,clocks.max.memory,power.limit"
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:  # it may hang where a driver is sick
            said = f"{type(error).__name__}: {error}"
        facts["nvidia_smi"] = {"asked": asked, "said": said}
    return {**environment(), **facts}


def wait(device: torch.device) -> None:
    """Return when the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def runner(module: Callable[..., Any], x: torch.Tensor) -> Callable[[], None]:
    """Return a call that runs a module on a batch and waits for the end."""

    def call() -> None:
        with torch.no_grad():
            module(x)
        wait(x.device)

    return call
