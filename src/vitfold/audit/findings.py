"""What is wrong with a graph for NVIDIA's compiler, why, and what cures it.

Findings about the file need no build; those about the plan explain what the compiler did.

Source: the fusion rules of TensorRT's INT8 attention (NVIDIA/TensorRT issues 2981, 3714, 4167), and plans of
TensorRT for RTX, compiled by this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vitfold.audit.facts import AttentionFacts, GraphFacts
from vitfold.audit.kernels import Kernel
from vitfold.audit.limits import INT8_ATTENTION_TOKENS, Finding

_SMALLEST_NORMAL_HALF = 2.0**-14


def find_problems(facts: GraphFacts, kernels: Sequence[Kernel]) -> tuple[Finding, ...]:
    """Return everything that is wrong, the worst first."""
    found = [
        *_overflow(facts),
        *_zero_points(facts),
        *_float_gemms(facts, kernels),
        *_unfused(facts, kernels),
        *_copies(kernels),
        *_single_precision(facts),
    ]
    return tuple(found)


def _overflow(facts: GraphFacts) -> Iterator[Finding]:
    half = [w for w in facts.weights if w.per_channel and w.scale_type == "FLOAT16"]
    if half:
        yield Finding(
            kind="overflow",
            where=_sites(facts, [w.node for w in half]),
            cause="these weights have one FP16 scale per channel: TensorRT stores their raw integer accumulators as "
            "FP16, which overflow beyond 65504",
            cure="normalize the weights: one scale for DequantizeLinear, and the channels' scales in a Mul behind the "
            "MatMul, as --target tensorrt-int8 and tensorrt-fp8 write them",
        )
    subnormal = [w for w in half if w.smallest_alpha is not None and w.smallest_alpha < _SMALLEST_NORMAL_HALF]
    if subnormal:
        least = min(w.smallest_alpha or 0.0 for w in subnormal)
        yield Finding(
            kind="subnormal scales",
            where=_sites(facts, [w.node for w in subnormal]),
            cause=f"the product of the scales of input and weight falls to {least:.0e}, in FP16 a subnormal "
            "of a few bits",
            cure="normalize the weights, as above",
        )


def _zero_points(facts: GraphFacts) -> Iterator[Finding]:
    if facts.zero_points:
        yield Finding(
            kind="zero points",
            where=_sites(facts, facts.zero_points),
            cause="TensorRT takes symmetric quantization only",
            cure="quantize with --target tensorrt-int8, which folds zero points into biases",
        )
    elif facts.unsigned:
        yield Finding(
            kind="unsigned codes",
            where=_sites(facts, facts.unsigned),
            cause="TensorRT imports uint8 codes as int8 without saying so: values beyond half the range are clipped",
            cure="write an int8 zero point of 0 at every QuantizeLinear and DequantizeLinear",
        )


def _float_gemms(facts: GraphFacts, kernels: Sequence[Kernel]) -> Iterator[Finding]:
    if not facts.quantized:
        return
    floats = [k for k in kernels if k.kind == "gemm" and k.precision in ("fp16", "fp32") and k.block is not None]
    if floats:
        yield Finding(
            kind="float GEMM",
            where=tuple(dict.fromkeys(site for kernel in floats for site in kernel.sites[:1])),
            cause="in a quantized graph these linear layers run in float: their input has no Q/DQ, or their weight is "
            "dequantized at every run (per-channel scales before a transposed layout)",
            cure="give both operands Q/DQ pairs, the weight in normalized form",
        )


def _unfused(facts: GraphFacts, kernels: Sequence[Kernel]) -> Iterator[Finding]:
    fused_nodes = {node for kernel in kernels if kernel.kind == "attention" for node in kernel.nodes}
    reasons: dict[tuple[str, str], list[str]] = {}
    for attention in facts.attentions:
        if attention.average not in fused_nodes and attention.node not in fused_nodes:
            reasons.setdefault(_why_unfused(facts, attention, kernels), []).append(attention.node)
    for (cause, cure), nodes in reasons.items():
        yield Finding(kind="unfused attention", where=_sites(facts, nodes), cause=cause, cure=cure)


def _why_unfused(facts: GraphFacts, attention: AttentionFacts, kernels: Sequence[Kernel]) -> tuple[str, str]:
    quantized = attention.quantized
    if attention.scores:
        return "the scores go through Q/DQ", "quantize q, k, v and the softmax, and nothing between them"
    if quantized and len(quantized) < 4:
        missing = [name for name in ("q", "k", "v", "softmax") if name not in quantized]
        return (
            f"only {', '.join(quantized)} {'is' if len(quantized) == 1 else 'are'} quantized, {', '.join(missing)} not",
            "quantize all four, or none",
        )
    if quantized and not attention.output:
        return (
            "its output is not quantized right behind it",
            "quantize the input of the projection, without a zero point",
        )
    if quantized:
        shapes = [k.shapes for k in kernels if k.is_unfused_attention and k.shapes]
        width = shapes[0][0][-1] if shapes else "?"
        return (
            f"8-bit attention of this size is no one kernel (head width {width}); INT8 fuses 32 and 64 "
            f"and at most {INT8_ATTENTION_TOKENS} tokens",
            "keep these attentions in FP16, merge tokens before them, or use FP8",
        )
    if "FLOAT" in facts.float_types:
        return "attention in FP32 is not fused", "export with --target tensorrt-fp16"
    return "unknown", "compare with a graph of --target tensorrt-fp16"


def _copies(kernels: Sequence[Kernel]) -> Iterator[Finding]:
    copies = [kernel for kernel in kernels if kernel.kind == "copy"]
    if copies:
        yield Finding(
            kind="copies",
            where=tuple(dict.fromkeys(site for kernel in copies for site in kernel.sites[:1])),
            cause=f"{len(copies)} kernels only move or pad data: unfused attention pads odd numbers of tokens, some "
            "layouts of heads are turned by hand, and the rows that pooling reads are cut out in the last block",
            cure="cure unfused attention first; split q, k, v on one axis behind one transpose; the small cut stays",
        )


def _single_precision(facts: GraphFacts) -> Iterator[Finding]:
    if "FLOAT" in facts.float_types and not facts.float_types & {"FLOAT16", "BFLOAT16"}:
        yield Finding(
            kind="single precision",
            where=(),
            cause="the graph is typed FP32: everything that is not quantized moves four bytes a number",
            cure="export with --target tensorrt-fp16, tensorrt-int8 or tensorrt-fp8",
        )


def _sites(facts: GraphFacts, nodes: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(facts.site_of.get(node, node) for node in nodes))
