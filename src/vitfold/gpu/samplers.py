"""Diffusion Transformers with and without reuse of steps, each drawn by a process of its own."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from vitfold.diffusion import find_method, sample
from vitfold.diffusion.opening import plan_parts, write_parts
from vitfold.engines.network.session import NetworkSession
from vitfold.errors import EngineError
from vitfold.gpu.report import Report
from vitfold.gpu.study import need_study
from vitfold.model import DiTSpec
from vitfold.model.dit import dit_param_shapes
from vitfold.sources.diffusers import dit_params
from vitfold.sources.dit import demo_dit_folder
from vitfold.target import find_target

SAMPLERS = tuple(itertools.product(("demo-dit", "dit-xl-2-256"), ("none", "stack:2", "fora:2")))
"""Diffusion Transformers, and how they reuse steps."""


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
    shared: dict[str, Any] = {"freq_shift": 1, "condition": "block", "activation": "gelu_tanh", "mlp_norm_eps": 1e-5}
    if name == "demo-dit":
        sizes: dict[str, Any] = {"image_size": 32, "patch_size": 4, "channels": 1, "outputs": 1, "classes": 10}
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


def draw(device: str, name: str, reuse: str, folder: str, compiles: bool) -> None:
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
    how: dict[str, Any] = {"seed": 0, "guidance": 4.0}
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
