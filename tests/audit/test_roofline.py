"""The model of a plan's time against sums done by hand, and its table of GPUs."""

from __future__ import annotations

import pytest

from vitfold.audit.gpus import Ceilings, constants, find_gpu, gpus
from vitfold.audit.kernels import Kernel, Product
from vitfold.audit.roofline import predict
from vitfold.errors import TargetError

PLAIN = Ceilings(compute=1.0, memory=1.0, launch_us=0.0)
FULL = Product(matrices=1, rows=256 * 108, columns=128, depth=64 * 1375)
"""One wave of the largest tiles on 108 multiprocessors, nothing padded."""
BOOST_GHZ = {
    "H100": 1.98, "H200": 1.98, "A100": 1.41, "A10": 1.695, "L40S": 2.52, "L4": 2.04, "T4": 1.59, "RTX3090": 1.695,
    "RTX4090": 2.52, "RTX5090": 2.407,
}  # fmt: skip


def kernel(**changes) -> Kernel:
    given = {
        "name": "k", "kind": "gemm", "precision": "int8", "product": None, "bytes_moved": 0, "weight_bytes": 0,
        "nodes": (), "sites": (), "block": 0, "shapes": (),
    }  # fmt: skip
    return Kernel(**{**given, **changes})


def test_a_kernel_takes_what_its_slower_side_takes():
    a100 = find_gpu("A100")
    busy, streaming = kernel(product=FULL), kernel(bytes_moved=2039 * 10**6, precision=None, kind="fused")
    alone = predict([busy], a100, PLAIN)
    assert alone.ms == pytest.approx(1e3 * 2 * FULL.macs / 624e12)
    assert alone.ms == pytest.approx(alone.roofline_ms), "full tiles in a full wave cost what the roofline says"
    assert alone.padding == alone.idle == 0.0
    assert predict([streaming], a100, PLAIN).ms == pytest.approx(1.0)
    both = predict([busy, streaming], a100, PLAIN)
    assert both.ms == pytest.approx(1.0 + alone.ms)
    assert both.share == pytest.approx({"compute": alone.ms / both.ms, "memory": 1 / both.ms, "launch": 0.0})
    overlapped = kernel(product=FULL, bytes_moved=500 * 10**6)
    assert predict([overlapped], a100, PLAIN).ms == pytest.approx(alone.ms)


def test_padding_and_idle_time_are_weighted_by_arithmetic():
    a100, odd = find_gpu("A100"), Product(matrices=1, rows=197, columns=768, depth=768)
    alone = predict([kernel(product=odd)], a100, PLAIN)
    assert alone.padding > 0.05
    assert alone.idle > 0.05
    full = predict([kernel(product=FULL)], a100, PLAIN)
    both = predict([kernel(product=odd), kernel(product=FULL)], a100, PLAIN)
    assert both.padding == pytest.approx(alone.padding * alone.ms / (alone.ms + full.ms))
    assert both.idle == pytest.approx(alone.idle * alone.ms / (alone.ms + full.ms))
    assert both.ms > both.roofline_ms


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
        assert gpu.devices
        assert gpu.plan.startswith("sm")
        assert gpu.peak["fp32"] < gpu.peak["fp16"] < gpu.peak["int8"]
        assert ("fp8" in gpu.peak) == (gpu.plan in ("sm89", "sm120"))
    with pytest.raises(TargetError, match="A10"):
        find_gpu("A101")


@pytest.mark.parametrize("gpu", gpus(), ids=lambda gpu: gpu.key)
def test_multiprocessors_times_cores_times_the_boost_clock_are_the_peak_in_fp32(gpu):
    cores = 64 if gpu.plan in ("sm75", "sm80") else 128
    assert 2 * gpu.multiprocessors * cores * BOOST_GHZ[gpu.key] * 1e9 == pytest.approx(gpu.peak["fp32"], rel=0.01)


def test_constants_name_their_source_and_that_no_machine_was_measured():
    found = constants(["H100", "A10"])
    assert found["measured_on"] is None
    assert "assumed" in found["ceilings"]["source"]
    assert "Matrix Multiplication Background" in found["tiles"]["source"]
    assert {gpu: one["multiprocessors"] for gpu, one in found["gpus"].items()} == {"H100": 132, "A10": 72}
    assert all(one["source"] for one in found["gpus"].values())
