"""The model of a block's kernels agrees with the plan that NVIDIA's compiler makes of it."""

from __future__ import annotations

import pytest

from audit.conftest import WIDE, quantizers_for
from vitfold.audit.audit import audit_graph
from vitfold.audit.canonical import BlockShape, block_kernels

SHAPE = BlockShape(width=384, heads=6, head_width=64, hidden=768, inner=768)


@pytest.mark.parametrize("merged", [0, 48])
@pytest.mark.parametrize(("name", "precision"), [("tensorrt-fp16", "fp16"), ("tensorrt-int8", "int8")])
def test_kernels_bytes_and_work_of_a_block(tiny_model, written, name, precision, merged):
    model = tiny_model(**WIDE)
    quantizers = None if precision == "fp16" else quantizers_for(model, float8=False)
    found = audit_graph(written(model, name, quantizers, (0, merged, 0)), gpu="sm86", batch=8).per_block[1]
    modelled = block_kernels(SHAPE, precision, batch=8, tokens=197, merged=merged, sizes=False)
    # After a merge FP16 adds the residual in the next LayerNorm, which then counts for this block.
    assert len(found) - len(modelled) == (1 if merged and precision == "fp16" else 0)
    if not (merged and precision == "fp16"):
        assert sum(k.bytes_moved for k in modelled) == pytest.approx(sum(k.bytes_moved for k in found), rel=1e-3)
    assert sum(k.macs for k in modelled) == pytest.approx(sum(k.macs for k in found), rel=2e-3)
    assert sum(k.weight_bytes for k in modelled) == pytest.approx(sum(k.weight_bytes for k in found), rel=2e-2)


def test_attention_beyond_the_limit_stays_fp16(tiny_model, written):
    model = tiny_model(**{**WIDE, "image_size": (384, 384)})
    quantizers = quantizers_for(model, float8=False, attention=False)
    found = audit_graph(written(model, "tensorrt-int8", quantizers), gpu="sm86", batch=8).per_block[1]
    modelled = block_kernels(SHAPE, "int8", batch=8, tokens=577, merged=0, sizes=False)
    assert [k.kind for k in modelled] == [k.kind for k in found]
    assert [k.precision for k in modelled] == [k.precision for k in found]
    assert sum(k.bytes_moved for k in modelled) == pytest.approx(sum(k.bytes_moved for k in found), rel=1e-3)


def test_a_merge_makes_everything_behind_it_smaller():
    few, none = (block_kernels(SHAPE, "int8", batch=1, tokens=197, merged=m, sizes=True) for m in (96, 0))
    assert len(few) == len(none) + 5
    work = {kernel.name: kernel.macs for kernel in none}
    for kernel in few:
        if kernel.name in ("mlp.fc1", "mlp.fc2"):
            assert kernel.macs == work[kernel.name] * 101 // 197
