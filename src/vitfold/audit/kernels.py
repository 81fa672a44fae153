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
class Product:
    """What a kernel multiplies: `matrices` times rows x depth by depth x columns.

    Where it `attends`, rows are queries, columns keys and depth the width of a head, and both products of attention
    are meant.
    """

    matrices: int
    rows: int
    columns: int
    depth: int
    attends: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return (2 if self.attends else 1) * self.matrices * self.rows * self.columns * self.depth


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A kernel of the plan. `kind` "product" is a matrix product of two activations.

    "edge" converts the graph's input, or picks the rows that the classifier reads. `product` is None where nothing is
    multiplied, or where shapes do not tell what.

    `block` is the first transformer block that it belongs to, None before and behind them.
    """

    name: str
    kind: Kind
    precision: Precision | None
    product: Product | None
    bytes_moved: int
    weight_bytes: int
    nodes: tuple[str, ...]
    sites: tuple[str, ...]
    block: int | None
    shapes: tuple[tuple[int, ...], ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return 0 if self.product is None else self.product.macs

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
        product=_product(layer, kind),
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


def _product(layer: Layer, kind: Kind) -> Product | None:
    if kind == "attention" and len(layer.inputs) >= 2:
        return _attention(layer.inputs[0].shape, layer.inputs[1].shape)
    if kind == "convolution" and layer.outputs and layer.constants:
        weight = max(layer.constants, key=lambda tensor: tensor.elements).shape
        return _known(1, layer.outputs[0].elements // weight[0], weight[0], math.prod(weight[1:]))
    if kind == "gemm" and (matrix := _weight(layer)) is not None:
        depth, columns = matrix.shape[-2:]
        return _known(1, layer.outputs[0].elements // columns, columns, depth)
    if kind == "product" and layer.outputs and len(layer.outputs[0].shape) >= 2:
        out = layer.outputs[0].shape
        operands = [t.shape for t in layer.inputs if len(t.shape) >= 2]
        depths = [
            a[-1]
            for a in operands
            for b in operands
            if a is not b and a[-1] == b[-2] and a[-2] == out[-2] and b[-1] == out[-1]
        ]
        return _known(math.prod(out[:-2]), out[-2], out[-1], max(depths, default=0))
    return None


def _attention(q: tuple[int, ...], k: tuple[int, ...]) -> Product | None:
    if len(q) < 3 or len(k) < 3:
        return None
    keys = k[-1] if k[-2] == q[-1] else k[-2]
    return _known(math.prod(q[:-2]), q[-2], keys, q[-1], attends=True)


def _known(matrices: int, rows: int, columns: int, depth: int, *, attends: bool = False) -> Product | None:
    """A product, None where its shape was not found or is dynamic (-1)."""
    if min(matrices, rows, columns, depth) < 1:
        return None
    return Product(matrices=matrices, rows=rows, columns=columns, depth=depth, attends=attends)
