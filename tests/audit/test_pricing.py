"""What an audit keeps of its kernels prices them again; what is no audit is refused with the cure."""

from __future__ import annotations

import json

import pytest

from vitfold.audit.canonical import BlockShape, block_kernels
from vitfold.audit.pricing import costs, priced, read_costs, reprice, usual_gpu
from vitfold.errors import EngineError, TargetError

SHAPE = BlockShape(width=384, heads=6, head_width=64, hidden=1536, inner=1536)
KERNELS = block_kernels(SHAPE, "int8", batch=8, tokens=197, merged=48, sizes=False)


def document() -> dict:
    found = {
        "name": "a",
        "gpu": "sm86",
        "kernels_per_block": {},
        **priced(KERNELS * 2, "A10"),
        "costs": costs(KERNELS * 2),
    }
    return json.loads(json.dumps(found))


def test_kernels_survive_json():
    again = read_costs(document()["costs"])
    assert len(again) == 2 * len(KERNELS)
    assert sum(one.macs for one in again) == 2 * sum(one.macs for one in KERNELS)
    assert reprice(document(), "A10") == document()
    assert reprice(document()) == {key: value for key, value in document().items() if key != "tiles"}


def test_another_gpu_s_tiles_may_be_shown():
    found = reprice(document(), "H100")
    assert found["tiles"]["gpu"] == "H100"
    assert found["predicted_ms"] == document()["predicted_ms"]
    names = [row["name"] for row in found["tiles"]["products"]]
    assert names == ["attn.qkv", "attn", "attn.proj", "merge.scores", "mlp.fc1", "mlp.fc2"]
    assert all(row["count"] == 2 for row in found["tiles"]["products"])
    with pytest.raises(TargetError, match="no peaks are known"):
        reprice(document(), "H1000")


def test_tiles_of_a_type_that_a_gpu_lacks_are_refused():
    float8 = block_kernels(SHAPE, "fp8", batch=8, tokens=197, merged=0, sizes=False)
    with pytest.raises(
        TargetError, match=r"A100 .* does not multiply a type of this plan; its tiles are known on H100"
    ):
        priced(float8, "A100")


def test_a_capability_has_a_usual_gpu():
    assert [usual_gpu(plan) for plan in ("sm75", "sm80", "sm86", "sm89", "sm120")] == [
        "T4", "A100", "A10", "H100", "RTX5090",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d.pop("kernels_per_block"), "no audit"),
        (lambda d: d.pop("costs"), "earlier vitfold .* audit its bundle anew"),
        (lambda d: d["costs"][0].update(count=0), r"costs\[0\].count has to be an integer of 1 to"),
        (lambda d: d["costs"][0]["product"].update(rows=-1), r"costs\[0\].product.rows"),
        (lambda d: d["costs"][0]["product"].pop("depth"), r"costs\[0\].product.depth is missing"),
        (lambda d: d["costs"][0].update(kind="magic"), r"costs\[0\].kind"),
        (lambda d: d.update(costs={}), "costs"),
        (lambda d: d.update(costs=[3]), r"costs\[0\]"),
    ],
)
def test_what_is_no_audit_is_refused(change, told):
    broken = document()
    change(broken)
    with pytest.raises(EngineError, match=told):
        reprice(broken)
