"""The compiler's list of kernels is read, whatever stands in it and wherever it ends."""

from __future__ import annotations

import pytest

from vitfold.audit.kernels import read_kernel
from vitfold.audit.layers import Layer, TensorUse, parse_layers

_LINEAR = "Format: (Linear) Row major linear format"
GEMM = (
    "Name: blocks.0.mlp.fc1_myl0_8, LayerType: gemm, Inputs: [ { Name: a, Dimensions: [1576,768], Strides: [768,1], "
    f"StrideOrder: [1,0], Datatype: Int8, {_LINEAR} }}], Constants: [ {{ Name: w, Dimensions: [768,3072], Strides: "
    f"[3072,1], StrideOrder: [1,0], Datatype: Int8, {_LINEAR} }}, {{ Name: alpha, Dimensions: [1], Strides: [1], "
    f"StrideOrder: [0], Datatype: Float, {_LINEAR} }}], Outputs: [ {{ Name: y, Dimensions: [1576,3072], Strides: "
    f"[3072,1], StrideOrder: [1,0], Datatype: Half, {_LINEAR} }}], TacticName: __myelin_CASK_STUB, StreamId: 0, "
    "Metadata: [ONNX Layer: blocks.0.mlp.fc1][ONNX Layer: blocks.0.mlp.fc1.w]"
)
SIGNAL = "Name: signal_1, LayerType: signal, Inputs: [], EventId: 3"


def tensor(*shape: int, kind: str = "Half", strides: tuple[int, ...] | None = None) -> TensorUse:
    return TensorUse(name="t", shape=shape, strides=strides or (1,) * len(shape), type=kind)


def layer(name: str, kind: str = "kgen", **parts: tuple[TensorUse, ...]) -> Layer:
    given = {"inputs": (), "constants": (), "outputs": (), **parts}
    return Layer(name=name, type=kind, nodes=("n",), **given)


def test_a_gemm_is_read_with_its_types_work_and_nodes():
    read = parse_layers(f"Layers:\n{GEMM}\n{SIGNAL}\n\nI/O Tensors:\n Name: x")
    (kernel,) = read.kernels
    assert len(read.layers) == 2
    assert kernel.nodes == ("blocks.0.mlp.fc1", "blocks.0.mlp.fc1.w")
    found = read_kernel(kernel, {"blocks.0.mlp.fc1": "blocks.0.mlp.fc1"}, frozenset())
    assert (found.kind, found.precision, found.block) == ("gemm", "int8", 0)
    assert found.macs == 1576 * 768 * 3072
    assert found.bytes_moved == 1576 * 768 + 2 * 1576 * 3072
    assert found.weight_bytes == 768 * 3072 + 4
    assert read.unread == read.unknown_types == ()


def test_a_log_that_ends_within_a_line_gives_the_layers_before_it():
    read = parse_layers(f"Layers:\n{GEMM}\n{GEMM[:300]}")
    assert len(read.kernels) == 1
    assert len(read.unread) == 1


def test_an_unknown_layer_type_is_kept_and_named():
    read = parse_layers("Layers:\n" + GEMM.replace("LayerType: gemm", "LayerType: quantum"))
    assert read.unknown_types == ("quantum",)
    assert len(read.kernels) == 1
    assert read_kernel(read.kernels[0], {}, frozenset()).kind == "other"


def test_noise_between_layers_is_reported():
    assert parse_layers(f"Layers:\nsomething else\n{GEMM}").unread == ("something else",)
    assert parse_layers("Layers:").kernels == ()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("__myl_ReshMoveConc_myl0_3", "copy"),
        ("__myl_CastMeanSubMulMeanAddSqrtDivMulCastMulAdd_myl0_7", "fused"),
        ("__myl_MoveTopk_myl0_18", "sort"),
        ("_gemm_mha_v2_myl0_5", "attention"),
        ("__myl_FcAddAdd_myl0_6", "fused"),
    ],
)
def test_kinds_follow_the_names_of_generated_kernels(name, kind):
    assert read_kernel(layer(name), {}, frozenset()).kind == kind


def test_a_copy_of_the_graphs_input_is_an_edge():
    source = layer("__myl_CastConc_myl0_0", inputs=(tensor(8, 3, 4, 4, kind="Float"),))
    assert read_kernel(source, {}, frozenset({"t"})).kind == "edge"
    assert read_kernel(source, {}, frozenset()).kind == "copy"


def test_a_repeated_axis_moves_no_bytes():
    assert tensor(8, 197, 768, strides=(0, 768, 1)).bytes == 197 * 768 * 2
    assert tensor(3, 5, kind="FP4").bytes == 8


def test_work_of_attention_and_of_products_of_activations():
    mha = layer(
        "_gemm_mha_v2_myl0_5",
        inputs=(
            tensor(96, 197, 64, kind="Int8"),
            tensor(96, 64, 197, kind="Int8"),
            tensor(8, 1, 1, 197),
            tensor(96, 197, 64),
        ),
        outputs=(tensor(96, 197, 64),),
    )
    found = read_kernel(mha, {}, frozenset())
    assert found.macs == 2 * 96 * 197 * 197 * 64
    assert found.precision == "int8", "the bias is added in FP16, the products are 8 bit"
    scores = layer(
        "blocks.1.merge.scores_myl0_16",
        "gemm",
        inputs=(tensor(8, 98, 64), tensor(8, 64, 99)),
        outputs=(tensor(8, 98, 99),),
    )
    found = read_kernel(scores, {"n": "blocks.1.merge.scores"}, frozenset())
    assert (found.kind, found.macs, found.is_unfused_attention) == ("product", 8 * 98 * 99 * 64, False)
    assert read_kernel(scores, {"n": "blocks.1.attn.qk"}, frozenset()).is_unfused_attention
