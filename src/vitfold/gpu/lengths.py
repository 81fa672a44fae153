"""Products and attention of a block at lengths that fill kernels' tiles and lengths that do not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from vitfold.bench.timing import interleave
from vitfold.gpu.report import Report, wait
from vitfold.gpu.speed import medians_ms
from vitfold.gpu.study import has_float8

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
        ms = {name: float(np.median(medians_ms(trials))) / launches for name, trials in timed.items()}
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
            how: dict[str, Any] = {"scale_a": one, "scale_b": one, "out_dtype": dtype, "use_fast_accum": True}
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
