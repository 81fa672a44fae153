"""Writing pieces of somebody's ONNX graph into ours, node by node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from vitfold.model import Array
from vitfold.ops.emit.writer import Writer


def opset_of(graph: Array) -> int:
    """Return the opset of ONNX's own operators that a piece speaks."""
    imports = onnx.load_model_from_string(graph.tobytes()).opset_import
    return max((one.version for one in imports if one.domain in ("", "ai.onnx")), default=1)


def copy_foreign(writer: Writer, site: str, graph: Array, inputs: Sequence[ir.Value]) -> list[ir.Value]:
    """Write the nodes of a piece; `inputs` are the values that stand for its inputs. Return those of its outputs."""
    piece = ir.from_proto(onnx.load_model_from_string(graph.tobytes())).graph
    values: dict[str, ir.Value] = {str(one.name): given for one, given in zip(piece.inputs, inputs, strict=True)}
    always = {str(one.name) for node in piece if node.op_type in _SINGLE for one in node.inputs[1:] if one is not None}
    for name, value in piece.initializers.items():
        if value.const_value is not None:
            values[name] = _constant(writer, f"{site}.{name}", value.const_value.numpy(), single=name in always)
    for node in piece:
        given = [None if one is None else values[str(one.name)] for one in node.inputs]
        attributes = {name: _in_type(writer, node.op_type, name, one) for name, one in node.attributes.items()}
        made = writer.nodes(
            node.op_type, *given, outputs=len(node.outputs), site=site, domain=node.domain, **attributes
        )
        values.update({str(old.name): new for old, new in zip(node.outputs, made, strict=True)})
    return [values[str(one.name)] for one in piece.outputs]


_SINGLE = ("Resize", "Upsample")
"""Operators whose numbers beside the input are in single precision, whatever the input is."""


def _constant(writer: Writer, name: str, array: Array, *, single: bool) -> ir.Value:
    if single and array.dtype == np.float32:
        return writer.lazy(name, array.shape, ir.DataType.FLOAT, lambda: array)
    return writer.constant(array)


def _in_type(writer: Writer, op_type: str, name: str, attribute: Any) -> Any:
    """An attribute as the writer takes it; a cast to single precision is one to the graph's float type."""
    if op_type == "Cast" and name == "to" and attribute.value == int(ir.DataType.FLOAT):
        return int(writer.real)
    return attribute.value
