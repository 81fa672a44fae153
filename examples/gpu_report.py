"""Measures vitfold's torch modules on the GPU at hand, most important first, within a time that is given.

    python examples/gpu_report.py --output results --seconds 360

Every file `gpu-NAME.json` is whole after each row, so that whatever time is left at the end, what was measured stands
there. Needs torch, timm, onnx and what vitfold needs; no network. With `--device cpu` small models stand in for large.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file

from vitfold import pipeline
from vitfold.bench.classes import class_targets
from vitfold.bench.environment import environment, installed_version
from vitfold.bench.timing import interleave
from vitfold.cores import usable_cores
from vitfold.diffusion import find_method, sample
from vitfold.diffusion.opening import plan_parts, write_parts
from vitfold.engines.network import Network, read_network
from vitfold.engines.network.session import NetworkSession
from vitfold.errors import EngineError
from vitfold.images import ImageSet, batches, find_images, prepared_ahead
from vitfold.model import DiTSpec, Model, Preprocess
from vitfold.model.dit import dit_param_shapes
from vitfold.pipeline.plan import Plan
from vitfold.pipeline.writing import write_graph
from vitfold.recipe import MergeRecipe, QuantRecipe
from vitfold.schedule import resolve_r
from vitfold.sources import demo_folder, load_source
from vitfold.sources.diffusers import dit_params
from vitfold.sources.dit import demo_dit_folder
from vitfold.target import find_target

ROOT = Path(__file__).parents[1]
TUNED = "max-autotune"
"""The mode in which torch.compile tries kernels of its own for products, with what follows them in one."""
LATE = "not compiled in time"
CHILDREN = 8
"""Processes that compile side by side; the kernels that they find are read from torch's cache afterwards."""
WARMING = 0.3
"""The share of what is left that a section waits for them."""
PREFLIGHT = 60.0
"""Seconds after which a compiler that has not compiled a line counts as broken."""
PHOTO = (500, 375)
"""Width and height of the files that are decoded, about the median of ImageNet."""
SAMPLERS = tuple(itertools.product(("demo-dit", "dit-xl-2-256"), ("none", "stack:2", "fora:2")))
"""Diffusion Transformers, and how they reuse steps."""
KINDS = (
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("sort", ("sort", "topk")),
    (
        "product",
        (
            *("gemm", "gemv", "cutlass", "cublas", "nvjet", "xmma", "splitk", "fprop", "convol"),
            *("int_mm", "scaled_mm", "linear", "addmm", "aten::mm", "bmm"),
        ),
    ),
    ("copy", ("memcpy", "memset", "copy", "nchwtonhwc", "aten::to")),
    ("single elementwise", ("elementwise", "reduce", "norm", "gelu", "softmax", "gather", "scatter", "index", "fill")),
)
"""Kinds of kernels that no compiler of torch's has named, by what is in their names, in this order."""


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


def compiled(module: torch.nn.Module, device: torch.device, how: str) -> Callable[..., Any]:
    """Compile whole, for static shapes; replayed as a CUDA graph on a GPU. A network's body has code of its own."""
    module = module.body if isinstance(module, Network) else module
    mode = how if how == TUNED else "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(module, fullgraph=True, dynamic=False, mode=mode)


def captured(module: Callable[..., Any], x: torch.Tensor) -> Callable[..., Any]:
    """Return a module that is replayed as a CUDA graph without being compiled; what it returns is written anew."""
    read, here, side = x.clone(), torch.cuda.current_stream(x.device), torch.cuda.Stream(x.device)
    side.wait_stream(here)
    with torch.no_grad():
        with torch.cuda.stream(side):
            for _ in range(2):
                module(read)
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = module(read)

    def replay(given: torch.Tensor) -> Any:
        read.copy_(given)
        graph.replay()
        return made

    return replay


def allow_recompilations() -> None:
    """Let one piece of code be compiled for many batches and types; the setting has had two names."""
    config: Any = torch._dynamo.config
    setattr(config, "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit", 64)


