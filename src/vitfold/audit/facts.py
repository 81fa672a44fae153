"""What an ONNX file says before it is compiled: sites, attentions, quantized weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from vitfold.errors import EngineError

SITE_KEY = "vitfold.site"
_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_SCALES = ("Mul", "Div", "Add", "Where", "Cast", "Sub")
_MOVES = ("Transpose", "Reshape", "Split", "Slice", "Cast", "Identity", "Squeeze", "Unsqueeze")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionFacts:
    """A softmax between two products, and which values around it go through Q/DQ."""

    node: str
    average: str
    q: bool
    k: bool
    v: bool
    softmax: bool
    scores: bool
    output: bool

    @property
    def quantized(self) -> tuple[str, ...]:
        """The operands that are quantized."""
        return tuple(name for name in ("q", "k", "v", "softmax") if getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFacts:
    """A quantized weight: how its scale stands in the graph. `smallest_alpha` is min(s_x s_w), None if x is float."""

    node: str
    per_channel: bool
    scale_type: str
    smallest_alpha: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFacts:
    """Everything that findings need from the file."""

    site_of: dict[str, str]
    inputs: frozenset[str]
    attentions: tuple[AttentionFacts, ...]
    weights: tuple[WeightFacts, ...]
    unsigned: tuple[str, ...]
    zero_points: tuple[str, ...]
    quantized: bool
    float_types: frozenset[str]


def read_facts(path: Path) -> GraphFacts:
    """Read an ONNX file.

    Raises:
        EngineError: if it is not one.
    """
    try:
        graph = ir.load(path).graph
    except FileNotFoundError:
        raise EngineError(f"no such file: {path}; give a bundle or an ONNX file") from None
    except Exception as error:  # protobuf raises types of its own
        raise EngineError(f"{path} is no ONNX file ({type(error).__name__}); give a bundle or an ONNX file") from None
    nodes = list(graph)
    quantizers = [node for node in nodes if node.op_type in (_QUANTIZE, _DEQUANTIZE)]
    names = {(node.name or ""): node.metadata_props.get(SITE_KEY, node.name or "") for node in nodes}
    return GraphFacts(
        site_of=names,
        inputs=frozenset(value.name or "" for value in graph.inputs),
        attentions=tuple(_attentions(nodes)),
        weights=tuple(_weights(nodes)),
        unsigned=tuple(node.name or "" for node in quantizers if _is_unsigned(node)),
        zero_points=tuple(node.name or "" for node in quantizers if _has_zero_point(node)),
        quantized=bool(quantizers),
        float_types=frozenset(
            value.const_value.dtype.name
            for value in graph.initializers.values()
            if value.const_value is not None and value.const_value.dtype.name in ("FLOAT", "FLOAT16", "BFLOAT16")
        ),
    )


def _is_unsigned(node: ir.Node) -> bool:
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        zero = node.inputs[2].const_value
        return bool(zero is not None and zero.dtype.name == "UINT8")
    return bool(node.op_type == _QUANTIZE)


def _has_zero_point(node: ir.Node) -> bool:
    if len(node.inputs) < 3 or node.inputs[2] is None or node.inputs[2].const_value is None:
        return False
    values = node.inputs[2].const_value.numpy()
    return values.dtype.kind in "iu" and bool(np.any(values))


def _weights(nodes: list[ir.Node]) -> Iterator[WeightFacts]:
    for node in nodes:
        if node.op_type not in ("MatMul", "Gemm") or len(node.inputs) < 2 or node.inputs[1] is None:
            continue
        source = _origin(node.inputs[1], ("Transpose", "Cast"))
        if source is None or source.op_type != _DEQUANTIZE or source.inputs[0] is None or source.inputs[1] is None:
            continue
        codes, scale = source.inputs[0], source.inputs[1].const_value
        maker = codes.producer()
        is_constant = codes.const_value is not None or (
            maker is not None and maker.op_type == _QUANTIZE and _constant(maker)
        )
        if scale is None or not is_constant:
            continue
        values = scale.numpy().astype(np.float64)
        left = _origin(node.inputs[0], _MOVES) if node.inputs[0] is not None else None
        alpha = None
        if left is not None and left.op_type == _DEQUANTIZE and left.inputs[1] is not None:
            given = left.inputs[1].const_value
            alpha = None if given is None else float(np.min(values) * np.min(given.numpy().astype(np.float64)))
        yield WeightFacts(
            node=node.name or "", per_channel=values.size > 1, scale_type=scale.dtype.name, smallest_alpha=alpha
        )


def _constant(node: ir.Node) -> bool:
    return node.inputs[0] is not None and node.inputs[0].const_value is not None


def _attentions(nodes: list[ir.Node]) -> Iterator[AttentionFacts]:
    for node in nodes:
        if node.op_type != "Softmax" or node.inputs[0] is None:
            continue
        scores = _origin(node.inputs[0], (*_SCALES, *_MOVES))
        quantized_scores = scores is not None and scores.op_type == _DEQUANTIZE
        if quantized_scores and scores is not None:
            scores = _behind_pair(scores, (*_SCALES, *_MOVES))
        if scores is None or scores.op_type != "MatMul":
            continue
        is_quantized = functools.partial(_is_quantized, moves=(*_MOVES, "Mul", "Div"))
        average, through = _consumer(node.outputs[0])
        if average is None:
            continue
        operand = average.inputs[1]
        output, _ = _consumer(average.outputs[0], until=(_QUANTIZE,))
        yield AttentionFacts(
            node=node.name or "",
            average=average.name or "",
            q=is_quantized(scores.inputs[0]),
            k=is_quantized(scores.inputs[1]),
            v=is_quantized(operand),
            softmax=through,
            scores=quantized_scores,
            output=output is not None,
        )


def _is_quantized(value: ir.Value | None, moves: tuple[str, ...]) -> bool:
    source = None if value is None else _origin(value, moves)
    return source is not None and source.op_type == _DEQUANTIZE


def _origin(value: ir.Value, skipped: tuple[str, ...]) -> ir.Node | None:
    """The node that made a value, before those that are skipped along their first computed input."""
    node = value.producer()
    while node is not None and node.op_type in skipped:
        following = next((one for one in node.inputs if one is not None and one.producer() is not None), None)
        if following is None:
            return None
        node = following.producer()
    return node


def _behind_pair(dequantize: ir.Node, skipped: tuple[str, ...]) -> ir.Node | None:
    quantize = dequantize.inputs[0].producer() if dequantize.inputs[0] is not None else None
    if quantize is None or quantize.inputs[0] is None:
        return None
    return _origin(quantize.inputs[0], skipped)


def _consumer(value: ir.Value, until: tuple[str, ...] = ("MatMul",)) -> tuple[ir.Node | None, bool]:
    """The first consumer of a kind, behind moves and Q/DQ pairs; and whether such a pair stood between."""
    through = False
    for _ in range(8):
        users = [use.node for use in value.uses()]
        if not users:
            return None, through
        node = users[0]
        if node.op_type in until:
            return node, through
        through = through or node.op_type == _QUANTIZE
        if node.op_type not in (*_MOVES, "Where", "Less", "Mul", _QUANTIZE, _DEQUANTIZE):
            return None, through
        value = node.outputs[0]
    return None, through
