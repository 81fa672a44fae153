"""The report itself: its sections, most important first, within a time that is given."""

from __future__ import annotations

import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from vitfold.bench.environment import installed_version
from vitfold.gpu.arrival import end_to_end
from vitfold.gpu.checks import accuracy, contract
from vitfold.gpu.kernels import profiles
from vitfold.gpu.lengths import lengths
from vitfold.gpu.report import Report, gpu_environment
from vitfold.gpu.samplers import diffusion
from vitfold.gpu.speed import batches_of, late, speed
from vitfold.gpu.study import allow_recompilations, prepare

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


def measure(
    output: Path, device: str = "cuda", seconds: float = 360.0, sections: Sequence[str] = tuple(SECTIONS)
) -> int:
    """Run sections in order until the time is over; return 0 if none failed, else 1.

    A section that fails is said, and the next one runs. Files are `gpu-NAME.json` in `output`.
    """
    on = torch.device(device)
    if on.type == "cuda" and not torch.cuda.is_available():
        print(
            "no CUDA device: install a driver and the build of PyTorch for it, or see what there is to measure with: "
            "python -m vitfold.gpu --device cpu --output DIR",
            file=sys.stderr,
        )
        return 1
    allow_recompilations()
    output.mkdir(parents=True, exist_ok=True)
    ends, facts = time.monotonic() + seconds, gpu_environment(on)
    with tempfile.TemporaryDirectory(prefix="vitfold-gpu-") as work:
        report = Report(output, on, ends, Path(work), on.type == "cpu", facts)
        report.say(f"{facts.get('gpu', 'CPU')}, torch {torch.__version__}, torchao {installed_version('torchao')}")
        try:
            failed = run_sections(report, sections)
        finally:
            if report.study is not None:
                report.study.children.end()
        report.say(f"files: {', '.join(sorted(p.name for p in output.glob('gpu-*.json')))}")
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