class Children:
    """Processes of this script that compile side by side, most important first, and stop while something is timed."""

    def __init__(self) -> None:
        self._pools = ThreadPoolExecutor(CHILDREN), ThreadPoolExecutor(len(SAMPLERS))
        self._lock, self._free, self._ended = threading.Lock(), threading.Event(), False
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._found: dict[str, Future[str]] = {}
        self._free.set()

    def start(self, name: str, task: Sequence[Any], *, threads: int = 2, aside: bool = False) -> None:
        """Queue a task: what `TASKS` does, and its arguments; `aside` from the others, whom it does not hold up."""
        self._found[name] = self._pools[aside].submit(self._run, name, task, threads)

    def wait(self, names: Iterable[str], seconds: float) -> None:
        """Return when these are done, or the seconds are over."""
        wait_for([self._found[name] for name in names if name in self._found], timeout=max(0.0, seconds))

    def said(self, name: str) -> str | None:
        """What went wrong, nothing where all went well or nothing was asked, None while it is at work."""
        if name not in self._found:
            return ""
        found = self._found[name]
        if not found.done():
            return None
        return found.result() if found.exception() is None else f"not started: {found.exception()}"

    @contextlib.contextmanager
    def paused(self, but: str | None = None) -> Iterator[None]:
        """Stop those that run, but for one, and start no others, for as long as the block runs."""
        with self._lock:
            self._free.clear()
            self._signal(signal.SIGSTOP, but)
        try:
            yield
        finally:
            with self._lock:
                self._signal(signal.SIGCONT)
                self._free.set()

    def end(self) -> None:
        """End those that run, and start no others."""
        with self._lock:
            self._ended = True
            self._free.set()
            self._signal(signal.SIGKILL)
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def _signal(self, what: signal.Signals, but: str | None = None) -> None:
        for process in (process for name, process in self._running.items() if name != but):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, what)

    def _run(self, name: str, task: Sequence[Any], threads: int) -> str:
        with tempfile.TemporaryFile("w+", errors="replace") as said:  # a pipe would stay open as long as its children
            process = self._begun(name, task, threads, said)
            if process is None:
                return "there was no time"
            code = process.wait()
            with self._lock:
                del self._running[name]
            said.seek(0)
            return "" if code == 0 else f"exit {code}: {said.read()[-600:]}"

    def _begun(self, name: str, task: Sequence[Any], threads: int, said: IO[str]) -> subprocess.Popen[bytes] | None:
        """Start a process as soon as none has to be quiet; none if all are over by then."""
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
        command = [sys.executable, __file__, "--child", json.dumps(task)]
        while True:
            self._free.wait()
            with self._lock:
                if self._ended:
                    return None
                if self._free.is_set():
                    self._running[name] = subprocess.Popen(
                        command, env=environment, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
                    )
                    return self._running[name]


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
        original = copy.deepcopy(loaded(source).original)
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


def graphs_of(report: Report, model: Model, plans: Mapping[str, Plan], merges: Mapping[str, Any]) -> dict[str, Path]:
    """Write the graph of every plan at every merging; ranges are those of the first plan, for only time is asked."""
    found = {}
    for name, plan in plans.items():
        for merging, r in merges.items():
            path = report.work / f"{name}-{merging}.onnx"
            chosen = replace(plan.recipe, merge=MergeRecipe(r=resolve_r(r, model.spec)))
            write_graph(replace(plan, recipe=chosen), path)
            found[f"{name}-{merging}"] = path
    return found


def plan_of(model: Model, target: str, images: ImageSet, merge: Any = None, *, quant: str | None = None) -> Plan:
    """Return a plan, calibrated by extremes on a few images where it quantizes."""
    chosen: Any = QuantRecipe(method="minmax", calibration_size=len(images.paths)) if quant == "w8a8" else quant
    plan = pipeline.optimize(model, merge=merge, target=target, quant=chosen)
    return pipeline.calibrate_plan(plan, images) if plan.needs_calibration else plan


def has_float8(device: torch.device) -> bool:
    """Say whether the device multiplies 8-bit floats, or is a CPU, which computes them as floats."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


CONTRACT = (
    "extreme_codes or kernel or long_products or fit_half or onnx_runtime and not openvino or "
    "test_engines and torch and not compile or reference and torch and compile and 5"
)
"""The tests of the contract that say something about a GPU, as pytest's -k takes them."""


def contract(report: Report) -> None:
    """Run the engine's contract on the device, where its kernels are exact, and once what torch compiles."""
    tests = ["tests/contracts/test_engines.py", "tests/engines/test_network.py", "-k", CONTRACT]
    if report.small:
        tests = ["tests/engines/test_network.py", "-k", "extreme_codes and qdq or kernel"]
    # Warnings of a torch, a driver or a compiler that was never seen before are no failures.
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=max(30.0, min(90.0, 0.3 * report.left())),
        )
        passed, said = done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    except subprocess.TimeoutExpired as error:
        passed, said = False, f"not finished within {error.timeout:.0f} s"
    row = {"command": command[1:], "passed": passed, "seconds": time.monotonic() - began, "said": said}
    report.write("contract", [row])
    report.say(f"contract: {'passed' if passed else 'FAILED, see gpu-contract.json'}")


