"""Documents as the commands write them, small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vitfold.report.sheet import contact_sheet

ENVIRONMENT: dict[str, Any] = {
    "processor": {"name": "A processor", "architecture": "x86_64", "instruction_sets": ["avx2"]},
    "cores": 2,
    "threads": 2,
    "system": "Linux 6",
    "python": "3.11.7",
    "packages": {"vitfold": "0.1.0", "onnxruntime": "1.31.1"},
    "load_average": 0.1,
}


def work(name: str) -> dict[str, Any]:
    integer = {"macs_ratio": 0.96, "dequantized_operands": 0} if "w8a8" in name else None
    energy = {"total_uj": 6510.0, "source": "a published table"}
    return {"integer": integer, "macs": 10**9, "bytes": 101_000_000, "energy": energy}


def bench_row(name: str, ms: float | None, top1: float | None, scope: str = "engine", **changes: Any) -> dict[str, Any]:
    fidelity = {"images": 436, "top1": top1, "top5": 1.0, "agreement": 0.97, "cosine": 0.99, "sqnr_db": 20.0}
    row: dict[str, Any] = {
        "bundle": name, "engine": "onnxruntime 1.31.1", "batch": 1, "scope": scope,
        "latency_ms": None if ms is None else {"median": ms, "iqr": 0.2},
        "throughput_ips": None if ms is None else {"median": 1e3 / ms},
        "noisy": False,
        "fidelity": None if top1 is None else fidelity,
        "speed_up": None if ms is None else {"median": 16.0 / ms, "iqr": 0.1, "baseline": "r0"},
        "tokens": 65, "macs": 10**9, "size_bytes": 86_000_000, "work": None if name == "torch" else work(name),
    }  # fmt: skip
    return {**row, **changes}


def bench() -> dict[str, Any]:
    rows = [bench_row("torch", 22.0, 0.88), bench_row("r0", 16.0, 0.88), bench_row("r4", 13.0, 0.885)]
    rows += [bench_row("r0-w8a8", 8.0, 0.885), bench_row("r4-w8a8", 6.2, 0.874), bench_row("r8-w8a8", 5.0, 0.80)]
    return {"environment": ENVIRONMENT, "rows": [*rows, bench_row("r0", 40.0, 0.88, "end_to_end")], "measurements": []}


def sweep_row(r: int, quant: str, ms: float | None, top1: float | None, **changes: Any) -> dict[str, Any]:
    name = f"r{r}" if quant == "none" else f"r{r}-{quant}"
    row: dict[str, Any] = {
        "recipe": name, "merge": [r] * 12, "quant": quant, "method": "vitfold", "bundle": None, "top1": top1,
        "top1_agreement": None if top1 is None else 0.99, "cosine": None if top1 is None else 0.995,
        "latency_ns": None if ms is None else {"median": ms * 1e6, "trials": [ms * 1e6 - 1e5, ms * 1e6 + 1e5]},
        "speedup": None if ms is None else {"median": 16 / ms, "low": 15 / ms, "high": 17 / ms},
        "throughput_ips": None if ms is None else 1e3 / ms, "size_bytes": 23_000_000, "images": 5000, "error": None,
        "commands": [f"vitfold optimize demo --merge {r} --quant {quant} -o {name}.fold"], "target": "cpu",
        "drop": None if top1 is None else {"drop": 0.89 - top1, "low": 0.889 - top1, "high": 0.891 - top1},
    }  # fmt: skip
    return {**row, **changes}


def sweep() -> list[dict[str, Any]]:
    rows = [sweep_row(r, "none", 16.0 - r, 0.89 - 0.001 * r * r) for r in (0, 2, 4)]
    rows += [sweep_row(r, "w8a8", 8.0 - r / 2, 0.89 - 0.0012 * r * r) for r in (0, 2, 4)]
    return [*rows, sweep_row(9, "w8a8", None, None, error="RecipeError: <b>block 8</b> has one pair left")]


def evaluation() -> dict[str, Any]:
    return {"images": 5000, "top1": 0.8918, "top5": 0.99, "agreement": 1.0, "cosine": 1.0, "sqnr_db": None,
            "reference": "unfolded float32", "engine": "onnxruntime 1.31.1", "skipped": []}  # fmt: skip


def ladder() -> dict[str, Any]:
    rows = [
        {"method": method, "scheme": scheme, "seed": seed, "engine": "simulation", "attention": True, "error": None,
         "fidelity": {"images": 300, "top1": top1 + 0.001 * seed, "cosine": 0.9, "sqnr_db": 12.0}}
        for method, scheme, top1 in (("vitfold", "W8A8", 0.89), ("vitfold", "W4A4", 0.87), ("minmax", "W8A8", 0.88))
        for seed in (0, 1)
    ]  # fmt: skip
    return {"source": "demo", "model_digest": "0", "merge": [0], "images": 300, "images_digest": "1",
            "calibration_size": 8, "environment": ENVIRONMENT, "rows": rows}  # fmt: skip


def sensitivity() -> dict[str, Any]:
    names = [f"blocks.{i}.{part}" for i in range(12) for part in ("attn.qkv", "attn", "mlp.fc1")]
    sites = [
        {"site": name, "sqnr_db": 30.0 + i, "noise_ratio": 0.1 / (i + 1), "agreement": 0.99, "macs_ratio": 0.02}
        for i, name in enumerate(names)
    ]
    return {"source": "demo", "images": 32, "recipe": {}, "sites": sites}


def profile() -> dict[str, Any]:
    kinds = [
        ("linear", 6.0, 10**9, 0.6),
        ("softmax", 1.0, 0, None),
        ("merging", 2.0, 0, None),
        ("quantize", 0.0, 0, None),
    ]
    times = {"linear": 3.0, "softmax": 0.5, "merging": 1.0}
    blocks = [{"block": name, "ms": times, "macs": 5} for name in ("embed", "blocks.0")]
    return {
        "bundle": "r4-w8a8", "engine": "onnxruntime 1.31.1", "recipe": {}, "tokens": [65, 61], "batch": 1,
        "latency_ms": {"plain": 9.5, "profiled": 10.0}, "overhead_ratio": 0.05, "nodes_ms": 9.0, "outside_ms": 1.0,
        "unnamed_ms": 0.0,
        "kinds": [
            {"kind": kind, "ms": ms, "ratio": ms / 9, "nodes": int(ms > 0), "macs": macs, "bytes": 1,
             "integer_macs": macs,
             "gmacs_per_s": 150.0 if macs else None, "gbytes_per_s": 1.0, "ceiling_ratio": ratio}
            for kind, ms, macs, ratio in kinds
        ],
        "blocks": blocks, "merging": {"costs_ms": 2.0, "saves_ms": 5.0},
        "ceiling": {"float_gmacs_per_s": 60.0, "integer_gmacs_per_s": 200.0, "copy_gbytes_per_s": 7.0},
        "advice": ["The bottleneck is linear layers: 6.00 ms."], "environment": ENVIRONMENT,
    }  # fmt: skip


def diffusion_row(
    name: str, full: int, seconds: float, psnr: float | None, *, steps: int = 20, frechet: float | None = None,
    **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    row: dict[str, Any] = {
        "name": name, "reuse": name.partition(", ")[0], "steps": steps, "full_steps": full,
        "reused_steps": steps - full, "reused_step_ratio": None if steps == full else 0.1,
        "seconds_per_image": seconds, "speedup": 0.4 / seconds, "speedup_iqr": 0.04, "noisy": False, "psnr_db": psnr,
        "ssim": 1.0 if psnr is None else 0.9, "frechet": frechet, "frechet_reason": None, "class_accuracy": None,
        "kept_bytes": 1_700_000,
    }  # fmt: skip
    return {**row, **changes}


def diffusion(**changes: Any) -> dict[str, Any]:
    rows = [
        diffusion_row("none", 20, 0.4, None, frechet=21.5, frechet_noise=0.5),
        diffusion_row("none, w8a8", 20, 0.32, 41.0, frechet=21.6, frechet_noise=0.5),
        diffusion_row("stack:2, w8a8", 11, 0.2, 33.25, frechet=22.5, frechet_noise=0.5),
        diffusion_row("none, 11 steps", 11, 0.22, 24.5, steps=11, frechet=30.0),
        diffusion_row("stack:4, w8a8", 7, 0.125, 28.0, noisy=True),
        diffusion_row("none, 7 steps", 7, 0.14, 18.0, steps=7, frechet=40.0),
        diffusion_row("first-block:0.01, w8a8", 20, 0.5, None, frechet=21.5),
    ]
    return {
        "source": "demo-dit", "classes": [0, 7, 9], "seed": 0, "steps": 20, "sampler": "ddim", "guidance": 2.5,
        "batch": 8, "merge": 0, "quant": "w8a8", "features": "garments.safetensors", "engine": "onnxruntime 1.31.1",
        "chosen": None, "environment": ENVIRONMENT, "rows": rows, "measurements": [], **changes,
    }  # fmt: skip


def held_out(**changes: Any) -> dict[str, Any]:
    """What a search adds: its winner again, on seeds that chose nothing."""
    winner = diffusion_row("stack:2, w8a8", 11, 0.2, 32.0, speedup=1.9, psnr_drop_db=None)
    found = {"images": 64, "winner": winner, "refused": [], **changes}
    name = None if found["winner"] is None else found["winner"]["name"]
    reason = "the fastest candidate that keeps the bounds on held-out seeds"
    return {"bounds": {"min_psnr_db": 30.0}, "winner": name, "held_out": found, "reason": reason}


def write_sheet(folder: Path, *, side: int = 32, lines: int = 7) -> Path:
    """Write what lies beside a document of `vitfold diffusion sample`: a line per row, a column per class."""
    images = np.random.default_rng(0).random((3, 1, side, side), np.float32)
    path = folder / "sheet.png"
    contact_sheet({str(line): images for line in range(lines)}).save(path)
    return path


def fill(folder: Path) -> Path:
    """Write one document of every kind."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("demo", bench()),
        ("accuracy", evaluation()),
        ("methods", ladder()),
        ("sites", sensitivity()),
        ("r4-profile", profile()),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "steps").mkdir(exist_ok=True)
    (folder / "steps" / "diffuse.json").write_text(json.dumps(diffusion()))
    write_sheet(folder / "steps")
    (folder / "sweep.json").write_text(json.dumps({"source": "demo", "protocol": "quick", "environment": ENVIRONMENT}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sweep()))
    return folder
