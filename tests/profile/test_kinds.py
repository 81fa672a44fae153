"""The table of kinds, on the names that engines really report."""

from __future__ import annotations

import pytest

from vitfold.ops.count import Count
from vitfold.profile.kinds import KINDS, kind_of, part_of, parts_of, place_of, site_of


@pytest.mark.parametrize(
    ("name", "op", "kind"),
    [
        ("blocks.0.attn.qkv.2", "MatMulIntegerToFloat", "linear"),
        ("blocks.11.mlp.fc1", "Gemm", "linear"),
        ("blocks.0.mlp.fc2.bias", "Add", "linear"),
        ("patch_embed:0_nchwc", "Conv", "linear"),
        ("patch_embed/WithoutBiases", "Convolution", "linear"),
        ("head", "FullyConnected", "linear"),
        ("blocks.0.attn.qk", "FusedMatMul", "attention"),
        ("blocks.0.attn.av", "MatMul", "attention"),
        ("blocks.3.attn.transpose.3", "Subgraph", "attention"),
        ("blocks.0.attn.softmax", "Softmax", "softmax"),
        ("blocks.0.norm1", "LayerNormalization", "normalization"),
        ("MVN_41", "MVN", "normalization"),
        ("norm", "LayerNormalization", "normalization"),
        ("blocks.0.attn.q_norm", "LayerNormalization", "normalization"),
        ("blocks.0.mlp.act", "Gelu", "activation"),
        ("blocks.0.attn.qkv.x", "QuantizeLinear", "quantize"),
        ("blocks.0.mlp.fc1.x", "Subgraph", "quantize"),
        ("pool.q", "Gemm", "linear"),
        ("pool.attn.q", "QuantizeLinear", "quantize"),
        ("head.w", "DequantizeLinear", "quantize"),
        ("blocks.0.attn.proj.x", "Div", "quantize"),
        ("blocks.0.mlp.fc1.scale", "Mul", "quantize"),
        ("blocks.0.attn.proj.x.2", "Transpose", "layout"),
        ("blocks.0.attn.transpose.3", "Transpose", "layout"),
        ("ReorderOutput", "ReorderOutput", "layout"),
        ("blocks.0.merge.topk.2", "TopK", "merging"),
        ("blocks.0.merge.slice", "Slice", "merging"),
        ("blocks.0.attn.reducemean", "ReduceMean", "merging"),
        ("blocks.1.attn.log", "Log", "merging"),
        ("blocks.1.attn.bias", "Add", "merging"),
        ("blocks.0.attn.add", "Add", "other"),
        ("Power_16315", "Subgraph", "other"),
        ("__myl_Fc_0", "", "other"),
    ],
)
def test_kind(name: str, op: str, kind: str) -> None:
    assert kind_of(name, op) == kind
    assert kind in KINDS


def test_site_and_part() -> None:
    assert site_of("blocks.10.attn.qkv.2") == "blocks.10.attn.qkv"
    assert site_of("blocks.1.mlp.fc1/DequantizationMultiply") == "blocks.1.mlp.fc1"
    assert site_of("[ONNX Layer: blocks.4.norm1]") == "blocks.4.norm1"
    assert site_of("MVN_41") is None
    assert [part_of(s) for s in ("patch_embed", "embed.add", "blocks.10.norm1", "norm", "pool.slice", "head")] == [
        "embed", "embed", "blocks.10", "head", "head", "head",
    ]  # fmt: skip


def test_a_nameless_node_counts_to_the_one_behind_it() -> None:
    names = ["Reorder_1", "patch_embed", "MVN_2", "blocks.0.attn.qkv", "MVN_3", "blocks.1.attn.qkv", "MVN_4"]
    assert parts_of(names) == ["embed", "embed", "blocks.0", "blocks.0", "blocks.1", "blocks.1", "head"]


def test_every_counted_product_has_a_kind(tiny_model) -> None:
    from vitfold.architectures.programs import forward
    from vitfold.recipe import MergeRecipe

    model = tiny_model(pool="token")
    count = Count({name: array.shape for name, array in model.params.items()})
    forward(count, model.spec, MergeRecipe(r=(3, 3)), (1, 3, 32, 32))
    for cost in count.costs:
        if cost.macs and ".merge" not in cost.site:
            assert kind_of(cost.site, "") == ("linear" if cost.kind == "linear" else "attention"), cost.site


def test_parts_stand_as_in_the_model():
    parts = ["head", "blocks.10", "blocks.2", "embed", "blocks.0"]
    assert sorted(parts, key=place_of) == ["embed", "blocks.0", "blocks.2", "blocks.10", "head"]
