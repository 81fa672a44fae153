"""The roofline model against sums done by hand, and its table of GPUs."""

from __future__ import annotations

import pytest

from vitfold.audit.kernels import Kernel
from vitfold.audit.roofline import Ceilings, find_gpu, gpus, predict
from vitfold.errors import TargetError

PLAIN = Ceilings(compute=1.0, memory=1.0, launch_us=0.0)


def kernel(**changes) -> Kernel:
    given = {
        "name": "k", "kind": "gemm", "precision": "int8", "macs": 0, "bytes_moved": 0, "weight_bytes": 0, "nodes": (),
        "sites": (), "block": 0, "shapes": (),
    }  # fmt: skip
    return Kernel(**{**given, **changes})


def test_a_kernel_takes_what_its_slower_side_takes():
    a100 = find_gpu("A100")
    busy, streaming = kernel(macs=624 * 10**9 // 2), kernel(bytes_moved=2039 * 10**6, precision=None, kind="fused")
    assert predict([busy], a100, PLAIN).ms == pytest.approx(1.0)
    assert predict([streaming], a100, PLAIN).ms == pytest.approx(1.0)
    both = predict([busy, streaming], a100, PLAIN)
    assert both.ms == pytest.approx(2.0)
    assert both.share == pytest.approx({"compute": 0.5, "memory": 0.5, "launch": 0.0})
    overlapped = kernel(macs=624 * 10**9 // 2, bytes_moved=1019 * 10**6)
    assert predict([overlapped], a100, PLAIN).ms == pytest.approx(1.0)


def test_weights_count_as_traffic_and_launches_as_time():
    a100 = find_gpu("a100")
    assert predict([kernel(weight_bytes=2039 * 10**6)], a100, PLAIN).ms == pytest.approx(1.0)
    many = predict([kernel()] * 100, a100, Ceilings(compute=0.5, memory=0.5, launch_us=2.0))
    assert many.ms == pytest.approx(0.2)
    assert many.bound == "launch"


def test_a_gpu_runs_only_the_types_that_it_multiplies():
    assert not find_gpu("A100").runs([kernel(precision="fp8")])
    assert find_gpu("L4").runs([kernel(precision="fp8"), kernel(precision=None)])


def test_the_table_is_complete_and_consistent():
    for gpu in gpus():
        assert gpu.source
        assert gpu.plan.startswith("sm")
        assert gpu.peak["fp32"] < gpu.peak["fp16"] < gpu.peak["int8"]
        assert ("fp8" in gpu.peak) == (gpu.plan in ("sm89", "sm120"))
    with pytest.raises(TargetError, match="A10"):
        find_gpu("A101")