def accuracy(report: Report) -> None:
    """Demo weights on CIFAR-10 test images: top-1, agreement with FP32, and how far the GPU is from the CPU."""
    model, images = load_source("demo").model, find_images(demo_folder() / "images")
    few = images.sample(8, seed=0)
    images = images.first(8) if report.small else images.without(few) or images
    pixels = np.concatenate([one.pixel_values for one in batches(images, model.preprocess, batch=64)])
    until = report.until(0.2)
    truth = class_targets(images, model.labels, model.spec.output_width)
    ways: list[tuple[str, str, Any, str | None]] = [
        ("fp32", "torch", None, None),
        ("fp16", "torch-fp16", None, None),
        ("fp16-r4", "torch-fp16", 4, None),
        ("int8", "torch-fp16", None, "w8a8"),
        ("int8-r4", "torch-fp16", 4, "w8a8"),
    ]
    if has_float8(report.device):
        ways += [("fp8", "torch-fp8", None, None), ("fp8-r4", "torch-fp8", 4, None)]
    rows: list[dict[str, Any]] = []
    reference: np.ndarray | None = None
    for name, target, merge, quant in ways:
        if rows and report.over(until):
            return
        path = report.work / f"demo-{name}.onnx"
        write_graph(plan_of(model, target, few, merge, quant=quant), path)
        network = read_network(path).eval()
        outputs = _outputs(network.to(report.device), pixels)
        reference = outputs if reference is None else reference
        host = _outputs(network.to("cpu"), pixels[:4])
        row = {
            "name": name,
            "images": len(pixels),
            "top1": None if truth is None else float((outputs.argmax(1) == np.asarray(truth)).mean()),
            "agreement": float((outputs.argmax(1) == reference.argmax(1)).mean()),
            "finite": bool(np.isfinite(outputs).all()),
            "from_cpu": float(np.median(np.linalg.norm(outputs[:4] - host, axis=1) / np.linalg.norm(host, axis=1))),
        }
        rows.append(row)
        report.write("accuracy", rows, model="demo", source="CIFAR-10 test images of assets/demo")
        report.say(
            "accuracy: " + ", ".join(f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
        )


def _outputs(network: Network, pixels: np.ndarray) -> np.ndarray:
    device = network.body.get_buffer("real").device
    made = []
    with torch.no_grad():
        for start in range(0, len(pixels), 64):
            y: Any = network(torch.from_numpy(pixels[start : start + 64]).to(device))
            made.append(y.float().cpu().numpy())
    return np.concatenate(made)


def study_of(report: Report, children: Children) -> Study:
    """Return what is timed, with all graphs written."""
    source = "timm:test_vit" if report.small else "timm:vit_base_patch16_224"
    model, few = loaded(source).model, find_images(demo_folder() / "images").sample(2, seed=0)
    layers = model.spec.num_layers
    merges = {"r0": None, "r8": 8, "3x48": [48 if i in (2, 5, 8) else 0 for i in range(layers)]}
    if report.small:
        merges = {"r0": None, "r8": [8] + [0] * (layers - 1)}
    plans = {"fp16": plan_of(model, "torch-fp16", few), "int8": plan_of(model, "torch-fp16", few, quant="w8a8")}
    if has_float8(report.device):
        plans["fp8"] = plan_of(model, "torch-fp8", few)
    graphs = graphs_of(report, model, plans, merges)
    most = "r8" if report.small else "3x48"
    ours = {name: Subject(name, graph, "float16") for name, graph in graphs.items()}
    peers = [
        Subject("torch-compile-fp16", None, "float16"),
        Subject("torch-fp32", None, "float32", "eager"),
        Subject("torch-fp16", None, "float16", "eager"),
        Subject("torch-tf32", None, "float32", "eager", tf32=True),
    ]
    if installed_version("torchao") is not None:
        peers.append(Subject("torchao-int8", None, "float16", "torchao"))
    first = [*peers[:2], ours[f"fp16-{most}"], ours[f"int8-{most}"]]
    core = [*first, ours["fp16-r0"], ours["int8-r0"]]
    tuned = replace(first[3], name=f"{first[3].name}-{TUNED}", how=TUNED)
    rest = [*core[4:], *(ours[name] for name in ("fp8-r0", f"fp8-{most}") if name in ours), *peers[2:], tuned]
    rest += [one for one in ours.values() if one not in core and one not in rest]  # each layer of another length
    batches = (1, 64, 8)
    if report.small:
        core, rest, batches = peers[1:2], [tuned], (1,)
    spec = model.spec
    shape = {"tokens": spec.tokens, "width": spec.embed_dim, "heads": spec.num_heads, "head_width": spec.head_dim}
    schedules = {name: list(resolve_r(r, spec)) for name, r in merges.items()}
    blocks = {**shape, "hidden": spec.mlp_dim, "schedules": schedules}
    batch = 2 if report.small else 128
    return Study(source, batch, batches, [*first, *rest], len(first), core, blocks, children)


def prepare(report: Report) -> None:
    """Write the graphs, see whether anything compiles here, and have children compile what is timed later."""
    children = Children()
    children.start("preflight", ["preflight", str(report.device)])
    report.say("writing graphs")
    report.study = study = study_of(report, children)
    children.wait(["preflight"], PREFLIGHT)
    said = children.said("preflight")
    report.compiles = said == "" or (said is not None and _compiles_here(report))
    shown = "works" if said == "" else said or f"not done within {PREFLIGHT:.0f} s"
    shown = f"works in this process alone: {shown}" if said and report.compiles else shown
    report.environment = {**report.environment, "torch_compile": shown}
    report.say(f"torch.compile: {shown}")
    if said != "":  # a GPU may be lent to one process only
        return
    if report.small:
        study.warm(report, study.subjects[2:3], study.batch)
        return
    study.warm(report, study.subjects, study.batch)
    for batch in study.batches:
        study.warm(report, study.core, batch)


def need_study(report: Report) -> Study:
    """Return what is timed, prepared by now."""
    if report.study is None:
        prepare(report)
    assert report.study is not None
    return report.study


def _compiles_here(report: Report) -> bool:
    try:
        _compile_a_line(str(report.device))
    except Exception as error:  # whatever a compiler may meet
        report.say(f"does not compile here either: {type(error).__name__}: {str(error)[:150]}")
        return False
    return True


def _compile_a_line(device: str) -> None:
    x = torch.randn(64, 64, device=device)
    torch.compile(lambda x: torch.softmax(x @ x, -1) * 2)(x)
    wait(x.device)


def _compile_a_subject(device: str, source: str, graph: str | None, dtype: str, how: str, batch: int) -> None:
    """Three calls: one compiles, one is recorded as a CUDA graph, one replays it."""
    subject = Subject("child", Path(graph) if graph else None, dtype, how)
    module = subject.module(torch.device(device), source)
    x = _pixels(source, module, dtype, batch, torch.device(device))
    call = runner(compiled(module, torch.device(device), how), x)
    for _ in range(3):
        call()


def _pixels(source: str, module: torch.nn.Module, dtype: str, batch: int, device: torch.device) -> torch.Tensor:
    size = module.ends.inputs[0].shape if isinstance(module, Network) else (3, *loaded(source).model.spec.image_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randn((batch, *size), generator=generator).to(device, getattr(torch, dtype))


def speed(report: Report) -> None:
    """Engine time of ViT-B/16 (random weights): every subject of a batch takes turns with the others.

    The first subjects are timed and written before the rest is compiled, and again beside it.
    """
    study = need_study(report)
    for place, subjects in enumerate((study.subjects[: study.first], study.subjects[study.first :])):
        if place:
            start_samplers(report)
        failed = make_ready(report, subjects, study.batch, study.ready, report.until(WARMING))
        study.rows = [row for row in study.rows if "error" in row] + failed
        study.rows += timed_rows(report, study.ready, study.batch)
        write_speed(report)


def batches_of(report: Report) -> None:
    """The same at other batches, of a few subjects."""
    study = need_study(report)
    for batch in study.batches:
        if report.over():
            return
        ready: dict[str, Ready] = {}
        study.rows += make_ready(report, study.core, batch, ready, report.until(WARMING))
        study.rows += timed_rows(report, ready, batch)
        write_speed(report)


def late(report: Report) -> None:
    """What was not compiled in time at the largest batch, beside the baselines once more."""
    study = need_study(report)
    missing = {row["name"] for row in study.rows if row.get("error") == LATE and row["batch"] == study.batch}
    again = [one for one in study.subjects if one.name in missing]
    if not again:
        return
    ready = {name: study.ready[name] for name in BASELINES if name in study.ready}
    failed = make_ready(report, again, study.batch, ready, report.until(0.6))
    found = [*failed, *(row for row in timed_rows(report, ready, study.batch) if row["name"] not in BASELINES)]
    study.rows = [row for row in study.rows if row["name"] not in missing or row["batch"] != study.batch] + found
    write_speed(report)


def write_speed(report: Report) -> None:
    """Write `gpu-vit-b16.json` as it stands."""
    study = need_study(report)
    note = "random weights; ratios are least, median and largest of paired rounds"
    facts = {"model": study.source, "scope": "engine", "note": note, "blocks": study.blocks}
    report.write("vit-b16", study.rows, **facts)


def make_ready(
    report: Report, subjects: Sequence[Subject], batch: int, ready: dict[str, Ready], until: float
) -> list[dict[str, Any]]:
    """Add the subjects that run to `ready`, and return rows of those that do not; compiled by children until then."""
    study, failed = need_study(report), []
    for subject in subjects:
        key = f"{subject.name}@{batch}"
        study.children.wait([key], 120.0 if report.small else until - time.monotonic())
        said = study.children.said(key)
        if (said is None or report.over(until)) and not study.essential(subject, batch):
            error = LATE
        elif said and ("CUDA error" in said or said.startswith("exit -")):  # it would take this process along
            error = said
        else:
            try:
                ready[subject.name] = one = made_ready(report, subject, batch)
                report.say(f"ready at batch {batch}: {subject.name}, {one.how}")
                continue
            except Exception as caught:  # what one subject meets is said, and the others are measured
                error = f"{type(caught).__name__}: {caught}"
        failed.append({"name": subject.name, "batch": batch, "error": error[:500]})
        report.say(f"{subject.name}: {error[:150]}")
    return failed


def made_ready(report: Report, subject: Subject, batch: int) -> Ready:
    """Return a subject that has run; where it does not compile, as a CUDA graph of its own kernels, or eagerly."""
    source = need_study(report).source
    module = subject.module(report.device, source)
    x = _pixels(source, module, subject.dtype, batch, report.device)
    how = "eager"
    called: Callable[..., Any] = module
    if subject.how != "eager":
        try:
            if not report.compiles:
                raise RuntimeError("nothing compiles here")
            called, how = compiled(module, report.device, subject.how), "torch.compile"
            runner(called, x)()
        except Exception as error:
            report.say(f"{subject.name} does not compile: {type(error).__name__}: {str(error)[:150]}")
            called, how = module, "eager"
            if report.device.type == "cuda":
                called, how = captured(module, x), "eager in a CUDA graph"
    call = _in_tf32(runner(called, x), subject.tf32)
    for _ in range(2):
        call()
    return Ready(subject, called, call, how)


def timed_rows(report: Report, ready: Mapping[str, Ready], batch: int) -> list[dict[str, Any]]:
    """Time subjects in turns and return their rows."""
    calls = {name: one.call for name, one in ready.items()}
    rounds, seconds = (2, 0.02) if report.small else (7, 1.4)
    with report.quiet():
        timed = interleave(calls, trials=rounds, seconds=seconds, warmup=1, max_iterations=200)
    rows = rows_of(timed, batch)
    for row in rows:
        row["how"] = ready[row["name"]].how
        pairs = ", ".join(f"{row[key][1]:.2f} {key.replace('_', ' ')}" for key in row if key.startswith("faster"))
        report.say(f"batch {batch}: {row['name']:20} {row['median_ms']:9.3f} ms  {pairs}")
    return rows


BASELINES = ("torch-fp32", "torch-compile-fp16")


def rows_of(timed: Mapping[str, Sequence[Sequence[int]]], batch: int) -> list[dict[str, Any]]:
    """Return a row per subject, with its ratios to the baselines."""
    medians = {name: _medians(trials) for name, trials in timed.items()}
    rows = []
    for name, trials in timed.items():
        row: dict[str, Any] = {"name": name, "batch": batch, "median_ms": float(np.median(medians[name]))}
        row["images_per_second"] = batch / row["median_ms"] * 1e3
        rows.append({**row, **ratios_of(medians, name), "trials_ns": trials})
    return rows


def ratios_of(times: Mapping[str, Sequence[float]], name: str) -> dict[str, list[float]]:
    """Return how many times as fast as each baseline a subject is: the least, the median and the largest round."""
    found = {}
    for baseline in BASELINES:
        if baseline in times:
            ratios = [other / own for other, own in zip(times[baseline], times[name], strict=True)]
            found[f"faster_than_{baseline}"] = [float(r) for r in (min(ratios), np.median(ratios), max(ratios))]
    return found


def _in_tf32(call: Callable[[], None], wanted: bool) -> Callable[[], None]:
    if not wanted:
        return call

    def run() -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            call()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return run


def _medians(trials: Sequence[Sequence[int]]) -> list[float]:
    return [float(np.median(trial)) / 1e6 for trial in trials]


def kind_of(kernel: str) -> str:
    """Return the kind of a kernel. Inductor names its own after all that they fuse, products or not."""
    name = kernel.lower()
    if name.startswith("triton_tem_"):
        return "product"
    if name.startswith("triton_") or "cpp_fused" in name:
        return "sort" if "sort" in name else "fused elementwise"
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "other")


def profiles(report: Report) -> None:
    """Time per kind of kernel and the longest kernels of every subject, from torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu, until = report.device.type == "cuda", report.until(0.2)
    rows: list[dict[str, Any]] = []
    for name, ready in need_study(report).ready.items():
        if rows and report.over(until):
            return
        with report.quiet(), profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as watched:
            for _ in range(3):
                ready.call()
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        events = [(one.key, float(getattr(one, key)) / 3e3, one.count / 3) for one in watched.key_averages()]
        kernels = [one for one in events if one[1] > 0]  # the host's calls take no time of the device's
        kinds: dict[str, float] = {}
        for kernel, ms, _ in kernels:
            kinds[kind_of(kernel)] = kinds.get(kind_of(kernel), 0.0) + ms
        longest = sorted(kernels, key=lambda one: -one[1])[:20]
        rows.append(
            {
                "name": name,
                "ms_by_kind": kinds,
                "kernels": sum(n for _, _, n in kernels),
                "longest": [[k[:120], ms, n] for k, ms, n in longest],
            }
        )
        report.write("profile", rows)
        report.say(
            f"profile: {name}: " + ", ".join(f"{k} {v:.2f} ms" for k, v in sorted(kinds.items(), key=lambda i: -i[1]))
        )


class Arrival:
    """Images from the host to labels on the host: bytes copied from pinned memory, normalized on the device.

    The next batch is copied while the device works on this one, and labels are read a batch later, so that the host
    never waits for what it has just asked for.
    """

    def __init__(self, report: Report, preprocess: Preprocess) -> None:
        self._device, self._shape = report.device, preprocess.crop_size
        mean, std = (
            torch.tensor(values, device=report.device).view(1, 3, 1, 1) for values in (preprocess.mean, preprocess.std)
        )
        self._factor, self._offset = 1 / (255 * std), -mean / std
        self._on_gpu = report.device.type == "cuda"
        self._copies = torch.cuda.Stream(report.device) if self._on_gpu else None

    def through(self, held: Iterable[torch.Tensor], ready: Ready) -> float:
        """Return the seconds from now until all labels of batches (B, H, W, 3) of bytes are on the host."""
        labels: list[tuple[torch.Tensor, Any]] = []
        wait(self._device)
        began = time.perf_counter_ns()
        with torch.no_grad():
            for one in held:
                made = ready.module(self._normalized(self._copied(one), getattr(torch, ready.subject.dtype)))
                made = made[0] if isinstance(made, tuple) else made
                labels.append((made.argmax(1).to("cpu", non_blocking=True), self._event()))
                if len(labels) > 1 and self._on_gpu:
                    labels[-2][1].synchronize()
        wait(self._device)
        return (time.perf_counter_ns() - began) / 1e9

    def _copied(self, held: torch.Tensor) -> torch.Tensor:
        if self._copies is None:
            return held
        with torch.cuda.stream(self._copies):
            x = held.to(self._device, non_blocking=True)
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._copies)
        x.record_stream(here)
        return x

    def _event(self) -> Any:
        if not self._on_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _normalized(self, held: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Images (B, 3, H, W) in the subject's type; those of another size are resized, near to how Pillow does."""
        x = held.permute(0, 3, 1, 2).float()
        if tuple(x.shape[2:]) != tuple(self._shape):
            x = torch.nn.functional.interpolate(x.contiguous(), self._shape, mode="bicubic", antialias=True)
            x = x.round_().clamp_(0, 255)
        return torch.addcmul(self._offset, x, self._factor).to(dtype, memory_format=torch.contiguous_format)


def photos_of(report: Report) -> list[Path]:
    """Write JPEG files of the size of photos, made of the demo's images and noise, and return their paths."""
    few = find_images(demo_folder() / "images").sample(4 if report.small else 64, seed=0)
    noise = np.random.default_rng(0).normal(0, 12, (*PHOTO[::-1], 3))
    folder = report.work / "photos"
    folder.mkdir(exist_ok=True)

    def write(place: int, path: Path) -> Path:
        image = np.asarray(Image.open(path).convert("RGB").resize(PHOTO, Image.Resampling.BICUBIC))
        noisy = np.clip(image + np.roll(noise, 7 * place, 1), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{place}.jpg", quality=90)
        return folder / f"{place}.jpg"

    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(write, range(len(few.paths)), few.paths))


def held_bytes(report: Report, paths: Sequence[Path], size: tuple[int, int] | None) -> torch.Tensor:
    """Decode a batch, resized by Pillow to `size` (width, height) unless it is none: (B, H, W, 3) of pinned bytes."""
    images = [Image.open(path).convert("RGB") for path in paths]
    if size is not None:
        images = [image.resize(size, Image.Resampling.BICUBIC) for image in images]
    held = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return held.pin_memory() if report.device.type == "cuda" else held


def end_to_end(report: Report) -> None:
    """Files to labels, of the baselines and of ours, each in its own type; rounds take turns.

    First of images decoded ahead: resized by Pillow, and, in a second row of each, on the device, which is near to
    Pillow's and not equal (docs/gpu.md). Then as a stream, in which threads decode while the device works.
    """
    study = need_study(report)
    batch, ready = study.batch, study.ready
    preprocess, paths, workers = loaded(study.source).model.preprocess, photos_of(report), usable_cores()
    size, count = preprocess.crop_size[::-1], batch * (2 if report.small else 8)
    files = [paths[i % len(paths)] for i in range(count)]
    groups = [files[start : start + batch] for start in range(0, count, batch)]
    arrival, wanted = Arrival(report, preprocess), ends_of(report, ready)
    rows: list[dict[str, Any]] = []

    def prepared(to: tuple[int, int] | None) -> Iterator[torch.Tensor]:
        return prepared_ahead(groups, lambda group: held_bytes(report, group, to), workers=workers)

    for suffix, to in {"": size, ", resized on the device": None}.items():
        held = list(prepared(to))
        add_ends(report, rows, suffix, {name: ready[name] for name in wanted}, arrival, lambda held=held: held)
    with report.quiet():
        began = time.perf_counter()
        rate = sum(len(held) for held in prepared(size)) / (time.perf_counter() - began)
    rows.append({"name": "decoding alone", "batch": batch, "workers": workers, "images_per_second": rate})
    few = {name: ready[name] for name in wanted[:4]}
    add_ends(report, rows, ", stream", few, arrival, lambda: prepared(size))


def ends_of(report: Report, ready: Mapping[str, Ready]) -> list[str]:
    """Return the baselines, then ours, the most merged first."""
    ours = sorted((name for name in ready if "torch" not in name), key=lambda name: ("3x48" not in name, "r0" in name))
    found = [name for name in BASELINES if name in ready] + ours
    return found[:3] if report.small else found


def add_ends(
    report: Report,
    rows: list[dict[str, Any]],
    suffix: str,
    ready: Mapping[str, Ready],
    arrival: Arrival,
    held: Callable[[], Iterable[torch.Tensor]],
) -> None:
    """Add a row per subject, `suffix` behind its name: three rounds through all batches that `held` gives."""
    first = list(itertools.islice(held(), 1))
    seconds: dict[str, list[float]] = {}
    for name, one in ready.items():
        try:
            arrival.through(first * 3, one)
            seconds[name] = []
        except Exception as error:  # the others are measured
            rows.append({"name": name + suffix, "error": f"{type(error).__name__}: {error}"[:500]})
    for place in range(1 if report.small else 3):
        if place and report.over():
            break
        with report.quiet():
            for name, taken in seconds.items():
                taken.append(arrival.through(held(), ready[name]))
    images = sum(len(one) for one in held())
    for name, taken in seconds.items():
        rate = images / float(np.median(taken))
        row = {"name": name + suffix, "batch": len(first[0]), "images": images, "images_per_second": rate}
        rows.append({**row, **ratios_of(seconds, name), "seconds": taken})
        report.say(f"end to end: {name + suffix} {rate:.0f} images/s")
    note = (
        f"JPEG files of {PHOTO[0]} x {PHOTO[1]}. Timed: copy, normalization, network and labels; in a stream decoding, "
        "too, by threads ahead. Ratios are least, median and largest of rounds"
    )
    report.write("end-to-end", rows, note=note)


LAYERS: Mapping[str, tuple[int, int]] = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}
"""Inputs and outputs of a block's linear layers, in widths of the model."""


