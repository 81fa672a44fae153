"""The engines `torch` and `torch-compile`: bundles as torch modules on the GPU, where PyTorch finds one, or the CPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from vitfold.artifacts.bundle import MAIN
from vitfold.cores import usable_cores
from vitfold.engines.network.products import check_float8, computed_product, integer_product
from vitfold.engines.network.translation import SITE, Network, networks
from vitfold.engines.session import Call, EngineProfile, NodeTime, median_ns, take_turns
from vitfold.engines.torch import TorchSession
from vitfold.errors import EngineError

_REASON = 300
_RECOMPILATIONS = 64
"""Batch sizes that a session compiles for; beyond torch's own bound it would refuse."""


def usual_device() -> torch.device:
    """Return the device that PyTorch computes on here: an NVIDIA GPU, Apple's, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


class NetworkSession(TorchSession):
    """Bundles of any number of parts as torch modules, in the float type that their graphs state.

    `compiled` hands each part to `torch.compile` whole, once per batch size; on a GPU its kernels are replayed as a
    CUDA graph. `bind` copies to the device, `run` returns when the device is done, `fetch` copies back.

    Raises:
        EngineError: if a graph holds what torch has no rule for, or 8-bit floats that this GPU does not multiply.
    """

    def __init__(
        self,
        graphs: Path | Mapping[str, Path],
        *,
        threads: int | None = None,
        compiled: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        found = networks(graphs if isinstance(graphs, Mapping) else {MAIN: Path(graphs)})
        device = device or usual_device()
        for name, network in found.items():
            if network.uses_float8:
                check_float8(device)
            found[name] = network.eval().to(device, dtype)
        self._networks = found
        calls = {name: _compiled(network, device) if compiled else network for name, network in found.items()}
        super().__init__(
            {name: _several(call) for name, call in calls.items()},
            {name: network.ends for name, network in found.items()},
            shown="compile" if compiled else "eager",
            threads=threads if threads is not None else usable_cores() if device.type == "cpu" else None,
            device=device,
        )

    @staticmethod
    def check_starts(*, compiled: bool = False) -> None:
        """Torch runs wherever it is installed; what compiles for the CPU also needs a C++ compiler."""
        if not compiled or usual_device().type != "cpu":
            return
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            raise EngineError(
                "torch-compile needs a C++ compiler on the CPU, and none is found; install g++ or clang, or run on "
                "--engine torch"
            ) from None

    @property
    def engine(self) -> str:
        """Name, version, and the device where it is no CPU."""
        if self.device.type == "cpu":
            return super().engine
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        return f"{super().engine} on {name}"

    def _execute(self, part: str, inputs: Sequence[Any], kept: tuple[str, ...]) -> Sequence[Any]:
        try:
            return super()._execute(part, inputs, kept)
        except torch.OutOfMemoryError:
            raise EngineError(
                f"{self.device} has too little memory for this batch; take a smaller one: --batch"
            ) from None
        except (NotImplementedError, RuntimeError) as error:  # a kernel that the device lacks, or a driver too old
            said = " ".join(str(error).split())[:_REASON]
            raise EngineError(
                f"torch failed while running {part} on {self.device}: {said}; upgrade torch, or run it on --engine "
                "onnxruntime"
            ) from None

    def profile(self, runs: int = 20, beside: Mapping[str, Call] | None = None) -> EngineProfile:
        """Time each site by itself, eagerly: where torch compiles, several of them are one kernel."""
        inputs = self._inputs()
        watch = _Stopwatch(self._networks[MAIN].body, self._wait)

        def profiled() -> None:
            with torch.no_grad():
                watch.run(*inputs)

        self.run()
        profiled()
        watch.samples.clear()
        turns = take_turns(self.run, profiled, beside or {}, runs)
        return replace(turns, nodes=watch.nodes(runs))

    def close(self) -> None:
        """Drop the modules, too."""
        super().close()
        self._networks = {}


def _several(call: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    def several(*inputs: Tensor) -> tuple[Tensor, ...]:
        made = call(*inputs)
        return made if isinstance(made, tuple) else (made,)

    return several


def _compiled(network: Network, device: torch.device) -> Callable[..., Any]:
    """Compile whole, for every batch size anew; what CUDA graphs return is copied, for they write there again.

    It is the body that is compiled: its code is its own, and so torch's bound on recompilations counts for it alone.
    """
    graphs = device.type == "cuda"
    call = torch.compile(network.body, fullgraph=True, dynamic=False, mode="reduce-overhead" if graphs else "default")

    def run(*inputs: Tensor) -> Any:
        with _recompilations():
            if not graphs:
                return call(*inputs)
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            made = call(*inputs)
            return tuple(one.clone() for one in made) if isinstance(made, tuple) else made.clone()

    return run


@contextlib.contextmanager
def _recompilations() -> Iterator[None]:
    """Let torch compile for more batch sizes than it would; the setting has had two names."""
    config: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"
    with config.patch({name: _RECOMPILATIONS}):
        yield


class _Stopwatch(fx.Interpreter):
    """Runs a network call by call, and times each."""

    def __init__(self, body: fx.GraphModule, wait: Callable[[], None]) -> None:
        super().__init__(body)
        self._wait = wait
        self.samples: dict[tuple[str, str, bool], list[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one call until the device is done."""
        self._wait()
        before = time.perf_counter_ns()
        made = super().run_node(n)
        self._wait()
        if SITE in n.meta:
            name, op = n.meta[SITE]
            integer = n.target in (integer_product, computed_product)
            self.samples.setdefault((name, op, integer), []).append(time.perf_counter_ns() - before)
        return made

    def nodes(self, runs: int) -> tuple[NodeTime, ...]:
        """Return the median of each site, whose calls add up; a site that multiplied integers is one that did."""
        found: dict[str, NodeTime] = {}
        for (name, op, integer), samples in self.samples.items():
            calls = len(samples) // runs
            each = median_ns(sum(samples[run * calls : (run + 1) * calls]) for run in range(runs))
            old = found.get(name)
            found[name] = NodeTime(
                name=name,
                op=op,
                latency_ns=each + (0.0 if old is None else old.latency_ns),
                integer=integer or (old is not None and old.integer),
            )
        return tuple(found.values())
