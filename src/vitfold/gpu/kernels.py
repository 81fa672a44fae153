"""Time by kind of kernel, from PyTorch's profiler."""

from __future__ import annotations

from typing import Any

from vitfold.gpu.report import Report
from vitfold.gpu.study import need_study

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