def lengths(report: Report) -> None:
    """Products and attention of a ViT-B/16 block at lengths that fill the kernels' tiles and lengths that do not.

    A sample is many launches, one behind the other, so that what the host takes for a launch does not count.
    """
    batch, width, heads, launches = (1, 32, 2, 2) if report.small else (128, 768, 12, 20)
    rows: list[dict[str, Any]] = []
    until = report.until(0.25)
    for tokens in (197, 192, 176, 160, 144, 128):
        if rows and report.over(until):
            return
        calls, failed = products_of(report.device, batch, tokens, width, heads)
        calls = {name: repeated(call, launches, report.device) for name, call in calls.items()}
        with report.quiet():
            timed = interleave(calls, trials=3, seconds=0.003 if report.small else 0.15, warmup=2)
        ms = {name: float(np.median(_medians(trials))) / launches for name, trials in timed.items()}
        rows.append({"tokens": tokens, "batch": batch, "ms": ms, **({"errors": failed} if failed else {})})
        report.write("lengths", rows, width=width, heads=heads, launches_per_sample=launches)
        report.say(f"{tokens} tokens: " + ", ".join(f"{name} {took:.4f}" for name, took in ms.items()))


def products_of(
    device: torch.device, batch: int, tokens: int, width: int, heads: int
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Return a launch of each product of a block in every type that the device has, and what failed of them."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    calls: dict[str, Callable[[], Any]] = {}
    one = torch.ones((), device=device)
    for layer, (i, o) in LAYERS.items():
        x = torch.randn(batch * tokens, i * width, device=device, dtype=dtype)
        w = torch.randn(o * width, i * width, device=device, dtype=dtype)
        calls[f"{layer}-fp16"] = functools.partial(torch.mm, x, w.t())
        xi, wi = ((t * 20).clamp(-127, 127).to(torch.int8) for t in (x, w))
        calls[f"{layer}-int8"] = functools.partial(torch._int_mm, xi, wi.t())
        if has_float8(device):
            xf, wf = (t.to(torch.float8_e4m3fn) for t in (x, w))
            how = {"scale_a": one, "scale_b": one, "out_dtype": dtype, "use_fast_accum": True}
            calls[f"{layer}-fp8"] = functools.partial(torch._scaled_mm, xf, wf.t(), **how)
    q = torch.randn(batch, heads, tokens, width // heads, device=device, dtype=dtype)
    calls["attention-fp16"] = functools.partial(torch.nn.functional.scaled_dot_product_attention, q, q, q)
    failed = {}
    for name in list(calls):
        try:
            calls[name]()
        except (RuntimeError, NotImplementedError) as error:  # a kernel that this device or this torch lacks
            failed[name] = str(error)[:200]
            del calls[name]
    return calls, failed


def repeated(launch: Callable[[], Any], launches: int, device: torch.device) -> Callable[[], None]:
    """Return a call that launches several times and waits for the end once."""

    def call() -> None:
        with torch.no_grad():
            for _ in range(launches):
                launch()
        wait(device)

    return call


class Ddim:
    """The deterministic sampler over a linear schedule, as far as timing needs it; diffusers may be missing."""

    init_noise_sigma = 1.0
    config: Mapping[str, Any] = {}

    def __init__(self, steps: int) -> None:
        self._alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float()
        self.timesteps = torch.linspace(999, 0, steps).round().long()

    def scale_model_input(self, x: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """As it is."""
        return x

    def step(self, noise: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> Any:
        """One step down."""
        place = int((self.timesteps == t).nonzero()[0])
        now = self._alphas[t]
        then = self._alphas[self.timesteps[place + 1]] if place + 1 < len(self.timesteps) else torch.tensor(1.0)
        clean = ((x - (1 - now).sqrt() * noise) / now.sqrt()).clamp(-3, 3)
        return argparse.Namespace(prev_sample=then.sqrt() * clean + (1 - then).sqrt() * noise)


def dit_of(name: str, *, small: bool) -> tuple[DiTSpec, dict[str, np.ndarray], str]:
    """Return a Diffusion Transformer and what its weights are: the demo's own where they are at hand, else random."""
    shared = {"freq_shift": 1, "condition": "block", "activation": "gelu_tanh", "mlp_norm_eps": 1e-5}
    if name == "demo-dit":
        sizes = {"image_size": 32, "patch_size": 4, "channels": 1, "outputs": 1, "classes": 10}
        spec = DiTSpec(**sizes, embed_dim=192, num_layers=10, num_heads=6, mlp_dim=768, **shared)
        weights = demo_dit_folder() / "diffusion_pytorch_model.safetensors"
        if weights.is_file():
            return spec, dit_params(spec, load_file(weights)), "the demo's weights"
    else:
        sizes = {"image_size": 32, "patch_size": 2, "channels": 4, "outputs": 8, "classes": 1000}
        layers = 1 if small else 28
        spec = DiTSpec(**sizes, embed_dim=1152, num_layers=layers, num_heads=16, mlp_dim=4608, **shared)
    rng = np.random.default_rng(0)
    required, optional = dit_param_shapes(spec)
    shapes = {**required, **optional}
    return (
        spec,
        {n: 0.02 * rng.standard_normal(shape, dtype=np.float32) for n, shape in shapes.items()},
        "random weights",
    )


def _sample(device: str, name: str, reuse: str, folder: str, compiles: bool) -> None:
    """Make a sampler ready, say so, and draw when told to; in the narrowest type in which all samples are finite."""
    place, small = Path(folder), device == "cpu"
    spec, params, weights = dit_of(name, small=small)
    method = find_method(reuse)
    parts = plan_parts(spec, method, (), 0)
    write_parts(parts, params, place, target=find_target("torch"))
    del params
    graphs = {part: place / f"{part}.onnx" for part in parts}
    steps, count, times = (4, 1, 1) if small else (50, 4, 2)
    row: dict[str, Any] = {"name": name, "reuse": reuse, "weights": weights, "steps": steps, "images": count}
    how = {"seed": 0, "guidance": 4.0}
    for dtype in [torch.float32] if small else [torch.float16, torch.bfloat16, torch.float32]:
        try:
            with NetworkSession(graphs, compiled=compiles, device=torch.device(device), dtype=dtype) as session:
                sample(session, spec, Ddim(min(steps, 8)), method, list(range(count)), **how)
                (place / "ready").touch()
                while not (place / "go").exists():
                    time.sleep(0.02)
                took = []
                for _ in range(times):
                    began = time.perf_counter()
                    drawn = sample(session, spec, Ddim(steps), method, list(range(count)), **how)
                    took.append(time.perf_counter() - began)
            break
        except EngineError as error:  # numbers beyond half precision, or a kernel that a type lacks
            row.setdefault("instead_of", {})[str(dtype)] = str(error)[:300]
    else:
        raise RuntimeError(str(row["instead_of"]))
    row |= {"type": str(dtype), "how": session.engine, "seconds": took, "full_steps": len(drawn.full_ns)}
    row["median_full_ms"] = float(np.median(drawn.full_ns)) / 1e6
    if drawn.reused_ns:
        row["median_reused_ms"] = float(np.median(drawn.reused_ns)) / 1e6
    np.save(place / "drawn.npy", drawn.samples)
    (place / "row.new").write_text(json.dumps(row))
    (place / "row.new").replace(place / "row.json")


def start_samplers(report: Report) -> None:
    """Have children make the samplers ready, each in a folder."""
    study = need_study(report)
    for name, reuse in SAMPLERS:
        folder = report.work / f"{name}-{reuse.replace(':', '')}"
        if not folder.exists():
            folder.mkdir()
            task = ["sample", str(report.device), name, reuse, str(folder), report.compiles and not report.small]
            study.children.start(folder.name, task, aside=True)


def diffusion(report: Report) -> None:
    """Diffusion Transformers with and without reuse of steps: the demo's, and DiT-XL/2. Children draw, by turns."""
    start_samplers(report)
    children, until = need_study(report).children, report.until(0.6)
    rows: list[dict[str, Any]] = []
    plain: dict[str, np.ndarray] = {}

    def appears(path: Path, child: str) -> bool:
        while not path.exists() and children.said(child) is None and not report.over(until):
            time.sleep(0.02)
        return path.exists()

    for name, reuse in SAMPLERS:
        folder = report.work / f"{name}-{reuse.replace(':', '')}"
        if appears(folder / "ready", folder.name):
            with children.paused(but=folder.name):
                (folder / "go").touch()
                appears(folder / "row.json", folder.name)
        if (folder / "row.json").exists():
            row = json.loads((folder / "row.json").read_text())
            drawn = np.load(folder / "drawn.npy")
            first = plain.setdefault(name, drawn) if reuse == "none" else plain.get(name)
            if first is not None:
                row["from_none"] = float(np.linalg.norm(drawn - first) / np.linalg.norm(first))
            report.say(f"{name}, reuse {reuse}: {row['seconds'][-1]:.2f} s for {row['images']} images, {row['type']}")
        else:
            row = {"name": name, "reuse": reuse, "error": children.said(folder.name) or "not done in time"}
            report.say(f"{name}, reuse {reuse}: {row['error'][-150:]}")
        rows.append(row)
        report.write(
            "dit", rows, note="graphs cast to `type`; from_none is how far samples are from those without reuse"
        )


TASKS: Mapping[str, Callable[..., None]] = {
    "preflight": _compile_a_line,
    "subject": _compile_a_subject,
    "sample": _sample,
}
"""What children do."""
SECTIONS: Mapping[str, Callable[[Report], None]] = {
    "prepare": prepare,
    "contract": contract,
    "accuracy": accuracy,
    "speed": speed,
    "profile": profiles,
    "end-to-end": end_to_end,
    "lengths": lengths,
    "diffusion": diffusion,
    "batches": batches_of,
    "late": late,
}
"""In the order in which they run; what takes long and tells least comes last."""


def main() -> int:
    """Run all sections in order until the time is over; a section that fails is said, and the next one runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    allow_recompilations()
    if asked.child:
        task, *arguments = json.loads(asked.child)
        TASKS[task](*arguments)
        return 0
    device = torch.device(asked.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: install a driver, or try this with --device cpu", file=sys.stderr)
        return 1
    asked.output.mkdir(parents=True, exist_ok=True)
    ends, facts = time.monotonic() + asked.seconds, gpu_environment(device)
    with tempfile.TemporaryDirectory(prefix="vitfold-gpu-") as work:
        report = Report(asked.output, device, ends, Path(work), device.type == "cpu", facts)
        report.say(f"{facts.get('gpu', 'CPU')}, torch {torch.__version__}, torchao {installed_version('torchao')}")
        try:
            failed = run_sections(report, asked.sections.split(","))
        finally:
            if report.study is not None:
                report.study.children.end()
        report.say(f"files: {', '.join(sorted(p.name for p in asked.output.glob('gpu-*.json')))}")
    return 1 if failed else 0


def run_sections(report: Report, names: Sequence[str]) -> list[str]:
    """Run sections and return those that failed, each of which has left a file with what it met."""
    failed = []
    for name in names:
        if report.over():
            report.say(f"no time for {name}")
            continue
        try:
            SECTIONS[name](report)
        except Exception:
            failed.append(name)
            report.write(f"{name}-failed", [{"error": traceback.format_exc()}])
            traceback.print_exc()
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
