"""What a kernel is: its kind, the type it computes in, its work, and the sites that it came from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vitfold.audit.layers import Layer, TensorUse

Kind = Literal["gemm", "product", "attention", "convolution", "fused", "sort", "copy", "edge", "other"]
KINDS: tuple[Kind, ...] = ("gemm", "product", "attention", "convolution", "fused", "sort", "copy", "edge", "other")
Precision = Literal["fp32", "fp16", "fp8", "int8"]
PRECISIONS: tuple[Precision, ...] = ("int8", "fp8", "fp16", "fp32")
_PRECISION: Mapping[str, Precision] = {
    "Float": "fp32", "Half": "fp16", "BFloat16": "fp16", "BF16": "fp16", "FP8": "fp8", "Int8": "int8",
}  # fmt: skip
_WORDS = re.compile(r"[A-Z][a-z]*")
_BODY = re.compile(r"__myl_([A-Za-z]+)_")
_MOVES = frozenset(("Move", "Conc", "Slic", "Tran", "Resh", "Cast", "Repl", "Copy", "Pad", "Etc"))
_SORTS = frozenset(("Topk", "Bott", "Sort"))
_EDGES = ("embed", "pool", "head")
_BLOCK = re.compile(r"(?:blocks?|layers?|resblocks|encoder_layer|h)[._/]+(?:layer\.|encoder_layer_)?(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel of the plan. `kind` "product" is a matrix product of two activations.

    "edge" converts the graph's input, or picks the rows that the classifier reads.

    `block` is the first transformer block that it belongs to, None before and behind them.
    """

    name: str
    kind: Kind
    precision: Precision | None
    macs: int
    bytes_moved: int
    weight_bytes: int
    nodes: tuple[str, ...]
    sites: tuple[str, ...]
    block: int | None
    shapes: tuple[tuple[int, ...], ...]

    @property
    def is_unfused_attention(self) -> bool:
        """True for a product of two activations: in a transformer those are attention's, unless merging's."""
        return self.kind == "product" and not any(".merge" in site for site in self.sites)


def read_kernel(layer: Layer, site_of: Mapping[str, str], inputs: frozenset[str]) -> Kernel:
    """Understand one layer; `site_of` maps ONNX nodes to sites, `inputs` are the graph's."""
    sites = tuple(dict.fromkeys(site_of.get(node, node) for node in layer.nodes))
    kind = _kind(layer, inputs)
    if kind == "copy" and any(site.startswith(_EDGES) for site in sites):
        kind = "edge"
    blocks = [int(found[1]) for site in sites if (found := _BLOCK.search(site))]
    activations = sum(tensor.bytes for tensor in (*layer.inputs, *layer.outputs))
    weights = sum(tensor.bytes for tensor in layer.constants)
    return Kernel(
        name=layer.name,
        kind=kind,
        precision=_precision(layer) if kind in ("gemm", "product", "attention", "convolution") else None,
        macs=_macs(layer, kind),
        bytes_moved=activations,
        weight_bytes=weights,
        nodes=layer.nodes,
        sites=sites,
        block=min(blocks) if blocks else None,
        shapes=tuple(tensor.shape for tensor in layer.inputs),
    )


def _kind(layer: Layer, inputs: frozenset[str]) -> Kind:
    if "mha" in layer.name:
        return "attention"
    body = _BODY.match(layer.name)
    words = frozenset(_WORDS.findall(body[1])) if body else frozenset()
    if layer.type == "gemm" or (layer.type == "runtime_fusion" and words & {"Fc", "Gemm"}):
        return "gemm" if _weight(layer) is not None else "product"
    if layer.type in ("correlation", "conv"):
        return "convolution"
    if words & _SORTS:
        return "sort"
    if words and words <= _MOVES:
        return "edge" if any(tensor.name in inputs for tensor in layer.inputs) else "copy"
    return "fused" if layer.type in ("kgen", "runtime_fusion") else "other"


def _weight(layer: Layer) -> TensorUse | None:
    """The constant matrix that a linear layer multiplies with: its last axis is that of the output."""
    if not layer.outputs:
        return None
    columns = layer.outputs[0].shape[-1] if layer.outputs[0].shape else 0
    for tensor in layer.constants:
        if len(tensor.shape) >= 2 and tensor.shape[-1] == columns and tensor.shape[-2] > 1:
            return tensor
    return None


def _precision(layer: Layer) -> Precision | None:
    operands = layer.inputs[:1] if "mha" in layer.name else layer.inputs
    types = [_PRECISION[tensor.type] for tensor in operands if tensor.type in _PRECISION]
    return max(types, key=("int8", "fp8", "fp16", "fp32").index) if types else None


def _macs(layer: Layer, kind: Kind) -> int:
    if kind == "attention" and len(layer.inputs) >= 2:
        q, k = layer.inputs[0].shape, layer.inputs[1].shape
        if len(q) >= 3 and len(k) >= 3:
            keys = k[-1] if k[-2] == q[-1] else k[-2]
            return 2 * math.prod(q) * keys
    if kind == "convolution" and layer.outputs and layer.constants:
        weight = max(layer.constants, key=lambda tensor: tensor.elements)
        return layer.outputs[0].elements * math.prod(weight.shape[1:])
    if kind == "gemm":
        weight_matrix = _weight(layer)
        return layer.outputs[0].elements * weight_matrix.shape[-2] if weight_matrix is not None else 0
    if kind == "product" and layer.outputs:
        out = layer.outputs[0].shape
        operands = [t.shape for t in layer.inputs if len(t.shape) >= 2]
        depths = [
            a[-1]
            for a in operands
            for b in operands
            if a is not b and a[-1] == b[-2] and a[-2] == out[-2] and b[-1] == out[-1]
        ]
        return math.prod(out) * max(depths, default=0)
    return 0
