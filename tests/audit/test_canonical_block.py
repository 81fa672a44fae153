"""The forms that the targets write give exactly the kernels that they were chosen for, in NVIDIA's compiler.

A newer compiler that breaks one of them is noticed here.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from audit.conftest import WIDE, quantizers_for
from vitfold.audit.audit import Audit, audit_graph
from vitfold.audit.limits import check_attention
from vitfold.target import TARGETS

BLOCK = {
    "tensorrt-fp16": ("sm86", {"gemm": 4, "attention": 1, "fused": 3}),
    "tensorrt-int8": ("sm86", {"gemm": 4, "attention": 1, "fused": 4}),
    "tensorrt-fp8": ("sm89", {"gemm": 4, "attention": 1, "fused": 4}),
}
PRECISION = {"tensorrt-fp16": "fp16", "tensorrt-int8": "int8", "tensorrt-fp8": "fp8"}
MERGE_KERNELS = 5


def quantizers(model, name):
    return None if name == "tensorrt-fp16" else quantizers_for(model, float8=name == "tensorrt-fp8")


def audited(written, model, name, r=(), **changes) -> Audit:
    target = replace(TARGETS[name], **changes)
    return audit_graph(written(model, target, quantizers(model, name), r), gpu=BLOCK[name][0])


@pytest.mark.parametrize("name", BLOCK)
def test_a_block_has_exactly_the_kernels_that_its_form_promises(tiny_model, written, name):
    found = audited(written, tiny_model(**WIDE), name)
    kinds = Counter(kernel.kind for kernel in found.per_block[1])
    assert kinds == BLOCK[name][1]
    assert {kernel.precision for kernel in found.per_block[1] if kernel.precision} == {PRECISION[name]}
    assert (found.copies, found.unfused, found.fused) == (0, 0, 3)
    assert found.findings == ()
    assert found.not_understood == ()
    classifier = 0 if name == "tensorrt-fp16" else 1
    assert found.gemms[PRECISION[name]] == 13 - classifier
    assert found.gemms["fp16"] == (13 if name == "tensorrt-fp16" else classifier)


@pytest.mark.parametrize("name", BLOCK)
def test_a_merge_adds_five_kernels_and_no_copy(tiny_model, written, name):
    plain = audited(written, tiny_model(**WIDE), name)
    merged = audited(written, tiny_model(**WIDE), name, (0, 48, 0))
    assert len(merged.kernels) - len(plain.kernels) <= MERGE_KERNELS
    assert merged.copies == 0
    assert merged.fused == 3, "the bias of merged tokens' sizes stays within the attention"
    assert merged.findings == ()


@pytest.mark.parametrize("merge", [None, "0,48,0", "8,8,8"])
@pytest.mark.parametrize("name", BLOCK)
def test_the_last_block_takes_the_form_of_the_fewest_kernels(tiny_model, deployed, name, merge):
    """Behind its attention one row is left; whether the attention itself has one query is the target's choice."""
    model, (gpu, _) = tiny_model(**WIDE), BLOCK[name]
    found, other = (
        audit_graph(deployed(model, name, quantizers(model, name), merge, whole_attention=whole), gpu=gpu)
        for whole in (TARGETS[name].whole_attention, not TARGETS[name].whole_attention)
    )
    assert (found.fused, found.unfused) == (3, 0)
    assert len(found.kernels) <= len(other.kernels)
    assert found.copies <= 1
    if name == "tensorrt-int8":
        assert found.attention_types == {"int8": 3}
        assert (other.fused, other.unfused) == (2, 1), "NVIDIA's compiler fuses one query, too: take the shorter form"
        (cut,) = found.findings
        assert (cut.kind, cut.where) == ("copies", ("blocks.2.attn",)), "one row is cut out of the attention's codes"


def test_every_kernel_knows_its_site(tiny_model, written):
    found = audited(written, tiny_model(**WIDE), "tensorrt-int8", (0, 48, 0))
    assert all(kernel.sites for kernel in found.kernels)
    assert {site for kernel in found.kernels for site in kernel.sites} >= {"blocks.1.attn.qkv", "blocks.1.mlp.fc2"}
    gemms = {site for kernel in found.kernels if kernel.kind == "gemm" for site in kernel.sites}
    assert {
        f"blocks.{n}.{layer}" for n in range(3) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    } <= gemms


def test_bytes_fall_to_a_quarter_of_the_single_precision_graph(tiny_model, written):
    model = tiny_model(**WIDE)
    single = audit_graph(written(model, "portable"), gpu="sm86")
    assert single.unfused == 3
    assert {finding.kind for finding in single.findings} == {"unfused attention", "copies", "single precision"}
    moved = audited(written, model, "tensorrt-int8").per_block[1]
    assert sum(k.bytes_moved for k in moved) <= 0.25 * sum(k.bytes_moved for k in single.per_block[1])


def test_scales_per_channel_in_half_precision_are_found_dangerous(tiny_model, written):
    found = audited(written, tiny_model(**WIDE), "tensorrt-int8", weight_scale="channel")
    (overflow,) = [finding for finding in found.findings if finding.kind == "overflow"]
    assert "blocks.0.attn.qkv" in overflow.where
    assert len(overflow.where) == 12
    assert {finding.kind for finding in found.findings} >= {"overflow", "subnormal scales"}


@pytest.mark.parametrize(
    ("left_out", "cause"),
    [
        (("q", "k"), "only v, softmax are quantized, q, k not"),
        (("softmax", "v"), "only q, k are quantized, v, softmax not"),
    ],
)
def test_attention_that_is_partly_quantized_is_explained(tiny_model, written, left_out, cause):
    model = tiny_model(**WIDE)
    dropped = {f"blocks.1.attn.{operand}" for operand in left_out}
    given = {site: q for site, q in quantizers(model, "tensorrt-int8").items() if site not in dropped}
    found = audit_graph(written(model, "tensorrt-int8", given), gpu="sm86")
    (explained,) = [finding for finding in found.findings if finding.kind == "unfused attention"]
    assert explained.where == ("blocks.1.attn.softmax",)
    assert explained.cause == cause


def test_attention_beyond_512_tokens_is_explained_before_and_after_the_build(tiny_model, written):
    model = tiny_model(**{**WIDE, "image_size": (384, 384), "num_layers": 1})
    foretold = check_attention([64], [577])
    assert foretold is not None
    assert foretold.where == ("blocks.0.attn",)
    found = audit_graph(written(model, "tensorrt-int8", quantizers(model, "tensorrt-int8")), gpu="sm86")
    (explained,) = [finding for finding in found.findings if finding.kind == "unfused attention"]
    assert "512 tokens" in explained.cause
    assert check_attention([64, 32], [512, 400]) is None
    assert "width 48" in check_attention([48], [100]).cause
    assert check_attention([64, 40], [100, 100]).where == ("blocks.1.attn",)


def test_dynamic_batches_and_other_gpus_have_the_same_kernels(tiny_model, written):
    path = written(tiny_model(**WIDE), "tensorrt-int8", quantizers(tiny_model(**WIDE), "tensorrt-int8"))
    counts = {gpu: len(audit_graph(path, gpu=gpu, batch=batch).kernels) for gpu, batch in (("sm80", 8), ("sm89", 64))}
    assert len(set(counts.values())) == 1
