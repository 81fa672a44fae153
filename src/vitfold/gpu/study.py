"""What is timed of ViT-B/16: its graphs written, its modules compiled ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vitfold import pipeline
from vitfold.bench.environment import installed_version
from vitfold.engines.network import Network
from vitfold.gpu.children import Children
from vitfold.gpu.report import TUNED, Report, Study, Subject, loaded, runner, wait
from vitfold.images import ImageSet, find_images
from vitfold.model import Model
from vitfold.pipeline.plan import Plan
from vitfold.pipeline.writing import write_graph
from vitfold.recipe import MergeRecipe, QuantRecipe
from vitfold.schedule import resolve_r
from vitfold.sources import demo_folder

PREFLIGHT = 60.0
"""Seconds after which a compiler that has not compiled a line counts as broken."""


def compiled(module: torch.nn.Module, device: torch.device, how: str) -> Callable[..., Any]:
    """Compile whole, for static shapes; replayed as a CUDA graph on a GPU. A network's body has code of its own."""
    module = module.body if isinstance(module, Network) else module
    mode = how if how == TUNED else "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(module, fullgraph=True, dynamic=False, mode=mode)


def captured(module: Callable[..., Any], x: torch.Tensor) -> Callable[..., Any]:
    """Return a module that is replayed as a CUDA graph without being compiled; what it returns is written anew."""
    cuda: Any = torch.cuda
    read, here, side = x.clone(), cuda.current_stream(x.device), cuda.Stream(x.device)
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
    batches: tuple[int, ...] = (1, 64, 8)
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
        compile_a_line(str(report.device))
    except Exception as error:  # whatever a compiler may meet
        report.say(f"does not compile here either: {type(error).__name__}: {str(error)[:150]}")
        return False
    return True


def compile_a_line(device: str) -> None:
    """Compile as little as can be, to see whether anything compiles."""
    x = torch.randn(64, 64, device=device)
    torch.compile(lambda x: torch.softmax(x @ x, -1) * 2)(x)
    wait(x.device)


def compile_a_subject(device: str, source: str, graph: str | None, dtype: str, how: str, batch: int) -> None:
    """Three calls: one compiles, one is recorded as a CUDA graph, one replays it."""
    subject = Subject("child", Path(graph) if graph else None, dtype, how)
    module = subject.module(torch.device(device), source)
    x = random_pixels(source, module, dtype, batch, torch.device(device))
    call = runner(compiled(module, torch.device(device), how), x)
    for _ in range(3):
        call()


def random_pixels(source: str, module: torch.nn.Module, dtype: str, batch: int, device: torch.device) -> torch.Tensor:
    """Return images (B, ...) as the module takes them, in a type, on a device; always the same."""
    size = module.ends.inputs[0].shape if isinstance(module, Network) else (3, *loaded(source).model.spec.image_size)
    generator = torch.Generator().manual_seed(0)
    return torch.randn((batch, *size), generator=generator).to(device, getattr(torch, dtype))
